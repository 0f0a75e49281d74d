"""Pictures of graphs: one site as SVG, a whole plan as an HTML page."""

from __future__ import annotations

from ..errors import ConfigError, NoMatchError
from ..module import CapturedModule, check_captured
from ..module.program import MODES
from ..names import shown
from ..reads.sites import find_sites
from ..tables import did_you_mean, some
from .neighborhood import around_adapter, around_site
from .svg import Svg, drawn

__all__ = ["Svg", "draw"]


def draw(module: CapturedModule, site: str, *, mode: str = "eval") -> Svg:
    """Draw the part of the graph around a site's weight: its reads, and its adapter if it has one.

    Args:
        module: a captured, adapted or folded module.
        site: name of the site, as a plan prints it.
        mode: "eval" or "train".

    Returns:
        The SVG as text, which notebooks show as a picture. Write it to a file to look at it.

    Raises:
        NotCapturedError: the module is not a captured one.
        NoMatchError: the module has no such site, or no graph of this mode reads it.
        ConfigError: no such mode.

    Example:
        >>> import torch, fxlora
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> lora = fxlora.adapt(model, torch.randn(3, 6), rules=config)
        >>> picture = fxlora.draw(lora, "0")
        >>> picture[:4], "0.lora_A" in picture
        ('<svg', True)
    """
    check_captured(module, "draw")
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, not {shown(mode)}.")
    entries = {entry.site: entry for entry in module.plan or ()}
    if site in entries:
        parts = around_adapter(module, entries[site], mode)
    else:
        sites = {found.name: found for found in find_sites(module)}
        if site not in sites:
            near = did_you_mean(str(site), [*entries, *sites]) or f" The sites: {some(sites)}."
            raise NoMatchError(f"there is no site {shown(site)}.{near}")
        parts = around_site(module, sites[site], mode)
    if not parts:
        raise NoMatchError(f"no {mode} graph reads {shown(site)}.")
    return drawn(parts)
