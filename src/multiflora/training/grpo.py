r"""trl's GRPOTrainer for several tasks: every answer is written, scored and learned from as its prompt's task.

.. math:: \hat A_i = \frac{r_i - \operatorname{mean}_G r}{\operatorname{std}_G r + 10^{-4}}

Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) draws G answers to a prompt and makes those
likelier whose reward r is above the mean of the G. trl draws them and has the loss. Here are the tasks: their own
scorers are the rewards, adapters that route by task are told which task each row is of, in generation and in the loss,
and every log line has each task's figures.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

from multiflora.context import task
from multiflora.generation import RowStops, generate_leaving, may_leave
from multiflora.kept_rows import base_of
from multiflora.training import shared_prompts
from multiflora.training.reference import Reference, evaluating, leave_loss_out
from multiflora.training.rewards import Reward, rewards_of
from multiflora.training.run_trainer import RunTrainer
from multiflora.training.trainer import usable_pad

__all__ = ["GrpoTrainer", "kl_of"]

# rows of the window's sums, each with a column for every task
_ANSWERS, _REWARD, _LENGTH, _CUT, _GROUPS, _EQUAL, _KL, _KL_TOKENS = range(8)


class GrpoTrainer(RunTrainer, GRPOTrainer):
    """Learns from the model's own answers to the prompts of several tasks.

    A log line holds, of each task and of all, ``reward`` (the mean), ``length`` (of an answer, in tokens), ``cut`` (the
    share of answers that ended at the longest length), ``equal`` (the share of prompts whose answers were all worth the
    same, which nothing is learned from) and, with ``beta``, ``kl`` (nats per token, from the model as the run started).

    Args:
        model: A causal language model, with an adapter or without.
        args: Settings of the run, with ``beta=0``: it is given beside them.
        train_dataset: Columns ``input_ids`` of the prompts, ``task_id``, ``example`` and those of ``load_split``.
        processing_class: The model's tokenizer.
        rewards: Each task's reward, in the order of their numbers.
        beta: Weight of the KL divergence.
        is_fresh: Whether the adapter has learned nothing yet.
        kwargs: For `RunTrainer`, ``task_names`` among them.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: GRPOConfig,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        rewards: Sequence[Reward],
        beta: float = 0.0,
        is_fresh: bool = True,
        **kwargs: Any,
    ) -> None:
        pad = processing_class.convert_ids_to_tokens(usable_pad(processing_class, model))
        if processing_class.pad_token != pad:
            processing_class.pad_token = pad
        self._rewards = list(rewards)
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._task_id: Tensor | None = None
        self._log_probs: Tensor | None = None
        self._own: Tensor | float = 0.0
        self._buffered_inputs: list[dict[str, Any]] | None = None  # trl's; it has no type there
        # with beta in its arguments trl would copy the adapter for a reference; peft would save the copy beside it
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            reward_funcs=[self.reward],
            **kwargs,
        )
        leave_loss_out(base_of(model))
        if beta:
            self.beta = self.args.beta = beta
            self.ref_model = Reference(model, is_fresh=is_fresh)

    def reward(self, prompts: Any, completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Score a step's answers, and count them for the log."""
        found = rewards_of(self._rows, completions, self._rewards)
        sums = torch.zeros(8, len(self.task_names), dtype=torch.float64)
        size = self.num_generations
        for i, (row, value, ids) in enumerate(zip(self._rows, found, completion_ids, strict=True)):
            column = sums[:, row["task_id"]]
            column[_ANSWERS] += 1
            column[_REWARD] += value
            column[_LENGTH] += len(ids)
            column[_CUT] += ids[-1] not in self.eos_token_ids
            if i % size == 0:  # a prompt's answers lie together
                column[_GROUPS] += 1
                column[_EQUAL] += len(set(found[i : i + size])) == 1
        read = sum(len(row["input_ids"]) for row in self._rows) + sum(len(ids) for ids in completion_ids)
        self._count(sums.float().to(self.args.device), torch.tensor(read, device=self.args.device))
        return found

    def figures_of(self, sums: Tensor) -> dict[str, float]:
        """The window's figures, ``reward/<task>`` and so on, and those of all tasks together: ``reward``, ..."""
        kinds = {
            "reward": (_REWARD, _ANSWERS),
            "length": (_LENGTH, _ANSWERS),
            "cut": (_CUT, _ANSWERS),
            "equal": (_EQUAL, _GROUPS),
            "kl": (_KL, _KL_TOKENS),
        }
        table = sums.double().cpu()
        figures: dict[str, float] = {}
        for kind, (total, count) in kinds.items():
            if table[count].sum():
                figures[kind] = float(table[total].sum() / table[count].sum())
            for column, name in enumerate(self.task_names):
                if table[count, column]:
                    figures[f"{kind}/{name}"] = float(table[total, column] / table[count, column])
        return figures

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return trl's loss of a micro-batch, with the adapter's auxiliary loss."""
        self._task_id = inputs["task_id"]
        with self.listening():
            loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.guard is not None:
            self.guard.numbers.add(loss.expand(len(self._task_id)), inputs["example"])
        if "ref_per_token_logps" in inputs:
            assert self._log_probs is not None  # the loss has just been made of them
            by_task = kl_of(
                self._log_probs,
                inputs["ref_per_token_logps"],
                inputs["completion_mask"],
                self._task_id,
                len(self.task_names),
            )
            sums = by_task.new_zeros(8, len(self.task_names))
            sums[[_KL, _KL_TOKENS]] = by_task
            self._count(sums, None)
        return loss + self._own

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the window's figures in the place of trl's, which a checkpoint does not hold."""
        self._metrics["train"].clear()
        super().log(logs, start_time)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Have trl write and score answers to a step's prompts, and note which task each is of."""
        self._rows = inputs
        self._task_id = torch.tensor([row["task_id"] for row in inputs], device=self.args.device)
        made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        # trl shuffles and divides what is here, row by row
        made["task_id"] = self._task_id
        made["example"] = torch.tensor([row["example"] for row in inputs], device=self.args.device)
        return made

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Give a step's micro-batches whole groups of answers.

        trl deals them out singly; every micro-batch would read every prompt.
        """
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        parts = self._buffered_inputs
        if parts is None or parts is before:
            return inputs
        self._buffered_inputs = shared_prompts.together(parts, "example")
        return self._buffered_inputs[self._step % len(parts)]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Take the prompts' ids as they were encoded: one way from text to ids, in training and scoring."""
        return [row["input_ids"] for row in self._rows], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Write the answers without dropout, by branches prepared for inference, each row as its own task."""
        assert self._task_id is not None
        tasks, tensors = self._task_id, [torch.tensor(ids) for ids in prompt_ids]
        ids = pad(tensors, self.processing_class.pad_token_id, "left").to(self.args.device)
        mask = pad([torch.ones_like(row) for row in tensors], 0, "left").to(self.args.device)
        with (
            # with settings of ours alone: those of the model's own that are not named here would be taken, too
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, generation_kwargs=self.generation_kwargs
            ) as model,
            evaluating(model),
            torch.no_grad(),
        ):
            prompts = self._read_prompts(model, ids, mask, tasks)
            cache = None if prompts is None else prompts.behind()
            if may_leave(model):
                settings = copy.copy(self.generation_config)
                settings.max_new_tokens = None  # it would count from where a call begins
                texts = generate_leaving(
                    model,
                    ids,
                    mask,
                    stops=RowStops((), self.processing_class, ids.shape[1]),
                    max_length=ids.shape[1] + self.max_completion_length,
                    pad=self.processing_class.pad_token_id,
                    cache=cache,
                    within=lambda rows: task(model, tasks[rows.to(tasks.device)].tolist()),
                    generation_config=settings,
                )
            else:
                with task(model, tasks.tolist()):
                    texts = model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        past_key_values=cache,
                        generation_config=self.generation_config,
                    )
        texts = texts[:, ids.shape[1] :]
        ended = torch.isin(texts, texts.new_tensor(self.eos_token_ids)).cumsum(1)
        # up to the first end of text, which belongs to the answer
        kept = torch.cat([ended.new_zeros(len(ended), 1), ended[:, :-1]], 1) == 0
        return [row[own].tolist() for row, own in zip(texts.cpu(), kept.cpu(), strict=True)], None

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Score rows in batches, each row as its own task."""
        assert self._task_id is not None
        size, parts = batch_size or len(input_ids), []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            ids, mask, tasks = input_ids[rows], attention_mask[rows], self._task_id[rows]
            width = ids.shape[1] - logits_to_keep
            # the loss of a mixture's own router is made of whole rows
            whole = kwargs.get("compute_aux_loss", False)
            prompts = None if whole else self._read_prompts(model, ids[:, :width], mask[:, :width], tasks)
            if prompts is not None:
                parts.append(self._score_behind(model, prompts, ids, mask, tasks, logits_to_keep, **kwargs))
                continue
            with task(self.model, tasks.tolist()):
                score = super()._get_per_token_logps_and_entropies
                parts.append(score(model, ids, mask, logits_to_keep, **kwargs))
        if torch.is_grad_enabled():  # of the pass that the loss is made of
            self._own = self.loss_of_adapter(model)
        log_probs, entropies, losses = zip(*parts, strict=True)
        joined = torch.cat(log_probs)
        self._log_probs = joined.detach()
        return (
            joined,
            None if entropies[0] is None else torch.cat(entropies),
            None if losses[0] is None else torch.stack(losses).mean(),
        )

    def _read_prompts(self, model: Any, ids: Tensor, mask: Tensor, tasks: Tensor) -> shared_prompts.Prompts | None:
        """Read each prompt once; None where it is read with every answer."""
        own = self.accelerator.unwrap_model(self.model)
        if self.accelerator.num_processes > 1 or not shared_prompts.may_share(own):
            return None
        with self.accelerator.autocast():
            return shared_prompts.read(model, own, ids, mask, tasks)

    def _score_behind(
        self,
        model: Any,
        prompts: shared_prompts.Prompts,
        ids: Tensor,
        mask: Tensor,
        tasks: Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Score answers behind prompts that are read: (B, C) log-probabilities, and entropies where they are wanted.

        Of answers that say the same to one prompt, as many short ones do, one is scored for all.
        """
        start = ids.shape[1] - logits_to_keep
        log_probs, entropies = [], []
        first, which = shared_prompts.once(tasks.to(ids.device)[:, None], mask, ids)
        groups = shared_prompts.by_length(mask[first, start:].sum(-1))
        for group, width in groups:
            rows = first[group]
            end = start + width
            own, real = ids[rows, start:end], mask[rows, start:end]
            # what fills a row up needs a position too, and the model may have none behind the row's last
            steps = torch.minimum(real.cumsum(-1), real.sum(-1, keepdim=True)) - 1
            with self.accelerator.autocast(), task(self.model, tasks[rows.to(tasks.device)].tolist()):
                out = model(
                    # an answer's token is read from the one before it, the first from the prompt's last
                    input_ids=ids[rows, start - 1 : end - 1],
                    attention_mask=mask[rows, : end - 1],
                    position_ids=prompts.lengths[rows, None] + steps.clamp(min=0),
                    past_key_values=prompts.behind(rows),
                    shift_labels=own.masked_fill(real == 0, -100),
                    fused_lm_head=True,
                )
            rest = (0, logits_to_keep - width)
            log_probs.append(F.pad(out.log_probs, rest))
            if compute_entropy:
                entropies.append(F.pad(out.entropy, rest))
        back = torch.cat([group for group, _ in groups]).argsort()[which]
        entropy = torch.cat(entropies)[back] if compute_entropy else None
        return torch.cat(log_probs)[back], entropy, None


def kl_of(log_probs: Tensor, reference: Tensor, mask: Tensor, tasks: Tensor, num_tasks: int) -> Tensor:
    r"""Add up the KL divergence of a batch's tokens by task, by the estimate that is in the loss.

    .. math:: \widehat{KL} = \frac{\pi_\text{ref}}{\pi} - \log \frac{\pi_\text{ref}}{\pi} - 1

    Args:
        log_probs: (B, C) of the answers' tokens.
        reference: (B, C) the same of the reference.
        mask: (B, C), 0 for fill.
        tasks: (B,) numbers of the tasks.
        num_tasks: How many there are.
    Returns:
        (2, num_tasks): the sums in nats, and the tokens.
    Example:
        >>> one = torch.zeros(1, 2)
        >>> kl_of(one, one, torch.ones(1, 2), torch.tensor([0]), 1).tolist()
        [[0.0], [2.0]]
    """
    more = reference - log_probs
    kl = ((more.exp() - more - 1) * mask).sum(1)
    rows = torch.stack([kl, mask.sum(1).to(kl.dtype)])
    return rows.new_zeros(2, num_tasks).index_add(1, tasks, rows)
