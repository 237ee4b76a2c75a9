"""The service answers as the model does, refuses with a status and a sentence, and quotes no text."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from fedtune.monitoring.logs import JsonLines
from fedtune.runs.predict import load
from fedtune.serving.app import Served, make_app
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier
from fedtune.serving.keys import Keys, make_key
from fedtune.serving.questions import Limits, Rates

TEXTS = ["the film was good", "an awful day", "so very happy and nice food was it a film", "sad"]


Models = dict[str, Served]


@pytest.fixture(scope="module")
def models(exported: Path) -> Models:
    bundle = Bundle.open(exported)
    return {"film": Served(bundle, Classifier.open(bundle, "onnx", threads=1), "onnx")}


@pytest.fixture(scope="module")
def client(models: Models) -> Iterator[TestClient]:
    with TestClient(make_app(models)) as opened:
        yield opened


def with_forward(models: Models, forward: Any) -> Models:
    """The same with a model that computes otherwise."""
    return {name: replace(one, model=replace(one.model, forward=forward)) for name, one in models.items()}


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
        (b'{"text": "a", "model": "b"}', 404, "film"),
        (b'{"text": "a", "label": "positive"}', 422, "/explain"),
        (b'{"text": "a", "other": "b"}', 422, "other: "),
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
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    import asyncio

    app = make_app(models, Limits(body=100, body_seconds=0.05))

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
    # One that goes away is no failure of the service, and no error in its log.
    caplog.clear()
    assert asyncio.run(ask([part, {"type": "http.disconnect"}]))[0]["status"] == 499
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_bodies_have_so_many_bytes_together(models: Models) -> None:
    import asyncio

    app = make_app(models, Limits(bodies=100))

    async def main() -> None:
        first, sent = asyncio.Event(), list[Any]()

        async def receive() -> dict[str, Any]:
            if first.is_set():
                await asyncio.sleep(600)
            first.set()
            return {"type": "http.request", "body": b" " * 60, "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b"",
            "client": ("a", 1), "http_version": "1.1", "scheme": "http", "server": ("b", 2),
        }  # fmt: skip
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            reading = asyncio.create_task(app(scope, receive, send))
            await first.wait()
            body = json.dumps({"text": TEXTS[0]}).encode().ljust(60)
            refused = await client.post("http://a/predict", content=body)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            for _ in range(3):  # what was answered counts no longer
                assert (await client.post("http://a/predict", content=body)).status_code == 200

    asyncio.run(main())


def test_a_full_queue_is_503_and_what_was_accepted_is_answered(models: Models) -> None:
    go, entered = threading.Event(), threading.Event()

    def slow(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        entered.set()
        assert go.wait(60)
        return models["film"].model.forward(ids, mask)

    app = make_app(with_forward(models, slow), Limits(waiting=8))
    with TestClient(app) as client, ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, "/predict", json={"text": TEXTS[0]})
        assert entered.wait(60)
        ready = client.get("/readyz")
        second = client.post("/predict", json={"texts": TEXTS})
        for refused in (second, ready) if app.state.batcher.waiting >= 8 else (second,):
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        go.set()
        assert first.result().status_code == 200
        assert client.get("/readyz").json() == {"status": "ready"}


def test_an_address_that_asks_too_much_is_told_when_to_come_back(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Classifier.encode

    def counting(model: Classifier, texts: Sequence[str]) -> list[list[int]]:
        encoded.append(len(texts))
        return encode(model, texts)

    monkeypatch.setattr(Classifier, "encode", counting)
    with TestClient(make_app(models, Limits(rate=0.5))) as client:
        assert client.post("/predict", json={"texts": TEXTS[:2]}).status_code == 200
        response = client.post("/predict", json={"texts": TEXTS[:2]})
        assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 4
    assert encoded == [2]  # who is refused costs nothing


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
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(ids: Any, mask: Any) -> Any:
        raise RuntimeError("cannot read 'a secret'")

    with (
        caplog.at_level(logging.INFO),
        TestClient(make_app(with_forward(models, broken))) as client,
    ):
        response = client.post("/predict", json={"text": "a secret"})
    assert response.status_code == 500 and "secret" not in response.text + caplog.text
    assert "RuntimeError" in caplog.text


def test_the_log_and_the_metrics_count_and_quote_nothing(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedtune.serve"), TestClient(make_app(models)) as client:
        client.post("/predict", json={"texts": ["the film was good", "sad"]})
        client.post("/predict", json={"text": ""})
        counted = client.get("/metrics").text
    lines = [one.msg for one in caplog.records if one.name == "fedtune.serve"]
    assert all(isinstance(one, dict) for one in lines)
    assert [(one["status"], one["texts"], one["tokens"]) for one in lines] == [(200, 2, 9), (422, 0, 0)]
    asked = 'path="/predict",'
    for line in (
        f'fedtune_requests_total{{model="film",{asked}status="200"}} 1.0',
        f'fedtune_requests_total{{model="",{asked}status="422"}} 1.0',
        'fedtune_texts_total{model="film",path="/predict"} 2.0',
        'fedtune_tokens_total{model="film",path="/predict"} 9.0',
        "fedtune_waiting_tokens 0.0",
        "fedtune_workers 0.0",
        "fedtune_batch_texts_total 2.0",
        "fedtune_batch_tokens_sum 9.0",
        "fedtune_batch_seconds_count 1.0",
        'fedtune_request_seconds_count{path="/predict"} 2.0',
    ):
        assert line in counted, line
    assert 'fedtune_model{format="onnx",model="film"' in counted and "process_resident_memory" in counted
    assert "was good" not in counted + caplog.text


def test_a_line_of_the_log_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("fedtune.serve", logging.INFO, "", 0, {"status": 200}, (), None)
    line = json.loads(JsonLines().format(record))
    assert line["status"] == 200 and line["level"] == "info" and line["time"].endswith("+00:00")
    other = logging.LogRecord("uvicorn", logging.WARNING, "", 0, "a %s", ("word",), None)
    assert json.loads(JsonLines().format(other))["message"] == "a word"


def test_what_the_model_is(client: TestClient, exported: Path) -> None:
    about = client.get("/model").json()
    assert about["labels"] == ["negative", "positive"]
    assert about["card"] == (exported / "README.md").read_text()
    assert about["statement"].startswith("# Privacy statement")
    assert client.get("/model?model=film").json() == about
    assert client.get("/model?model=other").status_code == 404
    (one,) = client.get("/models").json()["models"]
    said = {"labels": about["labels"], "run": about["run"], "format": "onnx", "pairs": False}
    assert one == {"name": "film", **said}


def test_what_the_service_says_of_itself(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    paths = {"/predict", "/explain", "/model", "/models", "/healthz", "/readyz", "/metrics"}
    assert paths == set(described["paths"])
    schema = described["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert [set(one["properties"]) for one in schema["oneOf"]] == [{"text", "model"}, {"texts", "model"}]
    assert "securitySchemes" not in described["components"]


def test_an_explanation_is_what_the_model_says_without_each_word(client: TestClient) -> None:
    text = "Good food,  an awful film\U0001f600"
    found = client.post("/explain", json={"text": text}).json()
    words = [text[one["start"] : one["end"]] for one in found["words"]]
    assert words[:5] == ["Good", "food", ",", "an", "awful"] and found["read"] == len(text)

    def odds(text: str) -> float:
        (one,) = client.post("/predict", json={"text": text}).json()["predictions"]
        probability = one["probabilities"][found["label"]]
        return float(np.log(probability / (1 - probability)))

    assert found["probability"] == pytest.approx(1 / (1 + np.exp(-odds(text))), abs=1e-5)
    for one in found["words"]:
        without = text[: one["start"]] + " " + text[one["end"] :]
        assert one["weight"] == pytest.approx(odds(text) - odds(without), abs=2e-3)
    other = {"positive": "negative", "negative": "positive"}[found["label"]]
    turned = client.post("/explain", json={"text": text, "label": other}).json()
    for one, opposite in zip(found["words"], turned["words"], strict=True):
        assert one["weight"] == pytest.approx(-opposite["weight"], abs=1e-3)


def test_a_long_text_is_explained_in_parts(client: TestClient, models: Models) -> None:
    text = "good " * 4000
    found = client.post("/explain", json={"text": text}).json()
    assert len(found["words"]) <= Limits().parts and found["read"] < 200
    with TestClient(make_app(models, Limits(parts=2))) as other:
        found = other.post("/explain", json={"text": "the film was good"}).json()
    assert [(one["start"], one["end"]) for one in found["words"]] == [(0, 8), (9, 17)]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"texts": ["a"]}, "one text"),
        ({}, "one text"),
        ({"text": "a", "label": "happy"}, "negative, positive"),
    ],
)
def test_what_cannot_be_explained(client: TestClient, asked: dict[str, Any], words: str) -> None:
    response = client.post("/explain", json=asked)
    assert response.status_code == 422 and words in response.json()["detail"]


def test_an_explanation_counts_as_the_texts_that_the_model_reads(models: Models) -> None:
    with TestClient(make_app(models, Limits(rate=1.0))) as client:
        assert client.post("/explain", json={"text": "the film was good"}).status_code == 200
        assert client.post("/predict", json={"text": "a"}).status_code == 429


def test_without_a_key_nobody_asks(models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    key, other = make_key(path, "clinic-1"), make_key(path, "clinic-2")
    with (
        caplog.at_level(logging.INFO, "fedtune.serve"),
        TestClient(make_app(models, Limits(rate=0.5), keys=Keys.open(path))) as client,
    ):

        def ask(**headers: str) -> Any:
            return client.post("/predict", json={"texts": ["a", "b"]}, headers=headers)

        for headers in ({}, {"Authorization": f"Basic {key}"}, {"Authorization": f"Bearer {key[:-1]}"}):
            response = ask(**headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        # A stranger's body is not read: what is wrong with it is not told.
        assert client.post("/explain", content=b"{").status_code == 401
        assert ask(Authorization=f"Bearer {key}").status_code == 200
        assert ask(Authorization=f"bearer  {key}").status_code == 429  # each key has a rate of its own
        assert ask(Authorization=f"Bearer {other}").status_code == 200
        for page in ("/", "/model", "/models", "/healthz", "/readyz", "/metrics", "/openapi.json"):
            assert client.get(page).status_code == 200, page
        assert (
            client.get("/openapi.json").json()["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        )
    lines = [one.msg for one in caplog.records if one.name == "fedtune.serve"]
    assert [one["client"] for one in lines[-3:]] == ["clinic-1", "clinic-1", "clinic-2"]
    assert key not in caplog.text and lines[0]["client"] is None


def test_several_models(models: Models) -> None:
    def reversed_(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return models["film"].model.forward(ids, mask)[:, ::-1]

    both = models | {"mood": with_forward(models, reversed_)["film"]}
    with TestClient(make_app(both)) as client:

        def ask(**more: str) -> Any:
            return client.post("/predict", json={"texts": TEXTS, **more})

        first, second = (
            [one["probabilities"]["positive"] for one in ask(model=name).json()["predictions"]]
            for name in ("film", "mood")
        )
        assert first == pytest.approx([1 - one for one in second], abs=1e-5)
        nameless, unknown = ask(), ask(model="else")
        assert (nameless.status_code, unknown.status_code) == (422, 404)
        assert "film, mood" in nameless.json()["detail"] and "film, mood" in unknown.json()["detail"]
        assert client.get("/model").status_code == 404
        assert client.get("/model?model=mood").status_code == 200
        assert [one["name"] for one in client.get("/models").json()["models"]] == ["film", "mood"]
        described = client.get("/openapi.json").json()["paths"]["/explain"]["post"]["requestBody"]
    assert described["content"]["application/json"]["schema"]["required"] == ["text", "model"]
