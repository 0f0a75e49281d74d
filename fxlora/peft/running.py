"""Which module of a PeftModel runs: with an adapter, without, or merged; and the tensors of all."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..api import fold
from ..errors import AdapterError, ConfigError, FxLoraError, InjectError
from ..hosts.host import Host
from ..hosts.merged_source import merged
from ..names import shown
from ..passes import Remove
from ..tables import some
from .adapters import Adapters

# The attributes in which two hosts of one model differ.
_TENSORS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_OF_HOST = (*_TENSORS, "_captured", "_held", "_seal")


def host_of(adapters: Adapters, methods: type[RunningModule]) -> Any:
    """Return a host of the module that is to run, whose class also has some methods."""
    host: Any = adapters.running()
    kind = type(host)
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    result: Any = nn.Module.__new__(type(kind.__name__, (methods, kind), names))
    object.__setattr__(result, "__dict__", host.__dict__)
    result.__dict__["_peft"] = adapters
    return result


class RunningModule(Host):
    """A host that becomes another one, of the same model: of the module that is to run."""

    _peft: Adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list if several are."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self._peft.active)

    # ---- running without them --------------------------------------------------------------------

    def disable_adapter_layers(self) -> None:
        """Run the base model from now on, and train nothing.

        What is merged is not, afterwards, as in PEFT.
        """
        self._peft.enabled, self._peft.merged = False, ()
        self._peft.train_only(())
        self._run()

    def enable_adapter_layers(self) -> None:
        """Run the active adapters again. They train, and no others, as in PEFT."""
        self._peft.enabled = True
        self._peft.train_only(self._peft.active)
        self._run()

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Run the base model in a `with` block; afterwards `enable_adapter_layers` is called."""
        before = self._peft.enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if before:
                self.enable_adapter_layers()

    def merge_adapter(
        self,
        adapter_names: str | list[str] | None = None,
        safe_merge: bool = False,
        *,
        quantised: str | None = None,
    ) -> None:
        """Run the graph with folded weights (see `fold`), until `unmerge_adapter`.

        Adapters that are merged already stay so: the weights are those of the sum.

        Args:
            adapter_names: the adapters to merge; by default the active ones.
            safe_merge: without effect: a fold raises for weights that are not finite.
            quantised: as for `fxlora.fold`; by default as in the merge before.

        Raises:
            InjectError: the adapters have no sum, or a folded weight is not finite.
            ConfigError: an active adapter that is not merged adapts other weights, where PEFT runs
                it.
            QuantisedError: as for `fxlora.fold`.
        """
        before = self._peft.merged, self._peft.quantised
        self._peft.merged = self._to_merge(adapter_names)
        self._peft.quantised = self._how(quantised, before[0])
        try:
            self._check_left_out()
            self._run()
        except FxLoraError:
            self._peft.merged, self._peft.quantised = before
            self._run()
            raise

    def _check_left_out(self) -> None:
        """Raise if an active adapter that is not merged adapts other weights than those that are.

        PEFT runs it there, as no adapter that anyone has.
        """
        if left := self._peft.left_out():
            merged, active = list(self._peft.merged), some(left)
            raise ConfigError(
                f"merged, {some(merged)} would run alone, and {active}, active, adapts other "
                f"weights too, where PEFT runs it: call set_adapter({merged}) before, or "
                f"merge_adapter({[*merged, *left]}) for the sum."
            )

    def unmerge_adapter(self) -> None:
        """Run the active adapter as a branch again."""
        self._peft.merged = ()
        self._run()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | list[str] | None = None,
        *,
        quantised: str | None = None,
    ) -> Any:
        """Return a copy of the user's own model with folded weights (`fxlora.merged`).

        Args:
            progressbar: without effect.
            safe_merge: raise if a folded weight is not finite.
            adapter_names: the adapters to merge, with those that are merged already; by default
                the active ones.
            quantised: for quantised weights, "dequantise" or "requantise", as for `fxlora.fold`.

        Raises:
            InjectError: a folded weight is NaN or infinite.
            QuantisedError: as for `fxlora.fold`.
        """
        how = self._how(quantised, self._peft.merged)
        return self._merged(self._to_merge(adapter_names), how, safe_merge)

    def _merged(self, names: tuple[str, ...], quantised: str | None, safe: bool) -> nn.Module:
        if quantised == "keep":
            raise ConfigError(
                'the model\'s own class has no branches, which quantised="keep" would keep: take '
                '"dequantise" or "requantise", or this model as it is.'
            )
        folded = fold(self._peft.with_active(names), quantised=quantised)
        if safe and (bad := [n for n, p in folded.named_parameters() if not _finite(p)]):
            raise InjectError(f"{some(bad)}: NaN or infinity after the merge.")
        result = merged(self._peft.source, folded)
        devices = {p.device for p in folded.parameters()}
        return result.to(devices.pop()) if len(devices) == 1 else result

    def unload(self) -> nn.Module:
        """Return the user's own model, which never had adapters.

        It is a copy of it where this model has other values than the user's: merged adapters,
        modules or biases that the active ones train in full, buffers that calls have written to,
        or weights that were loaded.
        """
        if self._peft.merged:
            return self._merged(self._peft.merged, self._peft.quantised, safe=False)
        self._peft.keep_buffers()
        module = self._peft.with_active(self.active_adapters)
        trained = module.plan is not None and module.plan.trained
        if not (self._peft.loaded or trained or _buffers_differ(self._peft.source, module)):
            return self._peft.source
        plain = module if module.plan is None else Remove(restore=False)(module)
        return merged(self._peft.source, plain)

    def get_base_model(self) -> Any:
        """Return the model with its adapters: it is an instance of the user's class itself."""
        return self

    def _to_merge(self, names: Any) -> tuple[str, ...]:
        """Return what is merged, with the adapters to merge: the active ones, if None are given."""
        chosen = self.active_adapters if names is None else listed("adapter_names", names)
        self._peft.check_known(*chosen)
        return tuple(dict.fromkeys((*self._peft.merged, *chosen)))

    def _how(self, quantised: str | None, before: tuple[str, ...]) -> str | None:
        """Return what a merge does with quantised weights: what the one before did, by default."""
        return self._peft.quantised if quantised is None and before else quantised

    # ---- the tensors of all adapters -------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all parameters, of every adapter: one optimizer may train them in turns."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for name, parameter in self._peft.others() if recurse else ():
            yield f"{prefix}.{name}".removeprefix("."), parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors of the model and of all adapters, by their names here."""
        state = super().state_dict(*args, **kwargs)
        for name, tensor in self._peft.other_tensors().items():
            state[f"{kwargs.get('prefix', '')}{name}"] = tensor.detach()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the tensors of the running module, and those of other adapters that are given.

        All adapters get the base weights; the user's model stays as it is.

        Raises:
            ConfigError: adapters are merged, whose weights would be the base's.
            AdapterError: a tensor has another shape, or the state is of a model with other active
                adapters, of which one trains in full what is a base weight here.
        """
        if self._peft.merged:
            raise ConfigError(
                f"{some(self._peft.merged)}: merged now, so the weights here are not the base's. "
                "Call unmerge_adapter(), then load_state_dict, then merge_adapter()."
            )
        others = self._peft.other_tensors()
        base = self._peft.names_of_base() & state_dict.keys()
        self._check_state(state_dict, others, base)
        mine = {name: tensor for name, tensor in state_dict.items() if name not in others}
        try:
            result = super().load_state_dict(mine, *args, **kwargs)
        finally:  # torch loads what fits, and raises afterwards
            self._peft.share_base(base)
        with torch.no_grad():
            for name in state_dict.keys() & others.keys():
                others[name].copy_(state_dict[name])
        return result

    def _check_state(
        self, state: Mapping[str, Any], others: Mapping[str, torch.Tensor], base: Collection[str]
    ) -> None:
        for name in state.keys() & others.keys():
            if others[name].shape != state[name].shape:
                raise AdapterError(
                    f"'{name}' is {tuple(state[name].shape)} in the state, and "
                    f"{tuple(others[name].shape)} here."
                )
        own = self._peft.saved_names()
        left = [n for n, path in own.items() if path in base and n in others and n not in state]
        given = [n for n in own if n in state and n not in others]
        if left or given:
            raise AdapterError(
                f"the state {'has no' if left else 'has'} {some(left or given)}: other adapters "
                "were active when it was saved. Make them active here first: set_adapter, or "
                "disable_adapter_layers() if none was."
            )

    # ---- the host that runs ----------------------------------------------------------------------

    def _run(self) -> None:
        """Become the host of the module that is to run, in the same mode and with the same hooks.

        Loops and optimizers hold this object, so it takes over the other host's attributes.
        """
        before, host = self.__dict__, self._peft.running()
        if host.__dict__ is before:
            return
        own = {name: host.__dict__[name] for name in _OF_HOST}
        host.__dict__.update({**before, **own})
        object.__setattr__(self, "__dict__", host.__dict__)
        self.train(before["training"])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._peft.apply(fn)
        self._run()  # a merged module is made anew
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = nn.Module.__new__(type(self))
        adapters = self._peft.copied(memo)
        object.__setattr__(copied, "__dict__", adapters.running().__dict__)
        copied.__dict__["_peft"] = adapters
        copied.train(self.training)
        return copied


def listed(what: str, names: Any) -> list[str]:
    """Return one name or several as a list.

    Raises:
        ConfigError: they are none.
    """
    found = [names] if isinstance(names, str) else names
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise ConfigError(
            f"{what} takes the name of an adapter, or a list of names: {shown(names)}."
        )
    return list(found)


def _buffers_differ(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module has other values of a model's buffers."""
    held = dict(module.named_buffers(remove_duplicate=False))
    named = model.named_buffers(remove_duplicate=False)
    return any(_differ(buffer, held[name]) for name, buffer in named if name in held)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ in dtype, shape or bits: a NaN is equal to itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return True
    if one.is_meta or other.is_meta:
        return one.is_meta is not other.is_meta
    ours, theirs = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (one, other))
    return not torch.equal(ours, theirs)


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
