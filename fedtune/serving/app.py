"""The HTTP service of an exported model: what it answers, what it refuses, what it counts.

    POST /predict   {"text": "..."} or {"texts": ["...", ...]} -> the label and the probability of each label
    GET  /model     export.json, the model card and the privacy statement
    GET  /healthz   the process lives;   /readyz   it accepts requests;   /metrics   for Prometheus

Refused: 400 no JSON, 408 a body that takes too long to come, 413 more bytes than allowed, 422 texts that
cannot be classified (empty, too long, too many, half a character), 429 more texts a second than one address
may ask (`Limits.rate`), 503 a full queue or a server that is stopping; 429 and 503 with Retry-After. Each
answer has one sentence in `detail`. Nothing of a text is logged or counted: a line of the log has time,
status, number of texts, tokens and milliseconds.

Does not do: TLS, keys of clients (put it behind a proxy that does both), explanations, several models.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, ValidationError

from fedtune.errors import DataError
from fedtune.runs.predict import check_texts
from fedtune.serving.batcher import Batcher, Busy
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier, probabilities

__all__ = ["Limits", "make_app"]

_log = logging.getLogger("fedtune.serve")
_ADDRESSES = 10_000  # whose rate is remembered at once


@dataclass(frozen=True)
class Limits:
    """What one request, and one address, may ask.

    Attributes:
        texts: in one request.
        characters: of one text.
        body: bytes of one request.
        body_seconds: that a body may take to come.
        waiting: tokens in the queue.
        rate: texts a second from one address, on average over some seconds; None: any.
    """

    texts: int = 256
    characters: int = 20_000
    body: int = 2_000_000
    body_seconds: float = 10.0
    waiting: int = 32_768
    rate: float | None = None


class Question(BaseModel):
    """A request for predictions: `text`, or `texts`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str | None = None
    texts: list[str] | None = None


class Refused(Exception):
    """A request is answered by a status and one sentence."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


class Rates:
    """Texts a second of each address: a bucket that holds five seconds' worth."""

    def __init__(self, rate: float) -> None:
        self.rate, self.most = rate, max(1.0, 5 * rate)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str, count: int, now: float) -> int:
        """0 if `address` may ask `count` texts now; else after how many seconds it may."""
        left, then = self._left.pop(address, (self.most, now))
        left = min(self.most, left + (now - then) * self.rate)
        # More than a bucket holds is let through when it is full, and paid for afterwards.
        short = min(count, self.most) - left
        self._left[address] = (left if short > 0 else left - count, now)
        while len(self._left) > _ADDRESSES:
            self._left.popitem(last=False)
        return math.ceil(short / self.rate) if short > 0 else 0


class Metrics:
    """What Prometheus is told; of this app alone."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("fedtune_requests", "Requests for predictions.", ["status"], **known)
        self.texts = Counter("fedtune_texts", "Texts that were classified.", **known)
        self.tokens = Counter("fedtune_tokens", "Tokens of them.", **known)
        self.seconds = Histogram("fedtune_request_seconds", "From the request to its answer.", **known)
        waiting = Gauge("fedtune_waiting_tokens", "Tokens accepted and not answered.", **known)
        waiting.set_function(lambda: float(batcher.waiting))
        batches = Gauge("fedtune_batches", "Batches computed.", **known)
        batches.set_function(lambda: float(batcher.batches))


def make_app(bundle: Bundle, model: Classifier, limits: Limits = Limits()) -> FastAPI:
    """The service of `model`, opened from `bundle`."""
    batcher = Batcher(model.logits, limits.waiting)
    metrics = Metrics(batcher)
    rates = None if limits.rate is None else Rates(limits.rate)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(
        title="fedtune",
        description="A text classifier that was trained by fedtune.",
        version=str(bundle.about["fedtune"]),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.state.batcher = batcher

    async def answer(request: Request) -> tuple[dict[str, Any], int, int]:
        """(what is answered, number of texts, tokens)."""
        texts = _texts(await _body(request, limits), limits)
        address = request.client.host if request.client else ""
        if rates is not None and (wait := rates.take(address, len(texts), time.monotonic())):
            raise Refused(429, f"More than {limits.rate:g} texts a second from one address.", wait)
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(None, model.encode, texts)
        try:
            logits = await batcher.logits(ids)
        except Busy as busy:
            raise Refused(503, "Too much is waiting, or the server stops.", busy.retry_after) from busy
        rows = probabilities(logits).tolist()
        named = [dict(zip(model.labels, row, strict=True)) for row in rows]
        best = [max(one, key=one.__getitem__) for one in named]
        predictions = [
            {"label": label, "probability": one[label], "probabilities": one}
            for label, one in zip(best, named, strict=True)
        ]
        return {"model": bundle.about["run"], "predictions": predictions}, len(texts), sum(map(len, ids))

    @app.post("/predict", openapi_extra=_DESCRIBED, responses=_RESPONSES)
    async def predict(request: Request) -> Response:
        """The label of each text, with the probability of every label."""
        started, texts, tokens = time.monotonic(), 0, 0
        try:
            found, texts, tokens = await answer(request)
            response = JSONResponse(found)
        except Refused as refused:
            headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
            response = JSONResponse({"detail": refused.detail}, refused.status, headers)
        except Exception as error:  # its words may quote a text
            _log.error("a request failed with %s", type(error).__name__)
            response = JSONResponse({"detail": "The model failed; the server's log says how."}, 500)
        seconds = time.monotonic() - started
        metrics.requests.labels(response.status_code).inc()
        metrics.texts.inc(texts)
        metrics.tokens.inc(tokens)
        metrics.seconds.observe(seconds)
        line = {
            "status": response.status_code,
            "texts": texts,
            "tokens": tokens,
            "ms": round(1000 * seconds, 1),
        }
        _log.info(json.dumps(line))
        return response

    @app.get("/model")
    async def about() -> dict[str, Any]:
        """What the model is, and what was promised to the people in its data."""
        pages = {
            name: bundle.folder / f"{file}.md"
            for name, file in (("card", "README"), ("statement", "statement"))
        }
        return {**bundle.about, **{name: path.read_text(encoding="utf-8") for name, path in pages.items()}}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether requests are accepted: 200, or 503 with a full queue."""
        if batcher.is_open and batcher.waiting < limits.waiting:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "busy"}, 503, {"Retry-After": str(batcher.retry_after())})

    @app.get("/metrics")
    async def counted() -> Response:
        """For Prometheus."""
        return PlainTextResponse(generate_latest(metrics.registry))

    return app


_DESCRIBED = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": Question.model_json_schema()}},
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": what}
    for status, what in (
        (400, "No JSON."),
        (408, "The body took too long."),
        (413, "Too many bytes."),
        (422, "Texts that cannot be classified."),
        (429, "Too many texts a second."),
        (503, "Too much is waiting."),
    )
}


async def _body(request: Request, limits: Limits) -> bytes:
    """The request's body. Raises `Refused` for one that is too long, or too slow."""
    too_long = Refused(413, f"A request may have {limits.body} bytes. Send fewer texts at a time.")
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > limits.body:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body:
                    raise too_long
    except TimeoutError:
        raise Refused(408, f"The body did not come within {limits.body_seconds:g} s.") from None
    return bytes(body)


def _texts(body: bytes, limits: Limits) -> list[str]:
    """The texts of a request. Raises `Refused` for what is none."""
    try:
        question = Question.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        status = 400 if first["type"] == "json_invalid" else 422
        raise Refused(status, f"{where + ': ' if where else ''}{first['msg']}.") from None
    if (question.text is None) == (question.texts is None):
        raise Refused(422, 'Give "text", or "texts": one of the two.')
    texts = [question.text] if question.text is not None else question.texts or []
    if len(texts) > limits.texts:
        raise Refused(422, f"{len(texts)} texts; a request may have {limits.texts}. Send them in parts.")
    for number, text in enumerate(texts, start=1):
        if len(text) > limits.characters:
            raise Refused(
                422,
                f"Text {number} of {len(texts)} has {len(text)} characters, and a text may have "
                f"{limits.characters}. Its beginning will do: the model looks at no more.",
            )
    try:
        check_texts(texts)
    except DataError as error:
        raise Refused(
            422, str(error).replace("Give one or more, or '-' and one text a line.", "Give some.")
        ) from None
    return texts
