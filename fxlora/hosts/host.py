"""hosted: run a captured graph inside an instance of the source model's class.

`generate`, pipelines and training loops of a library call methods and read attributes that a
graph does not have. A host is a copy of the source model (configuration, methods and hooks, but
not the weights) whose forward runs the captured module.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InjectError
from ..frontends.methods import method_of, signature_of
from ..fx.literals import same_literal
from ..module import CapturedModule, check_captured
from ..module.compiled import uncompiled
from ..module.example_calls import Call
from ..module.host_attributes import MISSING, Attributes, SetByCalls, plain_values, set_by_calls
from ..module.seal import Seal
from ..module.submodules import check_absent, host_part
from ..tables import said
from .arguments import align
from .checkpoint import save_checkpoint
from .tensors import check_fits, share_tensors, tensors_of


def hosted(model: nn.Module, module: CapturedModule) -> Any:
    """Return a copy of a model that runs a graph captured from it (adapted, folded or neither).

    The host is an instance of the model's class, so that `generate`, `config`, `device` and other
    attributes work. Its parameters and buffers are the captured module's, and its `train()`,
    `eval()` and `to()` act on the captured module too. The model itself does not change.

    A call with an argument that the graph was not captured with raises InputError, unless the
    value is the argument's default. A submodule whose calls were captured
    (`methods={"model.encoder": …}`) runs its graph. The others cannot be called on a host with
    adapters, which their own code would not apply; on one without adapters, they run the source's
    code on the captured module's weights.

    Args:
        model: the source model.
        module: the module captured from it.

    Returns:
        The host, an instance of a subclass of the model's class.

    Raises:
        NotCapturedError: `module` is not a captured module.
        InjectError: the module was not captured from a model like this one.

    Example:
        >>> import torch, fxlora
        >>> class Model(torch.nn.Sequential):
        ...     def predict(self, x):
        ...         return self(x).argmax(-1)
        >>> model, x = Model(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> lora = fxlora.adapt(model, x, rules=config)
        >>> fxlora.hosted(model, lora.eval()).predict(x).shape
        torch.Size([3])
    """
    check_captured(module, "hosted")
    model = uncompiled(model, InjectError)
    if isinstance(model, Host | CapturedModule):
        raise InjectError("hosted takes the source model itself, not a captured or hosted one.")
    check_fits(model, module)
    _check_unchanged(model, module)
    return _hosted(model, module)


def _hosted(model: nn.Module, module: CapturedModule) -> Any:
    _refuse_code_around(model)
    methods = dict.fromkeys(("forward", *module.captured_methods))
    signatures = {name: signature_of(model, name) for name in methods}
    parts = {name for name in methods if isinstance(method_of(model, name), nn.Module)}
    try:
        host = copy.deepcopy(model, tensors_of(model, module))
    except Exception as error:
        raise InjectError(
            f"{type(model).__name__} cannot be copied for a host ({said(error)}). Make it "
            "so that copy.deepcopy(model) works, or use the captured module itself."
        ) from error
    # The captured graphs contain a forward or a method that was set on the instance.
    for name in methods:
        host.__dict__.pop(name, None)
    own = {name: signature for name, signature in signatures.items() if name not in parts}
    host.__class__ = _host_class(type(model), module, own)
    host.__dict__["_captured"] = module
    host.__dict__["_held"] = list(share_tensors(host, module))
    _seal(host, module, {name: signatures[name] for name in parts})
    return _in_mode(host, module.training)


def _in_mode(host: Any, training: bool) -> Any:
    """Set a host's mode, and note which flags the source's own `train` sets apart in each mode."""
    seal: Seal = host.__dict__["_seal"]
    for mode in (not training, training):
        host.train(mode)
        seal.usual |= {(path, mode) for path in seal.apart}
    return host.train(training)


def _refuse_code_around(model: nn.Module) -> None:
    """Raise InjectError if calls of the model run code around its forward: the graph has it too."""
    if model._forward_hooks or model._forward_pre_hooks:
        raise InjectError(
            f"{type(model).__name__} has forward hooks of its own, which are in its graph: a host "
            "would run them twice. Remove them from the model before hosted(model, …)."
        )
    if type(model).__call__ is not nn.Module.__call__:
        raise InjectError(
            f"{type(model).__name__} has a __call__ of its own, which is in its graph: a host "
            "would run it twice. Use the captured module itself, or move its code to forward."
        )


def _seal(
    host: Any, module: CapturedModule, callable_parts: Mapping[str, inspect.Signature]
) -> None:
    """Have the host's own submodules refuse changes without effect on the graph.

    Args:
        callable_parts: signatures of the submodules whose calls were captured, by path.
    """
    seal = Seal(host)
    seal.adapted, seal.matters = module.adapted, module.mode_matters
    seal.reads, seal.regions = module.reads, module.parent_module is not None
    seal.called = frozenset(module.outlined_modules)
    seal.attributes = Attributes(module.reads, bool(module.changes))
    seal.calls = {
        path: functools.partial(_run, host, path, signature)
        for path, signature in callable_parts.items()
    }
    containers = {id(part) for part in module.modules()}
    for path, part in host.named_modules():
        if path and id(part) not in containers:
            host_part(part, path, seal, module.changes)
            seal.owners[path] = host
    seal.note_absent(host)
    host.__dict__["_seal"] = seal
    seal.open = False


@contextmanager
def recorded_calls(model: nn.Module) -> Generator[list[Call]]:
    """Record the arguments of every call of a model in a `with` block, as examples for capture.

    Args:
        model: the model whose calls are recorded.

    Yields:
        A list to which a copy of `(args, kwargs)` is added before each call.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Linear(6, 4)
        >>> with fxlora.recorded_calls(model) as calls:
        ...     _ = model(torch.randn(3, 6))
        >>> args, kwargs = calls[0]
        >>> gm = fxlora.capture(model, args, kwargs)
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
    """The methods that `hosted` adds to the model's own class."""

    _captured: CapturedModule
    _source_class: type[nn.Module]
    _seal: Seal
    _held: list[tuple[nn.Module, str, nn.Module]]

    def train(self, mode: bool = True) -> Any:
        """Set the mode as nn.Module does, also of the captured module."""
        super().train(mode)
        self._captured.train(mode)
        self._seal.all_set(self)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if seal := self.__dict__.get("_seal"):
            check_absent(seal, name, value)
            seal.attributes.check_host(self, name, value)
            seal.attributes.note(self, "", name, value)
        super().__setattr__(name, value)
        if name == "training" and "_seal" in self.__dict__:
            self._seal.owner_set(self)

    def __delattr__(self, name: str) -> None:
        if seal := self.__dict__.get("_seal"):
            seal.attributes.check_host(self, name, MISSING)
            seal.attributes.note(self, "", name, MISSING)
        super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        seal: Seal | None = self.__dict__.get("_seal")
        return value if seal is None else seal.outside("", name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._captured._apply(fn, recurse)  # the host shares its dicts of tensors
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load as the captured module does, without writing into the source model's storage."""
        return self._captured.load_state_dict(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the model's own method does; of a module with adapters, save those.

        So a library's training loop writes and resumes checkpoints of the trained part (see
        `save_checkpoint`). A plain checkpoint of all weights needs a fold:
        `hosted(model, fold(lora))`.
        """
        if self._captured.plan is None:
            parent: Any = super()
            parent.save_pretrained(*args, **kwargs)
        elif kwargs.pop("is_main_process", True):
            _save_adapted(self._captured, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        plain = nn.Module.__new__(self._source_class)
        plain.__dict__.update(self.__dict__)
        for name in ("_captured", "_held", "_seal"):
            del plain.__dict__[name]
        copied = _hosted(plain, copy.deepcopy(self._captured, memo))
        copied._seal.attributes.take(self._seal.attributes)
        return copied


def _save_adapted(
    module: CapturedModule,
    save_directory: str | Path,
    state_dict: Any = None,
    safe_serialization: bool = True,
    **options: Any,
) -> None:
    """Save the adapter, given the arguments of transformers' `save_pretrained`."""
    options["safe_serialization=False"] = not safe_serialization
    if given := [name for name, value in options.items() if value]:
        raise InjectError(
            f"save_pretrained of a host with adapters saves these, and knows no {given[0]}. Fold "
            "first (hosted(model, fold(lora))) for a checkpoint of the whole model."
        )
    save_checkpoint(module, save_directory)


def _host_class(
    kind: type[nn.Module], module: CapturedModule, signatures: Mapping[str, inspect.Signature]
) -> type[nn.Module]:
    """Return a subclass with the same name, because libraries look models up by class name.

    Args:
        kind: the model's class.
        module: the captured module.
        signatures: of the model's forward and captured methods, which run the module.

    Raises:
        InjectError: a method has the name of an attribute that a host needs.
    """
    if taken := [name for name in signatures if name in _OWN]:
        raise InjectError(f"a host has an attribute {taken[0]} of its own: rename the method.")
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    changed = set_by_calls(kind, "", module.changes)
    own = {"__doc__": kind.__doc__, "_source_class": kind, **{n: SetByCalls(n) for n in changed}}
    captured = {
        name: _running(getattr(kind, name), name, signature, _takes_more(module, name, signature))
        for name, signature in signatures.items()
    }
    return type(kind.__name__, (Host, kind), {**names, **own, **captured})


_OWN = {*Host.__annotations__, *vars(Host)} - {"forward"}


def _takes_more(module: CapturedModule, method: str, signature: inspect.Signature) -> bool:
    """Whether a captured call gives an argument that only the method's `**kwargs` takes."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    declared = {p.name for p in signature.parameters.values() if p.kind not in variadic}
    contracts = [call.contract for call in module.captured_calls(method)]
    return any(spec is None or not declared.issuperset(spec.names) for spec in contracts)


def _running(
    original: Callable[..., Any], method: str, signature: inspect.Signature, takes_more: bool
) -> Callable[..., Any]:
    """Return a method that runs the captured module, with the signature of the model's own.

    Libraries read a model's arguments from it. A graph takes no further keywords, so `**kwargs` is
    left out unless a captured call needs it (transformers' Trainer then counts items for it).
    """

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, method, signature, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    kept = [p for p in signature.parameters.values() if takes_more or p.kind is not p.VAR_KEYWORD]
    run.__dict__["__signature__"] = signature.replace(parameters=[own, *kept])
    return run


def _run(
    host: Host, method: str, signature: inspect.Signature, /, *args: Any, **kwargs: Any
) -> Any:
    """Run a captured method or submodule of a host."""
    _check_held(host)
    captured = host._captured
    if captured.training is not host.training:  # set without train(), perhaps
        captured.train(host.training)
    host._seal.refuse_apart()
    args, kwargs = align(captured, method, signature, args, kwargs)
    attributes = host._seal.attributes
    if attributes.before or attributes.changing:
        program = captured.chosen_call(args, kwargs, method).program
        attributes.called(program.reads, program.changes)
    if method == "forward":
        return captured(*args, **kwargs)
    return captured._call_method(method, *args, **kwargs)


def _check_unchanged(model: nn.Module, module: CapturedModule) -> None:
    """Raise InjectError if an attribute that the graphs depend on has another value now."""
    # A flag may follow the mode, for which each graph has its own value.
    known = {n: v for n, v in module.known.read_values.items() if type(v) is not bool}
    now = plain_values(model, known)
    for name, value in known.items():
        if not same_literal(now.get(name, MISSING), value):
            raise InjectError(
                f"'{name}' of the model was {value!r} in the capture, and now is "
                f"{now.get(name)!r}: the graphs have the old value. Set it back, or capture the "
                "model again."
            )


def _check_held(host: Host) -> None:
    """Raise if a submodule of the host was replaced: the graph would not run the new one."""
    if torch.compiler.is_compiling():
        return
    for parent, name, child in host._held:
        if parent._modules.get(name) is not child:
            raise InjectError(
                f"module '{name}' of the host was replaced after it was captured (resized "
                "embeddings?). Change the source model, and capture that."
            )
