#!/usr/bin/env python
r"""How much cheaper can a fine-tuned model be asked, for how much accuracy? The whole chain, in both orders.

    python simulations/cheaper/study.py --run RUN_DIR     of a finished default run, with its seed
    python simulations/cheaper/study.py --run RUN_DIR --only int8,student2
    python simulations/cheaper/study.py --run RUN_DIR --speeds    of all models that there are, in turn
    python simulations/cheaper/study.py --report          table and figure from the records there are

Cells: `fedtune compress` of the run in several ways (fine-tune, then compress), and `small_base`: the base
encoder is distilled first, on the same public texts, and the run then done again on it (compress, then
fine-tune). All are measured on the part of the public test split that no cell learns from. A finished cell is
kept as `records/NAME-seedN.json` (its compression.json) and skipped the next time; of `small_base` also the
base and each round of its run are kept, so that it can be done in parts. Cells are made at different times,
and the machine may be busy in some: so speeds are taken once more of all of them, in one process in turn, by
the processor's seconds of each one's best round, and kept as `records/speeds-seedN.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(HERE.parents[1]))

from fedtune.runs.figures import alike  # noqa: E402
from simulations.cells import known, script  # noqa: E402

CELLS: dict[str, list[str]] = {
    "int8": ["compress=int8", "quantize=[int8,int8-weights,nf4]"],
    "student2": ["compress=student"],
    "pruned": ["compress=pruned"],
    "student3": ["compress=student", "distill.layers=3"],
    "smallest": ["compress=smallest"],
    "sparse": ["compress=sparse", "transfer.epochs=1"],
}
TIMED, TIMES = 60, 5  # texts whose time is taken, and how often
BASE = "small_base"
BASE_LAYERS = 3
SHOWN = {
    "original": "PyTorch",
    "hf": "PyTorch",
    "onnx": "ONNX",
    "onnx-int8": "ONNX, int8",
    "onnx-int8-weights": "ONNX, weights in int8",
    "onnx-nf4": "ONNX, weights in nf4",
}


def run_cell(name: str, run: Path, work: Path, records: Path) -> None:
    """One cell, unless its record is there. Raises FedtuneError."""
    from fedtune.compress.compress import RECORD_NAME, compress
    from fedtune.runs import record

    seed = int(record.read(run)["config"]["seed"])
    path = records / f"{name}-seed{seed}.json"
    print(f"\n{path.stem}", flush=True)
    if path.exists():
        print("  done before", flush=True)
        return
    words = [*CELLS.get(name, CELLS["int8"]), f"seed={seed}"]
    if name == BASE:
        run = _on_small_base(run, work / f"{BASE}-seed{seed}", seed)
    folder = work / path.stem
    if not folder.exists():
        compress(run, words, folder, say=lambda line: print(f"  {line}", flush=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((folder / RECORD_NAME).read_text(encoding="utf-8"), encoding="utf-8")


def _on_small_base(run: Path, work: Path, seed: int) -> Path:
    """The run done again, on a base that was distilled before; its folder."""
    from dataclasses import replace

    from fedtune.compress.compress import compress
    from fedtune.compress.texts import texts_for
    from fedtune.config.convert import from_dict
    from fedtune.config.loader import load
    from fedtune.runs import record
    from fedtune.runs.run import run as federate

    made = record.read(run)
    if not (work / "base").exists():
        work.mkdir(parents=True, exist_ok=True)
        learn = texts_for(made, None, 0.5, seed).learn
        texts = work / "public.txt"
        texts.write_text(
            "\n".join(" ".join(text.split()) for text in learn if isinstance(text, str)) + "\n",
            encoding="utf-8",
        )
        words = [f"distill.layers={BASE_LAYERS}", f"texts={texts}", f"seed={seed}"]
        compress("embedded:minilm", words, work / "base", say=lambda line: print(f"  {line}", flush=True))
    if (work / "run" / "record.json").exists():
        return work / "run"
    if (work / "run" / "checkpoint").exists():
        federate(load([f"resume={work / 'run'}"]))
    else:
        config = from_dict(dict(made["config"]))
        config.model = replace(config.model, name=str(work / "base"))
        config.adapter = replace(config.adapter, layers=None)  # there may be fewer than the run adapted
        config.resume, config.output = None, str(work / "run")
        federate(config)
    return work / "run"


def time_again(run: Path, work: Path, records: Path) -> None:
    """Processor seconds that the run's own model and every model in `work` take for the same texts, with one
    thread, best of the rounds; as records/speeds-seedN.json."""
    import torch

    from fedtune.export.checks import public_test_split
    from fedtune.export.export import processor
    from fedtune.models.standalone import merged
    from fedtune.runs import record
    from fedtune.serving.bundle import Bundle
    from fedtune.serving.classifier import Classifier, torch_forward

    torch.set_num_threads(1)
    made = record.read(run)
    seed, public = int(made["config"]["seed"]), public_test_split(made)
    assert public is not None
    models: dict[str, Classifier] = {}
    for folder in sorted(work.glob(f"*-seed{seed}/export.json")):
        bundle = Bundle.open(folder.parent)
        cell = folder.parent.name.removesuffix(f"-seed{seed}")
        for name in bundle.about["formats"]:
            models[f"{cell}/{name}"] = Classifier.open(bundle, name, threads=1)
    anyone = next(iter(models.values()))
    own = Classifier(anyone.labels, anyone.tokenizer, torch_forward(merged(run / "adapter")), anyone.pad_id)
    models = {"original": own, **models}
    ids = own.encode(public.texts[:: max(1, len(public.texts) // TIMED)][:TIMED])
    best = dict.fromkeys(models, math.inf)
    for _ in range(TIMES):
        for name, model in models.items():
            start = time.process_time()
            model.logits(ids)
            best[name] = min(best[name], time.process_time() - start)
    kept = {"processor": processor(), "texts": len(ids), "rounds": TIMES, "seconds": best}
    path = records / f"speeds-seed{seed}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def rows_of(records: Path) -> list[dict[str, Any]]:
    """What the records say: cell, seed, what was asked, and its figures; speeds and points beside the run's
    own model. What has no speed, as a model between two steps, is left out."""
    kept = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(records.glob("*.json"))
    }
    found = []
    for cell in (*CELLS, BASE):
        for stem, one in kept.items():
            name, _, seed = stem.rpartition("-seed")
            if name != cell or f"speeds-seed{seed}" not in kept or f"int8-seed{seed}" not in kept:
                continue
            seconds = kept[f"speeds-seed{seed}"]["seconds"]
            beside = kept[f"int8-seed{seed}"]["original"]
            parts = {**one["formats"], **({"original": one["original"]} if cell == "int8" else {})}
            for part in sorted(parts, key=list(SHOWN).index):
                own = seconds.get("original" if part == "original" else f"{cell}/{part}")
                if own is None or (cell == "int8" and part == "hf"):
                    continue
                figures = parts[part]
                found.append(
                    {
                        "cell": cell, "seed": int(seed), "part": part, "bytes": figures["bytes"],
                        "ratio": seconds["original"] / own, "accuracy": figures["accuracy"],
                        "points": 100 * (figures["accuracy"] - beside["accuracy"]),
                        "error": _error(cell, figures, beside, one["texts"]["num_measured"]),
                    }
                )  # fmt: skip
    return found


def _error(cell: str, figures: dict[str, Any], beside: dict[str, Any], texts: int) -> float:
    """The standard error of the points, in points.

    A run that was done again is another model: how often it differs from the first on the same text is in no
    record, so its error is that of two accuracies on `texts` texts which have nothing to do with one another,
    and larger than it is.
    """
    if cell != BASE:
        return 100 * float(figures["difference_error"])
    spread = sum(one["accuracy"] * (1 - one["accuracy"]) for one in (figures, beside))
    return 100 * math.sqrt(spread / texts)


def table(records: Path) -> str:
    """The figures as Markdown, a line for each cell and format, over the seeds."""
    rows = rows_of(records)
    lines = [
        "| cell | asked by | size | texts a second | accuracy | points | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, part in dict.fromkeys((row["cell"], row["part"]) for row in rows):
        alike = [row for row in rows if (row["cell"], row["part"]) == (cell, part)]
        mean = {
            name: statistics.fmean(row[name] for row in alike)
            for name in ("bytes", "ratio", "accuracy", "points")
        }
        spread = alike[0]["error"] if len(alike) == 1 else statistics.stdev(row["points"] for row in alike)
        lines.append(
            f"| {cell} | {SHOWN[part]} | {mean['bytes'] / 1e6:.1f} MB | {mean['ratio']:.2f}x | "
            f"{mean['accuracy']:.1%} | {mean['points']:+.1f} ± {spread:.1f} | {len(alike)} |"
        )
    return "\n".join(lines)


@alike()
def draw(records: Path, path: Path) -> None:
    """Accuracy against cost: points lost beside the run's model, over what a text costs beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = rows_of(records)
    markers = {"original": "o", "hf": "o", "onnx": "s", "onnx-int8": "D"}
    for color, cell in enumerate(dict.fromkeys(row["cell"] for row in rows)):
        parts = [row["part"] for row in rows if row["cell"] == cell]
        for part, marker in markers.items():
            alike = [row for row in rows if row["cell"] == cell and row["part"] == part]
            if not alike:
                continue
            x = 1 / statistics.fmean(row["ratio"] for row in alike)
            y = statistics.fmean(row["points"] for row in alike)
            axes.plot(x, y, marker, color=f"C{color}", ms=7)
            if part == "onnx-int8" or (part == "onnx" and "int8" not in "".join(parts)):
                axes.annotate(
                    cell, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9, color=f"C{color}"
                )
    axes.axhline(0, color="#999999", lw=0.8)
    axes.axhline(-2, color="#999999", lw=0.8, ls=":")
    axes.set_xscale("log")
    ticks = [1, 0.5, 0.25, 0.15, 0.1]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(
        xlabel="what a text costs to ask, beside the run's model in PyTorch", ylabel="points of accuracy"
    )
    axes.set_title("Circles: PyTorch; squares: ONNX; diamonds: int8", loc="left", fontsize=10)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of a finished run with a public test split")
    parser.add_argument("--only", default=",".join([*CELLS, BASE]), metavar="NAME,NAME", help="cells")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="where the records are kept")
    parser.add_argument("--work", type=Path, default=Path("outputs") / "cheaper", help="the models")
    parser.add_argument("--speeds", action="store_true", help="take the speeds of all models in --work again")
    parser.add_argument("--report", action="store_true", help="run nothing; make table and figure")
    options = parser.parse_args(arguments)
    if not options.report:
        if options.run is None:
            parser.error("name a finished run: --run RUN_DIR")
        if options.speeds:
            time_again(options.run, options.work, options.records)
        else:
            for name in known(options.only, [*CELLS, BASE]):
                run_cell(name, options.run, options.work, options.records)
    if options.records == HERE / "records":
        draw(options.records, HERE / "figure.png")
    print(f"\n{table(options.records)}")
    return 0


if __name__ == "__main__":
    script(main)
