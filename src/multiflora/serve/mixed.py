"""One model for a batch in which each row has an adapter of its own, of any method, or none.

The base product of a layer is computed once for all rows; each adapter then adds its branches to its own rows, which
lie side by side. Nothing is switched: a layer looks at the groups of the batch that is running.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from peft.tuners.lora.layer import Linear as PlainLora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from multiflora.context import find
from multiflora.methods.layer import BranchLinear
from multiflora.serve.models import Served, share_weights

__all__ = ["Group", "Mixed"]

Task = str | int | None


class Group(NamedTuple):
    """Rows of a batch that lie side by side and have one adapter."""

    name: str
    start: int
    stop: int


class _Layer(nn.Module):
    """A linear layer and every adapter's branches on it.

    Args:
        base: The base model's layer.
        adapters: Name -> its adapted layer, over the same weight.
        groups: The batch's groups; the same list in all layers.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, Any], groups: list[Group]) -> None:
        super().__init__()
        self.base = base
        self.adapters = dict(adapters)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for name, start, stop in self.groups:
            if (layer := self.adapters.get(name)) is not None:
                y[start:stop] = _added(layer, x[start:stop], y[start:stop])
        return y


def _added(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """The base layer's output y with the active adapter's branches."""
    (name,) = layer.active_adapters
    if isinstance(layer, BranchLinear):
        return layer.add_to(x, y, name)
    A, B = layer.lora_A[name], layer.lora_B[name]
    added: Tensor = B(A(x.to(A.weight.dtype))) * layer.scaling[name]
    return y + added.to(y.dtype)


class Mixed:
    """The base model and all adapters that differ from it in linear layers alone, as one model.

    Args:
        base: The base model.
        served: What is served, by name.
    """

    def __init__(self, base: Any, served: Mapping[str, Served]) -> None:
        self.groups: list[Group] = []
        self.model = share_weights(base)
        self._routings: dict[str, Any] = {}
        known = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
        places: dict[str, dict[str, Any]] = {}
        self.names = set()
        for name, one in served.items():
            layers = {} if one.model is base else _linear_layers(one.model, known)
            if layers is None:
                continue
            self.names.add(name)
            self._routings[name] = None if one.model is base else find(one.model)
            for place, layer in layers.items():
                places.setdefault(place, {})[name] = layer
        for place, adapters in places.items():
            parent, _, leaf = place.rpartition(".")
            owner = self.model.get_submodule(parent)
            setattr(owner, leaf, _Layer(getattr(owner, leaf), adapters, self.groups))

    def forward(self, ids: Tensor, names: Sequence[str], tasks: Sequence[Task], **words: Any) -> Any:
        """One forward pass; rows of one adapter must lie side by side.

        Args:
            ids: (rows, length).
            names: Which model each row is for.
            tasks: The task of each row.
            words: For the model.
        """
        self.groups[:] = _groups(names)
        for name, start, stop in self.groups:
            if (routing := self._routings[name]) is not None:
                own = list(tasks[start:stop])
                known = None if None in own else own
                routing.begin(self.model, (ids[start:stop],), {} if known is None else {"task_id": known})
        return self.model(input_ids=ids, **words)


def _groups(names: Sequence[str]) -> Iterator[Group]:
    start = 0
    for k in range(1, len(names) + 1):
        if k == len(names) or names[k] != names[start]:
            yield Group(names[start], start, k)
            start = k


def _linear_layers(model: Any, known: set[int]) -> dict[str, Any] | None:
    """An adapter's layers by their place in the base model; None where it changes more than linear layers."""
    if not hasattr(model, "get_base_model") or model.active_peft_config.is_prompt_learning:
        return None
    tree = model.get_base_model()
    layers: dict[str, Any] = {name: layer for name, layer in tree.named_modules() if isinstance(layer, BaseTunerLayer)}
    for layer in layers.values():
        plain = type(layer) is PlainLora and not layer.lora_variant and type(layer.base_layer) is nn.Linear
        ours = isinstance(layer, BranchLinear) and type(layer.base_layer) is nn.Linear
        if not (plain or ours) or len(layer.active_adapters) != 1 or layer.merged:
            return None
    own = {id(t) for layer in layers.values() for t in (*layer.parameters(), *layer.buffers())}
    others = {id(t) for t in (*tree.parameters(), *tree.buffers())} - own
    return layers if others <= known else None
