"""Keep each torch.autograd.Function in a captured graph as one call, with its own backward.

torch.export and the tracer both trace a Function's forward op by op and drop its backward. The
graph would have the right outputs but, silently, different gradients: a straight-through estimator
would have none. Therefore, during a capture, each Function's forward is one opaque op, and in the
finished graph it is one call of the Function. An export of that graph, which is for inference,
traces the Function's forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from ...errors import CaptureError
from ...fx.effects import arguments_of
from ...fx.literals import literal
from ...module.memory import memory_id
from ...module.quantised import is_quantised, stored
from .opaque import opaque_node
from .patches import patched

_OPEN = object()  # marks a tensor or symbolic size among the arguments of a FunctionCall


class FunctionCall:
    """A node's target that calls a Function's `apply`.

    The node's arguments are the tensors and symbolic sizes; this object holds the other arguments.
    """

    writes_nothing = True  # see _RefuseOutsideTensors

    def __init__(self, function: type[Function], args: tuple[Any, ...]) -> None:
        leaves, self.structure = pytree.tree_flatten(args)
        self.function = function
        self.leaves = tuple(_OPEN if _is_open(leaf) else leaf for leaf in leaves)
        self.__name__ = self.__qualname__ = function.__name__  # torch.fx names the call by it

    def __call__(self, *values: Any) -> Any:
        given = iter(values)
        leaves = [next(given) if leaf is _OPEN else leaf for leaf in self.leaves]
        apply: Callable[..., Any] = self.function.apply
        return apply(*pytree.tree_unflatten(leaves, self.structure))

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.function)

    def _key(self) -> tuple[Any, ...]:
        return self.function, self.structure, literal(self.leaves)


class Functions:
    """The calls of Functions during one capture; an opaque op refers to its call by index."""

    def __init__(self) -> None:
        self.calls: list[FunctionCall] = []
        self.outputs: list[Any] = []  # each call's result on fake tensors
        self.inside = False  # whether a Function's own forward is running

    def forward(self, function: type[Function], args: tuple[Any, ...]) -> Any:
        """Add one node for a call of a Function, in place of its forward's ops."""
        call = FunctionCall(function, args)
        values = [leaf for leaf in pytree.tree_leaves(args) if _is_open(leaf)]
        proxy = next((value for value in values if isinstance(value, fx.Proxy)), None)
        if proxy is not None:
            return proxy.tracer.create_proxy("call_function", call, tuple(values), {})
        self.calls.append(call)
        self.outputs.append(None)
        if (
            any(map(is_quantised, values))
            and (kept := self._of_quantised(call, values)) is not None
        ):
            return kept
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        sizes = [value for value in values if not isinstance(value, torch.Tensor)]
        kinds = [isinstance(value, torch.Tensor) for value in values]
        found = iter(_OP(len(self.calls) - 1, tensors, sizes, kinds))
        return pytree.tree_map_only(torch.Tensor, lambda _: next(found), self.outputs[-1])

    def _of_quantised(self, call: FunctionCall, values: list[Any]) -> torch.Tensor | None:
        """Add the node for a call on a quantised tensor, which no registered op takes."""
        sizes = [value for value in values if not isinstance(value, torch.Tensor)]

        def result() -> torch.Tensor | None:
            found = self.fake(len(self.calls) - 1, values)
            return found[0] if isinstance(self.outputs[-1], torch.Tensor) else None

        kinds = [isinstance(value, torch.Tensor) for value in values]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        others, number = (sizes, kinds), len(self.calls) - 1
        return opaque_node(_OP_OF_QUANTISED, number, tensors, others, call.__name__, result)

    def fake(self, number: int, values: list[Any]) -> list[torch.Tensor]:
        """Run the Function's forward on fake tensors, and return the tensors among its outputs."""
        call = self.calls[number]
        self.inside = True
        try:
            with torch.no_grad(), _RefuseOutsideTensors(call, values):
                result = call(*values)
        finally:
            self.inside = False
        if isinstance(result, list):
            result = tuple(cast("list[Any]", result))
        self.outputs[number] = result
        leaves = result if isinstance(result, tuple) else (result,)
        # an output may be an input or alias one, which a custom op must not return
        return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def restore(self, module: fx.GraphModule) -> None:
        """Replace the opaque ops in a graph and its nested graphs by calls of the Functions."""
        for inner in module.modules():
            if isinstance(inner, fx.GraphModule):
                found = [
                    node
                    for target in (_OP, _OP_OF_QUANTISED)
                    for node in inner.graph.find_nodes(op="call_function", target=target)
                ]
                for node in found:
                    self._restore(node)
                if found:
                    inner.recompile()

    def _restore(self, node: fx.Node) -> None:
        """Replace an opaque op, which returns a list of only the tensors, by its call."""
        number, tensors, sizes, kinds = cast("tuple[Any, ...]", node.args)
        sources = {True: iter(tensors), False: iter(sizes)}
        of_list = node.target is _OP
        node.target = self.calls[number]
        node.args = tuple(next(sources[is_tensor]) for is_tensor in kinds)
        result = self.outputs[number]
        places = (
            [i for i, v in enumerate(result) if isinstance(v, torch.Tensor)]
            if isinstance(result, tuple)
            else None
        )
        for user in list(node.users) if of_list else ():
            assert user.target is operator.getitem
            if places is None:
                user.replace_all_uses_with(node)
                node.graph.erase_node(user)
            else:
                user.args = (node, places[cast("int", user.args[1])])


_active: list[Functions] = []  # a stack: the capture in progress is last


@contextmanager
def own_forwards() -> Generator[None]:
    """Within the context, Functions run their own forwards, as inside of a Function."""
    functions = _active[-1] if _active else Functions()
    inside, functions.inside = functions.inside, True
    try:
        yield
    finally:
        functions.inside = inside


@contextmanager
def opaque_functions() -> Generator[Functions]:
    """Within the context, every Function's forward is one opaque op, however `apply` is reached."""
    functions = Functions()
    with ExitStack() as patches:

        def watch(function: type[Function]) -> None:
            if _is_torchs_own(function):
                return
            forward = staticmethod(_replacement(functions, function))
            patches.enter_context(patched(function, forward=forward))

        for function in list(_subclasses(Function)):
            watch(function)
        # subclasses that a forward defines
        patches.enter_context(patched(Function, __init_subclass__=classmethod(watch)))
        _active.append(functions)
        try:
            yield functions
        finally:
            _active.pop()


def _replacement(functions: Functions, function: type[Function]) -> Callable[..., Any]:
    """Return a forward that becomes one node when traced, and is the original otherwise."""
    original = function.forward
    takes_context = function.setup_context is Function.setup_context

    def forward(*args: Any) -> Any:
        own = args[1:] if takes_context else args
        traced = any(isinstance(v, FakeTensor | fx.Proxy) for v in pytree.tree_leaves(own))
        if functions.inside or not traced:
            return original(*args)
        return functions.forward(function, own)

    return forward


def _subclasses(of: type[Function]) -> Iterator[type[Function]]:
    """Yield all subclasses except those that tracing itself is made of."""
    for function in of.__subclasses__():
        if not _is_torchs_own(function):
            yield function
            yield from _subclasses(function)


def _is_torchs_own(function: type[Function]) -> bool:
    """Whether a Function is of a module that tracing itself is made of."""
    return function.__module__.startswith("torch._")


def _is_open(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor | torch.SymInt | fx.Proxy)


class _RefuseOutsideTensors(TorchDispatchMode):
    """Refuse a Function's forward that reads tensors other than its arguments, or writes to those.

    The graph would not show that the Function reads a weight which it reaches through a closure.
    """

    def __init__(self, call: FunctionCall, values: list[Any]) -> None:
        super().__init__()
        self.call = call
        tensors = (value for value in values if isinstance(value, torch.Tensor))
        self.given = {memory_id(part) for tensor in tensors for part in stored(tensor)}
        self.known = set(self.given)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, FakeTensor) and memory_id(value) not in self.known:
                raise self._refusal("reads a weight or an activation besides its arguments")
        for argument, given in arguments_of(func, args, kwargs):
            written = argument.alias_info and argument.alias_info.is_write
            for value in pytree.tree_leaves(given) if written else ():
                if isinstance(value, torch.Tensor) and memory_id(value) in self.given:
                    raise self._refusal("writes to its arguments")
        result = func(*args, **kwargs)
        self.known |= {
            memory_id(v) for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)
        }
        return result

    def _refusal(self, does: str) -> CaptureError:
        advice = (
            "Use torch.utils.checkpoint with use_reentrant=False."
            if self.call.function is CheckpointFunction
            else "Pass every tensor to apply(), and return results instead of writing to arguments."
        )
        return CaptureError(
            f"the forward of the autograd.Function {self.call} {does}, which a graph cannot "
            f"represent. {advice}"
        )


def _fake(
    number: int, tensors: list[torch.Tensor], sizes: list[Any], kinds: list[bool]
) -> list[torch.Tensor]:
    """Run the opaque op on fake tensors; `kinds` says which arguments are tensors."""
    sources = {True: iter(tensors), False: iter(sizes)}
    return _active[-1].fake(number, [next(sources[is_tensor]) for is_tensor in kinds])


_LIBRARY = torch.library.Library("fxlora", "FRAGMENT")
_LIBRARY.define("function(int number, Tensor[] tensors, SymInt[] sizes, bool[] kinds) -> Tensor[]")
torch.library.register_fake("fxlora::function", _fake, lib=_LIBRARY)
_LIBRARY.define(
    "function_of_quantised(int number, Tensor[] tensors, SymInt[] sizes, bool[] kinds) -> Tensor"
)
_OP = torch.ops.fxlora.function.default
_OP_OF_QUANTISED = torch.ops.fxlora.function_of_quantised.default
