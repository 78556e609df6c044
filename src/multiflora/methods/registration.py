"""Our methods in peft's hands: each becomes one of peft's types, and nothing else is ever loaded into an adapter.

peft has no entry point for outside methods, so they are registered as soon as peft is imported. Tensors come into an
adapter in four ways; `multiflora.methods.model` guards one, and the other three are wrapped here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import wrapt
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import hotswap, register_peft_method

from multiflora.errors import AdapterError, MultifloraError
from multiflora.methods import METHODS
from multiflora.methods.model import check_state, model_class, state_of
from multiflora.peft_bridge import STEM, peft_type, prefix

if TYPE_CHECKING:
    from multiflora.methods.base import Method

__all__ = ["register", "register_methods"]

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_seed",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Settings that two adapters may differ in and still be swapped: they do not change what the tensors mean."""


def register_methods() -> None:
    """Make every method of ``METHODS`` known to peft. Called once, when peft is imported."""
    for card in METHODS.values():
        if card.module is not None:
            register(importlib.import_module(card.module).METHOD)
    _watch_loading()


def register(method: Method) -> None:
    """Make one method known to peft; a second call changes nothing.

    Raises:
        AdapterError: Another package has taken the name.
    """
    member = peft_type(method.name)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is None:
        hotswap.CONFIG_KEYS_TO_CHECK[member] = [
            field.name for field in dataclasses.fields(method.config) if field.name not in _WITHOUT_EFFECT
        ]
        register_peft_method(
            name=f"{STEM}{method.name}",
            config_cls=method.config,
            model_cls=model_class(method),
            prefix=prefix(method.name),
        )
    elif registered is not method.config:
        raise AdapterError(
            f"peft already knows a method {member.value} ({registered.__module__}.{registered.__name__}); multiflora "
            "does not replace it. Another package has taken the name: remove one of the two."
        )


def _watch_loading() -> None:
    """Wrap the three ways in which tensors come into an adapter beside ``set_peft_model_state_dict``; once."""
    if not isinstance(hotswap.hotswap_adapter_from_state_dict, wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper(hotswap, "hotswap_adapter_from_state_dict", _swap)
        wrapt.wrap_function_wrapper("peft.peft_model", "PeftModel.load_adapter", _load_whole_or_not)
        wrapt.wrap_function_wrapper(
            "transformers.integrations.peft", "PeftAdapterMixin.load_adapter", _load_whole_or_not
        )


def _load_whole_or_not(load: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load an adapter; where it is refused, no half-loaded one is left beside the others."""
    given = inspect.signature(load).bind(*args, **kwargs).arguments
    name = given.get("adapter_name") or "default"
    before = set(getattr(model, "peft_config", ()))
    try:
        try:
            loaded = load(*args, **kwargs)
        except RuntimeError as error:
            config = getattr(model, "peft_config", {}).get(name)
            if _method_name(config) is None or "ignore_mismatched_sizes" not in str(error):
                raise
            raise AdapterError(
                f"The adapter {name} does not fit the model: one of its tensors has another shape, as the report above "
                "says. Save the adapter again, or load it onto the model that it was trained on."
            ) from error
        # transformers puts tensors in place itself, and only reports what was wrong
        if hasattr(loaded, "mismatched_keys"):
            _check_report(model, name, loaded)
        return loaded
    except MultifloraError:
        if name not in before and name in getattr(model, "peft_config", ()):
            model.delete_adapter(name)
        raise


def _check_report(model: Any, adapter_name: str, report: Any) -> None:
    method_name = _method_name(model.peft_config[adapter_name])
    if method_name is not None:
        state = state_of(model, method_name, adapter_name)
        lost = {*report.missing_keys, *(key if isinstance(key, str) else key[0] for key in report.mismatched_keys)}
        strange = {key: torch.empty(0) for key in report.unexpected_keys}
        check_state(model, method_name, adapter_name, strange | {key: t for key, t in state.items() if key not in lost})


def _swap(swap: Callable[..., None], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """peft's hot-swap, for our adapters: the tensors of one put in the place of another's, all or none."""
    given = inspect.signature(swap).bind(*args, **kwargs).arguments
    method_name = _method_name(given["config"])
    if method_name is None:
        return swap(*args, **kwargs)
    model, name = given["model"], given["adapter_name"]
    state: Mapping[str, torch.Tensor] = given["state_dict"]
    if any(name in getattr(module, "merged_adapters", ()) for module in model.modules()):
        raise AdapterError(
            f"The adapter {name} is merged into the base weights and cannot be swapped. Call unmerge_adapter() first."
        )
    check_state(model, method_name, name, dict(state))
    with torch.no_grad():
        for key, tensor in state_of(model, method_name, name).items():
            tensor.copy_(state[key])
    return None


def _method_name(config: Any) -> str | None:
    """Of a config of ours; None for others'."""
    return getattr(config, "method_name", None)
