"""The only file that knows peft's insides: the closed enum of methods, registration, and what moves between versions.

peft has no entry point for outside methods: ``PeftType`` is a closed enum, and ``register_peft_method`` refuses a name
it does not list. So a member is added first, then the official function is called. Our types carry a prefix of our own
("MF_RLORA"): should peft ever ship an R-LoRA, an adapter saved here will not silently load as that one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn

from multiflora.errors import AdapterError

if TYPE_CHECKING:
    from multiflora.methods.base import Method

STEM = "mf_"


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
