"""trl's SFTTrainer for several tasks: loss only where there are labels, and each task's loss in every log line."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from multiflora.context import chosen_positions
from multiflora.data.collate import Collator
from multiflora.kept_rows import base_of
from multiflora.methods.baselines import tokens_in_front
from multiflora.training.losses import behind, loss_by_task, predicted_positions, project_only, token_losses
from multiflora.training.run_trainer import RunTrainer, own_forward

__all__ = ["MultitaskTrainer", "usable_pad"]


def usable_pad(tokenizer: Any, model: Any) -> int:
    """The id that fills rows up: the tokenizer's own where the model has an embedding for it, else the end of text.

    Some tokenizers have a pad token that was added behind the model's embeddings.
    """
    pad = tokenizer.pad_token_id
    usable = pad is not None and pad < model.get_input_embeddings().num_embeddings
    return int(pad if usable else tokenizer.eos_token_id)


class MultitaskTrainer(RunTrainer, SFTTrainer):
    """Fine-tunes one model on pre-encoded examples of several tasks.

    Differs from ``SFTTrainer`` in five points: the data come encoded and in the order to be trained in (see
    `multiflora.data.mixture`); the head of the model sees only positions with loss; the loss is the mean over
    the step's labelled tokens, or their sum by ``loss_weight`` where the examples have one (see
    `multiflora.data.weights`), whatever the padding, the packing or the gradient accumulation; an adapter's
    auxiliary loss is added; and log lines carry ``loss/<task>``, ``tokens_per_second`` and, for methods with
    gates, ``routing/…`` (see `multiflora.training.watch`). Adapters that route by task are told each row's or token's
    task.

    Args:
        model: A causal language model, with an adapter or without.
        args: Settings of the run, with ``dataset_kwargs={"skip_prepare_dataset": True}``.
        train_dataset: Columns ``input_ids``, ``labels`` (-100 where there is no loss) and ``task_id``.
        processing_class: The model's tokenizer.
        packing: Fold a batch's examples into few rows, see `multiflora.data.collate.fold_batch`.
        max_length: Longest folded row, in tokens.
        kwargs: For `RunTrainer`, ``task_names`` among them.
    """

    # compute_loss divides by the step's tokens itself; transformers must not divide by the micro-batches again
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: Any,
        args: SFTConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        packing: bool = False,
        max_length: int = 1024,
        **kwargs: Any,
    ) -> None:
        collator = Collator(pad_token_id=usable_pad(processing_class, model), packing=packing, max_length=max_length)
        # trl puts a fused head into the base model's forward; ours needs none, and a copy of the model would call the
        # original through it
        with own_forward(base_of(model)):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                processing_class=processing_class,
                data_collator=collator,
                **kwargs,
            )
        # transformers counts the labels of a step only for models that ask for the count
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the batch's share of the step's token-weighted mean loss, with the adapter's auxiliary loss."""
        inputs = dict(inputs)
        labels, row_length = inputs.pop("labels"), inputs.pop("row_length", None)
        task_id, example = inputs.pop("task_id", None), inputs.pop("example", None)
        weight = inputs.pop("loss_weight", None)
        if task_id is not None and self.routing is not None:
            inputs["task_id"] = task_id
        if example is not None and self.routing is not None:
            inputs["real_tokens"] = _real(example, inputs.get("attention_mask"))
        positions, targets = predicted_positions(labels)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        front = tokens_in_front(self.accelerator.unwrap_model(model))
        seen = behind(positions, labels.shape[1], front)
        with self.listening(), project_only(head, seen), chosen_positions(model, seen):
            outputs = model(**inputs, use_cache=False)
        losses = token_losses(outputs.logits, targets)
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        if weight is None:
            loss = losses.sum() / torch.as_tensor(count).clamp(min=1)
        else:  # of all of the step, as the count is
            loss = losses @ _of_positions(weight, positions, labels.shape[1])
        if self.model.training:
            # the count is of all processes and micro-batches; gradients are averaged over the former and summed over
            # the latter
            if weight is not None or (num_items_in_batch is not None and self.args.average_tokens_across_devices):
                loss = loss * self.accelerator.num_processes
            loss = loss + self.loss_of_adapter(model)
            if task_id is not None:
                tasks = _of_positions(task_id, positions, labels.shape[1])
                by_task = loss_by_task(losses.detach(), tasks, len(self.task_names))
                self._count(by_task, None if row_length is None else row_length.sum())
            if example is not None and self.guard is not None:
                self.guard.numbers.add(losses, _of_positions(example, positions, labels.shape[1]))
        return (loss, outputs) if return_outputs else loss

    def figures_of(self, sums: Tensor) -> dict[str, float]:
        """Each task's mean loss over its labelled tokens: ``loss/<task>``."""
        pairs = zip(self.task_names, *sums.tolist(), strict=True)
        return {f"loss/{name}": total / count for name, total, count in pairs if count}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """Keep the order of the data set: the mixture has shuffled it, reproducibly and resumably."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep every column the collator reads, whatever the model's forward takes."""
        self._signature_columns = ["input_ids", "labels", "task_id", "length", "example", "loss_weight"]


def _real(example: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Tell tokens of examples from the fill of rows and steps, (B, T), by the examples' numbers, (B,) or (B, T)."""
    known = example >= 0
    return known if attention_mask is None else attention_mask.bool() & (known if known.ndim == 2 else known[:, None])


def _of_positions(of: Tensor, positions: Tensor, length: int) -> Tensor:
    """Return what belongs to positions of a flattened batch, from numbers for each row, (B,), or token, (B, T)."""
    return of.reshape(-1)[positions] if of.ndim == 2 else of[positions // length]
