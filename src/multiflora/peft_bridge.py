"""The only file that touches what peft keeps private: its closed enum of methods, and what moves between versions.

``PeftType`` is a closed enum, and ``register_peft_method`` refuses a name it does not list. So a member is added first,
then the official function is called (`multiflora.methods.registration`). Our types carry a prefix of our own
("MF_RLORA"): should peft ever ship an R-LoRA, an adapter saved here will not silently load as that one.
"""

from __future__ import annotations

from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from peft.tuners.tuners_utils import _get_in_out_features
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
from peft.utils.peft_types import PeftType
from torch import nn

from multiflora.errors import AdapterError

__all__ = [
    "STEM",
    "BufferDict",
    "ExcludedModule",
    "include_all_linear_layers",
    "layer_widths",
    "peft_type",
    "prefix",
    "quantization_backend",
    "quantization_kwargs",
]

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
