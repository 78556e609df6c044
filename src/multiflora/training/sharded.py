"""Parameters that are spread over processes (FSDP2, FSDP1, ZeRO-3): the adapter made whole, the model made callable.

Saving what one process holds has lost most of an adapter elsewhere without a word (accelerate #4206, peft #2892): here
every tensor is gathered from all processes first, and the saved file is read back and compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

__all__ = ["adapter_tensors", "gather_containers", "keep_root_whole", "put_tensors"]


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors by their names in the model, whole and on the CPU; all of a model without adapters.

    Where parameters are spread over processes, all of these must call it at the same time.

    Args:
        model: A model that peft has adapted, or one that is trained whole.
    """
    adapters = set(model.peft_config) if isinstance(model, PeftModel) else None

    def wanted(name: str, trained: bool) -> bool:
        return trained or (adapters is not None and not adapters.isdisjoint(name.split(".")))

    found: dict[str, Tensor] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            found |= _copies((n, p) for n, p in _named(model, unit) if wanted(n, p.requires_grad))
    names = [(_plain(n), p) for n, p in model.named_parameters() if wanted(_plain(n), p.requires_grad)]
    kept = model.state_dict().keys() if adapters is None else ()  # buffers that belong to a saved model
    names += [(_plain(n), b) for n, b in model.named_buffers() if wanted(_plain(n), n in kept)]
    return _copies((name, tensor) for name, tensor in names if name not in found) | found


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model that is whole in this process the values of tensors by the names of `adapter_tensors`."""
    here = {_plain(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            here[name].copy_(tensor)


def _copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _whole(tensor).detach().cpu().clone() for name, tensor in named}


def _whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from all processes."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.data.detach().clone()
    return tensor


def _named(model: nn.Module, unit: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The parameters of one unit of FSDP1, by their names in the model."""
    within = {id(module) for module in unit.modules()}
    nested = {
        id(module)
        for inner in FullyShardedDataParallel.fsdp_modules(unit)
        if inner is not unit
        for module in inner.modules()
    }
    for prefix, module in model.named_modules():
        if id(module) in within - nested:
            for name, parameter in module.named_parameters(recurse=False):
                yield _plain(f"{prefix}.{name}"), parameter


def _plain(name: str) -> str:
    """Leave out what wrappers add to names."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


def keep_root_whole(model: nn.Module, wrapped: nn.Module) -> None:
    """Let a model that FSDP1 wraps be called without its wrapper: gather what no inner unit gathers by itself.

    Args:
        model: The model.
        wrapped: What training made of it; nothing is done for any other wrapper.
    """
    if isinstance(wrapped, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(wrapped, recurse=False, writeback=False)
        whole.__enter__()
        vars(model)["_root_kept_whole"] = whole  # it would end with the last reference to it


def gather_containers(model: nn.Module) -> None:
    """Let ZeRO-3 gather what layers keep in containers: it gathers a module's own parameters when that one is called.

    A layer with branches reads its tensors out of ``nn.ParameterDict``s, which nobody calls, and would find them empty.

    Args:
        model: The model, before DeepSpeed has it.
    """
    import deepspeed

    for layer in model.modules():
        for child in layer.children():
            if isinstance(child, (nn.ParameterDict, nn.ParameterList)):
                for parameter in child.parameters():
                    deepspeed.zero.register_external_parameter(layer, parameter)
