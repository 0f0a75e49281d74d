"""Separate random number generators for a capture.

The generators of torch, Python and numpy belong to the process. If a capture drew from them and
then restored their states, numbers that another thread drew meanwhile would be drawn again.
Therefore they are not touched: within `own_generators`, this thread seeds and draws from separate
generators that start from the same states.

One case is not exact: an op without a `generator` argument can only draw from torch's global
generator. When this op runs on real values (in a capture by regions, never in an export), the
global generator holds our state while the op runs, and another thread that draws from it at that
moment draws from our state.
"""

from __future__ import annotations

import inspect
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
    """The random generators of one thread: torch's (one per device), Python's and numpy's."""

    def __init__(self) -> None:
        self._of_device: dict[torch.device, torch.Generator] = {}
        self.python = random.Random()
        self.python.setstate(random.getstate())
        numpy: Any = sys.modules.get("numpy")
        self.numpy: Any = numpy and numpy.random.RandomState()
        if numpy:
            self.numpy.set_state(numpy.random.get_state())
        self.may_seed = True  # False during tracing: a graph cannot seed
        self.elsewhere: list[Callable[[], int]] = []

    def of(self, device: Any) -> torch.Generator:
        """Return the generator of a device, which is created with the state of torch's."""
        device = _numbered(device)
        if device not in self._of_device:
            own = self._of_device[device] = torch.Generator(device)
            own.set_state(_torchs(device).get_state())
        return self._of_device[device]

    def set_state(self, state: torch.Tensor, device: Any = "cpu") -> None:
        """Set a state, as torch.set_rng_state does; setting the present state is not seeding."""
        own = self.of(device)
        with _disable_current_modes():
            same = torch.equal(own.get_state(), state)
        if not same:
            self._check_may_seed()
            own.set_state(state)

    def seed(self, seed: int, device: Any = None) -> torch.Generator:
        """Seed the generators of all devices, or of a given one, as torch.manual_seed does."""
        self._check_may_seed()
        devices = _devices() if device is None else [device]
        seeded = [self.of(each).manual_seed(int(seed)) for each in devices]
        return seeded[0]

    def seed_all(self, seed: int) -> None:
        """Seed every generator, so that two runs can be compared."""
        self.seed(seed)
        self.python.seed(seed)
        if self.numpy:
            self.numpy.seed(seed)

    def outside(self) -> tuple[Any, Any]:
        """Return the states of Python's and numpy's generators: draws from these are constants."""
        return self.python.getstate(), self.numpy and _comparable(self.numpy.get_state())

    def drawn_elsewhere(self) -> int:
        """Return the number of calls by other threads to Python's and numpy's generators."""
        return sum(count() for count in self.elsewhere)

    def _check_may_seed(self) -> None:
        if not self.may_seed:
            raise CaptureError(
                f"the forward seeds torch's generator at {called_at()}, which a graph cannot "
                "do: it draws from the generator in the state that it has at the call. Seed before "
                "the call."
            )


_active = threading.local()


def current() -> OwnGenerators:
    """Return the generators of the innermost `own_generators` in this thread."""
    return _active.stack[-1]


@contextmanager
def own_generators() -> Generator[OwnGenerators]:
    """Within the context, this thread seeds, and draws from, separate generators.

    Draws of Python and numpy are redirected here, those of torch ops by `Draws`.
    """
    own = OwnGenerators()
    stack: list[OwnGenerators] = _active.__dict__.setdefault("stack", [])
    with ExitStack() as patches:
        seeding = _seeding(own)
        patches.enter_context(patched(torch.random, **seeding))
        patches.enter_context(patched(torch, **seeding))
        if torch.cuda.is_available():
            patches.enter_context(patched(torch.cuda.random, **_cuda_seeding(own)))
            patches.enter_context(patched(torch.cuda, **_cuda_seeding(own)))
        # functions imported from `random` by name (randint, choice) are methods of its one
        # instance, and draw through these two
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
            if own.drawn_elsewhere() == 0:  # else the draws of other threads would be repeated
                _put_back(before)


def _seeding(own: OwnGenerators) -> dict[str, Callable[..., Any]]:
    """Return replacements for the seeding functions of `torch` and `torch.random`."""
    return {
        "manual_seed": own.seed,
        "seed": lambda: own.seed(own.of("cpu").seed()).initial_seed(),
        "initial_seed": lambda: own.of("cpu").initial_seed(),
        "get_rng_state": lambda: own.of("cpu").get_state(),
        "set_rng_state": own.set_state,
    }


def _cuda_seeding(own: OwnGenerators) -> dict[str, Callable[..., Any]]:
    """Return replacements for the seeding functions of `torch.cuda`."""

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
    """Return replacements, bound to `own`, for a module's functions that use its one generator.

    Functions that are patched already count: captures may nest.
    """
    return {
        name: getattr(own, name)
        for name, function in vars(module).items()
        if _uses(inspect.unwrap(function) if callable(function) else function, type(own))
        and hasattr(own, name)
    }


def _uses(function: Any, kind: type) -> bool:
    return type(getattr(function, "__self__", None)) is kind


class Draws(TorchDispatchMode):
    """Make ops on real values draw from this thread's own generators."""

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
    """Return the overload of an op with the same arguments and a generator, or None."""
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
    """Draw while torch's global generator has the state of `own`; `own` gets the new state."""
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
    """Return a device with its index: that of the current device if it is plain "cuda"."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _torchs(device: torch.device) -> torch.Generator:
    """Return torch's global generator of a device."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def _comparable(state: Any) -> Any:
    """Return numpy's state with lists for its arrays, which `==` would compare entry by entry."""
    return tuple(part.tolist() if hasattr(part, "tolist") else part for part in state)


@contextmanager
def refuse_constant_draws(name: str) -> Generator[None]:
    """Raise if a forward draws from Python's or numpy's generator, or seeds torch's.

    A draw from Python or numpy would be a constant in the graph; torch's own draws are nodes.
    `from random import random` binds a method that no patch reaches and that draws from the
    process's generator. A change of that generator counts only if no other thread has drawn
    meanwhile.

    Args:
        name: name of the model, for the message.

    Raises:
        CaptureError: the forward draws from these generators, which the message names, or seeds
            torch's.
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
            "which a graph would repeat at every call. Draw them with torch (torch.rand), or turn "
            "off the code that needs them."
        )


def _processes() -> tuple[Any, Any]:
    """Return the states of the process's generators of Python and numpy."""
    numpy: Any = sys.modules.get("numpy")
    return random.Random.getstate(vars(random)["_inst"]), numpy and _comparable(
        numpy.random.mtrand._rand.get_state()
    )


def _put_back(states: tuple[Any, Any]) -> None:
    """Restore the states of the process's generators of Python and numpy where they differ."""
    python, arrays = _processes()
    if python != states[0]:
        random.Random.setstate(vars(random)["_inst"], states[0])
    if arrays != states[1]:
        sys.modules["numpy"].random.mtrand._rand.set_state(states[1])
