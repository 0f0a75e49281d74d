"""Count the damage that verify notices: sound modules are damaged in one place at a time.

The kinds of damage are in tests/mutation.py: to adapted modules, to folded ones and to saved
adapters, over models with every kind of read that fxlora supports. A cell says how many mutants of
a kind verify catches, of those that change anything: outputs, gradients, state, plan or whether
the module runs. For each kind and model there are up to two mutants, damaged in different places.
Adapted modules are verified by themselves; those "with its fold" against the fold that was made
before; a saved adapter is loaded, and verified against the fold of the module that was saved.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common import header, start, untimed_parser
from tabulate import tabulate

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.mutation import CASES, KINDS, Outcome, judge_all, sound  # noqa: E402

Found = dict[str, dict[str, list[Outcome]]]  # by model and kind of damage


def main() -> None:
    options = options_given()
    print("\n".join(f"{key}: {value}" for key, value in header(options).items()), flush=True)
    kinds = [name for name in KINDS if re.search(options.only, name)]
    found = {case: outcomes(case, kinds) for case in counted(options.models)}
    rows = [row(kind, found) for kind in kinds]
    rows.append({"damage": "all", "to": "", **totals(found)})
    print(f"\n{tabulate(rows, headers='keys', tablefmt=options.format, disable_numparse=True)}\n")
    print(summary(found))
    if missed := list(notes(found)):
        print("\n" + "\n".join(missed))
    if options.json:
        data = {
            case: {kind: [[o.verdict, o.said] for o in os] for kind, os in by_kind.items()}
            for case, by_kind in found.items()
        }
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")


def options_given() -> argparse.Namespace:
    parser = untimed_parser(__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="match in the kind's name")
    parser.add_argument("--models", default="", metavar="REGEX", help="match in the model's name")
    parser.add_argument("--format", default="simple", help="table format: github for the docs")
    return start(parser)


def counted(models: str) -> Iterator[str]:
    """Yield the models; show the progress on stderr."""
    chosen = [case for case in CASES if re.search(models, case)]
    for number, case in enumerate(chosen, 1):
        print(f"\r{number}/{len(chosen)} {case}\x1b[K", end="", file=sys.stderr, flush=True)
        yield case
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def outcomes(case: str, kinds: list[str]) -> dict[str, list[Outcome]]:
    logging.disable(logging.ERROR)  # logged by checkpoints whose shapes a mutant changed
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        return judge_all(sound(case, Path(folder)), kinds)


# ---- tables -------------------------------------------------------------------------------------


def row(kind: str, found: Found) -> dict[str, str]:
    cells = {case: cell(by_kind[kind]) for case, by_kind in found.items()}
    every = [outcome for by_kind in found.values() for outcome in by_kind[kind]]
    return {"damage": kind, "to": KINDS[kind].of, **cells, "all": cell(every)}


def totals(found: Found) -> dict[str, str]:
    of_case = {case: [o for os in by_kind.values() for o in os] for case, by_kind in found.items()}
    cells = {case: cell(outcomes) for case, outcomes in of_case.items()}
    return {**cells, "all": cell([o for os in of_case.values() for o in os])}


def cell(outcomes: list[Outcome]) -> str:
    """Return caught/counted, where mutants that change nothing do not count; blank if none do."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    applied = sum(counts.values()) - counts["equivalent"]
    return f"{counts['caught']}/{applied}" if applied else ""


def summary(found: Found) -> str:
    every = [o for by_kind in found.values() for os in by_kind.values() for o in os]
    counts = Counter(outcome.verdict for outcome in every)
    applied = len(every) - counts["equivalent"]
    applying = {kind for by_kind in found.values() for kind, os in by_kind.items() if os}
    return (
        f"{len(applying)} kinds of damage, {len(found)} models: verify catches {counts['caught']} "
        f"of {applied} mutants ({100 * counts['caught'] / max(1, applied):.1f} %); "
        f"{counts['missed']} missed, {counts['crash']} untyped errors. "
        f"{counts['equivalent']} more change nothing, and are not counted."
    )


def notes(found: Found) -> Iterator[str]:
    for case, by_kind in found.items():
        for kind, outcomes in by_kind.items():
            for outcome in outcomes:
                if outcome.verdict in ("missed", "crash"):
                    yield f"{case}, {kind}: {outcome.verdict} {outcome.said}"


if __name__ == "__main__":
    main()
