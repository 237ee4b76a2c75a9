"""The service under load, beside one-at-a-time PyTorch behind FastAPI and beside onnxruntime alone.

wrk (Debian: `apt-get install wrk`) asks over loopback, each server in turn, with `serve.lua`: public test
texts, one a request over 64 connections as fast as they are answered, and then at 70 percent of what was
reached so, by chance. What onnxruntime does alone is measured in this process: batches of as many texts as
the service's own batches had, tokenized beforehand, by as many threads as the service has workers.

`soak` asks for ten minutes at 70 percent of the top, and looks at what the service's process holds meanwhile.
`restarts` tells the service to stop in the midst of that load, again and again, and compares the answers that
it gave, by its own log, with those that came back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
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

from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier
from scripts.benchmarks.common import ratios_of, write

SECONDS, ROUNDS, CONNECTIONS, FORMAT = 2, 3, 64, "onnx-int8"
SOAK, LOOK = 600, 10  # seconds: of a soak, and from one look at memory to the next
RESTARTS, UNTIL = 20, 3  # and the seconds of load before each
_SIZES = (1, 4, 16, 32)  # texts of a batch
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
    _need_wrk()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = _model(Path(folder))
        texts = _texts(Path(folder))
        own, _ = stack.enter_context(_server(_fedtune(model, 18431), 18431))
        stock, _ = stack.enter_context(_server([sys.executable, "-c", _STOCK, str(model), "18433"], 18433))
        found: dict[str, list[dict[str, Any]]] = {"stock": [], FORMAT: []}
        alone, sizes = [], []
        for _ in range(ROUNDS):
            found["stock"].append(_ask(stock, texts))
            before = _counted(own)
            found[FORMAT].append(_ask(own, texts))
            after = _counted(own)
            sizes.append((after[0] - before[0]) / (after[1] - before[1]))
            alone.append(_alone(model, texts, sizes[-1]))
        top = {name: statistics.median(_speed(one) for one in rounds) for name, rounds in found.items()}
        calm = _ask(own, texts, rate=0.7 * top[FORMAT], seconds=4 * SECONDS)
        times, tokens = _batch_times(model, texts)
    pairs = [(_speed(one), _speed(two)) for one, two in zip(found[FORMAT], found["stock"], strict=True)]
    write(
        "serving",
        {
            "question": "texts a second of `fedtune serve` (int8) over those of one-at-a-time PyTorch "
            f"behind FastAPI; one text a request, {CONNECTIONS} connections, all on this machine",
            "texts_a_second": {name: round(value, 1) for name, value in top.items()},
            "texts_a_batch": round(statistics.median(sizes), 1),
            "alone_texts_a_second": round(statistics.median(alone), 1),
            "share_of_alone": round(
                statistics.median(_speed(one) / two for one, two in zip(found[FORMAT], alone, strict=True)), 3
            ),
            "format": FORMAT,
            "batch_ms": times,
            "tokens_a_text": tokens,
            "at_70_percent": calm,
            "p99_over_p50": round(calm["p99_ms"] / calm["p50_ms"], 2),
            "rounds": found,
            "failed": sum(one["failed"] for rounds in found.values() for one in rounds),
            "target": "ratio_median at least 3, share_of_alone at least 0.8, p99_over_p50 below 4",
            **ratios_of(pairs),
        },
    )


def soak() -> None:
    """Ten minutes at 70 percent of the top: requests lost, how long one waits, and what the process holds."""
    _need_wrk()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model, texts = _model(Path(folder)), _texts(Path(folder))
        own, process = stack.enter_context(_server(_fedtune(model, 18435), 18435))
        _ask(own, texts)  # shapes are seen
        top = statistics.median(_speed(_ask(own, texts)) for _ in range(ROUNDS))
        held: list[float] = []
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(_ask, own, texts, rate=0.7 * top, seconds=SOAK)
            while not asked.done():
                time.sleep(LOOK)
                held.append(round(psutil.Process(process).memory_info().rss / 1e6, 1))
        found = asked.result()
        answered = _counted(own)[0]
    write(
        "soak",
        {
            "question": f"{SOAK} s at 70 percent of the top: requests lost, p99 over p50, and megabytes that "
            f"the service's process holds, every {LOOK} s",
            "top_texts_a_second": round(top, 1),
            **found,
            "texts_answered_in_all": answered,
            "p99_over_p50": round(found["p99_ms"] / found["p50_ms"], 2),
            "megabytes": held,
            "target": "failed 0, p99_over_p50 below 4, megabytes flat",
        },
    )


def restarts() -> None:
    """Twenty restarts at 70 percent of the top: answers that were given and did not come back."""
    _need_wrk()
    given, came, seconds = list[int](), list[int](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        model, texts, log = _model(Path(folder)), _texts(Path(folder)), Path(folder) / "log"
        with _server(_fedtune(model, 18436), 18436) as (own, _):
            _ask(own, texts)  # shapes are seen
            top = statistics.median(_speed(_ask(own, texts)) for _ in range(ROUNDS))
        for _ in range(RESTARTS):
            with _server(_fedtune(model, 18436), 18436, log) as (own, process):
                asking = subprocess.Popen(
                    _wrk(own, texts, rate=0.7 * top, seconds=SOAK), stdout=subprocess.PIPE, text=True
                )
                time.sleep(UNTIL)
                told = time.monotonic()
                os.kill(process, signal.SIGTERM)
                psutil.wait_procs([psutil.Process(process)], SOAK)
                seconds.append(round(time.monotonic() - told, 2))
            asking.send_signal(signal.SIGINT)  # it says what it saw
            found = json.loads(asking.communicate()[0].splitlines()[-1])
            came.append(found["requests"] - found["refused"])
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            given.append(sum(line.get("status") == 200 for line in lines))
    write(
        "restarts",
        {
            "question": f"{RESTARTS} times SIGTERM at 70 percent of the top: requests that the service "
            "answered, by its log, and whose answers did not come back",
            "top_texts_a_second": round(top, 1),
            "answered": given,
            "came_back": came,
            "lost": sum(given) - sum(came),
            "seconds_to_stop": seconds,
            "target": "lost 0",
        },
    )


def _need_wrk() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("This benchmark needs wrk: apt-get install wrk")


def _model(folder: Path) -> Path:
    """An exported model: the one in FEDTUNE_BENCH_MODEL, or one that is made here in a hurry."""
    if named := os.environ.get("FEDTUNE_BENCH_MODEL"):
        return Path(named)
    import fedtune
    from fedtune.export.export import export

    run = fedtune.run("adapter=head", "privacy=none", "federation.num_rounds=1", f"output={folder / 'run'}")
    (folder / "few.txt").write_text("what a wonderful film\nnever again\n")
    return export(run.path, folder / "model", ("hf", FORMAT), texts=folder / "few.txt")


def _texts(folder: Path) -> Path:
    """The public test texts of the default data, as JSON strings, one a line."""
    from fedtune.config.loader import load
    from fedtune.data.sources.load import load_corpus

    _, test = load_corpus(load([]).data, 0)
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in test.texts))
    return path


def _fedtune(model: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "fedtune", "serve", str(model), "--format", FORMAT, "--port", str(port)]


@contextmanager
def _server(command: list[str], port: int, log: Path = Path(os.devnull)) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server that runs while this lasts, or until it is told to stop."""
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as lines:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=lines)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/openapi.json").read()
                break
            except OSError:
                time.sleep(0.2)
        if above := _above():
            os.sched_setscheduler(process.pid, os.SCHED_RR, os.sched_param(above))
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(30)


def _above() -> int:
    """Under `chrt -r`: a priority above this process's; else 0.

    There nobody gives way to a thread that wakes, as it is everywhere else. So the threads that answer and
    ask, which seldom have anything to do, get a priority above those that compute.
    """
    return os.sched_getparam(0).sched_priority + 1 if os.sched_getscheduler(0) == os.SCHED_RR else 0


def _ask(
    address: str, texts: Path, *, each: int = 1, rate: float = 0.0, seconds: int = SECONDS
) -> dict[str, Any]:
    """What wrk measured."""
    command = _wrk(address, texts, each=each, rate=rate, seconds=seconds)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"texts_a_request": each, **found}


def _wrk(address: str, texts: Path, *, each: int = 1, rate: float, seconds: int) -> list[str]:
    """The command: for so many seconds, `each` texts a request."""
    before = ["chrt", "-r", str(above)] if (above := _above()) else []
    return [
        *before, "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "30s", "-s", str(_LOAD),
        f"{address}/predict", "--", str(texts), str(each), str(rate), str(CONNECTIONS),
    ]  # fmt: skip


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


def _batch_times(folder: Path, texts: Path) -> tuple[dict[int, float], float]:
    """(milliseconds of a batch by its texts, on one core while the others do the same; tokens of a text)."""
    model, ids = _opened(folder, texts)
    workers = psutil.cpu_count() or 1

    def measure(size: int) -> float:
        batches = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        end, taken = time.perf_counter() + SECONDS / 4, list[float]()
        while time.perf_counter() < end:
            start = time.perf_counter()
            model.logits(batches[len(taken) % len(batches)])
            taken.append(time.perf_counter() - start)
        return 1000 * statistics.mean(taken)

    with ThreadPoolExecutor(workers) as pool:
        found = {size: statistics.mean(pool.map(measure, [size] * workers)) for size in _SIZES}
    return {size: round(ms, 2) for size, ms in found.items()}, round(sum(map(len, ids)) / len(ids), 1)


def _opened(folder: Path, texts: Path) -> tuple[Classifier, list[list[int]]]:
    """(the model with one thread a batch, token ids of the texts)"""
    model = Classifier.open(Bundle.open(folder), FORMAT, threads=1)
    return model, model.encode([json.loads(line) for line in texts.read_text().splitlines()])


def _alone(folder: Path, texts: Path, size: float) -> float:
    """Texts a second that onnxruntime does alone in batches of `size` texts, with all cores."""
    model, ids = _opened(folder, texts)
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
