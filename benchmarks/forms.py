"""Count which form each weight of each model takes, with the reason where it is not the branch.

Each model is built small and at random, in a separate process, captured in both modes and matched
by one rule that takes every weight; nothing is trained. The main table counts the weights that
linear, convolution, embedding or addmm reads; the others have a separate table.

There are three reasons not to take the branch. "by choice": there is a branch, but it costs more
(a depthwise convolution). "weight": there is none. "refused": no form can adapt every read.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial

import torch
from common import Report
from sweep import Record, add_failures, grouped, options_given, reason, sweep_parser, swept
from zoo import Case

import fxlora
from fxlora import LoraConfig, Rule, Site
from fxlora.matching.refusals import check_supported
from fxlora.reads.sites import find_sites

COUNTED = ("linear", "conv*", "embedding*", "addmm")
Weight = dict[str, str]  # its site, op, form and reason
FORMS = ("branch", "by choice", "weight", "refused")


# ---- one model ----------------------------------------------------------------------------------


def work(build: Callable[[], Case], device: str, record: Record, r: int) -> None:
    begin = time.perf_counter()
    try:
        with torch.device(device):
            case = build()
        captured = fxlora.capture(case.model, case.args, case.kwargs)
        record["sites"] = forms(captured, r)
    except Exception as error:  # noqa: BLE001 - any error is a result
        record["failures"].append(reason("capture", error))
    record["seconds"]["capture"] = round(time.perf_counter() - begin, 2)


def forms(captured: fxlora.CapturedModule, r: int) -> list[Weight]:
    """Return name, op, form and reason of every weight."""
    sites = {site.parameter: site for site in find_sites(captured)}
    refused = {name: why for name, site in sites.items() if (why := refusal(site))}
    rest = Rule(lora=LoraConfig(r=r), where=lambda site: site.parameter not in refused)
    plan = fxlora.match(captured, rest) if refused.keys() < sites.keys() else ()
    found = {name: (form_of(entry), entry.reason) for entry in plan for name in entry.names}
    found |= {name: ("refused", why) for name, why in refused.items()}
    return [
        {"site": site.name, "op": site.op, "form": found[name][0], "reason": found[name][1]}
        for name, site in sites.items()
    ]


def form_of(entry: fxlora.Entry) -> str:
    """Return the plan's form, or "by choice" if the plan says that a branch would cost more."""
    chosen = "a branch costs" in entry.reason
    return "by choice" if chosen else entry.form


def refusal(site: Site) -> str | None:
    try:
        check_supported(site, 1)
    except fxlora.FxLoraError as error:
        return general(str(error))
    return None


def general(message: str) -> str:
    """Return a message's first sentence without names and places, so that equal reasons match."""
    text = re.sub(r"^'[^']+' \(rule 1\):? ", "", message)
    text = re.sub(r" (?:at|with) (\S+:\d+|'[^']+')", "", text)
    text = re.sub(r"\([\d, ]+\)", "(…)", text)
    return re.split(r"[.:,] ", text)[0]


# ---- all of them --------------------------------------------------------------------------------


def main() -> None:
    parser = sweep_parser(__doc__)
    parser.add_argument("--rank", type=int, default=8, help="r, which decides the cheaper form")
    options = options_given(parser)
    report, records = swept(options, partial(work, r=options.rank), line)
    for library, mine in grouped(records, "library").items():
        models = f"{sum('sites' in r for r in mine)} of {len(mine)} models"
        every = [{**site, "model": r["name"]} for r in mine for site in r.get("sites", [])]
        counted = [site for site in every if is_counted(site)]
        others = [site for site in every if not is_counted(site)]
        report.add(f"{library}: {models}, by op", [*by_op(counted), row("all", counted)])
        for form in FORMS[1:]:
            of_form = [site for site in counted if site["form"] == form]
            add_reasons(report, f"{library}: reasons for '{form}'", of_form)
        if others:
            report.add(f"{library}: read by other ops", [*by_op(others), row("all", others)])
        no_branch = [site for site in others if site["form"] != "branch"]
        add_reasons(report, f"{library}: other ops, reasons for no branch", no_branch)
    add_failures(report, records)


def is_counted(site: Weight) -> bool:
    return any(fnmatchcase(site["op"], kind) for kind in COUNTED)


def by_op(sites: list[Weight]) -> list[dict[str, str]]:
    kinds = sorted({site["op"] for site in sites})
    return [row(kind, [site for site in sites if site["op"] == kind]) for kind in kinds]


def row(name: str, sites: list[Weight]) -> dict[str, str]:
    numbers = Counter(site["form"] for site in sites)
    branch, chosen = numbers["branch"], numbers["by choice"]
    return {
        "op": name,
        "weights": f"{len(sites):,}",
        **{form: f"{numbers[form]:,}" for form in FORMS},
        "branch, %": percent(branch, len(sites)),
        "branch, % without 'by choice'": percent(branch, len(sites) - chosen),
    }


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "–"


def add_reasons(report: Report, title: str, sites: list[Weight]) -> None:
    """Add a table of reasons, the most frequent first, each with one weight as an example."""
    groups = grouped([{**site, "why": alike(site["reason"])} for site in sites], "why")
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = [
        {
            "weights": f"{len(group):,}",
            "models": f"{len({site['model'] for site in group}):,}",
            "op": ", ".join(sorted({site["op"] for site in group})),
            "reason": why,
            "for example": f"{group[0]['model']}: {group[0]['site']}",
        }
        for why, group in ordered
    ]
    if rows:
        report.add(title, rows)


def alike(why: str) -> str:
    return re.sub(
        r"\d+ groups: a branch costs .* the", "n groups: a branch costs more than the", why
    )


def line(record: Record) -> str:
    sites = record.get("sites", [])
    counted = [site for site in sites if is_counted(site)]
    numbers = Counter(site["form"] for site in counted)
    verdict = " | ".join(record["failures"]) or ", ".join(f"{numbers[f]} {f}" for f in FORMS)
    seconds = record["seconds"].get("all", 0.0)
    return f"{record['library']} {record['name']} {seconds:.0f}s: {verdict}"


if __name__ == "__main__":
    main()
