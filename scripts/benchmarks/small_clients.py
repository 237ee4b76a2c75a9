"""A federation of many small clients, in a process of its own: what the benchmark `clients` times.

python -m scripts.benchmarks.small_clients FOLDER NODES RECORDS ROUNDS [OVERRIDE ...]

Each node has a few made-up texts of five words, which are written into FOLDER if they are not there; the
encoder is a random BERT of one layer and width 384, whose outputs are kept, and the head is trained in five
steps a round. Prints one line of JSON. ROUNDS 0: makes data and cache only (of outputs, and of the calibrated
noise), and FOLDER/features.npz with what the head sees, for other programs.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.federation.resources import RunResources

__all__ = ["OVERRIDES", "STEPS", "main", "make"]

WIDTH, WORDS, TEXT, STEPS = 384, 1000, 5, 5
MOST_KEPT = 10_000  # nodes whose features are written for other programs
OVERRIDES = (
    "data=files", "data.name=made-up", "data.site=site", "data.labels=[negative,positive]",
    "data.max_length=16", "partition=natural", "model.quantization=none", "adapter=head", "device=cpu",
    "privacy.unit=record", "privacy.epsilon=8", "privacy.max_grad_norm=1", "federation.strategy=fedavg",
    "federation.evaluation=none", f"train.local_steps={STEPS}",
    "train.learning_rate=0.2", "train.optimizer=sgd", "train.start=zero", "train.centre=false",
    "train.label_smoothing=0",
)  # fmt: skip


def make(folder: Path, nodes: int, records: int) -> list[str]:
    """Writes model and texts into `folder`, once; returns the settings that name them."""
    named = [
        f"data.path={folder}", f"model.name={folder / 'model'}", f"data.declared_size={nodes * records}",
    ]  # fmt: skip
    if (folder / "train.csv").exists():
        return named
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [f"w{i:03}" for i in range(WORDS)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(7)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=6,
            intermediate_size=WIDTH, max_position_embeddings=32,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "model")
    chance = random.Random(3)
    with (folder / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "site"])
        for node in range(nodes):
            for _ in range(records):
                text = chance.choices(words, k=TEXT)
                label = "positive" if sum(int(word[1:]) for word in text) > 500 * TEXT else "negative"
                rows.writerow([" ".join(text), label, f"site-{node:06}"])
    return named


class _Parts:
    """Seconds that parts of a run take of all, by wrapping what does them: the ledger (books); training, the
    wait for the model not counted; and in that the drawing of secure noise."""

    def __init__(self) -> None:
        from fedtune.privacy.ledger.ledger import PrivacyLedger
        from fedtune.privacy.plan import PrivacyPlan
        from fedtune.training import local

        self.seconds = {"books": 0.0, "training": 0.0, "noise": 0.0}
        self._within: set[str] = set()
        for name in ("reserve_all", "commit_all", "check_run", "rounds", "budget"):
            setattr(PrivacyLedger, name, self._timed("books", getattr(PrivacyLedger, name)))
        for name in ("train_locally", "train_together"):
            setattr(local, name, self._timed("training", getattr(local, name)))
        PrivacyPlan.noise = self._timed("noise", PrivacyPlan.noise)  # type: ignore[method-assign]

    def _timed(self, part: str, work: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            outer, start = part in self._within, time.perf_counter()
            self._within.add(part)
            try:
                return work(*arguments, **options)
            finally:
                if not outer:
                    self._within.remove(part)
                    self.seconds[part] += time.perf_counter() - start

        return timed


class _Watch:
    """An observer that looks at the clock."""

    def __init__(self, parts: _Parts) -> None:
        self._parts, self.rounds, self.marks = parts, list[float](), list[dict[str, float]]()
        self.started = self.busy = 0.0

    def on_start(self, info: Any) -> None:
        self.started, self.busy = time.perf_counter(), time.process_time()
        self.marks.append(dict(self._parts.seconds))

    def on_round(self, summary: Any) -> None:
        self.rounds.append(summary.seconds)
        self.marks.append(dict(self._parts.seconds))

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _keep_features(path: Path, resources: RunResources) -> None:
    """What the head sees of each node's texts, and their labels, node by node."""
    import numpy as np

    from fedtune.models.frozen_outputs import Features

    shards = resources.prepared.shards
    with resources.using_model() as model:
        seen = [
            model.head_inputs(Features.of(model, shard.data, 1024).vectors(np.arange(shard.data.num_records)))
            for shard in shards
        ]
    labels = np.concatenate([shard.data.labels for shard in shards])
    sizes = np.array([shard.data.num_records for shard in shards])
    np.savez(path, x=np.concatenate(seen).astype(np.float32), y=labels, sizes=sizes)


def main(arguments: list[str]) -> None:
    """Makes data, warms the cache, runs the federation and prints what it took."""
    from fedtune.config.loader import load
    from fedtune.engines import run
    from fedtune.federation.resources import run_resources
    from fedtune.privacy.plan import make_plan

    folder, (nodes, records, rounds) = Path(arguments[0]), map(int, arguments[1:4])
    named = [*make(folder, nodes, records), f"federation.num_rounds={max(1, rounds)}"]
    config = load([*OVERRIDES, *named, *arguments[4:]])
    begin, busy = time.perf_counter(), time.process_time()
    resources = run_resources(config)
    resources.warm()
    data = {
        "data_seconds": time.perf_counter() - begin,
        "data_processor_seconds": time.process_time() - busy,
    }
    if not rounds:
        make_plan(
            config, [shard.declared_size for shard in resources.prepared.shards]
        )  # calibrates the noise
        if nodes <= MOST_KEPT:
            _keep_features(folder / "features.npz", resources)
        print("RESULT", json.dumps(data))
        return
    watch, started, busy = _Watch(_Parts()), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as run_folder:
        run(config, Path(run_folder), watch)  # type: ignore[arg-type]
    each = {
        name: [after[name] - before[name] for before, after in itertools.pairwise(watch.marks)]
        for name in watch.marks[0]
    }
    print(
        "RESULT",
        json.dumps(
            {
                **data,
                "start_seconds": watch.started - started,
                "start_processor_seconds": watch.busy - busy,
                "start_books_seconds": watch.marks[0]["books"],
                "round_seconds": watch.rounds,
                **{f"round_{name}_seconds": seconds for name, seconds in each.items()},
                "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        ),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
