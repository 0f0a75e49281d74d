"""capture: turn a PyTorch model into a GraphModule with one graph per mode.

Whichever frontend makes a graph, the ops in it that read weights are aten overloads.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError, FxLoraError, FxLoraWarning
from ..fx.compare import alike
from ..fx.effects import written_attributes
from ..module import CapturedModule
from ..module.blocks.chosen import Modules, chosen_modules
from ..module.compiled import uncompiled
from ..module.constants import CONSTANTS
from ..module.example_calls import Call, MethodCalls
from ..module.host_attributes import dotted, plain_values
from ..module.memory import overlapping
from ..module.parent import ParentModule
from ..module.program import MODES, Program
from ..module.quantised import is_quantised
from ..module.state import State
from ..tables import some
from .arguments import check_model, given_calls, shapes_of
from .call_sources import Sources
from .caller_modes import callers_autocast
from .decoded import decode_weights
from .exported import Source
from .failures import capture_error
from .kept.asked_modes import forget_searches
from .kept.checkpoints import gather_checkpoints
from .kept.containers import count_in_containers, register_containers
from .kept.undisturbed import plain_tensors
from .memory import ParameterMemory, own_tensors
from .regions import Regions, wrong_regions
from .source_facts import input_embedding, linear_layers, model_type, output_embeddings
from .traced import trace_mode, traced_autocasts
from .tree import attach, build_tree, read_by_own_names


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
            has: `methods={"encode_text": ids}`; or of submodules that are called from outside, by
            path: `methods={"model.encoder": ids}`. Each is a tensor, a dict of keyword arguments,
            a pair `(args, kwargs)` or a list of such pairs.
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
    return _from_examples(model, (args, kwargs, calls, methods), dynamic_shapes, modules)


@torch.inference_mode(False)
def capture_recorded(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor | None,
    kwargs: dict[str, Any] | None,
    *,
    calls: Sequence[Call] | None,
    methods: Mapping[str, MethodCalls] | None,
    dynamic_shapes: Any,
    modules: Sequence[str],
) -> CapturedModule:
    """Capture a model with the calls of submodules recorded, so that they can be outlined later."""
    examples = (args, kwargs, calls, methods)
    return _from_examples(model, examples, dynamic_shapes, modules, outline=False)


def _from_examples(
    model: nn.Module,
    examples: tuple[Any, Any, Sequence[Call] | None, Mapping[str, MethodCalls] | None],
    dynamic_shapes: Any,
    modules: Modules | None,
    outline: bool = True,
) -> CapturedModule:
    """Capture a model by the user's examples: args, kwargs, calls and methods of `capture`."""
    model = uncompiled(model, CaptureError)
    check_model(model)
    forget_searches()
    try:
        with callers_autocast():
            given = given_calls(model, *examples)
            several = examples[2] is not None
            return _capture(model, given, several, dynamic_shapes, modules, outline)
    except (FxLoraError, Warning):  # a filter may turn warnings into errors
        raise
    except Exception as error:
        raise capture_error(model, "either", error, values=examples, otherwise=_REPORT) from error


_REPORT = "fxlora did not expect this error: please report it, with the model."


def _capture(
    model: nn.Module,
    given: Mapping[str, list[Call]],
    several: bool,
    dynamic_shapes: Any,
    modules: Modules | None,
    outline: bool,
) -> CapturedModule:
    """Capture a model by the example calls of each of its methods.

    Args:
        several: whether `dynamic_shapes` is a list with an item for each call of the forward.
        outline: whether the chosen modules are to be outlined, and not only their calls recorded.
    """
    parts = () if modules is None else chosen_modules(model, modules)
    if dynamic_shapes is not None and "forward" not in given:
        raise CaptureError("dynamic_shapes needs example inputs: capture(model, args, ...).")
    if not given:
        if parts:
            raise CaptureError("modules needs example inputs: capture(model, args, modules=...).")
        return _capture_traced(model)
    shapes = {method: [None] * len(calls) for method, calls in given.items()}
    if dynamic_shapes is not None:
        number = len(given["forward"])
        shapes["forward"] = shapes_of(number, dynamic_shapes) if several else [dynamic_shapes]
    return _capture_exported(model, given, shapes, parts, outline)


def _capture_exported(
    model: nn.Module,
    given: Mapping[str, list[Call]],
    shapes: Mapping[str, Sequence[Any]],
    parts: tuple[str, ...],
    outline: bool,
) -> CapturedModule:
    """Export the model for each call of each method, or else its submodules for all of them."""
    register_containers(model)
    count_in_containers([call for calls in given.values() for call in calls])
    try:
        of_methods = [_sources(model, m, calls, shapes[m], parts) for m, calls in given.items()]
        sources = [source for of_one in of_methods for source in of_one.made]
        for of_one in of_methods:
            of_one.refuse_state_of(sources)
    except CaptureError as failure:
        if asked := _needs_whole_graphs(given, shapes, parts):
            raise CaptureError(
                f"{failure} (With {asked}, whole graphs are needed: no submodules are tried.)"
            ) from failure
        return _capture_by_regions(model, given["forward"], failure)
    return _assemble(model, sources, outlined=parts if outline else ())


def _needs_whole_graphs(
    given: Mapping[str, list[Call]], shapes: Mapping[str, Sequence[Any]], parts: tuple[str, ...]
) -> str:
    """Return the argument of `capture` that graphs of submodules could not honour, or ""."""
    if list(given) != ["forward"]:
        return "methods="
    if parts:
        return "modules="
    return "dynamic_shapes=" if any(asked is not None for asked in shapes["forward"]) else ""


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
        stacklevel=7,  # the decorator of `capture` adds a frame
    )
    return module


def _capture_traced(model: nn.Module) -> CapturedModule:
    if quantised := [name for name, p in model.named_parameters() if is_quantised(p)]:
        raise CaptureError(
            f"{some(quantised)}: the tracer does not see how quantised weights are read. Give "
            "example inputs: capture(model, args)."
        )
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
    outlined: tuple[str, ...] = (),
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
            dotted(source.changes.names),
            None if source.reads is None else dotted(source.reads),
        )
        for source in sources
    ]
    if parent or any(spec is None for program in programs for spec in program.inputs.values()):
        _add_mirrors(mirrors, model, memory)
    state = State(
        grads=frozenset(name for name, p in tree.named_parameters() if p.requires_grad),
        outputs=output_embeddings(model),
        embedding=input_embedding(model),
        linears=linear_layers(model),
        model_type=model_type(model),
        outlined=outlined,
        written=_all_names(tree, found.written),
        apart=frozenset(p for p, m in model.named_modules() if m.training != model.training),
        mirrors={name: tuple(sorted(others)) for name, others in mirrors.items()},
        read_values=_read_values(model, programs),
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
    decode_weights(result)
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
        node.target = f"{CONSTANTS}.{label}_{name.replace('.', '_')}"
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


def _read_values(model: nn.Module, programs: Sequence[Program]) -> dict[str, Any]:
    """Return the plain attributes that the graphs of the whole model have as they are now."""
    whole = [program for program in programs if not program.path]
    changed = {name for program in whole for name in program.changes}
    return plain_values(model, {n for program in whole for n in program.reads or ()} - changed)
