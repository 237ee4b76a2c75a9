"""The service answers as the model does, refuses with a status and a sentence, and quotes no text."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fedtune.runs.predict import load
from fedtune.serving.app import Limits, Rates, make_app
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier

TEXTS = ["the film was good", "an awful day", "so very happy and nice food was it a film", "sad"]


@pytest.fixture(scope="module")
def parts(exported: Path) -> tuple[Bundle, Classifier]:
    bundle = Bundle.open(exported)
    return bundle, Classifier.open(bundle, "onnx", threads=1)


@pytest.fixture(scope="module")
def client(parts: tuple[Bundle, Classifier]) -> Iterator[TestClient]:
    with TestClient(make_app(*parts)) as opened:
        yield opened


def test_predictions_are_the_runs(client: TestClient, run_dir: Path) -> None:
    found = client.post("/predict", json={"texts": TEXTS}).json()
    expected = load(run_dir, device="cpu").predict(TEXTS)
    for one, other in zip(found["predictions"], expected, strict=True):
        assert one["label"] == other.label
        assert one["probabilities"] == pytest.approx(other.probabilities, abs=1e-5)
        assert one["probability"] == max(one["probabilities"].values())
    (alone,) = client.post("/predict", json={"text": TEXTS[0]}).json()["predictions"]
    assert alone["probability"] == pytest.approx(found["predictions"][0]["probability"], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "JSON"),
        (b"{", 400, "JSON"),
        (b'{"text": "caf\xe9"}', 400, "JSON"),
        (b'{"text": "\\ud800"}', 400, "JSON"),  # half a character
        (b"[]", 422, "object"),
        (b"{}", 422, "one of the two"),
        (b'{"text": "a", "texts": ["b"]}', 422, "one of the two"),
        (b'{"text": 3}', 422, "text: "),
        (b'{"texts": ["a", null]}', 422, "texts.1: "),
        (b'{"texts": []}', 422, "no text"),
        (b'{"text": ""}', 422, "empty"),
        (b'{"texts": ["a", " \\n"]}', 422, "Text 2 of 2"),
        (b'{"text": "a", "model": "b"}', 422, "model: "),
        (json.dumps({"text": "a" * 1_000_000}).encode(), 422, "1000000 characters"),
        (json.dumps({"texts": ["a"] * 10_000}).encode(), 422, "10000 texts"),
        (b" " * 2_000_001, 413, "bytes"),
    ],
)
def test_what_cannot_be_classified(client: TestClient, body: bytes, status: int, words: str) -> None:
    response = client.post("/predict", content=body)
    assert response.status_code == status, response.text
    assert words in response.json()["detail"] and set(response.json()) == {"detail"}
    assert client.post("/predict", json={"text": "a"}).status_code == 200


def test_one_character_and_the_longest_text(client: TestClient) -> None:
    for text in ("a", "é", "\U0001f600", "good " * 4000, "a" * 20_000):
        assert client.post("/predict", json={"text": text}).status_code == 200


def test_a_body_that_comes_in_parts_is_counted_and_a_slow_one_is_not_waited_for(
    parts: tuple[Bundle, Classifier],
) -> None:
    import asyncio

    app = make_app(*parts, Limits(body=100, body_seconds=0.05))

    async def ask(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        left = iter(messages)

        async def receive() -> dict[str, Any]:
            message = next(left, None)
            if message is None:
                await asyncio.sleep(30)
            assert message is not None
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b"",
            "client": ("a", 1), "http_version": "1.1", "scheme": "http", "server": ("b", 2),
        }  # fmt: skip
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
        return sent

    part = {"type": "http.request", "body": b" " * 60, "more_body": True}
    assert asyncio.run(ask([part, part]))[0]["status"] == 413
    assert asyncio.run(ask([part]))[0]["status"] == 408


def test_a_full_queue_is_503_and_what_was_accepted_is_answered(parts: tuple[Bundle, Classifier]) -> None:
    bundle, model = parts
    go, entered = threading.Event(), threading.Event()

    def slow(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        entered.set()
        assert go.wait(20)
        return model.forward(ids, mask)

    app = make_app(bundle, replace(model, forward=slow), Limits(waiting=8))
    with TestClient(app) as client, ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, "/predict", json={"text": TEXTS[0]})
        assert entered.wait(10)
        ready = client.get("/readyz")
        second = client.post("/predict", json={"texts": TEXTS})
        for refused in (second, ready) if app.state.batcher.waiting >= 8 else (second,):
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        go.set()
        assert first.result().status_code == 200
        assert client.get("/readyz").json() == {"status": "ready"}


def test_an_address_that_asks_too_much_is_told_when_to_come_back(parts: tuple[Bundle, Classifier]) -> None:
    with TestClient(make_app(*parts, Limits(rate=0.5))) as client:
        assert client.post("/predict", json={"texts": TEXTS[:2]}).status_code == 200
        response = client.post("/predict", json={"texts": TEXTS[:2]})
        assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 4


def test_rates_on_average() -> None:
    rates = Rates(2.0)  # a bucket of ten
    assert [rates.take("a", 5, 0.0) for _ in range(3)] == [0, 0, 3]
    assert rates.take("b", 1, 0.0) == 0
    assert rates.take("a", 5, 2.0) == 1 and rates.take("a", 5, 2.5) == 0
    # More than a bucket holds: once it is full, and then for a long time nothing.
    assert rates.take("c", 30, 0.0) == 0 and rates.take("c", 1, 9.0) == 2 and rates.take("c", 1, 11.0) == 0
    for number in range(20_000):
        rates.take(str(number), 1, 12.0)
    assert len(rates._left) <= 10_000


def test_a_model_that_fails_is_500_and_the_text_is_in_no_answer(
    parts: tuple[Bundle, Classifier], caplog: pytest.LogCaptureFixture
) -> None:
    bundle, model = parts

    def broken(ids: Any, mask: Any) -> Any:
        raise RuntimeError("cannot read 'a secret'")

    with (
        caplog.at_level(logging.INFO),
        TestClient(make_app(bundle, replace(model, forward=broken))) as client,
    ):
        response = client.post("/predict", json={"text": "a secret"})
    assert response.status_code == 500 and "secret" not in response.text + caplog.text
    assert "RuntimeError" in caplog.text


def test_the_log_and_the_metrics_count_and_quote_nothing(
    parts: tuple[Bundle, Classifier], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedtune.serve"), TestClient(make_app(*parts)) as client:
        client.post("/predict", json={"texts": ["the film was good", "sad"]})
        client.post("/predict", json={"text": ""})
        counted = client.get("/metrics").text
    lines = [json.loads(one.message) for one in caplog.records if one.name == "fedtune.serve"]
    assert [(one["status"], one["texts"], one["tokens"]) for one in lines] == [(200, 2, 9), (422, 0, 0)]
    assert 'fedtune_requests_total{status="200"} 1.0' in counted and "fedtune_texts_total 2.0" in counted
    assert 'fedtune_requests_total{status="422"} 1.0' in counted and "fedtune_waiting_tokens 0.0" in counted
    assert "film" not in counted + caplog.text


def test_what_the_model_is(client: TestClient, exported: Path) -> None:
    about = client.get("/model").json()
    assert about["labels"] == ["negative", "positive"]
    assert about["card"] == (exported / "README.md").read_text()
    assert about["statement"].startswith("# Privacy statement")
    described = client.get("/openapi.json").json()
    assert {"/predict", "/model", "/healthz", "/readyz", "/metrics"} == set(described["paths"])
    schema = described["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"text", "texts"}
