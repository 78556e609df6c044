"""``multiflora serve``: models loaded, a socket bound, requests answered until a signal says stop."""

from __future__ import annotations

import copy
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.serve.limits import Limits

__all__ = ["LOOPBACK", "serve"]

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""


def serve(
    model: str,
    adapters: Mapping[str, Path] | None = None,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
    dtype: Any = "auto",
    ready: Callable[[str, list[str]], None] = lambda address, models: None,
) -> None:
    """Answer OpenAI-compatible requests until SIGINT or SIGTERM.

    Args:
        model: The base model: a folder, a hub id or ``embedded``.
        adapters: Folders of adapters of any method, by the names they are served under.
        name: The name the base model is served under; the last part of ``model`` where none is given.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: Requests must carry it; None: anyone who reaches the address may ask.
        limits: Bounds on what one client may ask.
        dtype: Of the base weights.
        ready: Called with the server's address and the models' names once it listens.

    Raises:
        ConfigError: The model or an adapter cannot be loaded, or names collide.
        EnvironmentProblem: The extra ``serve`` is not installed, or the port is taken.
    """
    uvicorn = _uvicorn()
    from multiflora.ops import native
    from multiflora.serve.app import create_app
    from multiflora.serve.models import load_served

    listener = _listen(host, port)
    with listener:
        base, tokenizer, place = _load(model, dtype)
        known = name or place.rstrip("/").rpartition("/")[2] or place
        models = load_served(base, known, adapters or {})
        if adapters and base.device.type == "cpu":
            native.prepare()
        if host not in LOOPBACK and api_key is None:
            log.warning("Listening on %s without an API key: whoever reaches this machine may use the models.", host)
        app = create_app(
            models,
            tokenizer,
            ends=_ends(base, tokenizer),
            limits=limits,
            api_key=api_key,
            # a page in a browser reaches this machine only by a name of its own: refuse all but this machine's
            hosts=("127.0.0.1", "localhost") if host in ("127.0.0.1", "localhost") else ("*",),
        )
        config = uvicorn.Config(app, log_config=_log_config(uvicorn), timeout_graceful_shutdown=10, server_header=False)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listener.getsockname()[1]}", list(models))
        uvicorn.Server(config).run(sockets=[listener])


def _uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise EnvironmentProblem(
            f"The server needs the package {error.name}, which is not installed: pip install 'multiflora[serve]'."
        ) from error
    return uvicorn


def _listen(host: str, port: int) -> socket.socket:
    """Bind first: a taken port is told before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise EnvironmentProblem(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Choose another with --port or --host."
        ) from error


def _load(model: str, dtype: Any) -> tuple[Any, Any, str]:
    """The base model, on the machine's device, its tokenizer and the place they come from."""
    import torch

    from multiflora.errors import ExportError
    from multiflora.export.source import load_base, load_tokenizer_of

    place = model
    if model == "embedded":
        from multiflora.embedded import embedded_model

        place = str(embedded_model())
    try:
        base = load_base(place, dtype)
        tokenizer = load_tokenizer_of(Path(place), place)
    except ExportError as error:
        raise ConfigError(f"The base model cannot be served: {error}") from error
    return base.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, model


def _ends(base: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the generation config's, or the tokenizer's."""
    found = getattr(base.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _log_config(uvicorn: Any) -> dict[str, Any]:
    """uvicorn's own, with the requests on stderr, too: stdout is for results."""
    config: dict[str, Any] = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config
