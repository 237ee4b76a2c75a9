"""What a model costs to ask: bytes, texts a second beside the original, milliseconds of one text, memory.

Speeds are taken in turn, within one process, of all models after each other, several times over, and are
given as ratios: what else the machine does then meets all of them alike. Milliseconds are of one text at a
time. Memory is the largest that a process of its own has held, which asked the model about the same texts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.errors import ResourceError
from fedtune.serving.classifier import Classifier, Forward, onnx_forward, torch_forward

if TYPE_CHECKING:
    from fedtune.compress.transfer import Inputs  # needs torch, which must not count where it is not asked

__all__ = ["memory_of", "speeds"]

_TEXTS = 400  # that a speed is measured with
_ALONE = 100  # of them one at a time
_ROUNDS = 3


def speeds(
    models: Mapping[str, Classifier], ids: Sequence[Sequence[int]], threads: int
) -> dict[str, dict[str, float]]:
    """By model: `ratio` (texts a second over those of the first model, the median of the rounds), `low` and
    `high` (the smallest and the largest), `texts_per_second`, and `p50_ms` and `p99_ms` of one text at a
    time.

    Args:
        models: the first is what the others are compared with.
        threads: of torch; those of onnxruntime are set where a model is opened.
    """
    import torch

    some = list(ids[:: max(1, len(ids) // _TEXTS)][:_TEXTS])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for model in models.values():  # kernels for these shapes are made
            model.logits(some)
        rounds: list[dict[str, float]] = []
        for _ in range(_ROUNDS):
            rounds.append({})
            for name, model in models.items():
                start = time.perf_counter()
                model.logits(some)
                rounds[-1][name] = time.perf_counter() - start
        alone: dict[str, list[float]] = {name: [] for name in models}
        for one in some[:_ALONE]:
            for name, model in models.items():
                start = time.perf_counter()
                model.logits([one])
                alone[name].append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    first = next(iter(models))
    found = {}
    for name in models:
        ratios = sorted(one[first] / one[name] for one in rounds)
        found[name] = {
            "ratio": statistics.median(ratios),
            "low": ratios[0],
            "high": ratios[-1],
            "texts_per_second": len(some) / statistics.median(one[name] for one in rounds),
            "p50_ms": float(np.percentile(alone[name], 50)),
            "p99_ms": float(np.percentile(alone[name], 99)),
        }
    return found


def memory_of(
    path: Path, ids: Sequence[Sequence[int]], inputs: Inputs, classes: int, threads: int
) -> int | None:
    """Bytes that a process held at most which opened the model `path` and asked it about `ids`; None where
    the system does not tell.

    Args:
        path: an ONNX file, or the folder of a model in transformers' form.

    Raises:
        ResourceError: the process failed.
    """
    asked = {
        "ids": [list(one) for one in ids[:_ALONE]], "classes": classes, "threads": threads, **asdict(inputs),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "fedtune.compress.measure", str(path)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ResourceError(
            f"The process that measures the memory of {path.name} failed: {done.stderr.strip()[-300:]}. Give "
            "the machine more memory."
        )
    told: int | None = json.loads(done.stdout)
    return told


def _largest() -> int | None:
    """What this process held at most; not of getrusage, which counts what its parent held when it began."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return next(
        (1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), None
    )


def main(path: Path, asked: Mapping[str, Any]) -> None:
    """Asks the model `path` as `memory_of` says, and prints what this process held at most."""
    forward: Forward
    if path.is_dir():
        import torch

        from fedtune.models.standalone import load_merged

        torch.set_num_threads(asked["threads"])
        forward = torch_forward(load_merged(path), asked["separator"])
    else:
        forward = onnx_forward(path, asked["threads"], asked["separator"])
    labels = tuple(map(str, range(asked["classes"])))
    Classifier(labels, None, forward, asked["pad"]).logits(asked["ids"])
    print(json.dumps(_largest()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.load(sys.stdin))
