"""Where PEFT's wrapper of a layer computes something else than s·BA of the layer's input.

PEFT wraps a module of a class that it knows, or of one that extends it, and adds the branch of the
module's input to its output.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

from torch import fx

from ..fx.calls import call_site, example_value, kind_of, module_classes, named_argument
from ..plan import Entry
from ..reads.readers import Reader
from .peft import LAYERS, owner_of

# Its fused kernel in eval mode reads the weights without calling the forwards of their modules.
FUSED_LAYER = "torch.nn.modules.transformer.TransformerEncoderLayer"
# Ops around a layer's own that neither mix nor change entries. PEFT's branch passes around them.
_RESHAPES = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "_reshape_alias",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "alias",
        "clone",
        "contiguous",
    ]
)
_TORCHS = "torch.nn.modules."
_CASTS = frozenset(("_to_copy", "to", "type_as"))


def why_not_class(reader: Reader, kind: str) -> str | None:
    """Return the class of the module that reads, if PEFT wraps none such by a kind of op."""
    own = _class_of(reader)
    return None if LAYERS[kind] in _layer_class(own) else f"read by {own}"


def _class_of(reader: Reader) -> str:
    """Return the class of the module that reads, for messages, too."""
    return (module_classes(reader.node) or ["a module of unknown class"])[-1]


def _layer_class(name: str) -> tuple[str, ...]:
    """Return the name of a class and, if it is none of torch.nn, of the one there that it extends.

    The class is looked up among the modules that are imported; one that is not found has no other.
    """
    if name.startswith(_TORCHS):
        return (name,)
    module = name
    while module and module not in sys.modules:
        module = module.rpartition(".")[0]
    found: Any = sys.modules.get(module)
    for attribute in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, attribute, None)
    above = [f"{c.__module__}.{c.__qualname__}" for c in getattr(found, "__mro__", ())]
    layers = (c for c in above if c.startswith(_TORCHS) or c == LAYERS["addmm"])
    return (name, *itertools.islice(layers, 1))


def why_not_layer(entry: Entry, reader: Reader, from_peft: str) -> str | None:
    """Return why PEFT's wrapper of a layer would compute another result at this read, or None."""
    own = _class_of(reader)
    if reader.through or (not from_peft and why_not_class(reader, entry.op)):
        return f"read by {own}"
    if FUSED_LAYER in module_classes(reader.node):
        return "in a torch.nn.TransformerEncoderLayer, whose fused kernel may bypass its layers"
    if entry.layout.kernel(entry.shape):
        padded = [n for n in reader.node.all_input_nodes if n.op != "get_attr"]
        dilation = named_argument(reader.node, "dilation") or [1]
        alike = from_peft == "LOKR"  # the branch has the groups and the dilation of its layer
        if named_argument(reader.node, "groups") not in (None, 1) and not alike:
            return "a grouped convolution"
        dilated = any(n != 1 for n in dilation) and not alike
        if dilated or any(call_site(n) == owner_of(entry) for n in padded):
            return "a convolution with dilation, or with padding by another op"
    assert reader.op is not None
    given = reader.op.input_of(reader.node, reader.weight)
    why = why_not_around(owner_of(entry), reader.node, given, reader.kind)
    return f"read by {own}: {why}" if why and not from_peft and own != LAYERS[entry.op] else why


def why_not_around(owner: str, op: fx.Node, given: Any, kind: str) -> str | None:
    """Return what else a layer's forward, or a hook on it, computes around its op, or None.

    PEFT adds s·BA of the layer's input to the layer's output.

    Args:
        owner: the layer's path.
        op: the call of its op.
        given: the op's input.
        kind: the op's kind.
    """
    while isinstance(given, fx.Node) and is_inside(given, owner):
        if not _keeps_entries(given):
            return f"{kind_of(given)} in the forward of '{owner}', before its {kind}"
        given = given.all_input_nodes[0]
    ahead = [op]
    while ahead:
        value = ahead.pop()
        for user in value.users:
            if not user.users or not is_inside(user, owner):
                continue
            if not _passes_on(user, value, owner):
                return f"{kind_of(user)} in the forward of '{owner}', after its {kind}"
            ahead.append(user)
    return None


def is_inside(node: fx.Node, owner: str) -> bool:
    """Whether a call is made in a module's forward, by a node with inputs."""
    return node.op not in ("placeholder", "get_attr") and call_site(node) == owner


def _passes_on(user: fx.Node, value: fx.Node, owner: str) -> bool:
    """Whether a call keeps a branch that is added to its input: reshapes, a bias, PEFT's scale.

    PEFT multiplies the branch of an embedding by the `embed_scale` of its layer.
    """
    kind, others = kind_of(user), [n for n in user.all_input_nodes if n is not value]
    held = [str(n.target) for n in map(_unreshaped, others) if n.op == "get_attr"]
    if kind == "mul":
        return held == [f"{owner}.embed_scale"] and len(others) == 1
    if kind in ("add", "add_"):
        return held == [f"{owner}.bias"] and len(others) == 1
    return _keeps_entries(user) or kind == "getitem"


def _keeps_entries(node: fx.Node) -> bool:
    """Whether a call only reshapes its first input."""
    if kind_of(node) in _CASTS:
        before, after = example_value(node.args[0]), example_value(node)
        return before is not None and after is not None and before.dtype == after.dtype
    return kind_of(node) in _RESHAPES


def _unreshaped(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and kind_of(node) in _RESHAPES | _CASTS:
        node = node.all_input_nodes[0]
    return node
