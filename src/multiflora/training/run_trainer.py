"""What the trainers of all objectives share: checkpoints that reload, the log's windows, the optimiser, the end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from multiflora.context import auxiliary_loss, find
from multiflora.files import write_json, write_text
from multiflora.methods.layer_pass import BranchLayer
from multiflora.training.adapter import save_adapter
from multiflora.training.baselines import loraplus_optimizer, orthogonality, restore_training, save_training
from multiflora.training.best import KeepBest
from multiflora.training.checkpoint import DATA, Window, remove_older, seal
from multiflora.training.guard import Guard
from multiflora.training.router_rate import give_routers_their_rate
from multiflora.training.watch import RoutingWatch

__all__ = ["RunTrainer", "own_forward"]

# a gate, a matrix between stem and heads and peft's scales start at a meaning of their own; pulling them to zero would
# not be regularisation
_DECAYED_PARTS = ("A", "B")
_NOT_DECAYED_OF_PEFT = ("ia3_l", "lora_magnitude_vector")


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Take off afterwards whatever libraries put in the place of the model's ``forward``.

    Args:
        model: Training libraries wrap its ``forward``, for autocast or a fused head, and leave it wrapped.
    """
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        # accelerate's notes of what it wrapped, and that it did: a second training would otherwise run without autocast
        vars(model).pop("_original_forward", None)
        vars(model).pop("_is_accelerate_prepared", None)
        if before is not None:
            vars(model)["forward"] = before


class RunTrainer(Trainer):
    """One training of a recipe, whatever its objective; stands before one of trl's trainers in a class's bases.

    A log line carries ``loss``, ``tokens_per_second``, the objective's figures for each task and, for methods with
    gates, ``routing/…`` (see `multiflora.training.watch`). All of them are sums over a window that ends with the line,
    and a checkpoint holds them, so a resumed run writes the same next line.

    Args:
        model: A causal language model, with an adapter or without.
        args: Settings of the run.
        train_dataset: The examples, in the order to be trained in.
        task_names: Names of the tasks, in the order of their numbers.
        epoch_size: Examples in one epoch of the mixture; the log's ``epoch`` counts these. None: the whole
            data set.
        rows_of_step: Examples of an optimiser step; None: as many as the arguments say.
        loraplus_lr_ratio: LoRA+'s rate of B over that of A; None: one rate for all.
        router_lr_ratio: The token routers' rate over that of the rest; None: one rate for all.
        num_examples: Examples to be trained on; rows after them only fill the last step up. None: all.
        guard: Told of every batch's losses; stops the run when they go bad or somebody asks it to stop.
        best: Keeps the best adapter so far; checkpoints hold it, too.
        recipe: Text of the recipe, laid beside the checkpoints for a resumed run to compare with.
        fingerprints: Those of the tasks' rows, laid there too.
        callbacks: Further callbacks.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        train_dataset: Any,
        task_names: Sequence[str],
        epoch_size: int | None = None,
        rows_of_step: int | None = None,
        loraplus_lr_ratio: float | None = None,
        router_lr_ratio: float | None = None,
        num_examples: int | None = None,
        guard: Guard | None = None,
        best: KeepBest | None = None,
        recipe: str | None = None,
        fingerprints: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        folder = Path(args.output_dir or ".")
        is_new = not folder.exists()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            callbacks=[*callbacks, *([] if guard is None else [guard])],
            **kwargs,
        )
        if is_new and self.args.should_save:
            # transformers makes it at once; here it comes with the first checkpoint. Not taken away at the end of a run
            # without any: one process would do so while another may still be looking into it
            with suppress(OSError):
                folder.rmdir()
        self.task_names = tuple(task_names)
        self.examples_read = num_examples or len(train_dataset)
        self.epoch_size = epoch_size or self.examples_read
        self.rows_of_step = rows_of_step or (
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        self.guard = guard
        self.best = best
        self.recipe = recipe
        self.fingerprints = fingerprints
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.router_lr_ratio = router_lr_ratio
        self.routing = find(model)
        self._watch = None if self.routing is None else RoutingWatch(self.routing)
        # sums over the log window, on the device: the steps' losses, the objective's figures of each task, and all
        # tokens that were read
        self._loss: Tensor | None = None
        self._by_task: Tensor | None = None
        self._tokens_read: Tensor | None = None
        self._window_start: float | None = None
        self._window_step = 0

    def figures_of(self, sums: Tensor) -> dict[str, float]:
        """The log's figures, from the window's sums over all processes; each objective has its own."""
        raise NotImplementedError

    def listening(self) -> AbstractContextManager[None]:
        """Count the gates of the forward pass inside, where the model is training."""
        return self._watch.listening() if self._watch is not None and self.model.training else nullcontext()

    def loss_of_adapter(self, model: nn.Module) -> Tensor | float:
        """What the adapter adds to the loss of the last forward pass, a micro-batch's share of it."""
        own = auxiliary_loss(model) if self.routing is not None else orthogonality(self.accelerator.unwrap_model(model))
        # transformers divides what is not scaled
        return own / getattr(self, "current_gradient_accumulation_steps", 1) if self.loss_is_scaled_for_ga else own

    def train(self, resume_from_checkpoint: str | None = None, **words: Any) -> Any:
        """Train, from the start or on from a checkpoint of this trainer's, its log window and best adapter included."""
        if resume_from_checkpoint is not None:
            self._take_window(Path(resume_from_checkpoint))
            if self.best is not None:
                self.best.load(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **words)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Start the clock of the log window, then take the step."""
        if self._window_start is None:
            self._window_start = time.perf_counter()
        loss: Tensor = super().training_step(*args, **kwargs)
        self._loss = loss if self._loss is None else self._loss + loss
        return loss

    def stand_still(self, seconds: float) -> None:
        """Leave seconds that were no training out of the log's speed."""
        if self._window_start is not None:
            self._window_start += seconds

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures and the tokens per second of the window that ends here."""
        if self.model.training:
            figures = self._close_window()
            # transformers' own mean forgets, in a resumed run, what came before the checkpoint
            logs.update({name: value for name, value in figures.items() if name != "loss" or "loss" in logs})
            done = self.state.global_step * self.rows_of_step
            self.state.epoch = min(done, self.examples_read) / self.epoch_size
        super().log(logs, start_time)

    def show(self, figures: dict[str, float]) -> None:
        """Tell the screen and the trackers of figures that are no part of the log window, which stays open."""
        was_due = self.control.should_log
        self.callback_handler.on_log(self.args, self.state, self.control, figures)
        self.control.should_log = was_due  # it has been told of these figures alone

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters that weight decay applies to: matrices, of our branches A and B alone."""
        spared = {
            id(part)
            for layer in model.modules()
            if isinstance(layer, BranchLayer)
            for name in layer.configs
            for kind, part in layer.parts(name).items()
            if kind not in _DECAYED_PARTS
        }
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1
            and id(parameter) not in spared
            and not any(part in _NOT_DECAYED_OF_PEFT for part in name.split("."))
        ]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser, with two rates for LoRA+, and where the routers have one of their own."""
        is_new = self.optimizer is None  # type: ignore[has-type]  # transformers' own
        if self.loraplus_lr_ratio is not None and self.optimizer is None:  # type: ignore[has-type]  # transformers' own
            own = {"loraplus_lr_ratio": self.loraplus_lr_ratio, "loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = loraplus_optimizer(self.model, *self.get_optimizer_cls_and_kwargs(self.args), **own)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self.router_lr_ratio is not None:
            give_routers_their_rate(made, self.model, self.router_lr_ratio)
        return made

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save a checkpoint's weights, and what some of peft's methods need to go on from them."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_training(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights."""
        if not restore_training(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything a resumed run needs, in all processes; the seal comes last."""
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        first = self.is_world_process_zero()
        if first:
            shutil.rmtree(checkpoint, ignore_errors=True)  # the rest of one that was cut short
            checkpoint.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        save_adapter(self.model, checkpoint)  # whole, however the parameters are spread
        Window.save(checkpoint, self.args.process_index, self._window())
        if self.best is not None and first:
            self.best.save(checkpoint)
        self.accelerator.wait_for_everyone()
        if first:
            if self.recipe is not None:
                write_text(folder / "recipe.yaml", self.recipe)
            if self.fingerprints is not None:
                write_json(folder / DATA, self.fingerprints)
            seal(checkpoint, processes=self.args.world_size)
            remove_older(folder)
        self.accelerator.wait_for_everyone()

    def _window(self) -> dict[str, Tensor]:
        """What the log has gathered since its last line."""
        gathered = {"loss": self._loss, "by_task": self._by_task, "tokens_read": self._tokens_read}
        known = {name: tensor for name, tensor in gathered.items() if tensor is not None}
        routing = {} if self._watch is None else self._watch.state()
        return known | routing | {"step": torch.tensor(self._window_step)}

    def _take_window(self, checkpoint: Path) -> None:
        """Go on with what the log had gathered when the checkpoint was saved."""
        kept = Window.load(checkpoint, self.args.process_index, self.args.device)
        self._loss, self._by_task, self._tokens_read = (kept.get(name) for name in ("loss", "by_task", "tokens_read"))
        self._window_step = int(kept["step"])
        if self._watch is not None:
            self._watch.restore(kept)

    def _count(self, by_task: Tensor, tokens: Tensor | None) -> None:
        """Add a batch to the log window, without waiting for the device.

        Args:
            by_task: The objective's sums, with a column for each task.
            tokens: Tokens that were read.
        """
        self._by_task = by_task if self._by_task is None else self._by_task + by_task
        if tokens is not None:
            self._tokens_read = tokens + (0 if self._tokens_read is None else self._tokens_read)

    def _close_window(self) -> dict[str, float]:
        """Return the window's figures over all processes, and open the next one."""
        if self._by_task is None or self._window_start is None or self._loss is None:
            return {}
        figures = self.figures_of(self.accelerator.reduce(self._by_task, "sum"))
        steps = self.state.global_step - self._window_step
        figures["loss"] = self.accelerator.reduce(self._loss, "mean").item() / max(steps, 1)
        if self._tokens_read is not None:
            tokens = int(self.accelerator.reduce(self._tokens_read, "sum"))
            figures["tokens_per_second"] = tokens / (time.perf_counter() - self._window_start)
        if self._watch is not None:
            figures |= self._watch.close(
                lambda sums: self.accelerator.reduce(sums, "sum"), warn=self.is_world_process_zero()
            )
        self._loss = self._by_task = self._tokens_read = self._window_start = None
        self._window_step = self.state.global_step
        return figures
