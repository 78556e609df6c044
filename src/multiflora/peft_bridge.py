"""The only file that knows peft's insides: the closed enum of methods, registration, and what moves between versions.

peft has no entry point for outside methods: ``PeftType`` is a closed enum, and ``register_peft_method`` refuses a name
it does not list. So a member is added first, then the official function is called. Our types carry a prefix of our own
("MF_RLORA"): should peft ever ship an R-LoRA, an adapter saved here will not silently load as that one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import wrapt
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import hotswap, register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn

from multiflora.errors import AdapterError, MultifloraError

if TYPE_CHECKING:
    from multiflora.methods.base import Method

STEM = "mf_"
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


def prefix(method_name: str) -> str:
    """Prefix of a method's parameter names; transformers derives the same from the peft type."""
    return f"{STEM}{method_name}_"


def peft_type(method_name: str) -> PeftType:
    """The enum member of a method, added to peft's enum on first use."""
    name = f"{STEM}{method_name}".upper()
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    vars(member).update(__objclass__=PeftType, _sort_order_=len(PeftType._member_names_))
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # from Python 3.12 a member is looked up as a plain attribute of the class
    type.__setattr__(PeftType, name, member)
    return member


def register_methods() -> None:
    """Make every method of ``METHODS`` known to peft. Called once, when peft is imported."""
    from multiflora.methods import METHODS

    for card in METHODS.values():
        if card.module is not None:
            register(importlib.import_module(card.module).METHOD)
    _watch_loading()


def register(method: Method) -> None:
    """Make one method known to peft; a second call changes nothing.

    Raises:
        AdapterError: Another package has taken the name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from multiflora.methods.model import model_class

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


def layer_widths(base_layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer of any kind peft knows, quantised or sharded."""
    d_in, d_out = _get_in_out_features(base_layer)
    if d_in is None or d_out is None:
        raise AdapterError(
            f"{type(base_layer).__name__} has no in and out features; only linear layers can be adapted."
        )
    return d_in, d_out


def quantization_backend(base_layer: nn.Module, quantization: dict[str, Any]) -> Any:
    """peft's backend for a quantised layer, or None for a plain one."""
    from peft.utils import resolve_quantization_backend

    return resolve_quantization_backend(
        base_layer, get_apply_tensor_subclass=quantization.get("get_apply_tensor_subclass")
    )


def quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """What peft needs to quantise again after a merge (torchao)."""
    from peft.utils import get_quantization_kwargs

    found: dict[str, Any] = get_quantization_kwargs(model)
    return found


# ---- loading ---------------------------------------------------------------------------------------------------------


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
    from multiflora.methods.model import check_state, state_of

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
    from multiflora.methods.model import check_state, state_of

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
