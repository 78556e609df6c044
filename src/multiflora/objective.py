"""What a training makes likelier: the rows' answers (sft), what scores well (grpo), what was preferred (dpo).

The sections ``train.grpo`` and ``train.dpo`` of a recipe, in trl's words. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator

from multiflora.schema import Strict
from multiflora.suggest import shown

__all__ = ["OBJECTIVES", "DpoSpec", "GrpoSpec", "Objective"]

Objective = Literal["sft", "grpo", "dpo"]

OBJECTIVES: Mapping[Objective, str] = {
    "sft": "the answers of the rows become likelier",
    "grpo": "of several answers that the model itself writes to a prompt, those that score better become likelier",
    "dpo": "of the two answers in a row, the chosen one becomes likelier than the rejected one",
}
"""Words of ``train.objective`` -> what a step does then."""

_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class GrpoSpec(Strict):
    """Group relative policy optimisation (arXiv 2402.03300), in the words of trl's ``GRPOConfig``."""

    num_generations: int = Field(default=8, ge=2)
    """Answers to each prompt, which are compared with each other; they share a step's ``batch_size``."""
    max_completion_length: int = Field(default=64, gt=0)
    """Longest answer, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature that answers are drawn with; higher is more random."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that have this probability together; 1: from all."""
    top_k: int = Field(default=0, ge=0)
    """Draw from so many of the likeliest tokens; 0: from all."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the model as the run started; 0: it is neither computed nor logged."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How the loss is averaged over tokens and answers, by trl's names."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide what is better than the mean by the standard deviation of a prompt's answers, of the step's, or by 1."""
    mask_truncated_completions: bool = False
    """Leave answers that were cut at ``max_completion_length`` out of the loss."""
    rewards: dict[str, str] = Field(default={})
    """Task -> ``module:function`` that rewards it in place of the task's own score; called with the row and a text."""

    @field_validator("rewards")
    @classmethod
    def _entry_points(cls, value: dict[str, str]) -> dict[str, str]:
        for task, entry in value.items():
            if not _ENTRY_POINT.fullmatch(entry):
                raise ValueError(
                    f"the reward of {task} is {shown(entry)}; expected module:function, e.g. my_rewards:brief, of a "
                    "module that Python can import."
                )
        return value


class DpoSpec(Strict):
    """Direct preference optimisation (arXiv 2305.18290), in the words of trl's ``DPOConfig``."""

    beta: float = Field(default=0.1, gt=0)
    """How much a preference may cost in distance from the model as the run started: larger stays nearer."""
