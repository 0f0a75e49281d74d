"""Parts of a packed weight: slices of its output dimension that are adapted separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..names import WORD_RULE, is_word, shown
from ..tables import some

MAX_PARTS = 4096
MAX_ROWS = 2**48

Parts = int | Mapping[str, Any] | None
Rows = tuple[int, int]


def check_parts(parts: Any, enable: Any) -> None:
    """Check `parts=` and `enable=` of a rule, before the weight is known.

    Raises:
        ConfigError: they have wrong types or values, contradict each other, or enable no part.
    """
    if parts is None:
        if enable is not None:
            raise ConfigError("enable chooses among parts=, which is not given.")
        return
    if isinstance(parts, Mapping):
        names = list(parts)
        _check_names(names)
        kinds = {isinstance(value, int) for value in parts.values()}
        if len(kinds) > 1:
            raise ConfigError(f"parts has sizes or ranges, not both: {shown(parts)}.")
        for name, value in parts.items():
            if not isinstance(value, int):
                _range(name, value)
            elif isinstance(value, bool) or not 1 <= value <= MAX_ROWS:
                raise ConfigError(
                    f"parts: '{name}' must have at least one row, not {shown(value)}."
                )
    elif not isinstance(parts, int) or isinstance(parts, bool) or not 2 <= parts <= MAX_PARTS:
        raise ConfigError(
            f"parts must be a number from 2 to {MAX_PARTS} or a mapping of names, "
            f"not {shown(parts)}."
        )
    else:
        names = [str(number) for number in range(parts)]
    _enabled(names, enable)


def _check_names(names: Sequence[Any]) -> None:
    """Check the names of the parts: each becomes the name of a module."""
    if not names:
        raise ConfigError("parts needs at least one name.")
    for name in names:
        if not is_word(name):
            raise ConfigError(f"parts: {shown(name)} is not a valid name: {WORD_RULE}.")


def rows_of(parts: Any, enable: Any, outputs: int, site: str) -> dict[str, Rows]:
    """Return the rows (start, stop) of each enabled part of a weight, by the part's name.

    Args:
        parts: `parts=` of the rule.
        enable: `enable=` of the rule.
        outputs: size of the weight's output dimension.
        site: the site's name, for messages.

    Raises:
        ConfigError: the parts do not fit the weight.
    """
    if isinstance(parts, int):
        if outputs % parts:
            raise ConfigError(
                f"'{site}' has {outputs} outputs, which do not split into {parts} equal parts. "
                'Give their sizes: parts={"q": …, "k": …, "v": …}.'
            )
        parts = {str(number): outputs // parts for number in range(parts)}
    if all(isinstance(value, int) for value in parts.values()):
        found = _consecutive(parts, outputs, site)
    else:
        found = {name: _range(name, value) for name, value in parts.items()}
    _check_names(list(found))
    _check_ranges(found, outputs, site)
    wanted = _enabled(list(found), enable)
    return {name: rows for name, rows in found.items() if name in wanted}


def may_be_of(parts: Any, size: int) -> bool:
    """Whether the numbers of `parts=` are those of parts of a dimension of this size."""
    if isinstance(parts, int):
        return size % parts == 0
    values = list(parts.values())
    if all(isinstance(value, int) for value in values):
        return sum(values) == size
    return all(_range(name, value)[1] <= size for name, value in parts.items())


def _consecutive(sizes: Mapping[str, int], outputs: int, site: str) -> dict[str, Rows]:
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
    pair: tuple[Any, ...] = (
        tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    )
    whole = len(pair) == 2 and all(type(n) is int for n in pair)
    if not whole or not 0 <= pair[0] < pair[1] <= MAX_ROWS:
        raise ConfigError(
            f"parts: '{name}' must be a size or a range (from, to), not {shown(value)}."
        )
    return pair[0], pair[1]


def _enabled(names: list[str], enable: Any) -> set[str]:
    if enable is None:
        return set(names)
    if not isinstance(enable, Sequence) or isinstance(enable, str):
        raise ConfigError(f"enable must be a list of flags or of names, not {shown(enable)}.")
    if all(isinstance(flag, bool) for flag in enable):
        if len(enable) != len(names):
            raise ConfigError(f"enable has {len(enable)} flags for {len(names)} parts.")
        wanted = {name for name, flag in zip(names, enable, strict=True) if flag}
    else:
        # parts=3 names the parts "0", "1" and "2"; enable= may list them as numbers.
        wanted = {n if isinstance(n, str) else shown(n) for n in enable}
        if unknown := wanted - set(names):
            raise ConfigError(
                f"enable: no part {shown(sorted(unknown))}; the parts are {some(names)}."
            )
    if not wanted:
        raise ConfigError("enable chooses no part: leave the weight out of the rules instead.")
    return wanted
