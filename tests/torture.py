"""Five measurements of LoRA on a pattern, the same for fxlora and for PEFT.

A and B are drawn at random, since with B = 0 an adapter has no effect. Then, in float64 (or in
the dtype that the pattern asks for):

* effect train, effect eval: each adapter, with all others at zero, changes the output;
* gradient: it reaches every A and B, and equals that of the source called with W + s·BA;
* folded == unfolded: the folded (merged) module has the unfolded module's outputs, in both modes.
  So does the source, called with the folded weights or with W + s·BA in place of W
  (torch.func.functional_call, which does not depend on hooks, wrappers or graphs). So does the
  source with W + s·BA written into its own memory, where the adapter is meant for every name of
  the weight;
* exports: torch.export accepts the unfolded and the folded module, and the programs' outputs are
  the modules'.

PEFT is judged by its own definition: s·BA is the result of its `get_delta_weight`. Each way to
write the target is tried (target_modules, target_parameters, and those that a pattern adds), and
the best outcome counts; the outcome of target_modules is also reported by itself. An adapter of a
tied weight may apply to one name or to all names of it, but to the same ones in forward, backward
and merge. Fused kernels are on, as for users. "(warned)" means that PEFT, or torch's checkpoint,
issued a warning.
"""

from __future__ import annotations

import copy
import itertools
import operator
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxlora

from . import laws
from .laws import Wrong, called_with, distance
from .oracle import adapted
from .patterns import Pattern

CHECKS = ("effect train", "effect eval", "gradient", "folded == unfolded", "exports")
# Worst for the user first. A pattern's verdict is the first of these that occurs in its cells.
VERDICTS = ("silent", "crash", "refused", "right")
CANNOT = "cannot say"  # there is no way to express the target
RANK, ALPHA = 2, 3
EFFECT = 1e-8  # relative to the largest output: rounding is far below, an adapter far above

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    verdict: str
    note: str = ""
    error: Exception | None = None


@dataclass(frozen=True)
class Judgement:
    """The outcome of each check for one library on one pattern."""

    cells: dict[str, Outcome]
    warned: str = ""

    @property
    def verdict(self) -> str:
        found = {outcome.verdict for outcome in self.cells.values()}
        return next((v for v in VERDICTS if v in found), CANNOT)

    @property
    def note(self) -> str:
        """The note of the first cell that has the verdict."""
        return next((o.note for o in self.cells.values() if o.verdict == self.verdict), "")

    @property
    def error(self) -> Exception | None:
        return next((o.error for o in self.cells.values() if o.verdict == self.verdict), None)

    def score(self) -> tuple[int, ...]:
        """Sort key: more right cells first, then fewer silent ones, then fewer crashes."""
        counts = Counter(outcome.verdict for outcome in self.cells.values())
        return counts["right"], -counts["silent"], -counts["crash"]


def judge_fxlora(pattern: Pattern, checks: Collection[str] = CHECKS) -> Judgement:
    return _judge(lambda: FxLora(pattern), checks)


def judge_peft(pattern: Pattern) -> list[Judgement]:
    """Judge each way to write the target: target_modules first, where it can name the weights."""
    ways = pattern.ways_of_peft()
    return [_judge(lambda way=way: Peft(pattern, way)) for way in ways] or [
        Judgement(dict.fromkeys(CHECKS, Outcome(CANNOT)))
    ]


def best(judgements: Sequence[Judgement]) -> Judgement:
    return max(judgements, key=Judgement.score)


def _judge(make: Callable[[], Side], checks: Collection[str] = CHECKS) -> Judgement:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cells = _cells(make, checks)
    said = [str(w.message) for w in caught if {"peft", "checkpoint.py"} & {*Path(w.filename).parts}]
    return Judgement(cells, next((text for text in said if "fan_in_fan_out" not in text), ""))


def _cells(make: Callable[[], Side], checks: Collection[str]) -> dict[str, Outcome]:
    try:
        side = make()
    except Exception as error:  # noqa: BLE001 - any error is an outcome
        # PEFT raises the latter two on purpose; any other error is a crash.
        meant = isinstance(error, fxlora.FxLoraError | ValueError | NotImplementedError)
        outcome = Outcome("refused" if meant else "crash", _line(error), error)
        return dict.fromkeys(checks, outcome)
    every = (_effect_train, _effect_eval, _gradient, _folded, _exports)
    named = zip(CHECKS, every, strict=True)
    return {name: _attempt(check, side) for name, check in named if name in checks}


def _attempt(check: Callable[[Side], None], side: Side) -> Outcome:
    try:
        check(side.copy())
    except Wrong as error:
        return Outcome("silent", str(error), error)
    except fxlora.FxLoraError as error:
        return Outcome("refused", _line(error), error)
    except Exception as error:  # noqa: BLE001 - any error is an outcome
        return Outcome("crash", _line(error), error)
    return Outcome("right")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ---- the two libraries --------------------------------------------------------------------------


class Side:
    """A model adapted by one library, with random A and B, and its source."""

    pattern: Pattern
    source: nn.Module
    args: tuple[Any, ...]
    module: Any

    def copy(self) -> Side:
        return copy.deepcopy(self)

    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return (A, B) of each adapter, by the name of the site or weight that it adapts."""
        raise NotImplementedError

    def deltas(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (adapter, weight's name in the source, s·BA in its shape), for plain LoRA."""
        raise NotImplementedError

    def merged(self) -> nn.Module:
        raise NotImplementedError

    def exported(self, module: Any) -> Callable[..., Any]:
        raise NotImplementedError

    def meanings(self) -> list[dict[str, torch.Tensor]]:
        """Return the merged weights to call the source with, for each valid reading of the rules.

        Tied weights have several readings: an adapter may apply to one name or to all names.
        """
        raise NotImplementedError

    def adapted(self) -> set[int]:
        """Return the ids of the source's weights that have an adapter."""
        raise NotImplementedError


class FxLora(Side):
    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.source, self.args = pattern.built()
        gm = fxlora.capture(self.source, self.args)
        plan = fxlora.match(gm, pattern.fxlora_rules(), **pattern.match)
        self.module = fxlora.inject(gm, plan)
        randomise(self.pairs())
        for entry in plan:
            if entry.padding_idx is not None:  # zero at the start, and training leaves it so
                self.pairs()[entry.site][0].data[:, entry.padding_idx] = 0

    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        get = self.module.get_parameter
        return {e.site: (get(e.name_a), get(e.name_b)) for e in self.module.plan or ()}

    def deltas(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        weights = dict(self.source.named_parameters(remove_duplicate=False))
        for entry in self.module.plan or ():
            if entry.rows != self.pattern.parts.get(entry.part or ""):
                raise Wrong(f"{entry.site} takes the rows {entry.rows}")
            values: dict[str, torch.Tensor] = {
                name: self.module.get_parameter(name) for name in entry.tensors
            }
            if entry.parameter in weights:
                zero = torch.zeros_like(weights[entry.parameter])
                delta = adapted(self.source, self.module, entry, zero, values)
                yield entry.site, entry.parameter, delta

    def meanings(self) -> list[dict[str, torch.Tensor]]:
        """Return one reading: the delta of a tied weight applies to the names in the pattern."""
        if not self.pattern.plain:
            return []
        deltas = list(self.deltas())
        return [_summed(self.source, deltas, self._names(deltas))] if deltas else []

    def _names(self, deltas: list[tuple[str, str, torch.Tensor]]) -> dict[str, list[str]]:
        weights = dict(self.source.named_parameters(remove_duplicate=False))
        found: dict[str, list[str]] = {}
        for site, parameter, _ in deltas:
            tied = [n for n, w in weights.items() if w is weights[parameter]]
            meant = [n for n in tied if n in self.pattern.weights] or tied
            own = [n for n in meant if n in (site, f"{site}.weight")]
            several = sum(weights[other] is weights[parameter] for _, other, _ in deltas) > 1
            found[site] = own if several and own else meant
        return found

    def adapted(self) -> set[int]:
        names = dict(self.source.named_parameters(remove_duplicate=False))
        return {id(names[e.parameter]) for e in self.module.plan or () if e.parameter in names}

    def merged(self) -> nn.Module:
        return fxlora.fold(self.module)

    def exported(self, module: Any) -> Callable[..., Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = fxlora.export(module, Path(folder) / "model.pt2", self.args)
            return torch.export.load(path).module()


class Peft(Side):
    def __init__(self, pattern: Pattern, way: dict[str, Any]) -> None:
        import peft

        self.pattern, self.way = pattern, way
        self.source, self.args = pattern.built()
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **{**pattern.config, **way})
        self.module = peft.get_peft_model(pattern.built()[0], config)
        randomise(self.pairs())
        for _, layer in self._layers():  # as for fxlora
            index = getattr(layer.get_base_layer(), "padding_idx", None)
            if index is not None and "default" in layer.lora_embedding_A:
                layer.lora_embedding_A["default"].data[:, index] = 0

    def copy(self) -> Side:
        return Peft(self.pattern, self.way)  # a deep copy would untie tensors that share memory

    def _layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        for path, layer in self.module.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                name = ".".join(part for part in path.split(".") if part != "base_layer")
                weight = getattr(layer, "parameter_name", None)
                if weight is None:
                    weight = "in_proj_weight" if hasattr(layer, "in_proj_weight") else "weight"
                yield f"{name}.{weight}".removeprefix("."), layer

    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        found: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, layer in self._layers():
            if "default" in layer.lora_embedding_A:
                pair = (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
            else:
                pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            found[name] = pair
        return found

    def deltas(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, layer in self._layers():
            yield name, name, layer.get_delta_weight("default")

    def adapted(self) -> set[int]:
        """Return ids; with target_modules, those of all parameters of each adapted module."""
        weights = dict(self.source.named_parameters(remove_duplicate=False))
        found = {name for name, _ in self._layers()}
        if "target_modules" in self.way:
            owners = {name.rpartition(".")[0] for name in found}
            found = {name for name in weights if name.rpartition(".")[0] in owners}
        return {id(weights[name]) for name in found if name in weights}

    def meanings(self) -> list[dict[str, torch.Tensor]]:
        weights = dict(self.source.named_parameters(remove_duplicate=False))
        if not self.pattern.plain or not all(name in weights for name in self.pairs()):
            return []  # a parametrized weight is not a parameter of the source
        own = {name: [name] for name in self.pairs()}
        tied = {n: [m for m, w in weights.items() if w is weights[n]] for n in own}
        readings = [own] if own == tied else [own, tied]
        return [_summed(self.source, list(self.deltas()), names) for names in readings]

    def merged(self) -> nn.Module:
        return Peft(self.pattern, self.way).module.merge_and_unload()

    def exported(self, module: Any) -> Callable[..., Any]:
        return torch.export.export(copy.deepcopy(module).eval(), self.args).module()


def _summed(
    source: nn.Module, deltas: list[tuple[str, str, torch.Tensor]], names: dict[str, list[str]]
) -> dict[str, torch.Tensor]:
    weights = dict(source.named_parameters(remove_duplicate=False))
    total: dict[str, torch.Tensor] = {}
    for adapter, _, delta in deltas:
        for name in names[adapter]:
            total[name] = total.get(name, weights[name].detach()) + delta
    return total


def randomise(pairs: dict[str, tuple[nn.Parameter, nn.Parameter]]) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in itertools.chain(*pairs.values()):
            parameter.normal_(std=0.5)


# ---- the five checks ----------------------------------------------------------------------------


def outputs(
    module: Callable[..., Any], args: tuple[Any, ...], training: bool | None = None
) -> Tensors:
    if training is not None and isinstance(module, nn.Module):
        module = copy.deepcopy(module).train(training)
    torch.manual_seed(1)
    return laws.floats(module(*args))


def _effect_train(side: Side) -> None:
    _effect(side, True)


def _effect_eval(side: Side) -> None:
    _effect(side, False)


@torch.no_grad()
def _effect(side: Side, training: bool) -> None:
    _check_meant(side)
    if training not in side.pattern.modes:
        return
    base = outputs(side.source, side.args, training)
    pairs = side.pairs()
    values = {site: b.detach().clone() for site, (_, b) in pairs.items()}
    for site in pairs:
        for other, (_, b) in pairs.items():
            b.copy_(values[other] if other == site else torch.zeros_like(b))
        if not distance(outputs(side.module, side.args, training), base) > EFFECT:
            raise Wrong(f"the adapter of {site} has no effect")


def _check_meant(side: Side) -> None:
    """Raise unless every weight that the user named exists and is adapted."""
    names = dict(side.source.named_parameters(remove_duplicate=False))
    for name in side.pattern.weights:
        try:
            operator.attrgetter(name)(side.source)
        except AttributeError:
            raise Wrong(f"there is no {name}") from None
        if name in names and id(names[name]) not in side.adapted():
            raise Wrong(f"{name} is not adapted")


def _gradient(side: Side) -> None:
    pairs = {
        f"{x} of {site}": p
        for site, pair in side.pairs().items()
        for x, p in zip("AB", pair, strict=True)
    }
    side.module.train()
    found = _gradients(outputs(side.module, side.args), [*pairs.values()])
    for name, gradient in zip(pairs, found, strict=True):
        if not gradient.any():
            raise Wrong(f"no gradient at {name}")
    meanings = [] if side.pattern.hidden else side.meanings()
    errors = [
        distance(found, _gradients(_reference(side, weights, True), [*pairs.values()]))
        for weights in meanings
    ]
    if errors and min(errors) > 100 * side.pattern.tolerance:
        raise Wrong(f"the gradient differs by {min(errors):.1g}")


def _gradients(out: Tensors, parameters: Tensors) -> Tensors:
    """Return gradients of a loss with unequal cotangents: behind a softmax, a sum has none."""
    terms = [(o * torch.linspace(0.5, 1.5, o.numel()).view(o.shape).to(o)).sum() for o in out]
    terms = [t for t in terms if t.requires_grad]
    if not terms:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(
        torch.stack(terms).sum(), parameters, allow_unused=True, materialize_grads=True
    )
    return [g.to_dense() for g in found]


def _reference(side: Side, weights: dict[str, torch.Tensor], training: bool) -> Tensors:
    """Return the outputs of the source, or of the pattern's reference, with other weights."""
    model = copy.deepcopy(side.source)
    if side.pattern.reference:
        model = side.pattern.reference()[0].to(next(model.parameters()).dtype)
        model.load_state_dict(side.source.state_dict())
    model.train(training)

    torch.manual_seed(1)
    return called_with(model, weights, side.args)


def _written(side: Side, weights: dict[str, torch.Tensor], training: bool) -> Tensors:
    """Return the source's outputs with the weights written into its own memory.

    This reaches reads that have no name. Return [] if the weights would split a tie.
    """
    model, args = side.pattern.built()
    names = dict(model.named_parameters(remove_duplicate=False))
    meant = {id(names[name]) for name in weights}
    if {name for name, w in names.items() if id(w) in meant} != weights.keys():
        return []
    values = {(id(names[name]), float(weight.sum())) for name, weight in weights.items()}
    if len(values) > len(meant):  # the names of one tensor have different values
        return []
    for name, weight in weights.items():
        names[name].data.copy_(weight)
    model.train(training)
    return outputs(model, args)


@torch.no_grad()
def _folded(side: Side) -> None:
    merged = side.merged()
    weights: dict[str, torch.Tensor] = dict(merged.named_parameters(remove_duplicate=False))
    names = dict(side.source.named_parameters(remove_duplicate=False))
    known = {n: w for n, w in weights.items() if n in names and w.shape == names[n].shape}
    for training in (True, False):
        unfolded = outputs(side.module, side.args, training)
        error = distance(outputs(merged, side.args, training), unfolded)
        if error > side.pattern.tolerance:
            raise Wrong(f"folded and unfolded differ by {error:.1g} of the output")
        calls = [] if side.pattern.hidden else side.meanings()
        meanings = [distance(unfolded, _reference(side, w, training)) for w in calls]
        if meanings and min(meanings) > side.pattern.tolerance:
            raise Wrong(f"unfolded is not the source with W + s·BA: {min(meanings):.1g}")
        for weights in side.meanings():
            error = distance(unfolded, _written(side, weights, training) or unfolded)
            if error > side.pattern.tolerance:
                raise Wrong(f"a read of W is not adapted: {error:.1g}")
        if len(known) == len(names) and not side.pattern.hidden:
            error = distance(unfolded, _reference(side, known, training))
            if error > side.pattern.tolerance:
                raise Wrong(f"unfolded is not the source with the folded weights: {error:.1g}")


@torch.no_grad()
def _exports(side: Side) -> None:
    for what, module in (("unfolded", side.module), ("folded", side.merged())):
        expected = outputs(module, side.args, False)
        try:
            program = side.exported(module)
        except fxlora.FxLoraError:
            raise
        except Exception as error:
            raise RuntimeError(f"{what}: {_line(error)}") from error
        if distance(outputs(program, side.args), expected) > side.pattern.tolerance:
            raise Wrong(f"the {what} program's outputs differ")
