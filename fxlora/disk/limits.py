"""Where PEFT computes another function from an adapter than W0 + s·BA at every read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..fx.calls import kind_of, module_classes
from ..lora.ops import is_lookup
from ..module import CapturedModule
from ..module.fsdp import has_fsdp
from ..module.skeleton import skeleton
from ..passes import Remove
from ..plan import Entry, Plan
from ..reads.readers import Reader
from ..reads.sites import Site, find_sites
from ..tables import some
from .layer_forwards import is_inside, why_not_around, why_not_class, why_not_layer
from .peft import LAYERS, Group, groups_of, is_bare, is_transposed, owner_of
from .peft_config import name_suffixes
from .saved import Saved, paths_of

# Those that PEFT has an equal of; a frozen A ("fa") is a matter of training.
VARIANTS = ((), ("from_weight",), ("dora",), ("from_weight", "dora"))


def unadapted(module: CapturedModule) -> CapturedModule:
    """Return a module without its adapters (and maybe without values), to read its graphs."""
    if not module.known.adapters:
        return module
    return Remove(restore=False)(skeleton(module) if has_fsdp(module) else module)


def why_not(base: CapturedModule, plan: Plan, saved: Saved, *, from_peft: str = "") -> str | None:
    """Return why PEFT would compute another result from this adapter, or None if it would not.

    Args:
        base: the module without adapters.
        plan: the adapters.
        saved: the modules that PEFT wraps to train in full.
        from_peft: the method ("LORA") by which PEFT has made the adapter on this model, or "". If
            it has, it can wrap the layers, and one of an unknown class counts by what its forward
            does.
    """
    readers: dict[str, list[Reader]] = {}
    for site in find_sites(base):
        for name in site.names:
            readers.setdefault(name, []).extend(site.readers)
    pairs = [entry for entry in plan if not entry.tokens]
    if len({"dora" in entry.variants for entry in pairs}) > 1:
        return "DoRA only at some sites"
    paths = Counter(id(held) for _, held in base.named_modules(remove_duplicate=False))
    for group in groups_of(plan):
        entry = group[0]
        found = {id(r): r for name in entry.names for r in readers.get(name, ())}
        shared = paths[id(base.get_submodule(owner_of(entry)))] > 1
        reads = list(found.values())
        if entry.tokens:
            apart = {n for e in plan if e.tokens not in ((), entry.tokens) for n in e.names}
            why = _why_not_tokens(base, entry, reads, apart, from_peft)
        else:
            why = _why_not_these(group) or _why_not_read(base, entry, reads, shared, from_peft)
        if why:
            return f"'{entry.site}': {why}"
    return _why_not_together(base, pairs) or (None if from_peft else _why_not_apart(plan, saved))


def is_plain_layer(site: Site) -> bool:
    """Whether a weight is that of a layer of its own, of a class that PEFT wraps."""
    owner, _, last = site.parameter.rpartition(".")
    return (
        last == "weight"
        and len(site.names) == 1
        and all(
            reader.call_site == owner
            and reader.op is not None
            and module_classes(reader.node)[-1:] == [LAYERS.get(site.op)]
            for reader in site.readers
        )
    )


def _why_not_these(group: Group) -> str | None:
    """Return why PEFT has no equal of the entries of one weight, or None."""
    entry = group[0]
    if any(tuple(v for v in e.variants if v != "fa") not in VARIANTS for e in group):
        return f"variant {', '.join(entry.variants)}"
    if entry.part and len({(e.scaling, e.variants) for e in group}) > 1:
        return "parts that are scaled or start differently"
    if "dora" in entry.variants and (entry.part or is_bare(entry)):
        return "DoRA of a part" if entry.part else "DoRA of a bare parameter"
    if entry.part and entry.layout.roles not in ("oi", "io"):
        return "parts of a weight that is not a matrix"
    return None


def _why_not_tokens(
    base: CapturedModule, entry: Entry, readers: Sequence[Reader], apart: set[str], from_peft: str
) -> str | None:
    """Return why PEFT would not replace rows at all reads of a weight, or None.

    It replaces them in the forwards of embeddings and linear layers: of a module, and of those that
    transformers ties to its input embedding, unless these have other rows of their own (`apart`).
    """
    owners = {name.rpartition(".")[0] for name in entry.names}
    source = base.known.embedding if base.known.model_type else ""
    if len(owners) > 1 and source not in owners:
        return "rows that tied modules share, other than the input embedding of transformers"
    if source in owners and not apart.issuperset(entry.tied):
        return f"rows that {some(entry.tied)} does not share, which transformers ties to them"
    ends = tuple(owners if len(owners) == 1 else (source,))
    if more := [path for path in paths_of(base) if path.endswith(ends) and path not in owners]:
        return f"a module whose name is the end of '{more[0]}', in which PEFT replaces rows too"
    for reader in readers:
        known = reader.kind in ("embedding", "linear") and not reader.through
        if reader.call_site not in owners or not known:
            return f"{reader.describe()}, where PEFT does not replace rows"
        if not from_peft and (why := why_not_class(reader, reader.kind)):
            return why
        assert reader.op is not None
        given = reader.op.input_of(reader.node, reader.weight)
        if why := why_not_around(reader.call_site, reader.node, given, reader.kind):
            return why
    return None


def _why_not_read(
    base: CapturedModule, entry: Entry, readers: Sequence[Reader], shared: bool, from_peft: str
) -> str | None:
    """Return why PEFT would not adapt all reads of a weight, or None.

    Args:
        base: the module without adapters.
        entry: an entry of the weight.
        readers: all reads of the weight.
        shared: whether its module has several paths.
        from_peft: as in `why_not`.
    """
    owner = owner_of(entry)
    if not owner:
        return "a parameter of the model itself"
    if shared:
        return "one module under several names"
    for reader in readers:
        below = is_bare(entry) and reader.call_site.startswith(f"{owner}.")
        if reader.through and _is_used_inside(base, entry, lookups=bool(from_peft)):
            continue
        if reader.call_site != owner and not below:
            owners = {name.rpartition(".")[0] for name in entry.names}
            if reader.call_site in owners and not from_peft:
                return (
                    f"one pair for {some(entry.names)}, which are tied, where PEFT has one for "
                    'each (tied="each", to train them so)'
                )
            return f"{reader.describe()} outside of the forward of '{owner}'"
    for reader in readers:
        # A module of torch.nn may keep its weights elsewhere, too, as nn.LSTM does; other modules
        # read the parameter, which PEFT replaces while their forward runs.
        if reader.op is None and not (is_bare(entry) and _is_of_users(reader)):
            return f"read by {reader.kind}"
    if is_bare(entry):
        return _why_not_parameter(base, entry)
    whys = (why_not_layer(entry, reader, from_peft) for reader in readers)
    return next(filter(None, whys), None)


def _is_used_inside(base: CapturedModule, entry: Entry, lookups: bool) -> bool:
    """Whether the first ops on a weight are all in the forward of its module, with later ones.

    So it is with a lookup by fixed indices. PEFT replaces a bare parameter during the forward.

    Args:
        base: the module without adapters.
        entry: an entry of the weight.
        lookups: whether the ops must be lookups, alone in the forward, as PEFT's own layer is.
    """
    owner = owner_of(entry)
    uses = [
        user
        for graph in base.distinct_graphs()
        for name in entry.names
        for node in graph.find_nodes(op="get_attr", target=name)
        for user in node.users
    ]
    inside = bool(uses) and all(is_inside(user, owner) for user in uses)
    if not (inside and lookups):
        return inside
    return all(
        is_lookup(kind_of(user)) and not why_not_around(owner, user, user.args[1], kind_of(user))
        for user in uses
    )


def _is_of_users(reader: Reader) -> bool:
    """Whether the class of the module that reads is known, and not one of torch.nn."""
    classes = module_classes(reader.node)
    return bool(classes) and not classes[-1].startswith("torch.nn.")


def _why_not_parameter(base: CapturedModule, entry: Entry) -> str | None:
    """Return why PEFT's wrapper of a bare parameter would compute a different result, or None."""
    if entry.layout.roles not in ("oi", "io", "eoi", "eio"):
        return f"a parameter laid out as {entry.layout.roles}"
    if entry.dropout:
        return "lora_dropout on a bare parameter"
    square = entry.layout.roles == "eio" and entry.shape[1] == entry.shape[2]
    if square and is_transposed(base, entry) is None:
        return "a stack of square matrices (in, out), which PEFT may take for (out, in)"
    return None


def _why_not_together(module: CapturedModule, plan: Sequence[Entry]) -> str | None:
    """Return why one configuration of PEFT cannot target exactly these weights, or None."""
    bare = {e.parameter: owner_of(e) for e in plan if is_bare(e)}
    layers = {owner_of(e) for e in plan if not is_bare(e)}
    if both := layers & set(bare.values()):
        return f"'{both.pop()}' targeted both as a layer and by a parameter"
    for name, _ in module.named_parameters(remove_duplicate=False):
        if name not in bare and any(end in bare for end in name_suffixes(name)):
            return f"a parameter whose name is the end of '{name}', which PEFT would adapt too"
    return None


def _why_not_apart(plan: Plan, saved: Saved) -> str | None:
    """Return which parameter trains apart from its tie, but not in a module that PEFT wraps."""
    name = next((name for name in plan.untied if not saved.holds(name)), None)
    return name and f"'{name}' trains apart from {', '.join(plan.untied[name])}"
