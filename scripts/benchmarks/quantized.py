"""What weights in integers cost in time, and what they save in memory.

`quantized`: seconds of a private step of LoRA on all layers with int8 and nf4 weights over float32 ones, in
turn. `base_memory`: peak memory of one node's process on an encoder of BERT-base's size (random weights) in
nf4, beside the stock program on the same encoder and texts; each is a process of its own:

    python -m scripts.benchmarks.quantized (ours|stock) MODEL_FOLDER
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from fedtune.config.schema import TrainConfig
from fedtune.deploy.memory import WORKER_BLOCK, give_memory_back
from fedtune.training.dp_step import clipped_sum
from fedtune.training.example_gradients import hooks_for
from fedtune.training.local import ShardView, train_locally
from scripts.benchmarks.common import plan_for, pooled, ratios_of, seconds, take, write
from scripts.benchmarks.peers import opacus_program

__all__ = ["base_memory", "quantized"]

_TOKENS = TrainConfig().micro_batch_tokens
_EXAMPLES, _BASE_EXAMPLES, _PHYSICAL = 256, 128, 32


def quantized(repeats: int = 7) -> None:
    """A private step on each storage of the weights, in turn; what is made once a step is part of it."""
    programs = {}
    for name in ("none", "int8", "nf4"):
        _, model, shard, config = pooled(name)
        view = ShardView(model, take(shard, _EXAMPLES), "record", config.train)

        def step(model=model, view=view) -> None:  # type: ignore[no-untyped-def]
            with hooks_for(model, view.features):
                clipped_sum(
                    model, view.features, np.arange(_EXAMPLES), None, plan_for(_EXAMPLES, 1.0, 1),
                    micro_batch_tokens=_TOKENS,
                )  # fmt: skip

        programs[name] = step
        step()
    measured: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            measured[name].append(seconds(program))
    write(
        "quantized",
        {
            "question": f"seconds of a private step ({_EXAMPLES} texts, LoRA on all layers) on quantized "
            "weights over the same step on float32 ones",
            "seconds": {name: [round(one, 4) for one in taken] for name, taken in measured.items()},
            "adapters": {
                name: ratios_of(zip(measured[name], measured["none"], strict=True))
                for name in ("int8", "nf4")
            },
            "target": "ratio_median at most 1.1",
        },
    )


def _base(folder: Path) -> None:
    """Writes an encoder of BERT-base's size with random weights, and MiniLM's tokenizer, which is BERT's."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from fedtune.models.encoder import model_location

    torch.manual_seed(7)
    BertModel(BertConfig()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_location("embedded:minilm")).save_pretrained(folder)


def _main(which: str, folder: str) -> None:
    """One epoch of two private steps; prints this process' peak memory."""
    warnings.simplefilter("ignore")
    if which == "ours":
        give_memory_back(WORKER_BLOCK)  # as a node's worker does
        _, model, shard, config = pooled("nf4", name=folder)
        small = take(shard, _BASE_EXAMPLES)
        config.train.local_steps, config.train.sample_rate, config.train.optimizer = 2, 0.5, "adam"
        config.train.learning_rate = 1e-3
        train_locally(model, small, plan_for(_BASE_EXAMPLES, 0.5, 2), model.initial, config.train, round=1)
    else:
        from fedtune.config.schema import Config
        from fedtune.data.sources.load import load_corpus

        config = Config()
        corpus, _ = load_corpus(config.data, config.seed)
        texts, labels = list(corpus.texts[:_BASE_EXAMPLES]), corpus.labels[:_BASE_EXAMPLES]
        opacus_program(texts, labels, _PHYSICAL, name=folder)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT", json.dumps(peak))


def base_memory(repeats: int = 3) -> None:
    """Peak memory of both programs, in turn."""
    peaks: dict[str, list[float]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        _base(Path(folder))
        for _ in range(repeats):
            for which, found in peaks.items():
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "scripts.benchmarks.quantized",
                    which,
                    folder,
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines:
                    raise SystemExit(f"{which} failed:\n{done.stderr[-2000:]}")
                found.append(float(json.loads(lines[-1][7:])))
    write(
        "base_memory",
        {
            "question": "peak memory of a node's process with an encoder of BERT-base's size in nf4, over "
            "that of the "
            f"stock program (float32, PEFT, Opacus' hooks, padded to 64, physical batches of {_PHYSICAL})",
            "megabytes": {name: [round(one) for one in found] for name, found in peaks.items()},
            "ratio_peak": round(statistics.median(peaks["ours"]) / statistics.median(peaks["stock"]), 3),
            "target": "at most 0.35",
        },
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
