"""``multiflora serve``: an OpenAI-compatible server for a model and its adapters."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from multiflora.cli.screen import log_on_stderr

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Argument(help="The base model: a folder, a hub id or 'embedded'.", metavar="MODEL")],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Folders of adapters, each served under its own name.", metavar="[NAME=]FOLDER..."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; this machine only without.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="MULTIFLORA_API_KEY", metavar="KEY", help="Requests must carry it.", show_envvar=True
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Serve the base model as NAME.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 1024,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Answers written at once.")] = 16,
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Answers waiting; more get status 429.")] = 256,
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="Of the base weights.")] = "auto",
) -> None:
    """Serve a model with adapters of any method, routed exactly, to OpenAI clients."""

    # while the server runs, stray prints of libraries go to stderr; the address is a result
    results = Console(file=sys.stdout, highlight=False)

    def ready(address: str, models: list[str]) -> None:
        results.print(f"Serving {', '.join(models)} on {address}/v1 (Ctrl-C stops)", markup=False, soft_wrap=True)

    with log_on_stderr():
        from multiflora.serve.limits import Limits
        from multiflora.serve.models import name_adapters
        from multiflora.serve.run import serve as run

        limits = Limits(max_tokens=max_tokens, max_batch=max_batch, max_queue=max_queue)
        run(
            model,
            name_adapters(adapters or []),
            name=name,
            host=host,
            port=port,
            api_key=api_key,
            limits=limits,
            dtype=dtype,
            ready=ready,
        )
