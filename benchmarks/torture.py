"""Measure LoRA where weights are not only read by their module's forward: PEFT and fxlora.

Every pattern of tests/patterns.py is measured as tests/torture.py describes: does each adapter
change the output, in train mode and in eval mode; does its gradient arrive, and is it correct; are
the folded module's outputs the unfolded ones; does torch.export accept both. PEFT is given every
way to write the target, and the best outcome counts.

right: measured, and correct. silent: wrong, without an error. refused: an error that says so
before anything is trained. crash: any other error.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import header, start, untimed_parser
from tabulate import tabulate

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.patterns import GROUPS, PATTERNS, Pattern  # noqa: E402
from tests.torture import (  # noqa: E402
    CANNOT,
    CHECKS,
    VERDICTS,
    Judgement,
    best,
    judge_fxlora,
    judge_peft,
)

SIGNS = {"right": "✓", "silent": "✗ silent", "crash": "crash", "refused": "refused", CANNOT: "–"}
SHORT = {"folded == unfolded": "folded", "effect train": "train", "effect eval": "eval"}


def main() -> None:
    options = options_given()
    print("\n".join(f"{key}: {value}" for key, value in header(options).items()), flush=True)
    chosen = [p for name, p in PATTERNS.items() if re.search(options.only, name)]
    peft = [judge_peft(pattern) for pattern in counted(chosen, "PEFT")]
    ours = [judge_fxlora(pattern) for pattern in counted(chosen, "fxlora")]
    if not options.brief:
        rows = [row(*found) for found in zip(chosen, peft, ours, strict=True)]
        print(f"\n{table(rows, options.format)}")
    print()
    sides = {
        "PEFT, by target_modules": [ways[0] for ways in peft],
        "PEFT, best option": [best(ways) for ways in peft],
        "fxlora": ours,
    }
    print(table(summary(chosen, sides), options.format), end="\n\n")
    print(table([total(side, found) for side, found in sides.items()], options.format))
    if options.notes:
        print("\n" + "\n".join(notes(chosen, sides)))
    if options.json:
        write(options, chosen, peft, ours)


def options_given() -> argparse.Namespace:
    parser = untimed_parser(__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="match in the pattern's name")
    parser.add_argument("--format", default="simple", help="table format: github for the README")
    parser.add_argument("--brief", action="store_true", help="only print the totals")
    parser.add_argument("--notes", action="store_true", help="also print each failure")
    return start(parser)


def counted(patterns: Sequence[Pattern], side: str) -> Any:
    """Yield the patterns; show the progress on stderr."""
    for number, pattern in enumerate(patterns, 1):
        print(f"\r{side} {number}/{len(patterns)}\x1b[K", end="", file=sys.stderr, flush=True)
        yield pattern
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---- tables -------------------------------------------------------------------------------------


def row(pattern: Pattern, ways: Sequence[Judgement], ours: Judgement) -> dict[str, str]:
    found = {"pattern": pattern.name}
    for side, judgement in (("PEFT", best(ways)), ("fxlora", ours)):
        found |= {f"{side} {SHORT.get(c, c)}": v for c, v in cells(judgement).items()}
    return found


def cells(judgement: Judgement) -> dict[str, str]:
    signs = {check: SIGNS[outcome.verdict] for check, outcome in judgement.cells.items()}
    if len(set(map(id, judgement.cells.values()))) == 1:  # one outcome for all: no check was run
        signs = {check: SIGNS[judgement.verdict] if check == CHECKS[0] else "" for check in CHECKS}
    if judgement.warned and judgement.verdict == "silent":
        first = next(c for c, o in judgement.cells.items() if o.verdict == "silent")
        signs[first] += " (warned)"
    return signs


def summary(
    patterns: Sequence[Pattern], sides: Mapping[str, Sequence[Judgement]]
) -> list[dict[str, str]]:
    """Return a row for each group of patterns, with the number of each verdict."""
    rows: list[dict[str, str]] = []
    for group, members in GROUPS.items():
        numbers = [n for n, pattern in enumerate(patterns) if pattern in members]
        if numbers:
            found = {side: verdicts([j[n] for n in numbers]) for side, j in sides.items()}
            rows.append({"group": group, "patterns": str(len(numbers)), **found})
    return rows


def verdicts(judgements: Sequence[Judgement]) -> str:
    counts = Counter(judgement.verdict for judgement in judgements)
    order = ("right", "refused", CANNOT, "crash", "silent")
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])


def total(side: str, judgements: Sequence[Judgement]) -> dict[str, str]:
    counts = Counter(judgement.verdict for judgement in judgements)
    found = {verdict: str(counts[verdict]) for verdict in reversed((CANNOT, *VERDICTS))}
    return {"side": side, "patterns": str(len(judgements)), **found}


def table(rows: Sequence[Mapping[str, str]], style: str) -> str:
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def notes(patterns: Sequence[Pattern], sides: Mapping[str, Sequence[Judgement]]) -> list[str]:
    return [
        f"{side}, {pattern.name}: {judgement.verdict}: {judgement.note}"
        for side, judgements in sides.items()
        for pattern, judgement in zip(patterns, judgements, strict=True)
        if judgement.note
    ]


def write(
    options: argparse.Namespace,
    patterns: Sequence[Pattern],
    peft: Sequence[Sequence[Judgement]],
    ours: Sequence[Judgement],
) -> None:
    import json

    plain: Callable[[Judgement], Any] = lambda j: {  # noqa: E731
        "verdict": j.verdict,
        "warned": j.warned,
        "cells": {check: [o.verdict, o.note] for check, o in j.cells.items()},
    }
    data = {
        pattern.name: {"peft": [plain(way) for way in ways], "fxlora": plain(mine)}
        for pattern, ways, mine in zip(patterns, peft, ours, strict=True)
    }
    content = {"header": header(options), "checks": CHECKS, "patterns": data}
    options.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
