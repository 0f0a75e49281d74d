"""A call of a captured module, and the call of a program of it: its inputs and outputs by form."""

from __future__ import annotations

import inspect
import itertools
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..module.program import ProgramModule
from .metadata import plain

ADAPTERS = "adapters"  # the argument of a program whose adapters are inputs


@dataclass(frozen=True)
class Form:
    """How a program takes its inputs and gives its outputs.

    Attributes:
        flat: tensors only, in the order of the leaves of the call; else as the source does.
        plain: dicts and tuples in place of containers of other libraries.
        inputs: the tensors of the module that are inputs, by name, with example values.
        aliases: further names of these tensors in the graph: the name of the input for each.
    """

    flat: bool
    plain: bool
    inputs: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """A call of a captured module, and how a program of it is called.

    Attributes:
        module: the module that runs the call.
        args, kwargs: the call's arguments.
        form: how the program takes them.
    """

    module: ProgramModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    form: Form

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the program for arguments of the module like the call's."""
        if self.form.flat:
            tensors = [v for v in pytree.tree_leaves((args, kwargs)) if is_tensor(v)]
            return (*tensors, *values.values()), {}
        if self.form.plain:
            args, kwargs = tuple(map(plain, args)), {k: plain(v) for k, v in kwargs.items()}
        return args, {**kwargs, ADAPTERS: dict(values)} if values else kwargs

    def taken(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Mapping[str, Any]]:
        """Return the module's arguments, and the values of tensors, for the program's arguments."""
        if not self.form.flat and not self.form.plain:
            kwargs = dict(kwargs)
            values = kwargs.pop(ADAPTERS, {}) if self.form.inputs else {}
            return args, kwargs, values
        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        if self.form.flat:
            given = iter(args)
            leaves = [next(given) if is_tensor(leaf) else leaf for leaf in leaves]
            values = dict(zip(self.form.inputs, given, strict=True))
        else:
            kwargs = dict(kwargs)
            values = kwargs.pop(ADAPTERS, {}) if self.form.inputs else {}
            leaves = pytree.tree_leaves((args, kwargs))
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return args, kwargs, values

    def returned(self, output: Any) -> Any:
        """Return the program's output for the module's."""
        if self.form.flat:
            return tuple(leaf for leaf in pytree.tree_leaves(output) if is_tensor(leaf))
        return plain(output) if self.form.plain else output

    def names(self) -> list[str]:
        """Return names for the inputs of a flat program."""
        contract = self.module.contract
        if contract is None:
            bound = inspect.signature(type(self.module).forward).bind(
                None, *self.args, **self.kwargs
            )
            paths, _ = pytree.tree_flatten_with_path(dict(bound.arguments))
            found = [pytree.keystr(path) for path, leaf in paths if is_tensor(leaf)]
        else:
            pairs = contract.pairs(self.args, self.kwargs)
            found = [leaf.name for leaf, value in pairs if is_tensor(value)]
        return distinct_names(found)


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def distinct_names(texts: Sequence[str]) -> list[str]:
    """Return Python identifiers like the texts, each once."""
    taken: dict[str, None] = {}
    for text in texts:
        name = re.sub(r"\W+", "_", text).strip("_") or "value"
        name = f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name
        tried = (f"{name}_{number}" if number else name for number in itertools.count())
        taken[next(one for one in tried if one not in taken)] = None
    return list(taken)
