"""The eval graph of a captured module as an ExportedProgram, which every format starts from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.dynamic_shapes import _combine_args, _tree_map_with_path
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..frontends.examples import Example, example_for, examples_for
from ..frontends.one_export import run_export
from ..frontends.small_sizes import contract_with_small_sizes, drop_small_guards
from ..fx.calls import example_value
from ..module.contract import InputSpec
from ..module.program import ProgramModule
from ..module.quantised import is_quantised
from ..module.sizes import resized
from .call import ADAPTERS, Call, distinct_names, is_tensor
from .metadata import Tracer, root_class, with_places


@dataclass(frozen=True)
class Exported:
    """A program, the call that it is of, and the contract on its inputs."""

    program: ExportedProgram
    call: Call
    spec: InputSpec

    def up_to_example(self) -> Exported:
        """Return the same with the example's sizes as the largest where there is no maximum."""
        given = self.call.given(self.call.args, self.call.kwargs, self.call.form.inputs)
        return replace(self, spec=self.spec.up_to(self.spec.symbols(*given)))


def output_names(made: Exported) -> tuple[str, ...]:
    """Return names for the outputs of a flat program: their places in the module's output."""
    graph = made.call.module.program.graphs["eval"]
    number = len(made.program.graph_signature.user_outputs)
    texts = [f"output_{index}" for index in range(number)] if number > 1 else ["output"]
    if isinstance(graph._codegen, _PyTreeCodeGen):
        given: Any = next(iter(graph.find_nodes(op="output"))).args[0]
        spec: Any = graph._codegen.pytree_info.out_spec
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(given, spec))
        tensors = [path for path, node in paths if example_value(node) is not None]
        named = [pytree.keystr(path) if path else "output" for path in tensors]
        texts = named if len(named) == number else texts
    found = [f"output{text}" if text[:2].strip("[").isdigit() else text for text in texts]
    return tuple(distinct_names([text.strip("[]'.") for text in found]))


def exported(call: Call, dynamic_shapes: Any) -> Exported:
    """Return the graph of a call as an ExportedProgram.

    Its nodes have the metadata of the source's own export, and it takes a batch of 1 where the
    captured graph does.

    Raises:
        ExportError: torch.export refuses the graph.
        InputError: the captured graph does not hold for the inputs.
    """
    failure: Exception | None = None
    program = _program(call)
    for example in _examples(call, dynamic_shapes):
        try:
            with torch.no_grad():  # for inference: nothing has to mark where gradients stop
                found = run_export(program, example)
        except Exception as error:  # noqa: BLE001 - torch.export raises whatever the graph does
            failure = error
            continue
        _refuse_own_ops(found)
        spec = contract_with_small_sizes(program, found, example, _of_one(call))
        plain = _with_plain_state(found)
        if plain is not found:
            drop_small_guards(spec, plain, _of_one(call))
        return Exported(plain, call, spec)
    raise ExportError(f"torch.export refuses the graph: {failure}") from failure


def _with_plain_state(program: ExportedProgram) -> ExportedProgram:
    """Return a program whose state has the parts of quantised weights, as plain tensors.

    A file would need the package of their classes to be read.
    """
    if not any(is_quantised(tensor) for tensor in program.state_dict.values()):
        return program
    return program.run_decompositions({})


def _refuse_own_ops(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxlora":
            raise ExportError(f"the graph calls {node.target}, which needs fxlora to run.")


def _program(call: Call) -> nn.Module:
    """Return a plain nn.Module whose forward checks the input contract and runs the graph.

    torch.export interprets the graph of a GraphModule without calling its forward, so the exported
    program would lose the guards of the capture.
    """
    module = call.module
    run = _runner(call)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, values = call.taken(args, kwargs)
        module._check(args, kwargs)
        contract = module.contract
        if contract is not None and contract.defaults:
            args, kwargs = contract.without_defaults(args, kwargs)
        output = run(args, kwargs, values)
        if contract is not None and contract.updates:
            contract.update(args, kwargs, output)
        return _apart(call, (args, kwargs), call.returned(output))

    forward.__dict__["__signature__"] = _signature(call)
    where, name = root_class(module.program.graphs["eval"])
    program: nn.Module = type(name, (nn.Module,), {"forward": forward, "__module__": where})()
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        program.__dict__[name] = module.__dict__[name]
    return program.eval()


def _apart(call: Call, given: Any, returned: Any) -> Any:
    """Return outputs of which none is an input itself, of a flat program.

    Inputs and outputs have names in its file, and exporters give one value one name.
    """
    if not call.form.flat:
        return returned
    inputs = {id(leaf) for leaf in pytree.tree_leaves(given)}
    return tuple(leaf.clone() if id(leaf) in inputs else leaf for leaf in returned)


def _runner(call: Call) -> Callable[[Any, Any, Mapping[str, Any]], Any]:
    """Return the function that runs the graph inside the export."""
    module = call.module
    if _has_hooks(module):  # of submodules that the graph calls: they run in its own code

        def with_hooks(args: Any, kwargs: Any, values: Mapping[str, Any]) -> Any:
            return module.run(args, kwargs)

        if call.form.inputs:
            raise ExportError(
                "a submodule of the module has hooks or is wrapped, and so its adapters cannot be "
                'inputs: take the hooks off, or export with adapters="constants".'
            )
        return with_hooks
    graph = with_places(module.program.graphs["eval"])

    def interpreted(args: Any, kwargs: Any, values: Mapping[str, Any]) -> Any:
        given = {name: values[own] for name, own in call.form.aliases.items() if own in values}
        leaves = _placeholders(module, args, kwargs)
        tracer = Tracer(module._view, graph, given, assertions=not call.form.flat)
        return tracer.run_graph(leaves)

    return interpreted


def _has_hooks(module: Any) -> bool:
    owner = module.__dict__.get("_owner", module)
    blocks = owner.outlined_modules.values()
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return bool(owner.wrapped_blocks()) or any(getattr(b, name) for b in blocks for name in hooks)


def _placeholders(module: ProgramModule, args: Any, kwargs: Any) -> list[Any]:
    """Return the value of each placeholder of a module's graph for a call."""
    if module.contract is not None:
        return [value for _, value in module.contract.pairs(args, kwargs)]
    bound = inspect.signature(type(module).forward).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return list(bound.arguments.values())[1:]


def _signature(call: Call) -> inspect.Signature:
    """Return the signature of the program's forward: torch.export names its inputs so."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["self"]
    if call.form.flat:
        names += distinct_names([*call.names(), *call.form.inputs])
        return inspect.Signature([inspect.Parameter(name, kind) for name in names])
    signature = inspect.signature(type(call.module).forward)
    if call.form.inputs:
        added = inspect.Parameter(ADAPTERS, inspect.Parameter.KEYWORD_ONLY)
        return signature.replace(parameters=[*signature.parameters.values(), added])
    return signature


# ---- examples -----------------------------------------------------------------------------------


def _examples(call: Call, dynamic_shapes: Any) -> list[Example]:
    """Return the examples to try exporting with, in order, as the program takes them."""
    spec = call.module.contract
    if spec is None or dynamic_shapes is not None:
        found = examples_for(call.args, call.kwargs, dynamic_shapes)
    else:
        spec.check(call.args, call.kwargs)
        found = [example_for(spec, call.args, call.kwargs)]
    if not (call.form.flat or call.form.plain or call.form.inputs):
        return found
    return [_as_taken(call, example) for example in found]


def _as_taken(call: Call, example: Example) -> Example:
    """Return an example of the module's call as one of the program's call."""
    shapes = ShapesCollection()
    for leaf, shape in _shapes_of_leaves(call, example):
        if is_tensor(leaf) and shape is not None:
            shapes[leaf] = shape
        elif shape not in (None, Dim.STATIC):
            raise ExportError(
                "in this form a program takes tensors of other sizes, but no other integers: leave "
                "the integer out of dynamic_shapes."
            )
    values = {name: value.detach().clone() for name, value in call.form.inputs.items()}
    args, kwargs = call.given(example.args, example.kwargs, values)
    return Example(args, kwargs, shapes, example.asked, example.patience, example.reordered)


def _shapes_of_leaves(call: Call, example: Example) -> list[tuple[Any, Any]]:
    """Return each leaf of an example's arguments with the specification of its dimensions."""
    found: list[tuple[Any, Any]] = []
    shapes: Any = example.dynamic_shapes
    if shapes is None:
        return found
    if isinstance(shapes, ShapesCollection):
        shapes = shapes.dynamic_shapes(call.module, example.args, example.kwargs)

    def noted(_path: Any, leaf: Any, shape: Any) -> None:
        found.append((leaf, shape))

    combined = _combine_args(call.module, example.args, example.kwargs)
    if isinstance(shapes, tuple | list):
        shapes = dict(zip(combined, shapes, strict=True))
    _tree_map_with_path(noted, combined, shapes)
    return found


def _of_one(call: Call) -> Iterator[Example]:
    """Yield the calls with a batch of 1, which torch.export's checks of strides may exclude."""
    if call.module.contract is not None:
        for args, kwargs in resized(call.module.contract, call.args, call.kwargs, 1):
            yield Example(*call.given(args, kwargs, call.form.inputs), None)
