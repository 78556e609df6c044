"""One model for a batch in which each row has an adapter of its own, of any method, or none.

The base product of a layer is computed once for all rows; each adapter then adds its branches to its own rows, which
lie side by side, by adapter and task. Nothing is switched: a layer looks at the groups of the batch that is running,
and each group's branches are those that :mod:`multiflora.methods.inference` keeps prepared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from peft.tuners.lora.layer import Linear as PlainLora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from multiflora.base_model import share_weights
from multiflora.context import Routing, find
from multiflora.forward_pass import Pass
from multiflora.methods.inference import Store
from multiflora.methods.layer import BranchLinear
from multiflora.serve.models import Served

__all__ = ["Group", "Mixed"]

Task = str | int | None
Key = tuple[str, Task]


class Group(NamedTuple):
    """Rows of a batch that lie side by side and have one adapter and one task."""

    name: str
    start: int
    stop: int
    routing: Routing | None
    """What the adapter's layers ask for the task; None where they ask nothing."""
    passed: Pass | None
    """What they are told."""


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
        # each line is paid for by every layer for every token
        state = self.__dict__
        adapters, groups = state["adapters"], state["groups"]
        if len(groups) == 1:
            (name, _, _, routing, passed) = groups[0]
            if (layer := adapters.get(name)) is None:
                alone: Tensor = state["_modules"]["base"](x)
                return alone
            if routing is not None:
                routing.enter(passed)
            own: Tensor = layer.forward(x)  # which takes the base product along
            return own
        y: Tensor = state["_modules"]["base"](x)
        for name, start, stop, routing, passed in groups:
            if (layer := adapters.get(name)) is not None:
                if routing is not None:
                    routing.enter(passed)
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
        self._routings: dict[str, Routing | None] = {}
        self._decoding: tuple[Any, list[Group]] = (None, [])
        known = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
        places: dict[str, dict[str, Any]] = {}
        self.names: set[str] = set()
        self._by_task = {name for name, one in served.items() if one.needs_task}
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
        """One forward pass; rows of one adapter and task must lie side by side.

        Args:
            ids: (rows, length).
            names: Which model each row is for.
            tasks: The task of each row.
            words: For the model.
        """
        rows = self._keys(names, tasks)
        if ids.shape[1] > 1:
            self.groups[:] = self._grouped(rows, tasks, ids)
        else:
            if self._decoding[0] != (rows, tasks):  # a row has come or gone
                self._decoding = (rows, list(tasks)), list(self._grouped(rows, tasks, ids))
            self.groups[:] = self._decoding[1]
        try:
            return self.model(input_ids=ids, **words)
        finally:
            for group in self.groups:
                if group.routing is not None:
                    group.routing.enter(None)

    def _keys(self, names: Sequence[str], tasks: Sequence[Task]) -> list[Key]:
        """What each row's group is told apart by."""
        asked = dict.fromkeys(zip(names, tasks, strict=True))
        count = Counter(name for name, _ in asked)
        # more tasks than a layer keeps prepared at once are computed together
        apart = {name: count[name] <= Store.MOST // 2 for name in count}
        by_task = self._by_task
        return [
            (name, task if apart[name] else "several") if name in by_task else (name, None)
            for name, task in zip(names, tasks, strict=True)
        ]

    def _grouped(self, rows: Sequence[Key], tasks: Sequence[Task], ids: Tensor) -> Iterator[Group]:
        """Each group, and a pass for the layers of its adapter."""
        start = 0
        for k in range(1, len(rows) + 1):
            if k == len(rows) or rows[k] != rows[start]:
                name, task = rows[start]
                routing, passed = self._routings[name], None
                if routing is not None:
                    given = {} if task is None else {"task_id": list(tasks[start:k])}
                    routing.enter(None)
                    routing.begin(self.model, (ids[start:k],), given)
                    passed = routing.now()
                yield Group(name, start, k, routing, passed)
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
