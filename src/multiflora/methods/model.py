"""The tuner: finds the layers to adapt, checks everything that can be checked before one is replaced, swaps them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    onload_layer,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from multiflora.adapter_tensors import state_problems
from multiflora.context import Routing, find
from multiflora.errors import AdapterError, ExportError
from multiflora.methods.base import Method, class_of
from multiflora.methods.block_router import fit_problems
from multiflora.methods.config import AdapterConfig
from multiflora.methods.experts import AdaptedExperts, BranchExperts, experts_class
from multiflora.methods.fused import by_layer, fused_parameters, left_out, targeted, why_not
from multiflora.methods.layer import BranchLinear, layer_class
from multiflora.methods.layer_pass import BranchLayer
from multiflora.methods.model_hooks import give_names, hooks_of, note_places
from multiflora.methods.per_layer import block_problems
from multiflora.methods.targets import can_adapt, identity, places_of_weights, reads_weight_itself
from multiflora.peft_bridge import (
    ExcludedModule,
    include_all_linear_layers,
    prefix,
    quantization_kwargs,
)


class BranchModel(BaseTuner):
    """A model whose layers carry the branches of one method; made by ``peft.get_peft_model``."""

    # (peft's table lists no multi-branch method; LoRA's choice of modules serves them as well)
    method: ClassVar[Method]
    tuner_layer_cls = BranchLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ---- before anything is replaced --------------------------------------------------------------------------------

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Refuse what cannot work: called by peft before it looks at a single layer."""
        config = peft_config
        adapter_name = next(name for name, other in self.peft_config.items() if other is config)
        method = self.method.of(config)
        if (method.needs_task() or method.loss_needs_task(config)) and config.num_tasks is None:
            raise AdapterError(
                f"{type(config).__name__}: num_tasks is None; a method gated by task, or with a loss between tasks, "
                "must know how many there are. Set num_tasks=N or task_names=[...]."
            )
        parameters = self._fused(config, model)
        if config.target_modules == "all-linear" and (told := left_out(model, parameters)):
            warnings.warn(told, UserWarning, stacklevel=2)
        include_all_linear_layers(config, model)
        targets = list(self._targets(config, model))
        if not targets and not parameters:
            return  # peft raises its own error, which lists what was asked for
        for name, module in targets:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if base is not module and module.__class__ is not layer_class(self.method):
                raise AdapterError(
                    f"{name} already carries an adapter of another kind ({type(module).__name__}); one model "
                    f"holds adapters of one method. Unload it first, or use another copy of the model."
                )
            if not can_adapt(base):
                raise AdapterError(
                    f"Target module {name} is a {type(base).__name__}, which is not supported; only linear layers "
                    "(nn.Linear, transformers' Conv1D and quantised ones) can be adapted. Leave it out; the experts "
                    "of a mixture are named in target_parameters."
                )
            reader = reads_weight_itself(model, name)
            if reader is not None:
                raise AdapterError(
                    f"Target module {name} belongs to {reader} its weight directly and would pass the adapter by. "
                    f"Leave it out: exclude_modules=[{name.rpartition('.')[2]!r}]."
                )
        adapted = [*(name for name, _ in targets), *parameters]
        for field in ("rank_pattern", "alpha_pattern", "heads_pattern"):
            for pattern in getattr(config, field) or {}:
                if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                    raise AdapterError(
                        f"{type(config).__name__}: {field} key {pattern!r} matches none of the {len(adapted)} adapted "
                        f"modules (such as {adapted[0]}). Correct or remove it."
                    )
        for problem in block_problems(config, model, adapted):
            raise AdapterError(f"{type(config).__name__}: {problem}")
        for problem in fit_problems(config, model, adapted):
            raise AdapterError(f"{type(config).__name__}: {problem}")
        for name in adapted:
            config.at(name)  # which raises where there is a layer that it says nothing of
        routing = find(model) or Routing()
        routing.configs[adapter_name] = config
        self._routing = routing

    def _fused(self, config: AdapterConfig, model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        """Every fused parameter the config means: name -> the experts that hold it, and its name there."""
        wanted = config.target_parameters or []
        refusal = self.method.of(config).refuses_experts(config)
        if wanted and refusal is not None:
            raise AdapterError(refusal)
        for word in wanted:
            if not targeted(model, [word]):
                known = dict.fromkeys(by_layer(name for name, _ in fused_parameters(model)))
                raise AdapterError(
                    f"target_parameters holds {word!r}, and no parameter's name is or ends in that; the fused experts "
                    f"of the model are {', '.join(known) or 'none'}."
                )
        found = targeted(model, wanted)
        for name, (module, own) in found.items():
            if why := why_not(module, own):
                raise AdapterError(f"Target parameter {name} {why}. Leave it out of target_parameters.")
            if module is model:
                raise AdapterError(f"{own} is held by the model itself; adapt a model that has the experts inside.")
            place = model.get_submodule(name.rpartition(".")[0])
            layers = place.layers().values() if isinstance(place, AdaptedExperts) else ()
            if (place is not module and not layers) or any(type(x) is not experts_class(self.method) for x in layers):
                raise AdapterError(
                    f"{name} already carries an adapter of another kind ({type(place).__name__}); one model holds "
                    "adapters of one method. Unload it first, or use another copy of the model."
                )
        return found

    def _targets(self, config: AdapterConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Every module the config means, with its name."""
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, name + ".")
            if isinstance(module, BranchExperts):
                continue  # another adapter's; it may be called as linear layers are elsewhere
            matched = self._check_target_module_exists(config, name)
            if matched and not isinstance(matched, ExcludedModule):
                yield name, module

    # ---- replacing --------------------------------------------------------------------------------------------------

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        r = peft_config.rank_pattern.get(rank_key, peft_config.r)
        alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        if parameter_name is not None:
            self._adapt_experts(target, target_name, parent, current_key, parameter_name, adapter_name, r, alpha)
            return
        if isinstance(target, BranchExperts):
            return  # see `_targets`
        if isinstance(target, BranchLinear):
            target.update_layer(adapter_name, peft_config, r, alpha)
            return
        layer = layer_class(self.method)(target, self._routing, current_key, **quantization_kwargs(self.model))
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, r, alpha)
        # an adapter that joins a model in eval mode must not begin to drop out
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: AdapterConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """peft's own would take experts that carry an adapter for a layer that another method has adapted."""
        found = self._fused(peft_config, model)
        for name, (_, own) in found.items():
            place, _, target_name = name.rpartition(".")[0].rpartition(".")
            parent = model.get_submodule(place)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config,
                    adapter_name,
                    parent.get_submodule(target_name),
                    target_name,
                    parent,
                    current_key=name,
                    parameter_name=own,
                )
        return list(found)

    def _adapt_experts(
        self,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        name: str,
        own: str,
        adapter_name: str,
        r: int,
        alpha: float,
    ) -> None:
        """Put an adapter on one fused parameter of a mixture's experts."""
        if not isinstance(target, AdaptedExperts):
            experts = AdaptedExperts(target).train(target.training)
            self._replace_module(parent, target_name, experts, target)
            target = experts
        layer = target.layers().get(own)
        if layer is None:
            layer = experts_class(self.method)(target.base_layer, own, self._routing, name)
            layer._active_adapter = adapter_name
            target.add_module(own, layer)
        layer.update_layer(adapter_name, self.peft_config[adapter_name], r, alpha)
        layer.train(target.training)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, AdaptedExperts) or isinstance(child, AdaptedExperts):
            setattr(parent, child_name, new_module)  # peft would look for one weight, and experts have two
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _post_injection_hook(self, model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
        routing = find(model)
        if routing is not None:
            note_places(routing, model)
            if not any(getattr(hook, "__self__", None) is routing for hook in model._forward_pre_hooks.values()):
                self._hooks = list(hooks_of(routing, model))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """See peft, which makes new parameters of a narrow type's, and these learn."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            layer._freeze_non_trainable_peft_weights(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and forget its tasks."""
        super().delete_adapter(adapter_name)
        routing = find(self.model)
        if routing is not None:
            routing.configs.pop(adapter_name, None)
            routing.holders.pop(adapter_name, None)

    # ---- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge in place, into all layers or none; see `MergingLayer.updates` for what is refused."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        else:
            for layer in self._layers():
                if layer.merged:
                    layer.unmerge()  # the base as it was is asked for
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for hook in getattr(self, "_hooks", ()):
            hook.remove()
        return unloaded

    def _layers(self) -> Iterator[BranchLayer]:
        return (layer for layer in self.model.modules() if isinstance(layer, BranchLayer))

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Refuse before the first layer is touched: a half-merged model would be worse than none."""
        if isinstance(adapter_names, str):
            raise ExportError(f"adapter_names is {adapter_names!r}; expected a list of names: [{adapter_names!r}].")
        unknown = [name for name in adapter_names or () if name not in self.peft_config]
        if unknown:
            raise ExportError(f"There is no adapter {unknown[0]!r} to merge; there are {', '.join(self.peft_config)}.")
        places = places_of_weights(self.model)
        for layer in self._layers():
            with onload_layer(layer):
                updates = layer.updates(adapter_names, safe_merge=safe_merge)
            weight = layer.get_base_layer()._parameters.get("weight")
            here = [] if weight is None else places[identity(weight)]
            others = [place for place in here if place != f"{layer.name}.base_layer"]
            if updates and others:
                raise ExportError(
                    f"Cannot merge into {layer.name}: its weight is also that of {others[0]}, which would change with "
                    "it. Keep the adapter, or give the layer a weight of its own before it is adapted (for an output "
                    "layer: load the model with tie_word_embeddings=False and copy the embeddings' weight)."
                )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: peft's sums of adapters are made of LoRA's two factors, and gates are no factors.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            f"add_weighted_adapter is not there for {self.method.name} adapters: it weighs the two factors of LoRAs, "
            "and several heads with a gate are more than these. Make several adapters active at once, which adds their "
            "updates (model.base_model.set_adapter([...])), or convert each by `multiflora convert` and weigh the "
            "plain LoRAs."
        )

    # ---- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """peft asks for each state's own names before it loads one, whoever calls: here a damaged state is refused."""
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_state(model, config.method_name, adapter_name, remapped)
        return remapped

    # ---- calls ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model with its hooks, which add to its loss; peft 0.20 would call its forward past them."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """peft calls this around every forward pass: hand ``adapter_names`` to the layers (mixed batches)."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self._layers() for name in layer.configs}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise AdapterError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        names = list(adapter_names)
        num_beams = kwargs.get("num_beams")
        beams = [name for name in names for _ in range(num_beams)] if isinstance(num_beams, int) else names
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        inside_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        hooks = [
            # generation runs an encoder once, before rows are repeated for beam search
            module.register_forward_pre_hook(
                partial(give_names, names if module in inside_encoder else beams), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (BranchLinear, AdaptedExperts, AuxiliaryTrainingWrapper))
        ]
        routing = find(self.model)
        try:
            with nullcontext() if routing is None else routing.mixed():
                yield
        finally:
            for hook in hooks:
                hook.remove()


def state_of(model: nn.Module, method_name: str, adapter_name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors in a model, by their names in its ``state_dict``."""
    mark, end = f".{prefix(method_name)}", f".{adapter_name}"
    return {name: tensor for name, tensor in model.state_dict().items() if mark in name and name.endswith(end)}


def check_state(model: nn.Module, method_name: str, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that are not all and only those of an adapter, before one of them is loaded.

    Raises:
        AdapterError: A tensor is missing, damaged, of another shape or of another adapter; it is named.
    """
    for problem in state_problems(state_of(model, method_name, adapter_name), state):
        raise AdapterError(f"The adapter {adapter_name} is damaged or of another model: {problem}")


@cache
def model_class(method: Method) -> type[BranchModel]:
    """The tuner class of a method, for peft's table."""
    names = {
        "method": method,
        "prefix": prefix(method.name),
        "__doc__": f"A model with {method.name} adapters; made by ``peft.get_peft_model``.",
        "__module__": __name__,
    }
    return type(f"{method.config.__name__.removesuffix('Config')}Model", (BranchModel,), names)


def __getattr__(name: str) -> type:
    return class_of(name, "Model", model_class)
