"""Parts: a packed weight is several in one, beside each other in its output dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError

Parts = int | Mapping[str, Any] | None
Rows = tuple[int, int]


def check_parts(parts: Any, enable: Any) -> None:
    """Raise unless `parts=` and `enable=` of a rule say something.

    Raises:
        ConfigError: they are of another kind, or contradict each other.
    """
    if parts is None:
        if enable is not None:
            raise ConfigError("enable chooses among parts=, which is not given.")
        return
    if isinstance(parts, Mapping):
        names = list(parts)
        if not names or not all(isinstance(n, str) and n and "." not in n for n in names):
            raise ConfigError(f"parts needs names without dots, not {parts!r}.")
        kinds = {isinstance(value, int) for value in parts.values()}
        if len(kinds) > 1:
            raise ConfigError(f"parts has sizes or ranges, not both: {parts!r}.")
        for name, value in parts.items():
            if not isinstance(value, int):
                _range(name, value)
            elif isinstance(value, bool) or value < 1:
                raise ConfigError(f"parts: '{name}' must have at least one row, not {value}.")
    elif not isinstance(parts, int) or isinstance(parts, bool) or parts < 2:
        raise ConfigError(f"parts must be a number ≥ 2 or a mapping of names, not {parts!r}.")
    else:
        names = [str(number) for number in range(parts)]
    _enabled(names, enable)


def rows_of(parts: Any, enable: Any, outputs: int, site: str) -> dict[str, Rows]:
    """The enabled parts of a weight with so many outputs: from which to which, by name.

    Raises:
        ConfigError: the parts do not fit the weight.
    """
    if isinstance(parts, int):
        if outputs % parts:
            raise ConfigError(
                f"'{site}' has {outputs} outputs, which are not {parts} equal parts. Give their "
                'sizes: parts={"q": …, "k": …, "v": …}.'
            )
        parts = {str(number): outputs // parts for number in range(parts)}
    if all(isinstance(value, int) for value in parts.values()):
        found = _beside_each_other(parts, outputs, site)
    else:
        found = {name: _range(name, value) for name, value in parts.items()}
    _check_ranges(found, outputs, site)
    wanted = _enabled(list(found), enable)
    return {name: rows for name, rows in found.items() if name in wanted}


def _beside_each_other(sizes: Mapping[str, int], outputs: int, site: str) -> dict[str, Rows]:
    if sum(sizes.values()) != outputs:
        raise ConfigError(
            f"'{site}' has {outputs} outputs, and its parts add up to {sum(sizes.values())}. List "
            "all of them in order and choose with enable=, or give ranges: (from, to)."
        )
    found: dict[str, Rows] = {}
    start = 0
    for name, size in sizes.items():
        found[name] = (start, start + size)
        start += size
    return found


def _check_ranges(found: Mapping[str, Rows], outputs: int, site: str) -> None:
    end, before = 0, ""
    for (start, stop), name in sorted((rows, name) for name, rows in found.items()):
        if stop > outputs:
            raise ConfigError(f"part '{name}' ends at {stop}; '{site}' has {outputs} outputs.")
        if start < end:
            raise ConfigError(f"parts '{before}' and '{name}' of '{site}' overlap.")
        end, before = stop, name


def _range(name: str, value: Any) -> Rows:
    if isinstance(value, slice | range) and value.step in (None, 1):
        value = (value.start or 0, value.stop)
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(pair) != 2 or any(type(n) is not int for n in pair) or not 0 <= pair[0] < pair[1]:
        raise ConfigError(f"parts: '{name}' must be a size or a range (from, to), not {value!r}.")
    return pair[0], pair[1]


def _enabled(names: list[str], enable: Any) -> set[str]:
    if enable is None:
        return set(names)
    if not isinstance(enable, Sequence) or isinstance(enable, str):
        raise ConfigError(f"enable must be a list of flags or of names, not {enable!r}.")
    if all(isinstance(flag, bool) for flag in enable):
        if len(enable) != len(names):
            raise ConfigError(f"enable has {len(enable)} flags for {len(names)} parts.")
        wanted = {name for name, flag in zip(names, enable, strict=True) if flag}
    else:
        wanted = {str(name) for name in enable}
        if unknown := wanted - set(names):
            raise ConfigError(f"enable: no part {sorted(unknown)}; there are {', '.join(names)}.")
    if not wanted:
        raise ConfigError("enable chooses no part: leave the weight out of the rules instead.")
    return wanted
