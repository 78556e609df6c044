"""From an Example to the two texts that are tokenised, with or without the model's chat template."""

from __future__ import annotations

from typing import Any

from multiflora.errors import ConfigError
from multiflora.tasks.example import Example, Message

__all__ = ["as_text"]

_STAND_IN = "the-answer-stands-here"


def as_text(example: Example, tokenizer: Any, chat_template: bool) -> tuple[str, str]:
    """Return the prompt and the completion as they are tokenised, apart.

    Without a chat template they are the example's own. With one, the conversation goes through it (a plain prompt is
    one user turn); the prompt ends where the assistant begins and the completion is the rest of its turn, up to the
    end-of-text token, which is appended when the completion is tokenised.

    Args:
        example: The rendered row.
        tokenizer: A transformers tokenizer; looked at only with ``chat_template``.
        chat_template: Whether to use the tokenizer's template.

    Raises:
        ConfigError: The tokenizer has no chat template, or its template changes what came before an answer.
    """
    if not chat_template:
        return example.prompt, example.completion
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise ConfigError(
            f"model.chat_template is true, but the tokenizer of {name} has no chat template. "
            "Set it to false, or use the instruction-tuned model of that family."
        )
    turns = example.messages or (
        Message("user", example.prompt.strip()),
        Message("assistant", example.completion.strip()),
    )
    asked = [turn._asdict() for turn in turns[:-1]]
    answer = example.completion.strip()
    prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    # a stand-in, as a short answer could also be part of what the template writes around it
    answered = [*asked, {"role": "assistant", "content": _STAND_IN}]
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    start, found, end = whole[len(prompt) :].partition(_STAND_IN)
    if not whole.startswith(prompt) or not found:
        raise ConfigError(
            f"the chat template of {getattr(tokenizer, 'name_or_path', 'this model')} writes an answered conversation "
            "in another way than an open one, so no loss on the answer alone is possible. "
            "Set model.chat_template to false."
        )
    eos = tokenizer.eos_token
    return prompt + start, answer + (end.partition(eos)[0] if eos else end)
