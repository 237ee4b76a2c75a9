"""The service under load, beside one-at-a-time PyTorch behind FastAPI and beside onnxruntime alone.

wrk (Debian: `apt-get install wrk`) asks over loopback, each server in turn, with `serve.lua`: public test
texts, one a request over 64 connections as fast as they are answered, and then at 70 percent of what was
reached so, by chance. What onnxruntime does alone is measured in this process: batches of as many texts as
the service's own batches had, tokenized beforehand, by as many threads as the service has workers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from scripts.benchmarks.common import ratios_of, write

SECONDS, ROUNDS, CONNECTIONS = 2, 3, 64
_LOAD = Path(__file__).with_name("serve.lua")
_STOCK = """
import sys, threading
import torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder, port = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
app, lock = FastAPI(), threading.Lock()


class Question(BaseModel):
    texts: list[str]


@app.post("/predict")
def predict(question: Question) -> list[dict[str, float]]:
    answers = []
    for text in question.texts:
        with lock, torch.inference_mode():
            logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits
        answers.append(dict(zip(model.config.id2label.values(), logits.softmax(-1)[0].tolist())))
    return answers


uvicorn.run(app, port=port, log_level="warning")
"""


def serving() -> None:
    """Requests a second, the share of what onnxruntime does alone, and how long one waits."""
    if shutil.which("wrk") is None:
        raise SystemExit("scripts/bench serving needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = _model(Path(folder))
        texts = _texts(Path(folder))
        own = {
            name: stack.enter_context(_server(_fedtune(model, name, port), port))
            for port, name in ((18431, "onnx-int8"), (18432, "onnx"))
        }
        stock = stack.enter_context(_server([sys.executable, "-c", _STOCK, str(model), "18433"], 18433))
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("stock", *own)}
        alone: dict[str, list[float]] = {name: [] for name in own}
        batches: dict[str, float] = {}
        for _ in range(ROUNDS):
            found["stock"].append(_ask(stock, texts))
            for name, address in own.items():
                before = _counted(address)
                found[name].append(_ask(address, texts))
                after = _counted(address)
                batches[name] = (after[0] - before[0]) / (after[1] - before[1])
                alone[name].append(_alone(model, name, texts, batches[name]))
        top = {name: statistics.median(_speed(one) for one in rounds) for name, rounds in found.items()}
        calm = _ask(own["onnx-int8"], texts, rate=0.7 * top["onnx-int8"], seconds=4 * SECONDS)
    pairs = [(_speed(one), _speed(two)) for one, two in zip(found["onnx-int8"], found["stock"], strict=True)]
    write(
        "serving",
        {
            "question": "texts a second of `fedtune serve` (int8) over those of one-at-a-time PyTorch "
            f"behind FastAPI; one text a request, {CONNECTIONS} connections, all on this machine",
            "texts_a_second": {name: round(value, 1) for name, value in top.items()},
            "texts_a_batch": {name: round(value, 1) for name, value in batches.items()},
            "alone_texts_a_second": {name: round(statistics.median(each), 1) for name, each in alone.items()},
            "share_of_alone": {
                name: round(top[name] / statistics.median(each), 3) for name, each in alone.items()
            },
            "at_70_percent": calm,
            "p99_over_p50": round(calm["p99_ms"] / calm["p50_ms"], 2),
            "rounds": found,
            "failed": sum(one["failed"] for rounds in found.values() for one in rounds),
            "target": "ratio_median at least 3, share_of_alone at least 0.8, p99_over_p50 below 4",
            **ratios_of(pairs),
        },
    )


def _model(folder: Path) -> Path:
    """An exported model: the one in FEDTUNE_BENCH_MODEL, or one that is made here in a hurry."""
    if named := os.environ.get("FEDTUNE_BENCH_MODEL"):
        return Path(named)
    import fedtune
    from fedtune.export.export import export

    run = fedtune.run("adapter=head", "privacy=none", "federation.num_rounds=1", f"output={folder / 'run'}")
    (folder / "few.txt").write_text("what a wonderful film\nnever again\n")
    return export(run.path, folder / "model", ("hf", "onnx", "onnx-int8"), texts=folder / "few.txt")


def _texts(folder: Path) -> Path:
    """The public test texts of the default data, as JSON strings, one a line."""
    from fedtune.config.loader import load
    from fedtune.data.sources.load import load_corpus

    _, test = load_corpus(load([]).data, 0)
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in test.texts))
    return path


def _fedtune(model: Path, name: str, port: int) -> list[str]:
    return [sys.executable, "-m", "fedtune", "serve", str(model), "--format", name, "--port", str(port)]


@contextmanager
def _server(command: list[str], port: int) -> Iterator[str]:
    """The address of a server that runs while this lasts."""
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/openapi.json").read()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _ask(
    address: str, texts: Path, *, each: int = 1, rate: float = 0.0, seconds: int = SECONDS
) -> dict[str, Any]:
    """What wrk measured."""
    done = subprocess.run(
        ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "30s", "-s", str(_LOAD),
         f"{address}/predict", "--", str(texts), str(each), str(rate), str(CONNECTIONS)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"texts_a_request": each, **found}


def _speed(found: dict[str, Any]) -> float:
    return float(found["texts_a_request"] * found["requests"] / found["seconds"])


def _counted(address: str) -> tuple[float, float]:
    """(texts in batches, batches) so far."""
    page = urllib.request.urlopen(f"{address}/metrics").read().decode()

    def value(name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
        assert found is not None
        return float(found[1])

    return value("fedtune_batch_texts_total"), value("fedtune_batch_seconds_count")


def _alone(folder: Path, name: str, texts: Path, size: float) -> float:
    """Texts a second that onnxruntime does alone in batches of `size` texts, with all cores."""
    from fedtune.serving.bundle import Bundle
    from fedtune.serving.classifier import Classifier

    model = Classifier.open(Bundle.open(folder), name, threads=1)
    ids = model.encode([json.loads(line) for line in texts.read_text().splitlines()])
    count = max(1, round(size))
    batches = [ids[start : start + count] for start in range(0, len(ids) - count + 1, count)]
    workers = psutil.cpu_count() or 1
    model.logits(batches[0])
    end = time.perf_counter() + SECONDS

    def work(place: int) -> int:
        done = 0
        while time.perf_counter() < end:
            done += len(model.logits(batches[place % len(batches)]))
            place += workers
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        total = sum(pool.map(work, range(workers)))
    return total / (time.perf_counter() - start)
