"""report: the trainable parameters and training memory of a plan, per site and in total."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError, InjectError
from .module import CapturedModule, check_captured
from .module.ambient import no_ambient_modes
from .module.quantised import is_quantised, stored_bytes
from .names import printable
from .passes.active import as_names, check_known
from .plan import Entry, Plan, joined
from .tables import FORMATS, render, some

HEADER = ("site", "op", "weight", "form", "r", "alpha", "W", "A and B", "fewer", "factor")
DTYPES = (torch.float32, torch.bfloat16)
TENSORS_PER_PARAMETER = 3  # a gradient, and Adam's two moments


@dataclass(frozen=True)
class _Totals:
    """Numbers of parameters.

    Attributes:
        model: parameters of the model without adapters.
        adapter: trainable parameters of the adapters (A, B, and DoRA's magnitudes).
        frozen: frozen parameters of the adapters (the A and B that PiSSA starts from).
        full: parameters of the model that train in full.
        split: parameters that the fold added by splitting ties; None if the report is not about
            a folded module.
    """

    model: int
    adapter: int
    frozen: int
    full: int
    split: int | None

    @property
    def folded(self) -> bool:
        """Whether the report is about a folded module."""
        return self.split is not None

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return self.adapter + self.full

    @property
    def total(self) -> int:
        """Number of parameters of the module: of the folded one, or with its adapters."""
        return self.adapted if self.split is None else self.model + self.split

    @property
    def adapted(self) -> int:
        """Number of parameters of the model and its adapters together."""
        return self.model + self.adapter + self.frozen

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of those of the model and its adapters together."""
        return 100 * self.trainable / max(1, self.adapted)

    def training_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Return the bytes of gradients and Adam state for full fine-tuning and for the plan.

        Args:
            dtype: dtype of the parameters, their gradients and Adam's moments.
        """
        each = TENSORS_PER_PARAMETER * dtype.itemsize
        return self.model * each, self.trainable * each


@no_ambient_modes()
def report(
    x: Plan | CapturedModule, format: str = "table", *, adapter: str | Sequence[str] | None = None
) -> str:
    r"""Report how many parameters and how much training memory a plan saves.

    Only shapes are needed, so it works on the meta device. With the numbers of parameters w of a
    site's weight, and a of its adapter, the report gives for each site::

        fewer = 100 · (1 - a / w), in percent
        factor = w / a

    and for the whole model, where the adapters and the parameters trained in full are trainable::

        trainable % = 100 · trainable / parameters of the model and its adapters
        gradients + Adam state = 3 · itemsize · trainable, in bytes

    The memory is that of one gradient and Adam's two moments (Kingma and Ba 2015, algorithm 1) per
    trainable parameter, all in the parameters' dtype, for float32 and bfloat16. It does not include
    weights and activations. DoRA's magnitudes count as parameters of the adapter. The rows above
    the total add up to it: the model and its adapters, including their frozen tensors (the initial
    A and B of PiSSA), or, of a folded module, the model and the copies that split ties.

    Args:
        x: a plan, an adapted module, or a folded module (for its last folded plan).
        format: "table", "github" (a Markdown table), "html", "json" or "csv" (only the sites).
        adapter: the name or names of the adapters of a module; by default the active ones.

    Returns:
        The report as text. Numbers in "json" and "csv" are not rounded, and memory in "json" is in
        bytes.

    Raises:
        ConfigError: the format is unknown.
        InjectError: the module never had adapters, or has none of this name.
        NotCapturedError: `x` is neither a plan nor a captured module.

    Example:
        >>> import json, torch, fxlora
        >>> module = fxlora.capture(torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(2, 6))
        >>> plan = fxlora.match(module, fxlora.LoraConfig(r=1, target_modules=["0"]))
        >>> print(fxlora.report(plan).split("\n\n")[0])
          site  op      weight    form      r    alpha    W    A and B    fewer    factor
        ------  ------  --------  ------  ---  -------  ---  ---------  -------  --------
             0  linear  4x6       branch    1        8   24         10   58.33%      2.4x
        >>> json.loads(fxlora.report(plan, "json"))["trainable_parameters"]
        10
    """
    plan, folded = _plan_of(x, adapter)
    holds = sum(p.numel() for p in x.parameters()) if isinstance(x, CapturedModule) else 0
    totals = _Totals(
        plan.model_parameters,
        plan.adapter_parameters,
        _held(plan) - plan.adapter_parameters,
        plan.trained_parameters,
        holds - plan.model_parameters if folded else None,
    )
    if format == "json":
        return json.dumps({**_data(plan, totals), **_stored_data(x)}, indent=2)
    if format == "csv":
        return _csv(plan)
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, json, csv, not {format!r}.")
    sites = render(HEADER, site_rows(plan), format)
    sums = render(("", "parameters"), _sum_rows(totals), format)
    memory = render(
        ("gradients + Adam state", "full fine-tuning", "this plan", "saved"),
        [_memory_row(totals, dtype) for dtype in DTYPES],
        format,
    )
    said = [*_split_ties(plan, folded), *_stored(x)]
    return "\n\n".join([sites, sums, memory, *said])


def site_rows(plan: Plan) -> list[list[str]]:
    """Return the report's rows, one per entry, with the columns of HEADER."""
    return [_row(entry, plan.label(entry)) for entry in plan]


def _held(plan: Plan) -> int:
    """Return the number of parameters that all adapters hold, trainable and frozen."""
    return sum(math.prod(shape) for entry in plan for shape in entry.tensors.values())


def _plan_of(x: Plan | CapturedModule, adapter: str | Sequence[str] | None) -> tuple[Plan, bool]:
    """Return the plan to report on, and whether it is folded into the weights."""
    if adapter is not None:
        check_captured(x, "report(…, adapter=…)")
        assert isinstance(x, CapturedModule)
        check_known(x, names := as_names(adapter))
        return joined([x.known.adapters[name] for name in names]), False
    if isinstance(x, Plan):
        return x, False
    if isinstance(x, CapturedModule) and x.plan is not None:
        return x.plan, False
    if isinstance(x, CapturedModule) and x.folded:
        return x.folded[-1], True
    check_captured(x, "report")
    raise InjectError("nothing to report: give a plan, or a module that has or had adapters.")


def _reduction(entry: Entry) -> tuple[float, float]:
    """Return by how many percent, and by which factor, an adapter is smaller than its weight."""
    ratio = entry.adapter_parameters / entry.weight_parameters
    return 100 * (1 - ratio), 1 / ratio


def _row(entry: Entry, label: str) -> list[str]:
    percent, factor = _reduction(entry)
    return [
        label,
        entry.op,
        "x".join(map(str, entry.adapted_shape)),
        entry.form,
        str(entry.r),
        f"{entry.alpha:g}",
        f"{entry.weight_parameters:,}",
        f"{entry.adapter_parameters:,}",
        f"{percent:.2f}%",
        f"{factor:.4g}x",
    ]


def _sum_rows(totals: _Totals) -> list[list[str]]:
    """Return the rows that add up to the total, the total, and those of trained parameters."""
    rows: list[tuple[str, int | None]] = [("model", totals.model)]
    if totals.folded:
        rows += [
            ("ties split by the fold", totals.split or None),
            ("total", totals.total),
            ("A and B, folded into the weights", totals.adapter),
        ]
    else:
        rows += [
            ("A and B", totals.adapter),
            ("of adapters, frozen", totals.frozen or None),
            ("total", totals.total),
        ]
    word = "trained" if totals.folded else "trainable"
    rows += [("trained in full", totals.full or None), (word, totals.trainable)]
    shown = [[what, f"{number:,}"] for what, number in rows if number is not None]
    return [*shown, [f"{word} %", f"{totals.percent:.2f}%"]]


def _memory_row(totals: _Totals, dtype: torch.dtype) -> list[str]:
    full, lora = totals.training_bytes(dtype)
    return [str(dtype).removeprefix("torch."), _bytes(full), _bytes(lora), _bytes(full - lora)]


def _split_ties(plan: Plan, folded: bool) -> list[str]:
    """Return a line on the ties that a fold splits, or an empty list if there are none."""
    said = [" from ".join(some(names) for names in groups[::-1]) for groups in plan.split_ties]
    when = "split by the fold" if folded else "that a fold splits"
    return [f"Ties {when}: {'; '.join(said)}."] if said else []


def _stored(x: Plan | CapturedModule) -> list[str]:
    """Return lines on quantised weights: their bytes, and what a fold kept of s·BA in each."""
    stored = _stored_sizes(x)
    if not stored or not isinstance(x, CapturedModule):
        return []
    held, plain = stored
    lines = [f"Quantised weights: {_bytes(held)} as stored, {_bytes(plain)} in their dtype."]
    if x.retention:
        kept = ", ".join(f"{site} {value:.3f}" for site, value in x.retention.items())
        lines.append(f"Retention of s·BA in the weights that the fold quantised: {kept}.")
    return ["\n".join(lines)]


def _stored_data(x: Plan | CapturedModule) -> dict[str, Any]:
    """Return what `_stored` tells, as data; empty without quantised weights."""
    stored = _stored_sizes(x)
    if not stored or not isinstance(x, CapturedModule):
        return {}
    quantised = {"stored_bytes": stored[0], "bytes_in_dtype": stored[1]}
    return {"quantised_weights": {**quantised, "retention": dict(x.retention)}}


def _stored_sizes(x: Plan | CapturedModule) -> tuple[int, int] | None:
    """Return the bytes of quantised weights as stored, and in their dtype; None without any."""
    parameters = x.parameters() if isinstance(x, CapturedModule) else ()
    found = [parameter for parameter in parameters if is_quantised(parameter)]
    plain = sum(p.numel() * p.dtype.itemsize for p in found)
    return (sum(map(stored_bytes, found)), plain) if found else None


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.1f} TiB"


def _csv(plan: Plan) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for entry in plan:
        percent, factor = _reduction(entry)
        row = map(printable, _row(entry, plan.label(entry))[:6])
        writer.writerow([*row, entry.weight_parameters, entry.adapter_parameters, percent, factor])
    return text.getvalue()


def _data(plan: Plan, totals: _Totals) -> dict[str, Any]:
    sites: list[dict[str, Any]] = []
    for entry in plan:
        percent, factor = _reduction(entry)
        sites.append(
            {
                "site": entry.site,
                "adapter": entry.adapter,
                "op": entry.op,
                "shape": list(entry.adapted_shape),
                "form": entry.form,
                "r": entry.r,
                "alpha": entry.alpha,
                "weight_parameters": entry.weight_parameters,
                "adapter_parameters": entry.adapter_parameters,
                "fewer_percent": percent,
                "factor": factor,
            }
        )
    memory = {
        str(dtype).removeprefix("torch."): dict(
            zip(("full_fine_tuning", "this_plan"), totals.training_bytes(dtype), strict=True)
        )
        for dtype in DTYPES
    }
    return {
        "sites": sites,
        "model_parameters": totals.model,
        "adapter_parameters": totals.adapter,
        "frozen_adapter_parameters": totals.frozen,
        "full_parameters": totals.full,
        "trainable_parameters": totals.trainable,
        "total_parameters": totals.total,
        "trainable_percent": totals.percent,
        "folded": totals.folded,
        "split_tie_parameters": totals.split or 0,
        "split_ties": plan.split_ties,
        "training_state_bytes": memory,
    }
