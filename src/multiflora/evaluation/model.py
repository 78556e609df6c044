"""The harness's own Hugging Face model class, told to do no more work than the scores need.

Departures that change no score: logits only at the end of a batch where the completions are; a prompt that several
completions follow is read once; all texts of a task become tokens in one call; a row that has met its stop leaves its
batch, instead of running on until all have; and our progress instead of the harness's bars. And one that does: our
tasks' texts become tokens as in training (`multiflora.data.encode`), while the harness would put a BOS before a chat
template's text, an EOS between prompt and choice, and cut a token in two where a prompt ends within one.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import StoppingCriteriaList

from multiflora.data.check import check_ids
from multiflora.data.encode import encode_spans, prompt_ids, text_ids
from multiflora.errors import ConfigError, DataError
from multiflora.evaluation.prompted import generate_behind_prompt
from multiflora.evaluation.shared_prompt import by_prompt, score_behind
from multiflora.generation import RowStops, generate_leaving, may_leave
from multiflora.methods.baselines import tokens_in_front, virtual_tokens
from multiflora.once import once
from multiflora.tasks.chat_template import Asked, render_chat

__all__ = ["HarnessModel", "batches_of", "tail_length"]

log = logging.getLogger(__name__)

Request = tuple[Any, list[int], list[int]]
"""What the harness asks for: (the texts), the context's ids, the continuation's ids."""


def tail_length(requests: Sequence[Request], max_length: int) -> int:
    """Count the last positions of a right-padded batch whose logits score its continuations.

    Args:
        requests: The batch.
        max_length: The model's context, in tokens; the harness cuts longer inputs from the left.

    Example:
        >>> tail_length([(None, [1, 2, 3, 4], [5]), (None, [1, 2], [6, 7])], 512)
        3
    """
    lengths = [min(len(context) + len(wanted), max_length + 1) - 1 for _, context, wanted in requests]
    first = min(length - len(wanted) for length, (_, _, wanted) in zip(lengths, requests, strict=True))
    return max(lengths) - max(first, 0)


def batches_of(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Put requests into batches as the harness does: longest first, and one row for those with the same input.

    Args:
        requests: All requests.
        size: Rows of a batch.

    Returns:
        Positions in ``requests``, batch by batch.
    """
    rows: dict[Hashable, list[int]] = {}
    for i, (_, context, wanted) in enumerate(requests):
        rows.setdefault(tuple(context + wanted[:-1]), []).append(i)
    heads = [max(row, key=lambda i: len(requests[i][2])) for row in rows.values()]
    whole = {head: requests[head][1] + requests[head][2] for head in heads}
    order = sorted(zip(heads, rows.values(), strict=True), key=lambda row: (-len(whole[row[0]]), whole[row[0]]))
    return [[i for _, row in order[k : k + size] for i in row] for k in range(0, len(order), size)]


class HarnessModel(HFLM):
    """A causal language model for the harness, with an adapter or without.

    Args:
        model: The model, in memory.
        tokenizer: Its tokenizer.
        batch_size: Rows of a batch.
        on_progress: Called with the number of answers that are there and the number asked for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        with _pad_token(tokenizer, model):
            # float32: summed over a completion, log-probabilities rounded to bfloat16 are off by whole nats
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
            self._pad = int(tokenizer.pad_token_id)
        self.templated: bool | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._can_slice = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._front = tokens_in_front(model)
        self._max_length = self.max_length - virtual_tokens(model)
        self.stops: tuple[str, ...] = ()
        self.templated: bool | None = None
        self._tail: int | None = None
        self._known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._size = int(model.get_input_embeddings().num_embeddings)
        # where processes hold parts of the weights, all must make as many forward passes, whatever each one's text is
        self._together = {"synced_gpus": True} if _is_spread(model) else {}
        # a learned prompt stands before each row, and processes that hold parts must make as many forward passes each
        is_plain = not virtual_tokens(model) and not self._together
        self._can_share = is_plain and self._can_slice
        self._can_leave = is_plain and may_leave(model)
        self._ticker = self.cache_hook = _Ticker(on_progress)

    templated: bool | None
    """Whether the texts to come have been through a chat template; None: they are of a task of the harness itself."""
    stops: tuple[str, ...]
    """Stops of white space; the harness is not told of them, as it would end an answer at them before it begins."""

    def left_out(self, row: Mapping[str, Any], new_tokens: int | None) -> bool:
        """Whether a row does not fit into the model's context; it is then left out, never cut.

        Args:
            row: Our row, as `multiflora.evaluation.harness.row_of` gives it.
            new_tokens: Tokens that may be generated; None where completions are scored.

        Raises:
            DataError: The tokenizer makes an id that the model has no embedding for.
            ConfigError: ``new_tokens`` alone fill the context.
        """
        if new_tokens is not None:
            ids = self.tok_encode(row["prompt"])
            lengths = [len(ids) + self.max_length - self._room(new_tokens)]
        else:
            pairs = [self._encode_pair(row["prompt"], text) for text in row.get("choices", [row["completion"]])]
            ids = [i for first, rest in pairs for i in first + rest]
            lengths = [len(first) + len(rest) - 1 for first, rest in pairs]  # the last token is predicted, never read
        check_ids(ids, self._size, row["id"])
        return bool(max(lengths) > self.max_length)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Return the ids of a text that something follows; see the harness."""
        if args or kwargs:
            theirs: list[int] = super().tok_encode(string, *args, **kwargs)
            return theirs
        if self.templated is None:
            return text_ids(string, self.tokenizer)
        return prompt_ids(string, self.tokenizer, chat_template=self.templated)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the ids of prompts, padded on the left, and their mask; see the harness."""
        rows = [self.tok_encode(string) for string in strings]
        if (most := kwargs.get("left_truncate_len")) is not None:
            rows = [row[-most:] for row in rows]  # only a task of the harness itself has longer ones
        width = max(map(len, rows))
        ids = [[self._pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation with the tokenizer's template, where the system can stop it; see the harness."""
        words = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        words |= self.chat_template_args
        without_system = [turn for turn in chat_history if turn["role"] != "system"]
        try:
            with suppress(ValueError):  # some templates refuse a system prompt, and the harness then goes without
                return render_chat(Asked(chat_history, words=words), self.tokenizer)
            return render_chat(Asked(without_system, words=words), self.tokenizer)
        except ValueError as error:
            raise DataError(
                f"The chat template of {self.tokenizer.name_or_path or 'this model'} refuses a prompt of "
                f"lm-evaluation-harness: {' '.join(str(error).split())[:200]} Set model.chat_template to false, or "
                "leave the harness's tasks out."
            ) from error

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations; see the harness."""
        self._ticker.expect(len(requests))
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts; see the harness."""
        self._ticker.expect(len(requests))
        sums: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate text; see the harness."""
        self._ticker.expect(len(requests))
        longest = max(int(request.args[1].get("max_gen_toks", self.max_gen_toks)) for request in requests)
        self._tell_of_cuts([len(self.tok_encode(request.args[0])) for request in requests], self._room(longest))
        texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    def _room(self, new_tokens: int) -> int:
        """Tokens of a prompt that leave room for an answer of ``new_tokens``."""
        room = int(self.max_length) - new_tokens
        if room <= 0:
            raise ConfigError(
                f"evaluate.max_new_tokens (or a task's own max_new_tokens) is {new_tokens}, but the model reads "
                f"{self.max_length} tokens, prompt included. Set it well below that."
            )
        return room

    def read_ahead(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Cut the texts of our rows into tokens, all in one call: a tokenizer is slow for one text at a time.

        In a comparison that happens once for all its models.
        """
        texts = [(row["prompt"], [row["completion"], *row.get("choices", ())]) for row in rows]
        pairs = list(dict.fromkeys((prompt, text) for prompt, several in texts for text in several))
        key = ("pairs", self.tokenizer.name_or_path, self.templated, tuple(pairs))
        self._known.update(zip(pairs, once(key, lambda: self._cut(pairs)), strict=True))

    def count_tokens(self, prompt: str, completion: str) -> int:
        """Count the tokens of a completion after a prompt."""
        return len(self._encode_pair(prompt, completion)[1])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Cut a prompt and a completion into tokens, those of our tasks as in training; see the harness."""
        if self.templated is None:
            theirs: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return theirs
        pair = (context, continuation)
        return self._known[pair] if pair in self._known else self._cut([pair])[0]

    def _cut(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """The ids of prompts and of their completions; the end of text is one of these where it is written there."""
        end = self.tokenizer.eos_token or ""
        spans = [[(prompt, False), (text.removesuffix(end), True)] for prompt, text in pairs]
        found = []
        for (_, text), (_, (written, _)), encoded in zip(
            pairs, spans, encode_spans(spans, self.tokenizer, chat_template=bool(self.templated)), strict=True
        ):
            split = encoded.loss.index(True)
            first, rest = encoded.ids[:split], encoded.ids[split:]
            wanted = rest if written != text else rest[:-1]
            # the very first token is never predicted, nor is it in training
            found.append((first, wanted) if first else (wanted[:1], wanted[1:]))
        return found

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Hand the harness one batch at a time, having told `_model_call` which logits it needs."""
        for texts, _, wanted in requests:
            if not wanted:
                raise DataError(
                    f"The completion {texts[1]!r} has no token of its own after the prompt …{texts[0][-40:]!r}, so it "
                    "has no log-likelihood. Let the completion begin with a space."
                )
        self._tell_of_cuts([len(context) + len(wanted) - 1 for _, context, wanted in requests], self.max_length)
        answers = self._scored_behind_prompts(requests)
        left = [i for i in range(len(requests)) if i not in answers]
        for part in batches_of([requests[i] for i in left], self.batch_size):
            batch = [left[k] for k in part]
            chosen = [requests[i] for i in batch]
            self._tail = tail_length(chosen, self.max_length)
            try:
                found = super()._loglikelihood_tokens(chosen, disable_tqdm=True, override_bs=override_bs)
            finally:
                self._tail = None
            for i, answer in zip(batch, found, strict=True):
                answers[i] = answer
        return [answers[i] for i in range(len(requests))]

    def _scored_behind_prompts(self, requests: list[Request]) -> dict[int, tuple[float, bool]]:
        """Score what shares its prompt with others, where the model allows it."""
        prompts = by_prompt(requests, self.max_length) if self._can_share else {}
        if not prompts:
            return {}
        done = partial(self._ticker.add_partial, "loglikelihood", None, None)
        found = score_behind(self.model, prompts, self.batch_size, self._pad, done)
        self._can_share = found is not None
        return found or {}

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits of the last positions; the harness counts from the end."""
        if self._tail is None or not self._can_slice or attn_mask is not None:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        # positions as a tensor, not a number: a slice is not contiguous, and a frozen head would then take the batched
        # product, which copies its weight once per row (bfloat16, 16 rows: 0.40 s becomes 2.46 s)
        first = max(inps.shape[1] - self._tail, 0)
        last = torch.arange(first, inps.shape[1], device=inps.device) + self._front
        with torch.no_grad():
            kept: Tensor = self.model(inps, logits_to_keep=last).logits
        return kept

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Decode greedily with a stop for each row; anything else is the harness's own way."""
        if settings.get("do_sample") or settings.get("temperature", 0.0) or settings.get("num_beams", 1) != 1:
            sampled: Tensor = super()._model_generate(context, max_length, stop, **settings)
            return sampled
        settings = {k: v for k, v in settings.items() if k not in {"do_sample", "temperature"}}
        settings |= {"use_cache": True, "do_sample": False, **self._together}
        # where the input is given as embeddings, what is generated begins at 0
        stops = RowStops([*stop, *self.stops], self.tokenizer, 0 if self._front else context.shape[1])
        mask = settings.pop("attention_mask")
        if self._can_leave:
            return generate_leaving(
                self.model, context, mask, stops=stops, max_length=max_length, pad=self._pad, **settings
            )
        settings |= {"stopping_criteria": StoppingCriteriaList([stops]), "pad_token_id": self._pad}
        if self._front:
            room = max_length - context.shape[1]
            with torch.no_grad():
                return generate_behind_prompt(self.model, context, mask, max_new_tokens=room, **settings)
        tokens: Tensor = self.model.generate(input_ids=context, attention_mask=mask, max_length=max_length, **settings)
        return tokens

    def _tell_of_cuts(self, lengths: Sequence[int], room: int) -> None:
        """Report inputs that do not fit; the harness cuts them from the left."""
        too_long = sum(length > room for length in lengths)
        if too_long:
            log.warning(
                "%d of %d inputs are longer than the %d tokens the model has for them; their beginning is cut off.",
                too_long,
                len(lengths),
                room,
            )


def _is_spread(model: Any) -> bool:
    """Tell whether a model's parameters are spread over processes by FSDP."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )


@contextmanager
def _pad_token(tokenizer: Any, model: Any) -> Iterator[None]:
    """Lend a tokenizer a pad token where it has none; the harness would give it one for good, perhaps a new one."""
    had = tokenizer.pad_token
    usable = had is not None and tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
    if not usable:
        # any id will do, as padding is neither attended to nor predicted
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    try:
        yield
    finally:
        if not usable:
            tokenizer.pad_token = had


class _Ticker(CacheHook):
    """Takes each answer where the harness would cache it, and counts."""

    def __init__(self, on_progress: Callable[[int, int], None]) -> None:
        super().__init__(None)
        self.on_progress = on_progress
        self.done = self.total = 0

    def expect(self, total: int) -> None:
        """Begin to count anew."""
        self.done, self.total = 0, total
        self.on_progress(0, total)

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count one answer."""
        self.done += 1
        self.on_progress(self.done, self.total)
