"""capture: turn a PyTorch model into a GraphModule with one graph per mode.

Whichever frontend makes a graph, the ops in it that read weights are aten overloads.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError, FxLoraError, FxLoraWarning
from ..fx.compare import alike
from ..fx.effects import written_attributes
from ..module import CapturedModule
from ..module.chosen_modules import Modules, chosen_modules
from ..module.compiled import uncompiled
from ..module.example_calls import Call, MethodCalls, calls_of, calls_of_methods
from ..module.memory import overlapping
from ..module.parent import ParentModule
from ..module.program import MODES, Program
from ..module.state import State
from ..names import shown
from ..tables import some
from .autocast_proof import callers_autocast
from .call_sources import Sources
from .examples import in_signature_order
from .exported import Source
from .failures import capture_error
from .kept.checkpoints import gather_checkpoints
from .kept.containers import register_containers
from .kept.hooks import refuse_backward_hooks
from .kept.undisturbed import plain_tensors
from .memory import ParameterMemory, own_tensors
from .regions import Regions, wrong_regions
from .traced import trace_mode, traced_autocasts
from .tree import attach, build_tree, read_by_own_names, refuse_lazy


@torch.inference_mode(False)  # inference tensors can never be trained
def capture(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    calls: Sequence[Call] | None = None,
    methods: Mapping[str, MethodCalls] | None = None,
    dynamic_shapes: Any = None,
    modules: Modules | None = None,
) -> CapturedModule:
    """Capture a model as a `torch.fx.GraphModule`, leaving the model itself unchanged.

    With example inputs, torch.export captures the model in train and in eval mode; `train()` and
    `eval()` of the result select the graph. If no graph of the whole model can be exported (its
    Python code depends on tensor values, for example), its largest submodules that can be
    exported are captured instead, and its Python code calls them (with a warning). Without
    inputs, torch.fx's symbolic tracer captures the model; it sees less than torch.export, so
    give inputs where you can.

    Parameters share storage with the model, so that nothing large is copied. They are copied when
    their first gradient arrives or a state dict is loaded. Buffers are copied at once.

    Args:
        model: any nn.Module. Its current mode is captured with the training flags as they are
            (batch norms frozen by `eval()` stay frozen), the other mode with the flags that
            `train()` or `eval()` sets.
        args: example positional arguments (a single tensor means a tuple of one).
        kwargs: example keyword arguments.
        calls: several example calls `(args, kwargs)`, instead of `args` and `kwargs`, for a model
            that is called in several ways (with labels or without, with a cache or without). The
            result runs the first graph that holds for a call. `recorded_calls` records them.
        methods: example calls of methods other than the forward, by name, which the result then
            has: `methods={"encode_text": ids}`. Each is a tensor, a dict of keyword arguments, a
            pair `(args, kwargs)` or a list of such pairs.
        dynamic_shapes: torch.export's specification of the dynamic dimensions. By default the
            batch (dimension 0 of the first tensor, and of every tensor with the same size there)
            is dynamic, and all other dimensions are fixed to their sizes in the example. A
            dimension that is asked to be dynamic and that the model fixes is an error, also
            with `Dim.AUTO`. With `calls`, a list of such specifications, one for each call.
            It is for the forward; a size that varies over the calls of a method is dynamic.
        modules: submodules that are to be modules of their own, which the graph calls: glob
            patterns for their paths ("layers.*"), classes, or a list of both. Hooks, `eval()` of
            a part, wrappers (`fully_shard`, `checkpoint_wrapper`, `torch.compile`) and
            replacement work on these.

    Returns:
        The captured module: call it like the model; its state_dict keys are the model's.

    Raises:
        CaptureError: the model cannot be captured; the message names the place in its code.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Dropout(0.5)).eval()
        >>> x = torch.randn(3, 6)
        >>> gm = fxlora.capture(model, x)
        >>> torch.equal(gm(x), model(x)), gm.train()(x[:2]).shape
        (True, torch.Size([2, 4]))
    """
    model = uncompiled(model, CaptureError)
    _check_model(model)
    try:
        with callers_autocast():
            given = given_calls(model, args, kwargs, calls, methods)
            return _capture(model, given, calls is not None, dynamic_shapes, modules)
    except (FxLoraError, Warning):  # a filter may turn warnings into errors
        raise
    except Exception as error:
        values = (args, kwargs, calls, methods)
        raise capture_error(model, "either", error, values=values, otherwise=_REPORT) from error


_REPORT = "fxlora did not expect this error: please report it, with the model."


def _capture(
    model: nn.Module,
    given: Mapping[str, list[Call]],
    several: bool,
    dynamic_shapes: Any,
    modules: Modules | None,
) -> CapturedModule:
    """Capture a model by the example calls of each of its methods.

    Args:
        several: whether `dynamic_shapes` is a list with an item for each call of the forward.
    """
    parts = () if modules is None else chosen_modules(model, modules)
    if dynamic_shapes is not None and "forward" not in given:
        raise CaptureError("dynamic_shapes needs example inputs: capture(model, args, ...).")
    if not given:
        if parts:
            raise CaptureError("modules needs example inputs: capture(model, args, modules=...).")
        return _capture_traced(model)
    if parts and {method: len(calls) for method, calls in given.items()} != {"forward": 1}:
        raise CaptureError(
            "modules goes with one example call of the forward. Capture the training's call with "
            "it, and the others without: save_adapter and load_adapter take "
            "the adapters from one to the other."
        )
    shapes = {method: [None] * len(calls) for method, calls in given.items()}
    if dynamic_shapes is not None:
        number = len(given["forward"])
        shapes["forward"] = _shapes_of(number, dynamic_shapes) if several else [dynamic_shapes]
    return _capture_exported(model, given, shapes, parts)


def given_calls(
    model: nn.Module, args: Any, kwargs: Any, calls: Any, methods: Any
) -> dict[str, list[Call]]:
    """Return the user's example calls of each method, with keywords in the order of its signature.

    Args:
        model, args, kwargs, calls, methods: as for `capture`.

    Raises:
        CaptureError: they are no example calls of the model.
    """
    of_methods = {} if methods is None else calls_of_methods(methods, CaptureError)
    for name in of_methods:
        _check_method(model, name)
    forward = _example_calls(args, kwargs, calls)
    if "forward" in of_methods:
        raise CaptureError("give the calls of the forward as args and kwargs, or as calls=[…].")
    given = {"forward": forward, **of_methods} if forward else of_methods
    return {
        method: [(args, in_signature_order(getattr(model, method), kwargs)) for args, kwargs in all]
        for method, all in given.items()
    }


def _example_calls(args: Any, kwargs: Any, calls: Any) -> list[Call]:
    """Return the user's example calls; none if no inputs were given."""
    if calls is not None:
        if args is not None or kwargs is not None:
            raise CaptureError("give args and kwargs as one of calls=[(args, kwargs), …].")
        return calls_of(calls, CaptureError)
    if args is None and kwargs is None:
        return []
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, tuple | list | None):
        raise CaptureError(f"args must be a tuple of example inputs, not {type(args).__name__}.")
    if not isinstance(kwargs, Mapping | None):
        raise CaptureError(
            f"kwargs must be a mapping of names to inputs, not {type(kwargs).__name__}. "
            "Give several positional inputs as one tuple: capture(model, (a, b))."
        )
    return [(tuple(args or ()), dict(kwargs or {}))]


def _shapes_of(number: int, dynamic_shapes: Any) -> list[Any]:
    """Return the specification of the dynamic dimensions for each of several calls."""
    if not isinstance(dynamic_shapes, list | tuple) or len(dynamic_shapes) != number:
        raise CaptureError(f"dynamic_shapes must be a list of {number}, one for each call.")
    return list(dynamic_shapes)


def _check_model(model: nn.Module) -> None:
    """Raise CaptureError for a model that neither torch.export nor the tracer can capture."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture takes an nn.Module, not {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is compiled by TorchScript. Capture the module that it was "
            "compiled from or, with example inputs, nn.Sequential(model); names then start with "
            "'0.'."
        )
    if isinstance(model, CapturedModule):
        raise CaptureError(
            "the module is captured already: pass it to match, inject, fold, … directly. To "
            "capture it for other inputs, capture the source model again."
        )
    if hidden := _hidden_name(model):
        raise CaptureError(
            f"{type(model).__name__} has a submodule or tensor named '{hidden}', which the "
            "captured module's attribute of that name would hide. Wrap the model: "
            "capture(nn.Sequential(model), …); names then start with '0.'."
        )
    refuse_backward_hooks(model)
    refuse_lazy(model)
    if any(p.is_inference() for p in model.parameters()):
        raise CaptureError(
            f"{type(model).__name__} was created under torch.inference_mode, and inference "
            "tensors can never be trained. Create it outside, or capture copy.deepcopy(model)."
        )


def _hidden_name(model: nn.Module) -> str | None:
    """Return the first name of a child or tensor that CapturedModule already uses, or None."""
    taken = _empty()
    held = (
        *model.named_children(),
        *model.named_parameters(recurse=False),
        *model.named_buffers(recurse=False),
    )
    return next((name for name, _ in held if hasattr(taken, name)), None)


def _check_method(model: nn.Module, name: object) -> None:
    """Raise CaptureError unless a captured module can have the model's method of this name."""
    kind = type(model).__name__
    if not isinstance(name, str) or not inspect.isroutine(getattr(type(model), name, None)):
        raise CaptureError(f"the class {kind} has no method {shown(name)}.")
    if name != "forward" and hasattr(_empty(), name):
        raise CaptureError(
            f"{kind}.{name} cannot be captured, because every captured module has an attribute "
            "of that name. Give the method another name in a subclass."
        )


def _empty() -> CapturedModule:
    """Return a captured module that computes nothing, to ask which attributes every one has."""
    graph = fx.Graph()
    graph.output(None)
    programs = [Program(dict.fromkeys(MODES, graph), dict.fromkeys(MODES))]
    return CapturedModule(nn.Module(), programs, class_name="Empty", training=False)


def _capture_exported(
    model: nn.Module,
    given: Mapping[str, list[Call]],
    shapes: Mapping[str, Sequence[Any]],
    parts: tuple[str, ...],
) -> CapturedModule:
    """Export the model for each call of each method, or else its submodules for all of them."""
    register_containers(model)
    try:
        of_methods = [_sources(model, m, calls, shapes[m], parts) for m, calls in given.items()]
        sources = [source for of_one in of_methods for source in of_one.made]
        for of_one in of_methods:
            of_one.refuse_state_of(sources)
    except CaptureError as failure:
        if list(given) != ["forward"]:
            raise CaptureError(
                f"{failure} (Where methods are captured, each needs a whole graph: no submodules "
                "are tried.)"
            ) from failure
        if parts or any(asked is not None for asked in shapes["forward"]):  # a whole graph is asked
            raise
        return _capture_by_regions(model, given["forward"], failure)
    return _assemble(model, sources, parts=parts)


def _sources(
    model: nn.Module,
    method: str,
    calls: Sequence[Call],
    shapes: Sequence[Any],
    parts: tuple[str, ...],
) -> Sources:
    """Export one method of the model for all its calls, first those with a user's specification."""
    sources = Sources(model, method, parts)
    others = [call for call, asked in zip(calls, shapes, strict=True) if asked is None]
    for number in sorted(range(len(calls)), key=lambda n: shapes[n] is None):
        sources.add(calls[number], others, shapes[number])
    return sources


def _capture_by_regions(
    model: nn.Module, calls: Sequence[Call], failure: CaptureError
) -> CapturedModule:
    """Capture the largest submodules that have graphs for all that these calls do with them."""
    regions = Regions(model, calls, failure)
    module = _assemble(model, *regions.capture())
    while wrong := wrong_regions(module, regions.seen):
        regions.leave(wrong)
        module = _assemble(model, *regions.capture())
    warnings.warn(
        f"{failure} Its submodules are captured instead, and its Python calls them: "
        f"{some(module.regions)}. Print the module for details.",
        FxLoraWarning,
        stacklevel=6,  # the decorator of `capture` adds a frame
    )
    return module


def _capture_traced(model: nn.Module) -> CapturedModule:
    if model._forward_hooks or model._forward_pre_hooks:
        raise CaptureError(
            f"{type(model).__name__} has forward hooks on the root module, which torch.fx's "
            "tracer does not call. Give example inputs: capture(model, args)."
        )
    modules = {mode: trace_mode(model, mode) for mode in MODES}
    autocasts = {mode: traced_autocasts(model, mode, module) for mode, module in modules.items()}
    if alike(modules["train"], modules["eval"]):
        modules["train"] = modules["eval"]
    return _assemble(model, [Source(modules, dict.fromkeys(MODES), autocasts=autocasts)])


def _assemble(
    model: nn.Module,
    sources: Sequence[Source],
    parent: ParentModule | None = None,
    parts: tuple[str, ...] = (),
) -> CapturedModule:
    """Build the captured module: the sources' graphs of both modes over one parameter tree."""
    found = _Held(model)
    for source in sources:
        for module in source.distinct().values():
            gather_checkpoints(module)
            found.look_into(source, module)
    tensors = found.own_tensors(parent.reads if parent else ())
    tree = build_tree(model, found.called, tensors)
    memory, mirrors = found.memory, dict[str, set[str]]()
    for number, source in enumerate(sources):
        for mode, module in source.distinct().items():
            label = f"{mode}{number or ''}"
            _adopt(tree, label, source, module, found, tensors, mirrors)
    programs = [
        Program(
            {mode: source.modules[mode].graph for mode in MODES},
            source.inputs,
            source.path,
            source.calls,
            source.autocasts,
            source.method,
        )
        for source in sources
    ]
    if parent or any(spec is None for program in programs for spec in program.inputs.values()):
        _add_mirrors(mirrors, model, memory)
    state = State(
        grads=frozenset(name for name, p in tree.named_parameters() if p.requires_grad),
        outputs=_output_embeddings(model),
        outlined=parts,
        written=_all_names(tree, found.written),
        changes=frozenset(".".join(name) for s in sources for name in s.changes.names),
        apart=frozenset(p for p, m in model.named_modules() if m.training != model.training),
        mirrors={name: tuple(sorted(others)) for name, others in mirrors.items()},
    )
    result = CapturedModule(
        tree,
        programs,
        parent,
        class_name=type(model).__name__,
        training=model.training,
        state=state,
    )
    read_by_own_names(result)
    result.copy_when_trained()  # the source's storage
    return result


class _Held:
    """The tensors that graphs hold, and those that they write to.

    Attributes:
        named: the model's parameters and buffers, under all their names.
        memory: the memory of its parameters.
        called: paths of the submodules that graphs call.
        written: names of the parameters and buffers that graphs write to.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = model.named_parameters(remove_duplicate=False)
        buffers = model.named_buffers(remove_duplicate=False)
        self.model = model
        self.named: dict[str, torch.Tensor] = {**dict(parameters), **dict(buffers)}
        self.memory = ParameterMemory(model)
        self.called: set[str] = set()
        self.written: set[str] = set()
        self._constants: list[torch.Tensor] = []
        self._written_constants: list[torch.Tensor] = []

    def look_into(self, source: Source, module: fx.GraphModule) -> None:
        """Add the tensors that a graph holds and writes to, and the submodules that it calls."""
        graph = module.graph
        self.called |= {str(node.target) for node in graph.find_nodes(op="call_module")}
        writes = {name for node in graph.nodes for name in written_attributes(node, module)}
        for name in dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")):
            value, full = _attribute(module, name), _full(source, name)
            if not isinstance(value, torch.Tensor):
                continue
            if full not in self.named:
                full = self.memory.name_of(value)
            if full is not None:
                self.written |= {full} if name in writes else set()
            else:
                self._constants.append(value)
                self._written_constants += [value] if name in writes else []
        if None in source.inputs.values():
            self._refuse_apart()

    def _refuse_apart(self) -> None:
        """Raise if a plain tensor shares memory with a tensor that a call writes to.

        A traced graph holds a copy of the plain tensor, which the write would not change.
        """
        written = {id(self.named[name]) for name in self.written}
        plain = {id(tensor): name for name, tensor in plain_tensors(self.model)}
        apart = [t for _, t in plain_tensors(self.model)] if written else []
        for group in overlapping([*self.named.values(), *apart]) if apart else ():
            held = {id(tensor) for tensor in group}
            if held & written and (names := [plain[key] for key in held & plain.keys()]):
                raise CaptureError(
                    f"{type(self.model).__name__}: '{names[0]}' shares memory with a tensor that "
                    "the forward writes to, and is no buffer. Register it as one, or give example "
                    "inputs: capture(model, args)."
                )

    def own_tensors(self, read: Iterable[str]) -> dict[int, torch.Tensor]:
        """Return the captured module's tensor for each tensor of the model and its graphs, by id.

        Args:
            read: names of parameters that Python reads, and may write to.
        """
        names = self.written.union(read)
        marked = [self.named[name] for name in names if name in self.named]
        return own_tensors(self.model, self._constants, [*marked, *self._written_constants])


def _all_names(tree: nn.Module, written: Collection[str]) -> frozenset[str]:
    """Return all names of the parameters that are, or share memory with, a written tensor."""
    named = dict(tree.named_parameters(remove_duplicate=False))
    tensors = dict(tree.named_buffers(remove_duplicate=False)) | named
    marked = {id(tensors[name]) for name in written if name in tensors}
    groups = overlapping(tensors.values()) if marked else []
    met = {id(t) for group in groups if marked & set(map(id, group)) for t in group}
    return frozenset(name for name, parameter in named.items() if id(parameter) in met)


def _add_mirrors(mirrors: dict[str, set[str]], model: nn.Module, memory: ParameterMemory) -> None:
    """Add the model's buffers and plain tensors that share memory with a parameter to `mirrors`.

    A graph from torch.export holds every tensor that it reads, so that `_adopt` finds these. The
    tracer reads a copy of the model, and the Python code around regions may read any tensor.
    """
    held = [*model.named_buffers(remove_duplicate=False), *plain_tensors(model)]
    for name, tensor in held:
        for parameter in memory.under(tensor):
            mirrors.setdefault(parameter, set()).add(name)


def _adopt(
    tree: nn.Module,
    label: str,
    source: Source,
    module: fx.GraphModule,
    found: _Held,
    tensors: Mapping[int, torch.Tensor],
    mirrors: dict[str, set[str]],
) -> None:
    """Rename a graph's attributes to their names in the whole model; attach all others to the tree.

    The others are constants and nested graphs. Their names may collide between modes and regions,
    hence the label. A constant that is a parameter (held in a list or a closure) gets the
    parameter's name; a tensor that shares a parameter's memory is added to `mirrors`.
    """
    taken: set[str] = set()
    known, memory = found.named, found.memory
    for node in module.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            named = {k: (_full(source, str(path)), kind) for k, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = named
        if node.op != "get_attr":
            continue
        name = str(node.target)
        node.target = _full(source, name)
        value = _attribute(module, name)
        if node.target not in known and (own := memory.name_of(value)):
            node.target = own
        elif not isinstance(value, nn.Parameter):
            for parameter in memory.under(value):
                mirrors.setdefault(parameter, set()).add(node.target)
        if node.target in known:
            continue
        node.target = f"_constants.{label}_{name.replace('.', '_')}"
        if node.target not in taken:
            taken.add(node.target)
            attach(tree, node.target, tensors.get(id(value), value))


def _full(source: Source, name: str) -> str:
    return ".".join(filter(None, (source.path, name)))


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _output_embeddings(model: nn.Module) -> frozenset[str]:
    """Return names of parameters in transformers' output embeddings, which "all-linear" skips."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        return frozenset()
    held = {id(p) for p in head.parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, p in names if id(p) in held)
