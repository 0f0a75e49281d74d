"""An HTML page of a plan: its table, where the parameters are, and each kind of site as a graph."""

from __future__ import annotations

import html
from collections.abc import Iterable

from ..api import fold, inject
from ..costs import HEADER, site_rows
from ..module import CapturedModule
from ..names import printable
from ..plan import Entry, Plan
from ..tables import count
from .neighborhood import Neighborhood, around_adapter, around_site, site_of
from .svg import Svg, drawn

Kind = tuple[object, ...]


def plan_page(module: CapturedModule, plan: Plan, title: str) -> str:
    """Return a self-contained page about a plan for a captured module."""
    adapted = inject(module, plan)
    folded = fold(adapted)
    sections = [_section(entries, module, adapted, folded) for entries in _by_kind(plan).values()]
    name = html.escape(printable(title))
    return _PAGE.format(
        title=name,
        summary=html.escape(_summary(plan)),
        bars="".join(_bars(plan)),
        header="".join(f"<th>{html.escape(cell)}</th>" for cell in (*HEADER, "note")),
        rows="".join(_rows(plan)),
        skipped=_skipped(plan),
        sections="".join(sections),
    )


def _summary(plan: Plan) -> str:
    share = 100 * plan.adapter_parameters / max(plan.model_parameters, 1)
    return (
        f"{count(len(plan), 'site')} adapted with {plan.adapter_parameters:,} parameters, "
        f"{share:.2f} % of the model's {plan.model_parameters:,}; "
        f"{plan.trained_parameters:,} trained in full."
    )


def _bars(plan: Plan) -> Iterable[str]:
    """Yield one bar per site, as long as its adapter is large, relative to the largest."""
    largest = max((entry.adapter_parameters for entry in plan), default=1)
    for entry in plan:
        share = 100 * entry.adapter_parameters / largest
        site = html.escape(printable(entry.site))
        yield (
            f'<div class="bar"><span>{site}</span><i style="width:{share:.2f}%"></i>'
            f"<b>{entry.adapter_parameters:,}</b></div>"
        )


def _rows(plan: Plan) -> Iterable[str]:
    for entry, row in zip(plan, site_rows(plan), strict=True):
        cells = (html.escape(printable(str(cell))) for cell in (*row, entry.reason))
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _skipped(plan: Plan) -> str:
    items = "".join(
        f"<li><code>{html.escape(printable(site))}</code> {html.escape(printable(why))}</li>"
        for site, why in plan.skipped
    )
    if not items:
        return ""
    others = count(len(plan.skipped), "other site")
    return f"<details><summary>{others}</summary><ul>{items}</ul></details>"


def _by_kind(plan: Plan) -> dict[Kind, list[Entry]]:
    """Group the entries whose graphs look the same."""
    found: dict[Kind, list[Entry]] = {}
    for entry in plan:
        kind = (entry.op, entry.form, entry.variants, entry.part is None, bool(entry.tied))
        found.setdefault(kind, []).append(entry)
    return found


def _section(
    entries: list[Entry], module: CapturedModule, adapted: CapturedModule, folded: CapturedModule
) -> str:
    """Draw the first entry of a kind before, adapted and folded."""
    entry = entries[0]
    ours = {mine.site: mine for mine in adapted.plan or ()}[entry.site]
    stages = [
        ("before", _bare(module, entry)),
        ("adapted", around_adapter(adapted, ours, "eval")),
        ("folded", _bare(folded, entry)),
    ]
    variants = f", {', '.join(entry.variants)}" if entry.variants else ""
    heading = f"{entry.op}, {entry.form} form{variants}"
    return (
        f"<section><h3>{html.escape(heading)}</h3>"
        f"<p>{count(len(entries), 'site')}, drawn: "
        f"<code>{html.escape(printable(entry.site))}</code></p>"
        f'<div class="stages">{"".join(_figure(*stage) for stage in stages)}</div></section>'
    )


def _bare(module: CapturedModule, entry: Entry) -> list[Neighborhood]:
    site = site_of(module, entry)
    return around_site(module, site, "eval") if site else []


def _figure(stage: str, parts: list[Neighborhood]) -> str:
    picture = drawn(parts[:1]) if parts else Svg("<p>no read in this graph</p>")
    return f"<figure><figcaption>{stage}</figcaption>{picture}</figure>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: #14181f; background: #fff;
  max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }}
h1 {{ font-size: 24px; margin: 0 0 4px; }}
h2 {{ font-size: 18px; margin: 32px 0 8px; }}
h3 {{ font-size: 15px; margin: 24px 0 0; }}
p {{ margin: 4px 0 10px; color: #434b57; }}
code {{ font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; min-width: 100%; }}
th, td {{ text-align: left; padding: 5px 10px; border-bottom: 1px solid #e3e6ea;
  white-space: nowrap; }}
td:nth-child(n+5):nth-child(-n+10) {{ text-align: right; font-variant-numeric: tabular-nums; }}
th {{ cursor: pointer; user-select: none; background: #f6f7f9; position: sticky; top: 0; }}
th[aria-sort=ascending]::after {{ content: " \\25b2"; }}
th[aria-sort=descending]::after {{ content: " \\25bc"; }}
.bars {{ max-height: 420px; overflow-y: auto; }}
.bar {{ display: grid; grid-template-columns: minmax(120px, 34%) 1fr 90px; gap: 10px;
  align-items: center; font-size: 13px; padding: 2px 0; }}
.bar span {{ font-family: ui-monospace, monospace; overflow-wrap: anywhere; }}
.bar i {{ display: block; height: 12px; border-radius: 3px; background: #d9730d; min-width: 2px; }}
.bar b {{ font-weight: 400; text-align: right; font-variant-numeric: tabular-nums; }}
.stages {{ display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }}
figure {{ margin: 0; border: 1px solid #e3e6ea; border-radius: 10px; padding: 10px;
  max-width: 100%; box-sizing: border-box; overflow-x: auto; }}
figcaption {{ color: #5b6472; font-size: 13px; }}
details {{ margin-top: 10px; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<h2>Sites</h2>
<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>
{skipped}
<h2>Parameters of A and B by site</h2>
<div class="bars">{bars}</div>
<h2>Graphs by kind of site</h2>
<p>Blue: the weight. Orange: nodes that the adapter adds. Dashed: neighbours.
The folded graph has the nodes of the first.</p>
{sections}
<script>
const number = text => parseFloat(text.replace(/[,%x]/g, ""));
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {{
  const column = head.cellIndex, body = document.querySelector("tbody");
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of document.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].sort((a, b) => {{
    const [x, y] = [a, b].map(row => row.cells[column].textContent);
    const order = column > 3 && column < 10 ? number(x) - number(y) : x.localeCompare(y);
    return up ? order : -order;
  }});
  body.append(...rows);
}});
</script>
</body>
</html>
"""
