"""Capture through torch.export: the road for a model with example inputs."""

from __future__ import annotations

import inspect
import math
import re
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental import _config as export_config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..alike import alike, alike_but_for_sizes
from ..errors import CaptureError, InputError
from ..inputs import (
    ConstantInput,
    Dimension,
    Guard,
    Input,
    InputSpec,
    IntegerInput,
    TensorInput,
    Update,
)
from ..module import CapturedModule
from ..program import MODES
from .checkpoints import marked_checkpoints, marks_of
from .functions import opaque_functions
from .hooks import no_tensor_hooks
from .places import defined_at, raised_at
from .pytrees import watch_updates
from .sizes import refuse_fixed_sizes
from .surroundings import refuse_constant_dice, undisturbed


@dataclass(frozen=True, eq=False)
class Example:
    """Inputs to export with, the dynamic shapes that go with them, and who asked for those."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    asked: bool = False  # by the user: a dimension that comes out static is an error then
    patience: float = math.inf  # seconds that an export may take


@dataclass(eq=False)
class Source:
    """What torch.export or the tracer made of a model, or of a submodule: a graph per mode.

    Attributes:
        modules: by mode; one object under both keys where they came out alike.
        inputs: what each holds for.
        path: of the submodule whose names the graphs use; "" is the whole model.
    """

    modules: dict[str, fx.GraphModule]
    inputs: dict[str, InputSpec | None]
    path: str = ""

    def distinct(self) -> dict[str, fx.GraphModule]:
        """The graph modules, each once, by (the first) mode."""
        modes = {id(module): mode for mode, module in reversed(self.modules.items())}
        return {mode: self.modules[mode] for mode in MODES if mode in modes.values()}


def export_modes(
    model: nn.Module, examples: list[Example], *, root: nn.Module | None = None, path: str = ""
) -> Source:
    """Both modes of a model, or of a submodule of `root` as it is in the root's modes.

    Raises:
        CaptureError: none of the examples exports.
    """
    modules: dict[str, fx.GraphModule] = {}
    inputs: dict[str, InputSpec | None] = {}
    for mode in MODES:
        with mode_of(root or model, mode == "train"):
            modules[mode], inputs[mode], used = _export_mode(model, examples, mode)
        examples = examples[examples.index(used) :]
    train, evaluation = modules["train"], modules["eval"]
    same_inputs = inputs["train"] == inputs["eval"]
    if same_inputs and alike(train, evaluation) and marks_of(train) == marks_of(evaluation):
        modules["train"] = evaluation
    return Source(modules, inputs, path)


def _export_mode(
    model: nn.Module, examples: list[Example], mode: str
) -> tuple[fx.GraphModule, InputSpec, Example]:
    """The graph of the current mode from the first example that exports, with its contract.

    A graph that does not hold for the user's own inputs (the last example) is passed over while
    there is another: those are of batch 1, and the graph is for larger ones only. In train mode
    that may be all there is (batch norm refuses a batch of 1).

    Raises:
        CaptureError: none of the examples exports; the cause is the last one's error.
    """
    own, failure = examples[-1], None
    larger: tuple[fx.GraphModule, InputSpec, Example] | None = None
    for example in examples:
        try:
            module, spec = _attempt(model, example, mode)
            if spec.holds_for(own.args, own.kwargs):
                return module, spec, example
            larger = (module, spec, example)
        except Exception as error:  # noqa: BLE001 - torch.export raises whatever the model does
            failure = error
            if depends_on_data(error):
                break
    if larger:
        return larger
    assert failure is not None
    if isinstance(failure, CaptureError):  # of the contract, which says it better
        raise failure
    raise capture_error(model, mode, failure) from failure


def depends_on_data(error: BaseException | None) -> bool:
    """Whether Python branched on a value: no other sizes of the inputs will help."""
    return isinstance(error, GuardOnDataDependentSymNode)


def _attempt(model: nn.Module, example: Example, mode: str) -> tuple[fx.GraphModule, InputSpec]:
    fixed = refuse_fixed_sizes(model, mode) if example.asked else nullcontext()
    with fixed, watch_updates(model) as updates:
        program, module = _exported(model, example)
    spec = _contract(program, module, model, example)
    names = {**dict(enumerate(spec.names)), **{name: name for name in spec.names}}
    spec = replace(spec, updates=tuple(Update(names[p], path) for p, path in updates.items()))
    return module, allowing(model, module, spec, _of_batch_one(spec, example)) or spec


_RNN_WARNING = (
    r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, | ))+(was|were) assigned"
)


def _exported(model: nn.Module, example: Example) -> tuple[ExportedProgram, fx.GraphModule]:
    with ExitStack() as stack:
        functions = stack.enter_context(opaque_functions())
        stack.enter_context(no_tensor_hooks())
        stack.enter_context(marked_checkpoints())
        stack.enter_context(refuse_constant_dice(model))
        stack.enter_context(warnings.catch_warnings())
        # torch.export swaps the weights under the list that an RNN keeps of them
        warnings.filterwarnings("ignore", _RNN_WARNING, UserWarning)
        program = run_export(model, example)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    functions.restore(module)
    return program, module


def allowing(
    model: nn.Module, module: fx.GraphModule, spec: InputSpec, single: Example
) -> InputSpec | None:
    """The contract of a graph with sizes of 0 and 1 like these allowed, if it is right there.

    torch.export's guards against them often come from a question about strides, not from the
    source: they do if the graph of these very inputs has the same ops.
    """
    try:
        wider = spec.allowing(single.args, single.kwargs)
    except InputError:
        return None
    if wider is None or wider == spec:
        return wider
    try:
        _, static = _exported(model, single)
    except Exception:  # noqa: BLE001 - the source refuses such inputs, each in its own way
        return None
    return wider if alike_but_for_sizes(module.graph, static.graph) else None


def _of_batch_one(spec: InputSpec, example: Example) -> Example:
    """The example's inputs, with dynamic first dimensions cut to 1."""
    single = {
        id(value): value[:1]
        for leaf, value in spec.pairs(example.args, example.kwargs)
        if isinstance(leaf, TensorInput) and leaf.dims and isinstance(leaf.dims[0], Dimension)
    }

    def cut(leaf: Any) -> Any:
        return single.get(id(leaf), leaf)

    args, kwargs = pytree.tree_map(cut, (example.args, example.kwargs))
    return Example(args, kwargs, None)


def run_export(model: nn.Module, example: Example) -> ExportedProgram:
    """torch.export, told not to take a dynamic size for larger than 1.

    By default it does: a graph from a batch of 2 is then silently wrong for a batch of 1 where
    the source asks (batch norm in train mode does).
    """
    config: Any = export_config  # torch installs `patch` on the module at run time
    with config.patch(backed_size_oblivious=True), _Patience(example.patience):
        return torch.export.export(
            model,
            example.args,
            example.kwargs,
            dynamic_shapes=example.dynamic_shapes,
            strict=False,
        )


class _Patience(TorchFunctionMode):
    """Gives up after some seconds: with every size dynamic, some models take minutes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if time.monotonic() > self.end:
            self.end = math.inf  # what is left to do is to put things back
            raise TimeoutError("more dynamic sizes than torch.export works out in a minute")
        return func(*args, **(kwargs or {}))


def examples_for(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> list[Example]:
    """What to try, in order: the user's own shapes, or a dynamic batch and then a static one.

    The batch is dimension 0 of the first tensor, and of every tensor of that size. An example
    batch of 1 is widened to 2 first, because torch.export fixes dimensions of size 1.
    """
    args, kwargs = _told_apart(args, kwargs)
    if shapes is not None:
        return [Example(args, kwargs, shapes, asked=True)]
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _has_batch(leaf)]
    static = Example(args, kwargs, None)
    if not tensors:
        return [static]
    batch = tensors[0].shape[0]
    given = _with_dynamic_batch(args, kwargs, batch)
    if batch != 1:
        return [given, static]
    wide_args, wide_kwargs = pytree.tree_map(_widened, (args, kwargs))
    return [_with_dynamic_batch(wide_args, wide_kwargs, 2), static]


def in_signature_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords as the forward declares them: torch.export speaks of inputs in that order."""
    declared = [name for name in inspect.signature(model.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in dict.fromkeys([*declared, *kwargs])}


def _told_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A copy of every tensor that is given twice (labels=ids): torch.export would take the two
    inputs for one, for good."""
    seen: set[int] = set()

    def apart(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return leaf.clone()

    return pytree.tree_map(apart, (args, kwargs))


def example_for(spec: InputSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """Inputs and dynamic shapes that a captured graph's own contract asks for."""
    args, kwargs = _told_apart(args, kwargs)
    wide: dict[int, torch.Tensor] = {}
    shapes = ShapesCollection()
    for leaf, value in spec.pairs(args, kwargs):
        if not isinstance(leaf, TensorInput):
            continue
        axes = [axis for axis, dim in enumerate(leaf.dims) if isinstance(dim, Dimension)]
        tensor = value
        for axis in axes:  # torch.export would fix a dimension of size 1
            tensor = torch.cat([tensor, tensor], axis) if tensor.shape[axis] == 1 else tensor
        wide[id(value)] = tensor
        shapes[tensor] = dict.fromkeys(axes, Dim.AUTO)

    def widened(leaf: Any) -> Any:
        return wide.get(id(leaf), leaf)

    args, kwargs = pytree.tree_map(widened, (args, kwargs))
    return Example(args, kwargs, shapes)


def _has_batch(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


def _widened(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if _has_batch(leaf) and leaf.shape[0] == 1 else leaf


def _with_dynamic_batch(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> Example:
    shapes = ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if _has_batch(leaf) and leaf.shape[0] == batch:
            shapes[leaf] = {0: Dim.AUTO}
    return Example(args, kwargs, shapes)


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Generator[None]:
    """The model in one mode; flags that train() may touch are put back.

    In the mode that it is in, the model is taken as it stands, with the batch norms that the user
    froze by `eval()` frozen.
    """
    flags = [(module, module.training) for module in model.modules()]
    with undisturbed(model):
        try:
            if model.training != training:
                model.train(training)
            yield
        finally:
            for module, flag in flags:
                if isinstance(module, CapturedModule):  # its graph goes with the flag
                    module.train(flag)
                module.training = flag


# ---- errors -------------------------------------------------------------------------------------


def capture_error(
    model: nn.Module, mode: str, error: BaseException, otherwise: str = ""
) -> CaptureError:
    """The error of a capture that failed, with what to do about it, or `otherwise`."""
    advice = next((advice for words, advice in _ADVICE.items() if words in str(error)), otherwise)
    return unable(model, f"could not be captured in {mode} mode", error, advice)


_ADVICE = {
    "pytree": "Inputs and outputs must be tensors in containers that pytree knows: register the "
    "class (torch.export.register_dataclass for a dataclass, else "
    "torch.utils._pytree.register_pytree_node), or have the model return no cache (transformers: "
    "use_cache=False, or a release whose exporters register its caches).",
    "Constraints violated": "Give Dim.AUTO for that dimension, or a Dim with a range that the "
    "model treats alike.",
}


def unable(model: nn.Module, what: str, error: BaseException, advice: str) -> CaptureError:
    """An error with the line of the model's code that another one came from."""
    lines = str(error).strip().splitlines() or [""]
    reason = " ".join([lines[0][:300], *(x.strip() for x in lines[1:] if x.startswith("  - "))])
    place = raised_at(error)
    where = f", at {place}" if place else f", in the forward at {defined_at(model.forward)}"
    message = f"{type(error).__name__}: {reason.rstrip('.')}. {advice}"
    result = CaptureError(f"{type(model).__name__} {what}{where}: {message}".rstrip())
    result.__cause__ = error
    return result


# ---- the input contract -------------------------------------------------------------------------


def _contract(
    program: ExportedProgram, module: fx.GraphModule, model: nn.Module, example: Example
) -> InputSpec:
    codegen: Any = module.graph._codegen
    names: tuple[str, ...] = tuple(codegen.pytree_info.orig_args)
    values = [*example.args, *example.kwargs.values()]
    placeholders = iter(node for node in module.graph.nodes if node.op == "placeholder")
    bounds = {str(symbol): _bounds(limits) for symbol, limits in program.range_constraints.items()}
    structures: list[Any] = []
    leaves: list[tuple[Input, ...]] = []
    for name, value in zip(names, values, strict=True):
        paths, structure = pytree.tree_flatten_with_path(value)
        structures.append(structure)
        group = [
            _leaf(f"{name}{pytree.keystr(path)}", next(placeholders).meta.get("val"), bounds, model)
            for path, _ in paths
        ]
        leaves.append(tuple(group))
    guards = tuple(_guards(program, model, example))
    return InputSpec(names, tuple(structures), tuple(leaves), guards)


def _guards(program: ExportedProgram, model: nn.Module, example: Example) -> Iterator[Guard]:
    """torch.export's remaining assumptions, written over the leaves instead of its `L[...]`."""
    paths = _paths(model, example)
    by_length = sorted(enumerate(paths), key=lambda item: -len(item[1]))
    for text in getattr(program, "_guards_code", None) or ():
        code = text
        for index, path in by_length:
            code = code.replace(path, f"V[{index}]")
        if "L[" in code:
            raise CaptureError(
                f"{type(model).__name__}: torch.export assumes {text}, which cannot be checked at "
                "a call. Give dynamic_shapes with that dimension static."
            )
        readable = re.sub(r"L\['(\w+)'\]", r"\1", text).replace(".size()[", ".shape[")
        # torch.export's own words about sizes, as a function that torch.compile can trace too
        holds = eval(f"lambda V: {code}", {"math": math, "Max": max, "Min": min})
        yield Guard(readable, holds, _excludes_small(code))


def _excludes_small(code: str) -> bool:
    """Whether a guard only says that some size, or product of sizes, is not 0 or not 1."""
    more = any(word in code for word in (" and ", " or ", "==", "%"))
    form = r".+ (!= [01]|> [01]|>= [12])|(0|1) < .+|(1|2) <= .+"
    return not more and re.fullmatch(form, code) is not None


def _paths(model: nn.Module, example: Example) -> list[str]:
    """What torch.export calls each leaf of the inputs, in the order of the call.

    Its names follow the forward's signature, in which keywords may stand elsewhere.
    """
    values = [*example.args, *example.kwargs.values()]
    numbers = list(range(len(values)))
    split = len(example.args)
    keywords = dict(zip(example.kwargs, numbers[split:], strict=True))
    bound = inspect.signature(model.forward).bind(*numbers[:split], **keywords).arguments
    places = {number: path for path, number in pytree.tree_flatten_with_path(dict(bound))[0]}
    return [
        f"L{pytree.keystr((*places[number], *path))}"
        for number, value in enumerate(values)
        for path, _ in pytree.tree_flatten_with_path(value)[0]
    ]


def _bounds(limits: Any) -> tuple[int, int | None]:
    lower = int(limits.lower) if limits.lower.is_finite else 0
    upper = limits.upper
    return lower, int(upper) if upper.is_finite and upper < torch.iinfo(torch.int64).max else None


def _leaf(
    name: str, value: Any, bounds: dict[str, tuple[int, int | None]], model: nn.Module
) -> Input:
    if isinstance(value, torch.Tensor):
        dims = tuple(_dimension(name, size, bounds, model) for size in value.shape)
        return TensorInput(name, dims, value.dtype)
    if isinstance(value, torch.SymInt):
        dim = _dimension(name, value, bounds, model)
        return ConstantInput(name, dim) if isinstance(dim, int) else IntegerInput(name, dim)
    return ConstantInput(name, value)


def _dimension(
    name: str, size: Any, bounds: dict[str, tuple[int, int | None]], model: nn.Module
) -> int | Dimension:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression: Any = size.node.expr
    if expression.is_number:
        return int(expression)
    symbols = sorted(expression.free_symbols, key=str)
    polynomial = sympy.Poly(expression, *symbols) if expression.is_polynomial(*symbols) else None
    if polynomial is None or len(symbols) > 1 or polynomial.degree() > 1:
        raise CaptureError(
            f"{type(model).__name__}: torch.export relates a dimension of {name} to others by "
            f"{expression}, which cannot be checked at a call. Give dynamic_shapes with that "
            "dimension static."
        )
    scale, offset = (int(c) for c in polynomial.all_coeffs())
    lower, upper = bounds.get(str(symbols[0]), (0, None))
    return Dimension(str(symbols[0]), scale, offset, lower, upper)
