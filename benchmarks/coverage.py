"""Count the models of each library that fxlora handles, and list why the others fail.

Each model is built small and at random, in a separate process, and goes through all steps: capture
in both modes (outputs are the source's, bit for bit), adapters at every layer, a training step (a
gradient at every adapter whose weight has one in the source), fold (the same outputs, and the
captured graphs again), and optimize (the same outputs and gradients).
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import torch
from sweep import (
    Fault,
    Record,
    add_failures,
    grouped,
    options_given,
    reason,
    sweep_parser,
    swept,
)
from torch import nn
from torch.utils import _pytree as pytree
from zoo import Case, randomise_constants

import fxlora
from fxlora import LoraConfig, Rule
from fxlora.fx.compare import difference
from fxlora.matching.refusals import check_supported
from fxlora.reads.sites import find_sites

LAYERS = ["linear", "conv*", "embedding", "addmm", "matmul"]
RULES = [Rule(op=LAYERS, lora=LoraConfig(r=2, lora_alpha=3))]
# Relative to the largest output.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
DOUBLE_BELOW = 150e6  # parameters: larger models run in single precision, to save memory


# ---- one model ----------------------------------------------------------------------------------


class Trial:
    """Takes one model through the steps; each step writes its findings into the record."""

    def __init__(self, case: Case, device: str, record: Record) -> None:
        self.record = record
        self.case = runnable(case, device)
        self.model = self.case.model
        self.dtype = next(p.dtype for p in self.model.parameters())
        record["dtype"] = str(self.dtype).rpartition(".")[2]
        record["parameters"] = sum(p.numel() for p in self.model.parameters())

    def run(self) -> None:
        """Run every possible step: after a failed capture or match, the later ones are not."""
        if not (self._try("capture", self.capture) and self._try("sites", self.sites)):
            return
        self._try("eval", lambda: self.exact("eval"))
        self._try("train", lambda: self.exact("train"))
        if self._try("match", self.match):
            self._try("effect", self.effect)
            self._try("gradients", self.gradients)
            self._try("fold", self.fold)
            self._try("optimize", self.optimize)

    def _try(self, step: str, action: Callable[[], None]) -> bool:
        begin = time.perf_counter()
        try:
            action()
            self.record["passed"].append(step)
        except Exception as error:  # noqa: BLE001 - any error is a result
            self.record["failures"].append(reason(step, error))
            return False
        finally:
            self.record["seconds"][step] = round(time.perf_counter() - begin, 2)
        return True

    def capture(self) -> None:
        before = state(self.model)
        self.captured = fxlora.capture(self.model, self.case.args, self.case.kwargs)
        if state(self.model) != before:
            raise Fault("the source model was changed")
        self.record["road"] = "regions" if self.captured.parent_module else "whole"
        self.record["uncovered"] = sorted(self.captured.uncovered)

    def exact(self, mode: str) -> None:
        """Check that outputs and buffers are the source's, bit for bit."""
        expected = self.outputs(self.model, mode)
        found = self.outputs(self.captured, mode)
        if len(found) != len(expected):
            raise Fault(f"{len(found)} output tensors, the source has {len(expected)}")
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            if not same_bits(a, b):
                raise Fault(f"output {index} of {len(found)} {distance(a, b)}")
        own = dict(self.captured.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name in own and not same_bits(own[name], buffer):
                raise Fault(f"buffer '{name}' {distance(own[name], buffer)}")

    def sites(self) -> None:
        """Record how many weights there are, and why no form can adapt some of them."""
        sites = find_sites(self.captured)
        self.record["sites"] = len(sites)
        self.record["refused"] = [text for site in sites if (text := refusal(site))]

    def match(self) -> None:
        plan = fxlora.match(self.captured, RULES)
        self.record["adapted"] = len(plan)
        self.record["weight forms"] = Counter(e.reason for e in plan if e.form == "weight")
        self.record["skipped"] = Counter(why for _, why in plan.skipped)
        self.lora = fxlora.inject(self.captured, plan)
        randomise(self.lora)

    def effect(self) -> None:
        pairs = zip(*(self.outputs(m, "eval") for m in (self.lora, self.captured)), strict=True)
        if all(torch.equal(a, b) for a, b in pairs):
            raise Fault("the adapters do not change the outputs")

    def gradients(self) -> None:
        """Check that A and B have gradients if the source's weight has, and frozen tensors none."""
        with_gradient = backward(self.model, self.loss)
        trained = backward(self.lora, self.loss)
        entries = {name: e for e in self.lora.plan or () for name in (e.name_a, e.name_b)}
        dead = [n for n, e in entries.items() if e.parameter in with_gradient and n not in trained]
        reached = {entry.parameter for entry in entries.values()}
        groups = map(set[str], self.captured.aliases().values())
        taken = {alias for group in groups if group & reached for alias in group}
        matrices = {n for n, p in self.model.named_parameters() if p.ndim > 1}
        self.record["left alone"] = sorted((with_gradient & matrices) - taken)
        self.record["unused"] = len(reached - with_gradient)
        if dead:
            raise Fault(f"no gradient at {len(dead)} of {len(entries)}: {', '.join(dead[:3])}")
        same = [set(group) for group in self.lora.aliases().values() if entries.keys() & set(group)]
        if others := trained.difference(*same):
            raise Fault(f"a gradient at {sorted(others)[0]}, which is frozen")

    def fold(self) -> None:
        folded = fxlora.fold(self.lora)
        for ours, theirs in zip(folded.programs, self.captured.programs, strict=True):
            for mode in ours.graphs:
                if changed := difference(ours.graphs[mode], theirs.graphs[mode]):
                    raise Fault(f"the folded {mode} graph is another one: {changed}")
        pairs = self.float_pairs(folded)
        error = max((relative(a, b) for a, b in pairs), default=0.0)
        self.record["fold error"] = error
        if not error <= TOLERANCES[self.dtype]:
            raise Fault(f"folded outputs differ by {error:.1e} of the largest")

    def optimize(self) -> None:
        """Check that the optimized module has the outputs and gradients of the adapted one."""
        fast = fxlora.optimize(self.lora, recompute=True)
        assert fast.schedule
        groups = fast.schedule.groups
        self.record["chains"] = sum(number for _, number in fast.schedule.recomputed)
        self.record["joint"] = len({s for g in groups if not g.reason for s in g.sites})
        self.record["not joint"] = Counter(g.reason for g in groups if g.reason)
        errors = [relative(a, b) for a, b in self.float_pairs(fast)]
        if not self.lora.parent_module:  # whose Python may take another branch
            both = [self.adapters_gradients(module) for module in (fast, self.lora)]
            if both[0].keys() != both[1].keys():
                raise Fault("gradients of other adapters")
            errors += [relative(both[0][name], gradient) for name, gradient in both[1].items()]
        self.record["optimize error"] = max(errors, default=0.0)
        if not self.record["optimize error"] <= 100 * TOLERANCES[self.dtype]:
            raise Fault(f"the optimized module differs by {max(errors):.1e} of the largest")

    def adapters_gradients(self, module: fxlora.CapturedModule) -> dict[str, torch.Tensor]:
        self.loss(module, "train").backward()
        named = ((name, module.get_parameter(name).grad) for name in module.adapter_parameters())
        found = {name: gradient for name, gradient in named if gradient is not None}
        module.zero_grad(set_to_none=True)
        return found

    def float_pairs(self, folded: fxlora.CapturedModule) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return pairs of outputs of the folded, or optimized, and the adapted module.

        With regions, return the outputs of the regions: a rounding difference may change the
        branch that the Python between them takes (e.g. one more box).
        """
        if self.lora.parent_module and folded.parent_module:
            with self.lora.parent_module.recorded() as calls:
                self.outputs(self.lora, "eval")
            folded.eval()
            again = [folded.parent_module.call(call.path, call.args, call.kwargs) for call in calls]
            found, expected = tensors(again), tensors([call.output for call in calls])
        else:
            found, expected = (self.outputs(module, "eval") for module in (folded, self.lora))
        shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (found, expected)]
        if shapes[0] != shapes[1]:
            raise Fault(f"outputs of shapes {shapes[0]}, not {shapes[1]}")
        pairs = zip(found, expected, strict=True)
        return [pair for pair in pairs if pair[0].is_floating_point()]

    def outputs(self, module: nn.Module, mode: str) -> list[torch.Tensor]:
        module.train(mode == "train")
        seed_everything()
        with torch.no_grad():
            return tensors(self.call(module))

    def loss(self, module: nn.Module, mode: str) -> torch.Tensor:
        module.train(mode == "train")
        seed_everything()
        leaves = [leaf for leaf in tensors(self.call(module)) if leaf.requires_grad]
        if not leaves:  # no box was found
            return torch.zeros((), requires_grad=True)
        return torch.stack([leaf[leaf.isfinite()].abs().square().mean() for leaf in leaves]).sum()

    def call(self, module: nn.Module) -> Any:
        # Copies, because models may write to their inputs (detection resizes its targets).
        args, kwargs = pytree.tree_map(cloned, (self.case.args, self.case.kwargs))
        return module(*args, **kwargs)


def seed_everything() -> None:
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)


def runnable(case: Case, device: str) -> Case:
    """Return the case in double precision if the model runs in it, else in single precision.

    It must run in both modes: otherwise the source's failure would be counted as fxlora's.
    """
    randomise_constants(case.model)
    parameters = sum(p.numel() for p in case.model.parameters())
    dtypes = [torch.float64] if parameters < DOUBLE_BELOW else []
    for dtype in (*dtypes, torch.float32):
        attempt = converted(case, device, dtype)
        buffers = {n: b.clone() for n, b in attempt.model.named_buffers()}
        try:
            for training in (False, True):
                attempt.model.train(training)
                inputs = pytree.tree_map(cloned, (attempt.args, attempt.kwargs))
                with torch.no_grad():
                    outputs = tensors(attempt.model(*inputs[0], **inputs[1]))
                if not any(bool(leaf.isfinite().any()) for leaf in outputs):
                    raise Fault("the source's own outputs are not finite")
            return attempt
        except (Fault, RuntimeError, TypeError, NotImplementedError):
            if dtype == torch.float32:
                raise
        finally:
            for name, buffer in attempt.model.named_buffers():
                buffer.copy_(buffers[name])
    raise AssertionError("unreachable")


def converted(case: Case, device: str, dtype: torch.dtype) -> Case:
    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    args, kwargs = pytree.tree_map(moved, (case.args, case.kwargs))
    return Case(case.model.to(device, dtype), args, kwargs)


def backward(module: nn.Module, loss: Callable[[nn.Module, str], torch.Tensor]) -> set[str]:
    """Return the names of the parameters with nonzero gradients, from train and eval mode."""
    for mode in ("train", "eval"):
        loss(module, mode).backward()
    named = list(module.named_parameters(remove_duplicate=False))
    found = {n for n, p in named if p.grad is not None and bool((p.grad != 0).any())}
    module.zero_grad(set_to_none=True)
    return found


def refusal(site: fxlora.Site) -> str | None:
    try:
        check_supported(site, 1)
    except fxlora.UnsupportedOpError as error:
        return str(error)
    return None


def randomise(lora: fxlora.CapturedModule) -> None:
    """Draw A and B at random; one of them starts at zero."""
    with torch.no_grad():
        for entry in lora.plan or ():
            for name in (entry.name_a, entry.name_b):
                parameter = lora.get_parameter(name)
                parameter.normal_(std=0.3 / parameter[0].numel() ** 0.5)
            if entry.padding_idx is not None:  # zero at the start, and training leaves it so
                lora.get_parameter(entry.name_a)[:, entry.padding_idx] = 0


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit: NaN equals itself, 0.0 does not equal -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)))


def distance(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
    return f"differs by {relative(a, b):.1e} of the largest"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected entry.

    Only finite entries count; the result is infinite if they are not the same in both.
    """
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return float("inf")
    a, b = a[finite].to(torch.complex128), b[finite].to(torch.complex128)
    if not b.numel():
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def state(model: nn.Module) -> list[Any]:
    """Return everything that capture must not change: values (by version), flags, modes, hooks."""
    tensors_ = [*model.parameters(), *model.buffers()]
    modules = list(model.modules())
    return [
        [(id(t), t.data_ptr(), t._version, t.requires_grad, t.grad is None) for t in tensors_],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        list(model.state_dict()),
    ]


# ---- report -------------------------------------------------------------------------------------


def main() -> None:
    report, records = swept(options_given(sweep_parser(__doc__)), work, line)
    for library, mine in grouped(records, "library").items():
        report.add(library, rows(mine))
    add_failures(report, records)


def work(build: Callable[[], Case], device: str, record: Record) -> None:
    # Fused inference kernels round differently from the ops that they replace.
    torch.backends.mha.get_fastpath_enabled = lambda: False
    Trial(build(), device, record).run()


def rows(records: list[Record]) -> list[dict[str, str]]:
    """Return a row for each family, and one for all."""
    by_family = grouped(records, "family")
    groups = {**by_family, "all": records} if len(by_family) > 1 else by_family
    return [{"family": family, **row(group)} for family, group in groups.items()]


def row(records: list[Record]) -> dict[str, str]:
    def passed(step: str) -> str:
        return str(sum(step in record["passed"] for record in records))

    def total(key: str) -> int:
        return sum(record.get(key, 0) for record in records)

    roads = Counter(record.get("road") for record in records)
    forms = sum(sum(record.get("weight forms", {}).values()) for record in records)
    return {
        "models": str(len(records)),
        "whole": str(roads["whole"]),
        "regions": str(roads["regions"]),
        "exact, eval": passed("eval"),
        "exact, train": passed("train"),
        "weights": str(total("sites")),
        "adapted": str(total("adapted")),
        "weight form": str(forms),
        "gradients": passed("gradients"),
        "folded": passed("fold"),
        "optimized": passed("optimize"),
        "in joint ops": str(total("joint")),
        "chains": str(total("chains")),
        "no failure": str(sum(not record["failures"] for record in records)),
        "seconds": f"{sum(record['seconds'].get('all', 0.0) for record in records):.0f}",
    }


def line(record: Record) -> str:
    name = f"{record['library']} {record['name']}"
    verdict = " | ".join(record["failures"]) or "ok"
    seconds = record["seconds"].get("all", 0.0)
    sites = f"{record.get('adapted', 0)}/{record.get('sites', 0)}"
    return f"{name} {record.get('dtype', '')} {sites} {seconds:.0f}s: {verdict}"


if __name__ == "__main__":
    main()
