"""The laws on random models, against oracles that take no layout and no form from fxlora.

The oracle derives W0 + s·BA from the shapes of A and B only. It tries every product of the two
that has the weight's shape (no two sizes are equal) and takes the one that equals the folded
weight. The source model, called through torch.func with W0 + s·BA in place of the weight, gives
the outputs and gradients that the adapted module must have.

    python -m tests.random_laws 17              print the model of seed 17, and judge it
    python -m tests.random_laws 0 500           judge the models of the seeds 0 to 499
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule

from .laws import Wrong, assert_untouched, called_with, distance, floats, randomise, snapshot
from .random_models import RANK, Drawn, Shape, draw

ALPHA = 3
LORA = LoraConfig(r=RANK, lora_alpha=ALPHA)
FRONTENDS = ("export", "tracer")
EFFECT = 1e-9  # relative to the largest output: rounding is far below, an adapter far above

Tensors = list[torch.Tensor]
Weights = dict[str, torch.Tensor]


@dataclass
class Judgement:
    """The result for one model through one frontend.

    Attributes:
        drawn: the model.
        frontend: "export" or "tracer".
        adapted: names of the adapted weights.
        refused: the typed error for every other weight.
        inert: names of adapted weights on which the outputs do not depend.
        failure: a description of the failure, or "".
        trace: the traceback of an untyped error, or "".
    """

    drawn: Drawn
    frontend: str
    adapted: list[str] = field(default_factory=list)
    refused: dict[str, fxlora.FxLoraError] = field(default_factory=dict)
    inert: list[str] = field(default_factory=list)
    failure: str = ""
    trace: str = ""

    def __str__(self) -> str:
        return (
            f"{self.failure}\nseed {self.drawn.seed}, {self.frontend}, adapted: "
            f"{', '.join(self.adapted) or 'nothing'}\n{self.trace}\n{self.drawn.source}"
        )


def judge(drawn: Drawn, frontend: str) -> Judgement:
    """Capture a model, adapt every weight that match accepts, and check every law."""
    judgement = Judgement(drawn, frontend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _judge(judgement)
        except Wrong as error:
            judgement.failure = f"wrong: {error}"
        except Exception as error:  # noqa: BLE001 - any untyped error is a finding
            line = " ".join(str(error).split())[:300]
            judgement.failure = f"untyped: {type(error).__name__}: {line}"
            judgement.trace = traceback.format_exc()
    return judgement


def _judge(judgement: Judgement) -> None:
    model, args = judgement.drawn.build()
    before = snapshot(model)
    names = [name for name, weight in model.named_parameters() if weight.ndim > 1]
    try:
        gm = fxlora.capture(model, args if judgement.frontend == "export" else None)
    except fxlora.CaptureError as error:
        judgement.refused = dict.fromkeys(names, error)
        return
    side = Side(judgement.drawn, args, gm)
    side.check_capture()
    rules = list(side.accepted(names, judgement))
    if rules:
        judgement.inert += side.check_adapted(rules)
    assert_untouched(model, before)


# ---- one captured model --------------------------------------------------------------------------


class Side:
    """A captured model and its source, which is rebuilt for each call with other weights."""

    def __init__(self, drawn: Drawn, args: tuple[Any, ...], gm: fxlora.CapturedModule) -> None:
        self.drawn, self.gm = drawn, gm
        self.calls = (args, (-args[0], *args[1:]))  # with -x, a cond takes its other branch
        self.base = self.outputs(gm)

    def check_capture(self) -> None:
        _same(self.base, self.source({}), "the capture differs", 1e-12)

    def accepted(self, names: list[str], judgement: Judgement) -> Iterator[Rule]:
        """Yield a rule for each weight that match accepts; record the error for each other one."""
        again = copy.deepcopy(self.gm)
        for name in names:
            rule = Rule(name, lora=LORA)
            try:
                plan = fxlora.match(self.gm, rule)
            except fxlora.FxLoraError as error:
                judgement.refused[name] = error
                _check_refused(again, rule, error)
                continue
            if name not in plan.entries[0].names:
                raise Wrong(f"the rule for {name} adapts {plan.entries[0].names}")
            if fxlora.match(again, rule).entries != plan.entries:
                raise Wrong(f"a copy has another plan for {name}")
            judgement.adapted.append(name)
            yield rule

    def check_adapted(self, rules: list[Rule]) -> list[str]:
        """Check every law on the adapted model; return the weights that change no output."""
        lora = fxlora.inject(self.gm, fxlora.match(self.gm, rules))
        _same(self.outputs(lora), self.base, "injection is not the identity", 1e-12)
        torch.manual_seed(self.drawn.seed)
        randomise(lora)
        inert = self._check_effect(lora)
        folded = fxlora.fold(lora)
        self._check_folded(lora, folded)
        self._check_gradients(lora, folded)
        self._check_copies(lora, folded)
        return inert

    # ---- the laws ---------------------------------------------------------------------------

    def _check_effect(self, lora: fxlora.CapturedModule) -> list[str]:
        """Check that each adapter, with all others at zero, has an effect if its weight has."""
        still: list[str] = []
        every = {entry.name_b: lora.get_parameter(entry.name_b).data for entry in lora.plan or ()}
        values = {name: b.clone() for name, b in every.items()}
        for entry in lora.plan or ():
            for name, b in every.items():
                b.copy_(values[name]) if name == entry.name_b else b.zero_()
            if distance(self.outputs(lora), self.base) <= EFFECT:
                still += entry.names
        for name, b in every.items():
            b.copy_(values[name])
        return self._check_still(still)

    def _check_still(self, names: list[str]) -> list[str]:
        """Raise if the outputs depend on one of these weights, or if nothing reads its values."""
        parameters = _parameters(self.drawn.build(plain=True)[0])
        for name in names:
            weight = parameters[name].detach()
            outputs = self.source({name: weight.clone().requires_grad_()}, grad=True)
            if not any(o.requires_grad for o in outputs):
                raise Wrong(f"{name} is adapted, and no value of it is read")
            if distance(self.source({name: weight + 0.3}), outputs) > EFFECT:
                raise Wrong(f"the adapter of {name} has no effect")
        return names

    def _check_folded(self, lora: fxlora.CapturedModule, folded: fxlora.CapturedModule) -> None:
        """Check that folded and unfolded agree, and that every read sees the folded weights."""
        found, tolerance = self.outputs(folded), self.drawn.tolerance
        _same(found, self.outputs(lora), "folded and unfolded differ", tolerance)
        weights = {name: weight.detach() for name, weight in _parameters(folded).items()}
        _same(found, self.source(weights), "a read does not see the folded weight", tolerance)

    def _check_gradients(self, lora: fxlora.CapturedModule, folded: fxlora.CapturedModule) -> None:
        """Check outputs and gradients against the source called with the merged weights."""
        factors = {
            name: lora.get_parameter(name).detach().requires_grad_() for name in _names(lora)
        }
        expected = self.source(self._merged(lora, folded, factors), grad=True)
        module = copy.deepcopy(lora)
        found = self._outputs(module)
        _same(found, expected, "not the source with W0 + s·BA", self.drawn.tolerance)
        ours = gradients(found, {name: module.get_parameter(name) for name in factors})
        theirs = gradients(expected, factors)
        for name in factors:
            error = distance([ours[name]], [theirs[name]])
            if error > 100 * self.drawn.tolerance:
                raise Wrong(f"the gradient of {name} differs by {error:.1g}")

    def _merged(
        self, lora: fxlora.CapturedModule, folded: fxlora.CapturedModule, factors: Weights
    ) -> Weights:
        """Return W0 + s·BA of each adapted weight, by the product that equals the fold."""
        source = _parameters(self.drawn.build(plain=True)[0])
        weights: Weights = {}
        for entry in lora.plan or ():
            before = source[entry.parameter].detach()
            after = folded.get_parameter(entry.parameter).detach()
            a, b = factors[entry.name_a], factors[entry.name_b]
            deltas = [ALPHA / RANK * d.to(before) for d in products(before.shape, a, b, RANK)]
            errors = [distance([before + d], [after]) for d in deltas]
            if not errors or min(errors) > (1e-12 if before.dtype == torch.float64 else 1e-6):
                raise Wrong(f"the folded {entry.parameter} is not W0 + s·BA")
            merged = before + deltas[errors.index(min(errors))]
            weights |= dict.fromkeys(entry.names, merged)
        return weights

    def _check_copies(self, lora: fxlora.CapturedModule, folded: fxlora.CapturedModule) -> None:
        again, whole = copy.deepcopy(lora), self.outputs(folded)
        _same(self.outputs(fxlora.fold(again)), whole, "the fold of a copy differs")
        _same(self.outputs(fxlora.fold(folded)), whole, "folding twice differs")
        removed = fxlora.remove(again)
        _same(self.outputs(removed), self.base, "remove does not give the base")
        assert lora.plan
        if fxlora.match(removed, list(lora.plan.rules)).entries != lora.plan.entries:
            raise Wrong("what remove gives has another plan")

    # ---- runs -------------------------------------------------------------------------------

    @torch.no_grad()
    def outputs(self, module: nn.Module) -> Tensors:
        """Return the outputs of a module, whose mode and buffers are left as they are."""
        training, buffers = module.training, [(b, b.clone()) for b in module.buffers()]
        found = self._outputs(module)
        module.train(training)
        for buffer, before in buffers:
            buffer.copy_(before)
        return found

    def source(self, weights: Weights, grad: bool = False) -> Tensors:
        """Return the source's outputs with these weights in place of its own."""
        model = self.drawn.build(plain=True)[0].requires_grad_(False)

        with torch.set_grad_enabled(grad):
            return self._in_both_modes(model, lambda args: called_with(model, weights, args))

    def _outputs(self, module: nn.Module) -> Tensors:
        return self._in_both_modes(module, lambda args: floats(module(*args)))

    def _in_both_modes(self, module: nn.Module, called: Callable[..., Tensors]) -> Tensors:
        """Return the outputs of all calls in eval mode, then in train mode (it writes buffers)."""
        found: Tensors = []
        for training in (False, True):
            module.train(training)
            torch.manual_seed(1)
            for args in self.calls:
                found += called(args)
        return found


def _check_refused(module: fxlora.CapturedModule, rule: Rule, error: fxlora.FxLoraError) -> None:
    try:
        fxlora.match(module, rule)
    except fxlora.FxLoraError as other:
        if str(other) == str(error):
            return
    raise Wrong(f"what is refused on a module is not on its copy: {error}")


def _same(found: Tensors, expected: Tensors, what: str, tolerance: float = 0.0) -> None:
    half = len(found) // 2
    for mode, part in (("eval", slice(half)), ("train", slice(half, None))):
        error = distance(found[part], expected[part])
        if error > tolerance:
            raise Wrong(f"{what}: {error:.1g} ({mode})")


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(remove_duplicate=False))


def _names(lora: fxlora.CapturedModule) -> list[str]:
    return [name for entry in lora.plan or () for name in entry.trainable]


def gradients(outputs: Tensors, parameters: Weights) -> Weights:
    """Return gradients of a loss with unequal cotangents, which cannot cancel; zero if unused."""
    terms = [
        (o * torch.linspace(n, n + 1, o.numel()).view(o.shape).to(o)).sum()
        for n, o in enumerate(outputs, 1)
    ]
    found = torch.autograd.grad(
        torch.stack(terms).sum(), [*parameters.values()], allow_unused=True, materialize_grads=True
    )
    return {name: g.to_dense() for name, g in zip(parameters, found, strict=True)}


# ---- B·A in a weight's shape, from shapes only ---------------------------------------------------


def products(shape: Shape, a: torch.Tensor, b: torch.Tensor, r: int) -> Iterator[torch.Tensor]:
    """Yield every product of A (…, r, in) and B (…, out, r) that has this shape.

    Each of the shape's dimensions is a stack's ("e"), an input's ("i") or an output's ("o").
    """
    for roles in itertools.product("eio", repeat=len(shape)):
        stack, inputs, outputs = ([d for d, q in enumerate(roles) if q == role] for role in "eio")
        sizes = [[shape[d] for d in dims] for dims in (stack, inputs, outputs)]
        number, rank = math.prod(sizes[0]), len(stack)
        if [*a.shape[:rank]] != sizes[0] or [*b.shape[:rank]] != sizes[0]:
            continue
        if a.ndim <= rank or b.ndim <= rank + 1 or a.shape[rank] != r or b.shape[rank + 1] != r:
            continue
        of_a, of_b = a.reshape(number, r, -1), b.movedim(rank + 1, -1).reshape(number, -1, r)
        if (of_a.shape[2], of_b.shape[1]) != (math.prod(sizes[1]), math.prod(sizes[2])):
            continue
        product = (of_b @ of_a).reshape(*sizes[0], *sizes[2], *sizes[1])
        order = [*stack, *outputs, *inputs]
        yield product.permute([order.index(d) for d in range(len(shape))])


# ---- many models ---------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over many models."""

    judgements: list[Judgement] = field(default_factory=list)

    def of(self, frontend: str) -> Tally:
        return Tally([j for j in self.judgements if j.frontend == frontend])

    @property
    def failures(self) -> list[Judgement]:
        return [j for j in self.judgements if j.failure]

    @property
    def adapted(self) -> int:
        return sum(len(j.adapted) for j in self.judgements)

    @property
    def reasons(self) -> Counter[str]:
        """Number of refused weights by message, without its names and numbers."""
        found: Counter[str] = Counter()
        for j in self.judgements:
            found.update(f"{j.frontend}: {_reason(error)}" for error in j.refused.values())
        return found

    @property
    def share(self) -> float:
        """The share of weights that were adapted."""
        return self.adapted / max(self.adapted + sum(self.reasons.values()), 1)

    def __str__(self) -> str:
        inert = sum(len(j.inert) for j in self.judgements)
        lines = [f"{len(self.judgements)} captures, {self.adapted} weights adapted"]
        lines += [f"{inert:6} of them cannot change the outputs"]
        lines += [f"{n:6} refused, {reason}" for reason, n in self.reasons.most_common()]
        failures = Counter(re.sub(r"\d\S*", "#", j.failure)[:160] for j in self.failures)
        lines += [f"{n:6} FAILED, {what}" for what, n in failures.most_common()]
        return "\n".join(lines)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"'[^']*'", "'…'", re.sub(r"[\w.]*\d[\w.]*", "#", text))
    return f"{type(error).__name__}: {text[:110]}"


def judge_all(seeds: Iterable[int], frontends: tuple[str, ...] = FRONTENDS) -> Tally:
    tally = Tally()
    for seed in seeds:
        tally.judgements += [judge(draw(seed), frontend) for frontend in frontends]
    return tally


def main(arguments: list[str]) -> int:
    first = int(arguments[0])
    seeds = range(first, int(arguments[1]) if len(arguments) > 1 else first + 1)
    tally = Tally()
    start = time.perf_counter()
    for seed in seeds:
        found = judge_all(range(seed, seed + 1))
        tally.judgements += found.judgements
        for failure in found.failures:
            print(failure, flush=True)
    if len(seeds) == 1:
        print(draw(first).source)
    print(tally, f"{time.perf_counter() - start:.0f} s", sep="\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
