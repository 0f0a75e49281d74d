"""The laws that are proved without a run: about the graphs and the weights of a module."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter

from torch import Tensor, fx

from ..errors import InjectError, VerificationError
from ..fx.alike import difference, first_difference
from ..fx.calls import kind_of, source_line
from ..module import CapturedModule
from ..module.program import MODES
from ..passes import Inject, Remove
from ..passes.adapted import factors
from ..passes.structure import MARK, Insertion, insertions
from ..plan import Entry
from ..tables import some
from .coverage import adapted_names
from .exact import exact_weight
from .runs import fixed_seed, same

# ---- graphs -------------------------------------------------------------------------------------


def check_code(module: CapturedModule, what: str) -> None:
    """What runs is what the graphs say."""
    if stale := module.stale_graphs():
        raise VerificationError(
            f"code: in {what}, the graph of {some(stale)} was edited, and the code that runs is "
            "still the one of before. Call refresh() on the captured module after an edit."
        )


def without_adapters(module: CapturedModule) -> CapturedModule:
    """The module less its adapters; heads and buffers stay as they were trained."""
    try:
        return Remove(restore=False)(module).eval()
    except (AttributeError, KeyError, RuntimeError) as error:  # KeyError: of no entry of the plan
        raise VerificationError(
            f"coverage: the adapters cannot be taken out of the graphs again ({error})."
        ) from error


def check_modes(module: CapturedModule, base: CapturedModule) -> CapturedModule:
    """Each mode's graph is what injection makes of the base, node for node.

    So every read of an adapted weight has its adapter.

    Returns:
        what injection makes of the base: the module's graphs over tensors of its own, with B = 0.
    """
    assert module.plan is not None
    entries = tuple(dataclasses.replace(e, init="kaiming_uniform") for e in module.plan)  # B = 0
    try:
        with fixed_seed(module):
            again = Inject(dataclasses.replace(module.plan, entries=entries))(base)
    except InjectError as error:
        raise VerificationError(f"coverage: the plan does not fit the graphs: {error}") from error
    for ours, theirs in zip(module.programs, again.programs, strict=True):
        for mode in MODES:
            where = f"the {mode} graph{_of(ours.path)}"
            graph, expected = ours.graphs[mode], theirs.graphs[mode]
            if pair := first_difference(graph, expected):
                added = insertions(again, expected)
                _refuse_missing(insertions(module, graph), added, where)
                _refuse_bypass(pair, {insertion.output: insertion for insertion in added}, where)
                raise VerificationError(
                    f"modes agree: {where} is not the captured one with the plan's adapters; "
                    f"{_around(module, graph, pair[0])} it has {pair[0].format_node()} for "
                    f"{pair[1].format_node()}."
                )
    return again


def _refuse_missing(found: list[Insertion], expected: list[Insertion], where: str) -> None:
    """Raise where a read has no adapter, with its op and line."""
    for site, read in Counter(map(_place, expected)) - Counter(map(_place, found)):
        raise VerificationError(
            f"coverage: '{site}' is read without its adapter by {read} in {where}."
        )


def _refuse_bypass(
    pair: tuple[fx.Node, fx.Node], adapted: dict[fx.Node, Insertion], where: str
) -> None:
    """Raise where a node takes what an adapter adds to, and not the sum."""
    ours, theirs = pair
    for taken, expected in zip(ours.all_input_nodes, theirs.all_input_nodes, strict=False):
        if expected in adapted and MARK not in taken.meta:
            raise VerificationError(
                f"coverage: '{adapted[expected].entry.site}': {_read(ours)} goes past its adapter "
                f"in {where}."
            )


def _place(insertion: Insertion) -> tuple[str, str]:
    """Site of an adapter, and the op and the line that its weight is read at."""
    node = insertion.base if insertion.form == "branch" else next(iter(insertion.output.users))
    if node.target is operator.getitem:  # of an op with several results
        (node,) = node.all_input_nodes
    return insertion.entry.site, _read(node)


def _read(node: fx.Node) -> str:
    line = source_line(node)
    return f"{kind_of(node)} at {line}" if line else kind_of(node)


def _around(module: CapturedModule, graph: fx.Graph, node: fx.Node) -> str:
    """Which adapter a node is part of, or comes before."""
    for insertion in insertions(module, graph):
        if insertion.output.graph is node.graph and not insertion.output < node:
            return f"at '{insertion.entry.site}'"
    return "behind every adapter"


def check_folded_graphs(base: CapturedModule, folded: CapturedModule) -> None:
    """The folded graphs are the captured ones, node for node."""
    if [p.path for p in base.programs] != [p.path for p in folded.programs]:
        raise VerificationError("fold: the folded module has other regions than the captured one.")
    for before, after in zip(base.programs, folded.programs, strict=True):
        for mode in MODES:
            if found := difference(before.graphs[mode], after.graphs[mode]):
                raise VerificationError(
                    f"fold: the folded {mode} graph{_of(before.path)} is not the captured one "
                    f"node for node: {found}."
                )


def check_ties(module: CapturedModule, folded: CapturedModule) -> None:
    """Names of one weight are names of one folded weight where they are adapted alike."""
    found = {name: names for names in folded.aliases().values() for name in names}
    for (first, *others), _ in _kept(module):
        there = set(found.get(first, ()))
        if there != {first, *others}:
            what = "lost" if set(others) - there else "made"
            raise VerificationError(
                f"fold: a tie is {what}. '{first}' is adapted like {some(others) or 'no other'}, "
                f"and is one folded parameter with {some(sorted(there - {first})) or 'no other'}."
            )


def _kept(module: CapturedModule) -> list[tuple[list[str], list[Entry]]]:
    """The parameters that a fold leaves: the names of each, and the entries folded into it."""
    names = adapted_names(module)
    adapters = _names_of_adapters(module)
    found: list[tuple[list[str], list[Entry]]] = []
    for aliases in module.aliases().values():
        entries = [e for e in module.plan or () if e.parameter in aliases]
        alike: dict[tuple[str, ...], list[str]] = {}
        for name in aliases:
            into = tuple(e.name_a for e in entries if name in names[e.name_a])
            alike.setdefault(into, []).append(name)
        found += [
            (group, [e for e in entries if e.name_a in into])
            for into, group in alike.items()
            if group[0] not in adapters
        ]
    return found


def _of(path: str) -> str:
    return f" of '{path}'" if path else ""


# ---- weights ------------------------------------------------------------------------------------


def check_adapters(module: CapturedModule) -> None:
    """The plan's tensors are there and train, and leave padding rows as they are."""
    for entry in module.plan or ():
        for name, shape in entry.tensors.items():
            tensor = _parameter(module, name)
            if tensor is None or tensor.shape != shape:
                raise VerificationError(
                    f"adapter: '{name}' of '{entry.site}' is "
                    f"{'missing' if tensor is None else tuple(tensor.shape)}, where the plan has "
                    f"{shape}."
                )
        if entry.padding_idx is not None and _moves_padding(module, entry, entry.padding_idx):
            raise VerificationError(
                f"adapter: '{entry.name_a}' moves row {entry.padding_idx} of '{entry.site}', its "
                f"padding_idx, which no gradient reaches. Set column {entry.padding_idx} to zero."
            )
    trains = [*(name for entry in module.plan or () for name in entry.trainable), *module.trained]
    frozen = [name for name in trains if not module.get_parameter(name).requires_grad]
    if frozen and len(frozen) < len(trains):  # all of them: a module that is only to be run
        raise VerificationError(
            f"adapter: {some(frozen)} is to train by the plan, and requires no gradients: an "
            "optimizer would leave it as it is. Call requires_grad_(True) on it."
        )


def _parameter(module: CapturedModule, name: str) -> Tensor | None:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return None


def _moves_padding(module: CapturedModule, entry: Entry, row: int) -> bool:
    a, _ = factors(entry, {name: module.get_parameter(name).detach() for name in entry.tensors})
    return bool(a.select(-1, row).any())


def check_base(module: CapturedModule) -> None:
    """Nothing has written to a weight that the plan does not train, and nothing is about to."""
    assert module.plan is not None
    if stray := module.unplanned():
        raise VerificationError(
            f"base unchanged: '{stray[0]}' requires gradients and is not in the plan, so that "
            "training changes the base. Freeze it, or put its module into modules_to_save."
        )
    changed = module.changed_weights()
    sites = [entry.site for entry in module.plan if entry.parameter in changed]
    if sites:
        raise VerificationError(
            f"base unchanged: the weight under '{sites[0]}' was written to since the adapter was "
            "injected" + (f", and so were those under {some(sites[1:])}." if sites[1:] else ".")
        )
    if changed:
        raise VerificationError(
            f"base unchanged: {some(changed)} has no adapter, and was written to or untied since "
            "the injection. An adapter file would not hold that: put its module into "
            "modules_to_save, or load another base by load_state_dict."
        )


def check_finite(module: CapturedModule) -> None:
    """No adapter holds a NaN or an infinity."""
    for tensor in sorted(module.adapter_parameters()):
        if not bool(module.get_parameter(tensor).isfinite().all()):
            raise VerificationError(
                f"adapter: '{tensor}' holds values that are not finite: the training diverged."
            )


def folded_weights(
    module: CapturedModule, folded: CapturedModule
) -> dict[str, tuple[float, float]]:
    """Error and tolerance of the folded weight of each entry, by the name of its A."""
    found: dict[str, tuple[float, float]] = {}
    for names, entries in _kept(module):
        if entries:
            error = _weight_error(module, folded, names[0], entries)
            found |= {entry.name_a: error for entry in entries}
    return found


def _weight_error(
    module: CapturedModule, folded: CapturedModule, name: str, entries: list[Entry]
) -> tuple[float, float]:
    """Where the error is the largest part of what rounding may do."""
    site = entries[0].site
    weight, found = (m.get_parameter(name).detach() for m in (module, folded))
    if found.dtype != weight.dtype or found.shape != weight.shape:
        raise VerificationError(
            f"fold: '{site}' is folded to {found.dtype} {tuple(found.shape)} from {weight.dtype} "
            f"{tuple(weight.shape)}."
        )
    exact = exact_weight(module, entries)
    errors, bounds = (found.double() - exact.value).abs().flatten(), exact.bound.flatten()
    worst = int((errors / bounds).argmax())  # a NaN, if there is one
    error, bound = float(errors[worst]), float(bounds[worst])
    if not error <= bound:
        raise VerificationError(
            f"fold: '{site}': its folded weight is not W0 + s·BA (off by {error:.3g} where "
            f"rounding allows {bound:.3g})."
        )
    return error, bound


def check_the_rest(module: CapturedModule, folded: CapturedModule) -> None:
    """What is not adapted comes through the fold as it is, buffers too."""
    adapted = {name for names in adapted_names(module).values() for name in names}
    ours, theirs = _tensors(module), _tensors(folded)
    for name in sorted((ours.keys() | theirs.keys()) - adapted - _names_of_adapters(module)):
        if name not in ours or name not in theirs or not same(ours[name], theirs[name]):
            raise VerificationError(
                f"fold: '{name}' has no adapter, and is another tensor in the folded module."
            )


def _names_of_adapters(module: CapturedModule) -> set[str]:
    """All names of the adapters' tensors: a module with two names has its adapter under both."""
    own = module.adapter_parameters()
    groups = module.aliases().values()
    return {name for names in groups if not own.isdisjoint(names) for name in names}


def _tensors(module: CapturedModule) -> dict[str, Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def check_shared_memory(module: CapturedModule, folded: CapturedModule) -> None:
    """What a folded module has in common with the source cannot train in it."""
    ours = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for name, parameter in folded.named_parameters():
        if parameter.requires_grad and parameter.untyped_storage().data_ptr() in ours:
            raise VerificationError(
                f"fold: '{name}' requires gradients in the folded module, and its memory is the "
                "source model's: training it would change that. Freeze it, or give it a copy."
            )
