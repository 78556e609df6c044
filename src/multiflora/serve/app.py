"""HTTP around the engine: OpenAI's paths, errors and streams."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from multiflora._version import __version__
from multiflora.serve import schema
from multiflora.serve.answers import DONE, Answer, error_body, model_card, sse
from multiflora.serve.engine import Engine, QueueFullError
from multiflora.serve.job import Job
from multiflora.serve.limits import Limits
from multiflora.serve.models import Served
from multiflora.serve.prepare import RefusedError, prepare

__all__ = ["create_app"]

log = logging.getLogger(__name__)

Asked = TypeVar("Asked", schema.ChatRequest, schema.CompletionRequest)


def create_app(
    models: Mapping[str, Served],
    tokenizer: Any,
    *,
    ends: Sequence[int],
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        models: What is served, by name; the first is the base model.
        tokenizer: The base model's.
        ends: Ids that end an answer.
        limits: The server's bounds.
        api_key: Requests must carry it as a bearer token; None: anyone who reaches the server may use it.
        hosts: Names under which the server may be addressed; a page in a browser cannot reach it under another.
    """
    bounds = limits or Limits()
    base, started = next(iter(models)), int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = app.state.engine = Engine(models, ends, bounds)
        work = asyncio.create_task(engine.run())
        yield
        await engine.stop()
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    app = FastAPI(title="multiflora", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)

    def admit(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_key is not None and not hmac.compare_digest(given, api_key.encode()):
            raise RefusedError(
                "The API key is missing or wrong; send it as a bearer token.", 401, code="invalid_api_key"
            )

    async def answer(request: Request, kind: type[Asked]) -> Response:
        admit(request)
        asked = await _read(request, kind, bounds)
        task = request.headers.get("x-multiflora-task")
        # templates and tokenizers may take a while for a long text: not in the loop that serves the others
        loop = asyncio.get_running_loop()
        jobs = await asyncio.to_thread(prepare, asked, task, models, tokenizer, ends, bounds, loop)
        try:
            request.app.state.engine.submit(jobs)
        except QueueFullError:
            return _busy()
        made = Answer(
            chat=kind is schema.ChatRequest, id=f"cmpl-{uuid.uuid4().hex}", model=asked.model, created=int(time.time())
        )
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_stream(made, jobs, usage), media_type="text/event-stream")
        return await _whole(request, made, jobs)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        engine: Engine = request.app.state.engine
        text = engine.metrics.text(running=len(engine.running), waiting=engine.waiting)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        admit(request)
        return {"object": "list", "data": [model_card(m.name, base, m.tasks, started) for m in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        admit(request)
        if name not in models:
            raise RefusedError(
                f"There is no model {name!r}; served are {', '.join(models)}.", 404, "model", "model_not_found"
            )
        return model_card(name, base, models[name].tasks, started)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, schema.ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, schema.CompletionRequest)

    return app


async def _read(request: Request, kind: type[Asked], limits: Limits) -> Asked:
    """The body, no larger and no slower than allowed, as a request.

    Raises:
        RefusedError: It is too large, too slow, no JSON, or says what cannot be met.
    """
    if "application/json" not in request.headers.get("content-type", ""):
        # a page of another site can send forms and plain text to a server on this machine, but no JSON
        raise RefusedError("The body must be JSON: send the header Content-Type: application/json.", 415)
    try:
        body = await asyncio.wait_for(_body(request, limits.max_body), limits.body_seconds)
    except asyncio.TimeoutError as error:
        raise RefusedError(f"The request did not arrive within {limits.body_seconds:g} seconds.", 408) from error
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise RefusedError(f"{place or 'The body'}: {first['msg']}{more}", 400, place or None) from error


async def _body(request: Request, most: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    size, parts = int(announced) if announced.isdecimal() else 0, []
    if size <= most:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                break
            parts.append(part)
    if size > most:
        raise RefusedError(f"The request is larger than {most:,} bytes.", 413, code="request_too_large")
    return b"".join(parts)


async def _whole(request: Request, made: Answer, jobs: Sequence[Job]) -> Response:
    """The answer at once; nothing is computed for a client that has gone."""
    texts = asyncio.gather(*(job.whole() for job in jobs))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        waited: set[asyncio.Future[Any]] = {texts, gone}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not texts.done():
            return await _gone(request)
        found = texts.result()
    finally:
        gone.cancel()
        texts.cancel()
        for job in jobs:
            job.cancel()
    if any(piece.finish == "failed" for piece in found):
        return JSONResponse(error_body("The answer could not be computed; see the server's log.", "server_error"), 500)
    if any(piece.finish == "cancelled" for piece in found):
        return JSONResponse(error_body("The server is being stopped.", "server_error"), 503)
    prompt_tokens, tokens = sum(len(job.prompt) for job in jobs), sum(job.tokens for job in jobs)
    return JSONResponse(made.whole(found, prompt_tokens, tokens))


async def _disconnected(request: Request) -> None:
    """Return when the client hangs up; the body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(made: Answer, jobs: Sequence[Job], usage: bool) -> AsyncIterator[str]:
    """The answer as events; when the client hangs up, this is closed and the jobs are cancelled."""
    merged: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def forward(index: int, job: Job) -> None:
        async for piece in job.pieces():
            await merged.put((index, piece))

    readers = [asyncio.ensure_future(forward(index, job)) for index, job in enumerate(jobs)]
    try:
        for index in range(len(jobs)):
            if (opening := made.opening(index)) is not None:
                yield opening
        left, sent = len(jobs), [0] * len(jobs)
        while left:
            index, piece = await merged.get()
            if piece.finish in ("failed", "cancelled"):
                yield sse(error_body("The answer could not be finished; see the server's log.", "server_error"))
                return
            left -= piece.finish is not None
            yield made.piece(index, piece, sent[index])
            sent[index] += sum(len(token.token) for token in piece.told)
        if usage:
            yield made.usage(sum(len(job.prompt) for job in jobs), sum(job.tokens for job in jobs))
        yield DONE
    finally:
        for reader in readers:
            reader.cancel()
        for job in jobs:
            job.cancel()


def _busy() -> Response:
    body = error_body("Too many requests are waiting; try again soon.", "rate_limit_error", code="queue_full")
    return JSONResponse(body, 429, {"Retry-After": "1"})


async def _gone(request: Request, error: Exception | None = None) -> Response:
    """The client has hung up, so nobody reads this; 499 is what web servers' logs call it."""
    return Response(status_code=499)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    kind = {401: "authentication_error", 404: "not_found_error"}.get(error.status, "invalid_request_error")
    return JSONResponse(error_body(str(error), kind, param=error.param, code=error.code), error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code)
