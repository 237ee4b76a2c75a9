"""The HTTP service of exported models: what it answers, what it refuses, what it counts.

    POST /predict   {"text": "..."} or {"texts": ["...", ...]} -> the label and the probability of each label
    POST /explain   {"text": "..."} -> which words speak for the label (`fedtune.serving.explain`)
                    of a model of pairs: {"text": "...", "text_pair": "..."}, {"pairs": [["...", "..."], ...]}
    GET  /model     export.json, the model card and the privacy statement;   /models   what is served
    GET  /healthz   the process lives;   /readyz   it accepts requests;   /metrics   for Prometheus
    GET  /          a page to try it

With several models a request names one: "model". With keys (`fedtune.serving.keys`) a question needs one in
its header, `Authorization: Bearer KEY`; what the service says about itself is open to everybody.

Refused: 400 no JSON, 401 no key that is known, 404 no such model, 408 a body that takes too long to come, 413
more bytes than allowed, 422 texts that cannot be classified (empty, too long, too many, half a character),
429 more texts a second than one client may ask (`Limits.rate`), 503 a full queue, too many bytes of requests
at once, too many connections (`fedtune.serving.connections`) or a server that is stopping; 429 and 503 with
Retry-After. Each answer has one sentence in `detail`. Nothing of a text is logged
or counted: a line of the log is one JSON object with the time, the request's id (which its answer carries as
X-Request-Id), the path, the status, the client's name where keys are asked for, the model, and how much was
asked.

Does not do: TLS (put it behind a proxy that does).
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from numpy.typing import NDArray
from pydantic import BaseModel

from fedtune import __version__
from fedtune.monitoring.pages import load_page
from fedtune.runs.predict import Asked
from fedtune.serving.batcher import Batcher, Busy
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier, probabilities
from fedtune.serving.connections import Connections
from fedtune.serving.explain import METHOD, cut, weights
from fedtune.serving.keys import Keys
from fedtune.serving.metrics import Metrics
from fedtune.serving.questions import (
    Limits,
    Question,
    Rates,
    Refused,
    characters,
    check_kind,
    described,
    read_body,
    read_question,
)

__all__ = ["Served", "make_app"]

_log = logging.getLogger("fedtune.serve")
_DEFAULTS = Limits()
_AT_ONCE = 2000  # characters: tokenizing them is faster than handing them to another thread


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        bundle: the folder that it comes from.
        model: the model itself.
        format: which of the folder's formats it is.
    """

    bundle: Bundle
    model: Classifier
    format: str


class Prediction(BaseModel):
    """What a model says of one text."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Predictions(BaseModel):
    """The answer of /predict: of each text, in the order of the texts."""

    model: str
    predictions: list[Prediction]


class Word(BaseModel):
    """A part of a text: characters from `start` to before `end`, and what it speaks for."""

    start: int
    end: int
    weight: float


class Explanation(BaseModel):
    """The answer of /explain. `pair_read` and `pair_words`: of a pair's second text."""

    model: str
    label: str
    probability: float
    method: str
    read: int
    words: list[Word]
    pair_read: int | None = None
    pair_words: list[Word] | None = None


class Detail(BaseModel):
    """Why a request was refused."""

    detail: str


@dataclass
class _Asked:
    """What is known of a request so far, for its line in the log."""

    id: str
    path: str
    started: float = field(default_factory=time.monotonic)
    who: str = ""  # whose rate it counts for
    client: str | None = None
    model: str | None = None
    texts: int = 0
    tokens: int = 0
    bytes: int = 0  # that are held of it


class _Service:
    """The models, their queue, and who may ask how much."""

    def __init__(self, models: Mapping[str, Served], limits: Limits, keys: Keys | None, workers: int) -> None:
        self.models, self.limits, self.keys = models, limits, keys
        asks = {name: served.model.logits for name, served in models.items()}
        self.batcher = Batcher(asks, limits.waiting, workers)
        self.connections = Connections(limits.connections)
        self.metrics = Metrics(self.batcher, self.connections)
        self.held = 0  # bytes of all requests
        self.rates = None if limits.rate is None else Rates(limits.rate)
        for name, served in models.items():
            self.metrics.model.labels(name, str(served.bundle.about["run"]), served.format).set(1)

    def chosen(self, name: str | None) -> tuple[str, Served]:
        """The model `name`; None: the only one. Raises `Refused` if there is none."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.items()))
        if name in self.models:
            return str(name), self.models[str(name)]
        there = ", ".join(self.models)
        raise Refused(404 if name else 422, f"Name one of the models that are served: {there}.")

    def _admit(self, request: Request, asked: _Asked) -> None:
        """Notes who asks: by the key, or by the address where none is needed. `Refused`: a stranger."""
        if self.keys is None:
            asked.who = request.client.host if request.client else ""
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        asked.client = self.keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if asked.client is None:
            raise Refused(
                401, "Send a key that is known: Authorization: Bearer KEY.", WWW_Authenticate="Bearer"
            )
        asked.who = asked.client

    async def question(
        self, request: Request, asked: _Asked, *, explain: bool = False
    ) -> tuple[str, Served, Question, list[Asked]]:
        """(the model's name, the model, the question, its texts), from a client that may ask."""
        self._admit(request, asked)  # before anything of a stranger's is read
        body = await read_body(request, self.limits, partial(self._hold, asked))
        question, texts = read_question(body, self.limits, explain=explain)
        name, served = self.chosen(question.model)
        check_kind(name, served.bundle.pairs, texts)
        asked.model = name
        return name, served, question, texts

    def _hold(self, asked: _Asked, count: int) -> None:
        """Counts bytes of a request, until it is answered. `Refused`: there are too many of all."""
        asked.bytes += count
        self.held += count
        if self.held > self.limits.bodies:
            raise Refused(
                503, "Too much is being read.", Retry_After=str(math.ceil(self.limits.body_seconds))
            )

    def _take(self, asked: _Asked, texts: int) -> None:
        """Counts texts towards the client's rate. `Refused`: it asks too much now."""
        if self.rates is not None and (wait := self.rates.take(asked.who, texts, time.monotonic())):
            whose = "address" if self.keys is None else "key"
            raise Refused(
                429, f"More than {self.rates.rate:g} texts a second of one {whose}.", Retry_After=str(wait)
            )

    async def logits(self, asked: _Asked, name: str, ids: list[list[int]]) -> NDArray[np.float32]:
        """Logits of `ids` by the model `name`."""
        try:
            logits = await self.batcher.logits(name, ids)
        except Busy as busy:
            raise Refused(
                503, "Too much is waiting, or the server stops.", Retry_After=str(busy.retry_after)
            ) from busy
        asked.texts, asked.tokens = len(ids), sum(map(len, ids))
        return logits

    async def predict(self, request: Request, asked: _Asked) -> dict[str, Any]:
        """What /predict answers."""
        name, served, _, texts = await self.question(request, asked)
        self._take(asked, len(texts))  # before the work of tokenizing them
        if characters(texts) <= _AT_ONCE:
            ids = served.model.encode(texts)
        else:
            ids = await asyncio.get_running_loop().run_in_executor(None, served.model.encode, texts)
        rows = probabilities(await self.logits(asked, name, ids)).tolist()
        found = [dict(zip(served.model.labels, row, strict=True)) for row in rows]
        best = [max(one, key=one.__getitem__) for one in found]
        predictions = [
            {"label": label, "probability": one[label], "probabilities": one}
            for label, one in zip(best, found, strict=True)
        ]
        return {"model": name, "predictions": predictions}

    async def explain(self, request: Request, asked: _Asked) -> dict[str, Any]:
        """What /explain answers."""
        name, served, question, (text,) = await self.question(request, asked, explain=True)
        labels = served.model.labels
        if question.label is not None and question.label not in labels:
            raise Refused(422, f"label: the model {name} has the labels {', '.join(labels)}.")
        parts = await asyncio.get_running_loop().run_in_executor(
            None, cut, served.model.tokenizer, text, self.limits.parts
        )
        self._take(asked, len(parts.ids))
        logits = await self.logits(asked, name, parts.ids)
        said = probabilities(logits[:1])[0]
        label = int(said.argmax()) if question.label is None else labels.index(question.label)
        words: list[list[dict[str, Any]]] = [[] for _ in parts.ends]
        for of, (start, end), weight in zip(parts.texts, parts.spans, weights(logits, label), strict=True):
            words[of].append({"start": start, "end": end, "weight": round(weight, 4)})
        found = {
            "model": name,
            "label": labels[label],
            "probability": float(said[label]),
            "method": METHOD,
            "read": parts.ends[0],
            "words": words[0],
        }
        return found if len(words) == 1 else {**found, "pair_read": parts.ends[1], "pair_words": words[1]}

    async def answer(
        self, request: Request, work: Callable[[Request, _Asked], Awaitable[dict[str, Any]]]
    ) -> Response:
        """What `work` answers, or why not; counted and logged."""
        asked = _Asked(secrets.token_hex(6), request.url.path)
        try:
            response = JSONResponse(await work(request, asked))
        except Refused as refused:
            response = JSONResponse({"detail": refused.detail}, refused.status, refused.headers)
        except Exception as error:  # its words may quote a text
            _log.error({"id": asked.id, "message": f"a request failed with {type(error).__name__}"})
            response = JSONResponse({"detail": "The model failed; the server's log says how."}, 500)
        finally:
            self.held -= asked.bytes
        response.headers["X-Request-Id"] = asked.id
        self._count(asked, response.status_code)
        return response

    def _count(self, asked: _Asked, status: int) -> None:
        seconds, model = time.monotonic() - asked.started, asked.model or ""
        self.metrics.requests.labels(asked.path, model, status).inc()
        self.metrics.texts.labels(asked.path, model).inc(asked.texts)
        self.metrics.tokens.labels(asked.path, model).inc(asked.tokens)
        self.metrics.seconds.labels(asked.path).observe(seconds)
        line = {
            "id": asked.id,
            "path": asked.path,
            "status": status,
            "client": asked.client,
            "model": asked.model,
            "texts": asked.texts,
            "tokens": asked.tokens,
            "ms": round(1000 * seconds, 1),
        }
        _log.info(line)


def make_app(
    models: Mapping[str, Served],
    limits: Limits = _DEFAULTS,
    *,
    keys: Keys | None = None,
    workers: int = 1,
) -> FastAPI:
    """The service.

    Args:
        models: by the names that requests give.
        keys: of the clients; None: anybody may ask.
        workers: batches that are computed at once, at most.
    """
    service = _Service(models, limits, keys, workers)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    app = FastAPI(
        title="fedtune",
        description="Text classifiers that were trained by fedtune.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.state.batcher, app.state.connections = service.batcher, service.connections

    labels = {name: served.model.labels for name, served in models.items()}
    of_pairs = [name for name, served in models.items() if served.bundle.pairs]

    def described_as(explain: bool) -> dict[str, Any]:
        schema = described(limits, labels, of_pairs, explain=explain)
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        return {"requestBody": body} | ({} if keys is None else {"security": [{"key": []}]})

    @app.post(
        "/predict", response_model=Predictions, responses=_refusals(keys), openapi_extra=described_as(False)
    )
    async def predict(request: Request) -> Response:
        """The label of each text, with the probability of every label."""
        return await service.answer(request, service.predict)

    @app.post(
        "/explain", response_model=Explanation, responses=_refusals(keys), openapi_extra=described_as(True)
    )
    async def explain(request: Request) -> Response:
        """Which words of a text speak for its label, or for the label that is named, and how much."""
        return await service.answer(request, service.explain)

    _add_pages(app, service)
    if keys is not None:
        _describe_keys(app)
    return app


def _add_pages(app: FastAPI, service: _Service) -> None:
    """What the service says of itself, to everybody."""

    @app.get("/models")
    async def models() -> dict[str, Any]:
        """The models that are served, with their labels."""
        return {
            "models": [
                {
                    "name": name,
                    "labels": served.model.labels,
                    "pairs": served.bundle.pairs,
                    "run": served.bundle.about["run"],
                    "format": served.format,
                }
                for name, served in service.models.items()
            ],
            "key": service.keys is not None,
        }

    @app.get("/model", responses={404: {"model": Detail}}, response_model=dict[str, Any])
    async def about(model: str | None = None) -> Any:
        """What a model is, and what was promised to the people in its data."""
        try:
            _, served = service.chosen(model)
        except Refused as refused:
            return JSONResponse({"detail": refused.detail}, 404)
        pages = {name: served.bundle.folder / f"{file}.md" for name, file in _PAGES.items()}
        return {
            **served.bundle.about,
            **{name: path.read_text(encoding="utf-8") for name, path in pages.items()},
        }

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"description": "The queue is full, or the server stops."}})
    async def readyz() -> Response:
        """Whether requests are accepted: 200, or 503 with a full queue."""
        batcher = service.batcher
        if batcher.is_open and batcher.waiting < batcher.max_waiting:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "busy"}, 503, {"Retry-After": str(batcher.retry_after())})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return PlainTextResponse(service.metrics.page())

    page, headers = load_page("fedtune.serving", "page.html")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def try_it() -> Response:
        """A page to try it."""
        return HTMLResponse(page, headers=headers)


_PAGES = {"card": "README", "statement": "statement"}


def _refusals(keys: Keys | None) -> dict[int | str, dict[str, Any]]:
    known = (
        (400, "No JSON."),
        (401, "No key that is known."),
        (404, "No such model."),
        (408, "The body took too long."),
        (413, "Too many bytes."),
        (422, "Texts that cannot be classified."),
        (429, "Too many texts a second."),
        (500, "The model failed."),
        (503, "Too much is waiting."),
    )
    return {
        status: {"description": what, "model": Detail}
        for status, what in known
        if status != 401 or keys is not None
    }


def _describe_keys(app: FastAPI) -> None:
    """Says in the OpenAPI page how a key is sent."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
