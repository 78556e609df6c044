r"""Do tasks pull the adapter the same way? Cosines of their gradients, and groups of tasks that agree.

.. math:: c_{ab} = \frac{\langle \nabla L_a, \nabla L_b \rangle}{\|\nabla L_a\| \|\nabla L_b\|}

Below 0 a step for one task raises the other's loss (Yu et al. 2020, arXiv 2001.06782, call it a conflict). One model
for tasks in conflict needs heads, or a task's own matrix, to tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multiflora.context import find
from multiflora.training.losses import predicted_positions, project_only, token_losses

__all__ = ["gradient_cosines", "group_tasks", "task_gradients"]


def task_gradients(model: nn.Module, batches: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Tensor]]:
    """The gradient of each task's mean loss per token, for every trainable tensor, in the model's eval mode.

    Without dropout, so that what differs between tasks is the tasks.

    Args:
        model: A model with trainable parameters; its gradients are left as they were found, empty.
        batches: Task -> batches with ``input_ids``, ``attention_mask``, ``labels`` and ``task_id``.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    routed = find(model) is not None
    model.eval()
    found = {}
    for task, own in batches.items():
        tokens = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in own)
        total = [torch.zeros_like(p) for p in parameters]
        for batch in own:
            known = ("input_ids", "attention_mask", "position_ids", *(("task_id",) if routed else ()))
            inputs = {key: batch[key] for key in known if key in batch}
            positions, targets = predicted_positions(batch["labels"])
            with project_only(model.get_output_embeddings(), positions):  # type: ignore[operator]
                logits = model(**inputs, use_cache=False).logits
            loss = token_losses(logits, targets).sum() / max(tokens, 1)
            for i, gradient in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                if gradient is not None:
                    total[i] += gradient
        found[task] = total
    return found


def gradient_cosines(gradients: Mapping[str, Sequence[Tensor]]) -> list[list[float]]:
    """The cosine of every two tasks' gradients over all parameters, (tasks, tasks); 0 with a gradient that is zero.

    Example:
        >>> gradient_cosines({"a": [torch.tensor([1.0, 0.0])], "b": [torch.tensor([-1.0, 0.0])]})
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    flat = torch.stack([torch.cat([g.flatten().to(torch.float64) for g in own]) for own in gradients.values()])
    norms = flat.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, flat / norms.clamp(min=1e-300), torch.zeros_like(flat))
    cosines: list[list[float]] = (unit @ unit.t()).clamp(-1, 1).tolist()
    return cosines


def group_tasks(names: Sequence[str], cosines: Sequence[Sequence[float]]) -> list[list[str]]:
    """Suggest groups: tasks join while the gradients of two groups agree on average (mean cosine above 0).

    Average linkage on the distance 1 - cosine, cut at 1.

    Args:
        names: The tasks.
        cosines: From `gradient_cosines`.

    Example:
        >>> group_tasks(["a", "b", "c"], [[1.0, 0.5, -0.2], [0.5, 1.0, -0.1], [-0.2, -0.1, 1.0]])
        [['a', 'b'], ['c']]
    """
    if len(names) < 2:
        return [list(names)]
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    distances = 1 - np.asarray(cosines)
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform((distances + distances.T) / 2, checks=False), "average")
    # a hair below 1: orthogonal tasks gain nothing from each other
    labels = fcluster(tree, 1 - 1e-9, "distance")
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        groups.setdefault(int(label), []).append(name)
    return list(groups.values())
