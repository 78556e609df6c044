"""A trl script as one finds it everywhere, with one line changed: LoraConfig became RLoraConfig.

python examples/sft_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output runs/sft
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from trl import SFTConfig, SFTTrainer

import multiflora

ROWS = [
    {"prompt": "The capital of France is", "completion": " Paris."},
    {"prompt": "The capital of Italy is", "completion": " Rome."},
    {"prompt": "Two plus two is", "completion": " four."},
    {"prompt": "Three plus three is", "completion": " six."},
]


def main() -> None:
    """Train, save, and load again with plain peft."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    words.add_argument("--output", type=Path, default=Path("runs/sft"))
    words.add_argument("--steps", type=int, default=20)
    asked = words.parse_args()

    trainer = SFTTrainer(
        model=asked.model,
        train_dataset=Dataset.from_list(ROWS * 4),
        args=SFTConfig(
            output_dir=str(asked.output),
            max_steps=asked.steps,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            logging_steps=5,
            report_to="none",
            bf16=torch.cuda.is_available(),  # trl's default is bfloat16, which transformers refuses on a CPU
        ),
        # was: peft_config=LoraConfig(r=8, target_modules="all-linear"),
        peft_config=multiflora.RLoraConfig(r=8, num_heads=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    model = AutoPeftModelForCausalLM.from_pretrained(asked.output)
    print(f"saved and loaded again: {model.active_peft_config.num_heads} heads of rank {model.active_peft_config.r}")


if __name__ == "__main__":
    main()
