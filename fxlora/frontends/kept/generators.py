"""Random numbers during a capture: from generators of its own.

The generators of torch, Python and numpy belong to the process. Were they put back after a
capture, what another thread draws meanwhile would be drawn again. So they are not touched: within
`own_generators`, this thread seeds and draws from others that start where those are.

Not exact: an op without a `generator` argument can only draw from torch's. When such an op runs on
real values (by regions, never in an export) torch's generator has our state for as long as the op
takes; what another thread draws in that very moment comes from ours.
"""

from __future__ import annotations

import itertools
import operator
import random
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ...errors import CaptureError
from ..places import called_at
from .patches import patched


class OwnGenerators:
    """The generators of one thread: torch's by device, Python's and numpy's."""

    def __init__(self) -> None:
        self._of_device: dict[torch.device, torch.Generator] = {}
        self.python = random.Random()
        self.python.setstate(random.getstate())
        numpy: Any = sys.modules.get("numpy")
        self.numpy: Any = numpy and numpy.random.RandomState()
        if numpy:
            self.numpy.set_state(numpy.random.get_state())
        self.may_seed = True  # in a run; a graph would not follow
        self.elsewhere: list[Callable[[], int]] = []

    def of(self, device: Any) -> torch.Generator:
        """The generator of a device, which starts where torch's is."""
        device = _numbered(device)
        if device not in self._of_device:
            own = self._of_device[device] = torch.Generator(device)
            own.set_state(_torchs(device).get_state())
        return self._of_device[device]

    def set_state(self, state: torch.Tensor, device: Any = "cpu") -> None:
        own = self.of(device)
        with _disable_current_modes():
            same = torch.equal(own.get_state(), state)
        if not same:
            self._check_may_seed()
            own.set_state(state)

    def seed(self, seed: int, device: Any = None) -> torch.Generator:
        """As torch.manual_seed, or for the generator of one device."""
        self._check_may_seed()
        devices = _devices() if device is None else [device]
        seeded = [self.of(each).manual_seed(int(seed)) for each in devices]
        return seeded[0]

    def seed_all(self, seed: int) -> None:
        """Every generator at the same place, for two runs to be compared."""
        self.seed(seed)
        self.python.seed(seed)
        if self.numpy:
            self.numpy.seed(seed)

    def outside(self) -> tuple[Any, Any]:
        """States of Python's generator and numpy's: a draw from them is a constant of a graph."""
        return self.python.getstate(), self.numpy and _comparable(self.numpy.get_state())

    def drawn_elsewhere(self) -> int:
        """How often other threads have drawn from Python's generator or numpy's."""
        return sum(count() for count in self.elsewhere)

    def _check_may_seed(self) -> None:
        if not self.may_seed:
            raise CaptureError(
                f"the forward seeds torch's generator at {called_at()}, which a graph cannot: it "
                "draws from the generator as it is when it is called. Seed before the call."
            )


_active = threading.local()


def current() -> OwnGenerators:
    """The generators of the innermost `own_generators` in this thread."""
    return _active.stack[-1]


@contextmanager
def own_generators() -> Generator[OwnGenerators]:
    """Within, this thread seeds generators of its own, and Python and numpy draw from them."""
    own = OwnGenerators()
    stack: list[OwnGenerators] = _active.__dict__.setdefault("stack", [])
    with ExitStack() as patches:
        seeding = _seeding(own)
        patches.enter_context(patched(torch.random, **seeding))
        patches.enter_context(patched(torch, **seeding))
        if torch.cuda.is_available():
            patches.enter_context(patched(torch.cuda.random, **_cuda_seeding(own)))
            patches.enter_context(patched(torch.cuda, **_cuda_seeding(own)))
        # what was imported from `random` by name (randint, choice) comes to these two of its one
        process: Any = vars(random)["_inst"]
        core = {"random": own.python.random, "getrandbits": own.python.getrandbits}
        outside = [
            patched(random, **_methods(random, own.python)),
            patched(process, **core),
        ]
        if own.numpy:
            numpy: Any = sys.modules["numpy"]
            outside.append(patched(numpy.random, **_methods(numpy.random, own.numpy)))
        own.elsewhere = [patches.enter_context(patch) for patch in outside]
        before = _processes()
        stack.append(own)
        try:
            yield own
        finally:
            stack.pop()
            if own.drawn_elsewhere() == 0:
                _put_back(before)


def _seeding(own: OwnGenerators) -> dict[str, Callable[..., Any]]:
    return {
        "manual_seed": own.seed,
        "seed": lambda: own.seed(own.of("cpu").seed()).initial_seed(),
        "initial_seed": lambda: own.of("cpu").initial_seed(),
        "get_rng_state": lambda: own.of("cpu").get_state(),
        "set_rng_state": own.set_state,
    }


def _cuda_seeding(own: OwnGenerators) -> dict[str, Callable[..., Any]]:
    def seed(seed: int) -> None:
        own.seed(seed, "cuda")

    def seed_all(seed: int) -> None:
        for device in _devices()[1:]:
            own.seed(seed, device)

    def get_state(device: Any = "cuda") -> torch.Tensor:
        return own.of(_cuda(device)).get_state()

    def set_state(state: torch.Tensor, device: Any = "cuda") -> None:
        own.set_state(state, _cuda(device))

    return {
        "manual_seed": seed,
        "manual_seed_all": seed_all,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
    }


def _methods(module: ModuleType, own: Any) -> dict[str, Callable[..., Any]]:
    """The functions of a module that are methods of its one generator, as methods of another."""
    return {
        name: getattr(own, name)
        for name, function in vars(module).items()
        if type(getattr(function, "__self__", None)) is type(own) and hasattr(own, name)
    }


class Draws(TorchDispatchMode):
    """Has ops on real values draw from this thread's own generators."""

    def __init__(self) -> None:
        super().__init__()
        self.own = current()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator"):
            return func(*args, **kwargs)
        device = _device_of(args, kwargs)
        if device.type == "meta":
            return func(*args, **kwargs)
        own = self.own.of(device)
        if overload := _with_generator(func):
            return overload(*args, **{**kwargs, "generator": own})
        return _with_state(own, lambda: func(*args, **kwargs))


def _with_generator(func: Any) -> Any:
    """The overload of an op that takes a generator and is the same otherwise, or None."""
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        taken = [argument.name for argument in overload._schema.arguments]
        if "generator" in taken and [name for name in taken if name != "generator"] == names:
            return overload
    return None


def _with_state(own: torch.Generator, draw: Callable[[], Any]) -> Any:
    """A draw from torch's generator, which has the state of another one meanwhile."""
    torchs = _torchs(own.device)
    before = torchs.get_state()
    torchs.set_state(own.get_state())
    try:
        return draw()
    finally:
        own.set_state(torchs.get_state())
        torchs.set_state(before)


def _device_of(args: Any, kwargs: dict[str, Any]) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _devices() -> list[torch.device]:
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(cuda))]


def _cuda(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _numbered(device: Any) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _torchs(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def _comparable(state: Any) -> Any:
    """numpy's state, whose arrays do not compare."""
    return tuple(part.tolist() if hasattr(part, "tolist") else part for part in state)


@contextmanager
def refuse_constant_draws(name: str) -> Generator[None]:
    """Raise where numbers that Python or numpy draws would be constants of a graph.

    (torch's own draws are nodes.) `from random import random` takes a method that no patch reaches:
    it draws from the process's generator, and so may another thread.

    Raises:
        CaptureError: names the generators.
    """
    own = current()
    own.may_seed, seeds = False, own.may_seed
    before, process, others = own.outside(), _processes(), own.drawn_elsewhere()
    try:
        yield
    finally:
        own.may_seed = seeds
    changed = [*map(operator.ne, own.outside(), before)]
    if own.drawn_elsewhere() == others:
        imported = map(operator.ne, _processes(), process)
        changed = [*map(operator.or_, changed, imported)]
    if drawn := [*itertools.compress(("random", "numpy.random"), changed)]:
        raise CaptureError(
            f"{name} draws numbers from {' and '.join(drawn)} in its forward, "
            "which a graph would repeat for ever. Draw them with torch (torch.rand), or turn "
            "what needs them off."
        )


def _processes() -> tuple[Any, Any]:
    """States of the process's own generators, of Python and numpy."""
    numpy: Any = sys.modules.get("numpy")
    return random.Random.getstate(vars(random)["_inst"]), numpy and _comparable(
        numpy.random.mtrand._rand.get_state()
    )


def _put_back(states: tuple[Any, Any]) -> None:
    """Set the process's own generators of Python and numpy, if they differ."""
    python, arrays = _processes()
    if python != states[0]:
        random.Random.setstate(vars(random)["_inst"], states[0])
    if arrays != states[1]:
        sys.modules["numpy"].random.mtrand._rand.set_state(states[1])
