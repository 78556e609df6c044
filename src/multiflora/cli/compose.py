"""``multiflora compose``: several LoRAs as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout
from multiflora.errors import ConfigError

__all__ = ["compose"]


def compose(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of at least two adapters.", metavar="ADAPTER...")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the LoRA goes.")],
    examples: Annotated[
        Path | None,
        typer.Option("--examples", metavar="FILE", help="A few examples; weights are searched on them (LoraHub)."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", help="Exact sum with these weights; 1 each without.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="The base model, where the adapters do not name it.")
    ] = None,
    route: Annotated[
        bool, typer.Option("--route", help="Make them experts that stay as they are; a router is to be trained.")
    ] = False,
    budget: Annotated[int, typer.Option("--budget", min=1, help="How often the loss may be computed.")] = 40,
    seed: Annotated[int, typer.Option("--seed", help="Of the search.")] = 42,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Put several LoRAs together: an exact sum, weights found on a few examples without gradients, or a router."""
    with log_on_stderr():
        from multiflora.export.compose import compose as run

        made = run(
            adapters,
            output,
            weights=_numbers(weights),
            examples=examples,
            base=base,
            budget=budget,
            seed=seed,
            routed=route,
        )
    if as_json:
        print_json({"output": str(made.output), **made.to_dict()})
        return
    stdout.print(made.table())
    if made.method is not None:
        import yaml

        section = {"init_from": str(made.output), "method": dict(made.method)}
        stdout.print("Its router blends them evenly until it is trained, by a recipe with:")
        stdout.print(yaml.safe_dump(section, sort_keys=False), markup=False, soft_wrap=True)
    if made.loss_before is not None:
        stdout.print(
            f"Loss on the examples: {made.loss_before:.4f} before, {made.loss_after:.4f} after (nats per token)."
        )
    stdout.print(f"Written to {made.output} and read back.", markup=False, soft_wrap=True)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--weights is {text!r}; expected numbers with commas between them, such as 1,0.5."
        ) from error
