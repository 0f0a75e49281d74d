"""hosted: a captured graph inside the class that its source has, for what calls the class.

`generate`, pipelines and training loops of a library call methods and read attributes that a
graph does not have. A host is a copy of the source model (configuration, methods, hooks, but no
weight) whose forward runs the captured module.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import InjectError, InputError
from .captured import CapturedModule
from .contract import ConstantInput, InputSpec

Call = tuple[tuple[Any, ...], dict[str, Any]]


def hosted(model: nn.Module, module: CapturedModule) -> Any:
    """A copy of a model that runs a graph captured from it (adapted, folded or neither).

    The host is an instance of the model's class, so that `model.generate`, `config`, `device`
    and the like are there. Its parameters and buffers are the captured module's, its `train()`,
    `eval()` and `to()` act on the captured module too; the model itself is left as it is.

    An argument that the graph was not captured with is refused, unless it says no more than
    leaving it out. Submodules of a host with adapters cannot be called (their own code would not
    apply them); without, they run the source's code on the captured module's weights.

    Raises:
        InjectError: the module was not captured from such a model.
    """
    if not isinstance(module, CapturedModule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InjectError(f"hosted takes a captured module, not {type(module).__name__}.")
    if isinstance(model, Host | CapturedModule):
        raise InjectError("hosted takes the source model, which is not captured nor hosted itself.")
    _check_fits(model, module)
    host = copy.deepcopy(model, _tensors_of(model, module))
    host.__dict__.pop("forward", None)  # of the instance: what was captured went through it
    host.__class__ = _host_class(type(model))
    host.__dict__["_captured"] = module
    if module.plan is not None:
        for path, part in host.named_modules():
            if path:
                part.__dict__["forward"] = functools.partial(_refuse, path)
    host.__dict__["_held"] = list(_graft(host, module))
    return host.train(module.training)


@contextmanager
def recorded_calls(model: nn.Module) -> Generator[list[Call]]:
    """The arguments of every call of a model in a `with` block: examples to capture it with.

    Yields:
        a list that fills with `(args, kwargs)`, copied before each call.
    """
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(copy.deepcopy((args, kwargs)))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class Host(nn.Module):
    """What `hosted` adds to the model's own class."""

    _captured: CapturedModule
    _held: list[tuple[nn.Module, str, nn.Module]]

    def train(self, mode: bool = True) -> Any:
        """As nn.Module's, and choose the captured module's graph."""
        super().train(mode)
        self._captured.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._captured._apply(fn, recurse)  # the containers of the weights are shared
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the captured module's, which leaves the source model's storage alone."""
        return self._captured.load_state_dict(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, for weights that are whole."""
        if self._captured.plan is not None:
            raise InjectError(
                "the adapters are beside the weights, and a checkpoint would be the base's: fold "
                "first (hosted(model, fold(lora))), or keep them with save_adapter."
            )
        parent: Any = super()
        return parent.save_pretrained(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        plain = nn.Module.__new__(type(self).__mro__[2])  # the model's own class
        plain.__dict__.update(self.__dict__)
        for name in ("_captured", "_held"):
            del plain.__dict__[name]
        return hosted(plain, copy.deepcopy(self._captured, memo))


@functools.cache
def _host_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass under the same name: libraries look models up by it."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_held(self)
        args, kwargs = _align(self._captured, inspect.signature(kind.forward), args, kwargs)
        return self._captured(*args, **kwargs)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (Host, kind), {**names, "__doc__": kind.__doc__, "forward": forward})


# ---- weights ------------------------------------------------------------------------------------


def _check_fits(model: nn.Module, module: CapturedModule) -> None:
    held = dict(module.named_parameters(remove_duplicate=False))
    held |= dict(module.named_buffers(remove_duplicate=False))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in held or held[name].shape != tensor.shape:
            raise InjectError(
                f"the captured module has no '{name}' of shape {tuple(tensor.shape)}: host it in "
                "the model that it was captured from."
            )


def _tensors_of(model: nn.Module, module: CapturedModule) -> dict[int, Any]:
    """A memo for deepcopy: the captured module's tensors in place of the model's."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        memo[id(parameter)] = module.get_parameter(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        memo[id(buffer)] = module.get_buffer(name)
    return memo


def _graft(host: nn.Module, tree: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Have the host's modules share the tree's containers, and take on what they lack.

    Yields:
        what the host's modules are: parent, name and child.
    """
    host._parameters, host._buffers = tree._parameters, tree._buffers
    host._non_persistent_buffers_set = tree._non_persistent_buffers_set
    for name, child in tree._modules.items():
        assert child is not None
        mine = host._modules.get(name)
        if mine is None:
            host._modules[name] = mine = child
        else:
            yield from _graft(mine, child)
        yield host, name, mine


def _check_held(host: Host) -> None:
    """Refuse to run where a module was replaced: the graph does not see the new one."""
    if torch.compiler.is_compiling():
        return
    for parent, name, child in host._held:
        if parent._modules.get(name) is not child:
            raise InjectError(
                f"module '{name}' of the host was replaced after it was captured (resized "
                "embeddings?). Change the source model, and capture that."
            )


def _refuse(path: str, *args: Any, **kwargs: Any) -> Any:
    raise InjectError(
        f"'{path}' of a host with adapters cannot be called on its own: only the whole graph "
        "applies them. Fold the adapters (fxlora.fold) and host that."
    )


# ---- arguments ----------------------------------------------------------------------------------


def _align(
    module: CapturedModule, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The captured arguments among those of a call; the others must say nothing.

    Raises:
        InputError: an argument that the graph was not captured with.
    """
    spec = module.inputs[module.mode]
    parameters = list(signature.parameters.values())[1:]
    if spec is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return args, kwargs
    given = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
    defaults = {p.name: p.default for p in parameters}
    for name, value in given.items():
        if name not in spec.names and not _says_nothing(value, defaults.get(name)):
            raise InputError(
                f"{name}: not among the captured arguments ({', '.join(spec.names)}), and "
                f"{_word(value)} may change the result. Capture again with it."
            )
    left_out = {n: v for n, v in _constants(spec).items() if _says_nothing(v, defaults.get(n))}
    given = left_out | given
    return (), {name: given[name] for name in spec.names if name in given}


def _constants(spec: InputSpec) -> dict[str, Any]:
    """Arguments that capture baked in."""
    found: dict[str, Any] = {}
    for name, leaves in zip(spec.names, spec.leaves, strict=True):
        if len(leaves) == 1 and isinstance(leaves[0], ConstantInput):
            found[name] = leaves[0].value
    return found


def _says_nothing(value: object, default: object) -> bool:
    """Whether an argument is as good as left out."""
    return value is default or (type(value) in (bool, int, float, str) and value == default)


def _word(value: object) -> str:
    return type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)[:40]
