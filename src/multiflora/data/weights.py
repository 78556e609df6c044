r"""How much each token counts in a step's loss where tasks, not tokens, are to weigh alike.

The mean over a step's labelled tokens lets a task with long answers drown the others: of two tasks that are drawn
equally often, one with answers of 90 tokens holds nine tenths of the loss beside one with answers of 10. Instead,

.. math:: L = \sum_t \frac{n_t}{n} \cdot \frac{1}{m_t} \sum_{i \in t} \ell_i

takes each task's own mean over its m_t labelled tokens and weighs it by its share of the step's examples, n_t of n.
Over many steps that is the mixture's share, for rare tasks too: one that is not in a step leaves its weight to other
steps, where it counts for more than its share.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["task_weights"]


def task_weights(
    tasks: npt.NDArray[np.int64], loss_tokens: npt.NDArray[np.int64], step_size: int
) -> npt.NDArray[np.float64]:
    """Return the weight in its step's loss of every labelled token of each example; a step's weights sum to 1.

    Args:
        tasks: Number of each example's task, in the order of training.
        loss_tokens: Labelled tokens of each example.
        step_size: Examples of an optimiser step, of all processes and forward passes together; the last may be short.
    Example:
        >>> task_weights(np.array([0, 1, 1, 1]), np.array([5, 2, 2, 4]), 2).tolist()
        [0.1, 0.25, 0.16666666666666666, 0.16666666666666666]
    """
    steps = np.arange(len(tasks)) // step_size
    _, group = np.unique(np.stack([steps, tasks]), axis=1, return_inverse=True)
    group = group.reshape(-1)
    examples, tokens = np.bincount(group)[group], np.bincount(group, weights=loss_tokens)[group]
    return np.asarray(examples / np.bincount(steps)[steps] / np.maximum(tokens, 1), dtype=np.float64)
