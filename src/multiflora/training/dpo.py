r"""trl's DPOTrainer for several tasks: pairs that are encoded already, and each task's figures in every log line.

.. math:: L = -\log\sigma(\beta m), \qquad
    m = \log\frac{\pi(\text{chosen})}{\pi_\text{ref}(\text{chosen})}
      - \log\frac{\pi(\text{rejected})}{\pi_\text{ref}(\text{rejected})}

Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290). A pair is two rows of a batch, the chosen ones
first; adapters that route by task are told the task of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from multiflora.data.collate import pad_batch
from multiflora.data.encode import IGNORED
from multiflora.kept_rows import base_of
from multiflora.training.reference import Reference, leave_loss_out
from multiflora.training.run_trainer import RunTrainer
from multiflora.training.trainer import usable_pad

__all__ = ["DpoTrainer", "PairCollator", "preference_of"]

_OF_BATCH = ("task_id", "example", "row_length")


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Collates pre-encoded pairs into 2 B rows, the chosen ones first; a picklable callable for ``DataLoader``."""

    pad_token_id: int
    """Fills rows up."""

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the tensors of one batch: see `pad_batch`; ``completion_mask`` in the labels' place."""
        rejected = [{**pair, "input_ids": pair["rejected_ids"], "labels": pair["rejected_labels"]} for pair in pairs]
        batch = pad_batch([*pairs, *rejected], pad_token_id=self.pad_token_id)
        labels = batch.pop("labels")
        return {**batch, "completion_mask": (labels != IGNORED).long()}


class DpoTrainer(RunTrainer, DPOTrainer):
    """Makes the chosen text of each pair likelier than the rejected one.

    A log line holds, of each task and of all, ``loss``, ``accuracy`` (the share of pairs whose chosen text has gained
    more than the rejected one since the run started) and ``margin`` (by how much, times beta, in nats).

    Args:
        model: A causal language model, with an adapter or without.
        args: Settings of the run.
        train_dataset: Columns ``input_ids``, ``labels``, ``rejected_ids``, ``rejected_labels``, ``task_id`` and
            ``example``.
        processing_class: The model's tokenizer.
        is_fresh: Whether the adapter has learned nothing yet.
        kwargs: For `RunTrainer`, ``task_names`` among them.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: DPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        is_fresh: bool = True,
        **kwargs: Any,
    ) -> None:
        reference = Reference(model, is_fresh=is_fresh)
        # without one trl would copy the adapter for a reference; peft would save the copy beside it
        super().__init__(
            model=model,
            ref_model=reference,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=PairCollator(pad_token_id=usable_pad(processing_class, model)),
            **kwargs,
        )
        leave_loss_out(base_of(model))
        vars(reference).pop("forward", None)  # trl's fused head, which the model has itself
        self.ref_model = reference

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return trl's loss of a micro-batch, with the adapter's auxiliary loss."""
        inputs = dict(inputs)
        task_id, example, row_length = (inputs.pop(key) for key in _OF_BATCH)
        if self.routing is not None:
            inputs["task_id"] = task_id
        policy = _Heard(model, self)
        loss: Tensor = super().compute_loss(policy, inputs, return_outputs, num_items_in_batch)
        assert policy.log_probs is not None  # the loss has just been made of them
        assert self.ref_model.log_probs is not None
        by_task = preference_of(
            policy.log_probs.sum(1),
            self.ref_model.log_probs.sum(1),
            task_id[: len(task_id) // 2],
            len(self.task_names),
            beta=self.beta,
        )
        self._count(by_task, row_length.sum())
        if self.guard is not None:
            self.guard.numbers.add(loss.expand(len(example)), example)
        return loss + policy.own

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the window's figures in the place of trl's, which a checkpoint does not hold."""
        self._metrics["train"].clear()
        super().log(logs, start_time)

    def figures_of(self, sums: Tensor) -> dict[str, float]:
        """The window's figures: ``loss/<task>``, ``accuracy/<task>``, ``margin/<task>``, and the latter two of all."""
        table = sums.double().cpu()
        counts, figures = table[-1], dict[str, float]()
        for kind, row in zip(("loss", "accuracy", "margin"), table, strict=False):
            if kind != "loss":
                figures[kind] = float(row.sum() / counts.sum())
            figures |= {
                f"{kind}/{name}": float(total / count)
                for name, total, count in zip(self.task_names, row, counts, strict=True)
                if count
            }
        return figures

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Leave the examples as they are: they come encoded."""
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """Keep the order of the data set: the mixture has shuffled it, reproducibly and resumably."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class _Heard:
    """The model, whose log-probabilities and auxiliary loss are kept as it is called."""

    def __init__(self, model: nn.Module, trainer: DpoTrainer) -> None:
        self._model, self._trainer = model, trainer
        self.log_probs: Tensor | None = None
        self.own: Tensor | float = 0.0

    def __call__(self, **inputs: Any) -> Any:
        with self._trainer.listening():
            output = self._model(**inputs)
        self.log_probs = output.log_probs.detach()
        # now: the reference's pass comes next, and has none
        self.own = self._trainer.loss_of_adapter(self._model)
        return output


def preference_of(policy: Tensor, reference: Tensor, tasks: Tensor, num_tasks: int, *, beta: float) -> Tensor:
    """Add up a batch's pairs by task.

    Args:
        policy: (2 B,) log-probabilities of the texts, the chosen ones first.
        reference: (2 B,) the same of the reference.
        tasks: (B,) numbers of the pairs' tasks.
        num_tasks: How many there are.
        beta: See `DpoSpec`.
    Returns:
        (4, num_tasks): losses, pairs with the chosen text ahead, margins times beta, and pairs.
    Example:
        >>> preference_of(torch.tensor([3.0, 1.0]), torch.zeros(2), torch.tensor([0]), 1, beta=0.5)[1:].tolist()
        [[1.0], [1.0], [1.0]]
    """
    chosen, rejected = (policy - reference).chunk(2)
    margin = beta * (chosen - rejected)
    rows = torch.stack([-F.logsigmoid(margin), (margin > 0).to(margin.dtype), margin, torch.ones_like(margin)])
    return rows.new_zeros(4, num_tasks).index_add(1, tasks, rows)
