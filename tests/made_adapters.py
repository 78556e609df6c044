"""Adapters to export: every method on a tiny Llama, with weights that are not those of a start."""

from __future__ import annotations

import torch
from peft import get_peft_model

from multiflora.methods import METHODS, build_config

TASKS = ["sums", "labels"]
EXACT = ["multilora", "mlora"]
BY_TASK = ["moelora", "mtllora"]
ROUTED = ["rlora", "hydralora", "loramoe"]
BETWEEN = [
    {"gate": "stem"},
    {"gate": "largest", "stem": "own", "top_k": 2},
    {"gate": "sum", "num_heads": 1, "core": "full"},
    {"gate": "stem", "stem": "blended"},
]
"""Settings of `parts` with something that is decided for each token between the two products."""
OURS = [name for name, card in METHODS.items() if card.module]


def adapted(name, base, *, by=0.1, **settings):
    """A model with an adapter whose every trainable number has been moved, by a normal draw of that size."""
    words = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if name != "lora":
        words |= {"task_names": TASKS}
    model = get_peft_model(base, build_config(name, words | settings)).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(by * torch.randn_like(parameter))
    return model


def save(model, folder):
    model.save_pretrained(str(folder))
    return folder
