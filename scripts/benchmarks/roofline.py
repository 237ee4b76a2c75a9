"""How near the encoder comes to what this processor can do: product rates, bandwidth, and who reaches what.

`roofline` measures in turn, in one process: products of matrices of the encoder's own shapes in float32,
bfloat16 and int8 (`torch._int_mm`), a copy of memory, every operation of one layer by itself, the frozen pass
as it fills the cache, and a private step of LoRA on all layers. What limits an operation is the lower of two
lines: the product rate, and bandwidth times its operations a byte (Williams et al. 2009).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedtune.config.schema import TrainConfig
from fedtune.data.corpus import TokenizedCorpus
from fedtune.models.classifier import AdaptedModel
from fedtune.models.encoder import computes_in
from fedtune.models.frozen_outputs import FeatureStore, _compute, _digests
from fedtune.training.dp_step import clipped_sum
from fedtune.training.example_gradients import hooks_for
from fedtune.training.local import ShardView
from scripts.benchmarks.common import (
    OUTPUT,
    RECORDS,
    folder_of_records,
    plan_for,
    pooled,
    seconds,
    take,
    write,
)

__all__ = ["draw", "roofline"]

_TOKENS = TrainConfig().micro_batch_tokens
_LENGTH, _WIDTH, _INNER, _HEADS = (
    32,
    384,
    1536,
    12,
)  # of MiniLM; texts of 27 tokens are cut into batches of 32
_SHAPES = {
    "qkv": (_WIDTH, 3 * _WIDTH),
    "out": (_WIDTH, _WIDTH),
    "up": (_WIDTH, _INNER),
    "down": (_INNER, _WIDTH),
}
_COPY = 1 << 26  # bytes, far beyond the caches
_EXAMPLES = 512


def _times(programs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, after one call of each that does not count."""
    for program in programs.values():
        program()
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            found[name].append(seconds(program))
    return found


def _many(work: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            work()

    return repeated


def _product(kind: str, inner: int, outer: int) -> Callable[[], Tensor]:
    """A product of one micro-batch's tokens, [t, inner] by [outer, inner]."""
    if kind == "int8":
        left = torch.randint(-127, 127, (_TOKENS, inner), dtype=torch.int8)
        right = torch.randint(-127, 127, (outer, inner), dtype=torch.int8).t()
        return lambda: torch._int_mm(left, right)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((_TOKENS, inner), (outer, inner), (outer,)))
    return lambda: functional.linear(x, weight, bias)


def _operations(dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], float, float]]:
    """What one layer does to a micro-batch of `_TOKENS` tokens: work, floating point operations, and the
    bytes that must at least be read and written."""
    size = torch.finfo(dtype).bits // 8
    rows, head = _TOKENS // _LENGTH, _WIDTH // _HEADS
    hidden, inner = torch.randn(_TOKENS, _WIDTH).to(dtype), torch.randn(_TOKENS, _INNER).to(dtype)
    gain = torch.ones(_WIDTH, dtype=dtype)
    q, k, v = (torch.randn(rows, _HEADS, _LENGTH, head).to(dtype) for _ in range(3))
    found: dict[str, tuple[Callable[[], object], float, float]] = {}
    for name, (narrow, wide) in _SHAPES.items():
        work = _product("bf16" if dtype == torch.bfloat16 else "fp32", narrow, wide)
        found[name] = work, 2.0 * _TOKENS * narrow * wide, size * (_TOKENS * (narrow + wide) + narrow * wide)
    pairs = rows * _HEADS * _LENGTH * _LENGTH
    attention = lambda: torch.softmax(q @ k.transpose(-1, -2), -1) @ v  # noqa: E731
    found["attention"] = attention, 4.0 * pairs * head, size * 4 * _TOKENS * _WIDTH
    norm = lambda: functional.layer_norm(hidden + hidden, (_WIDTH,), gain, gain)  # noqa: E731
    found["norm"] = norm, 8.0 * hidden.numel(), size * 3 * hidden.numel()
    found["gelu"] = lambda: functional.gelu(inner), 8.0 * inner.numel(), size * 2 * inner.numel()
    return found


def _frozen(model: AdaptedModel, corpus: TokenizedCorpus, precision: str) -> Callable[[], None]:
    """The pass that fills the cache, into a store that is empty each time."""
    digests, missing = _digests(corpus), np.arange(corpus.num_records)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(Path(folder), model.base.encoder.width)
            _compute(store, model, corpus, missing, digests, True, _TOKENS, None, precision)

    return run


def _flops(model: AdaptedModel, work: Callable[[], object]) -> int:
    """Floating point operations of the second call: torch's own count of what was run."""
    work()
    before = model.flops.total
    work()
    return model.flops.total - before


def roofline(repeats: int = 7) -> None:
    """Rates, parts, frozen pass and private step in turn; and the figure."""
    precision = computes_in(torch.device("cpu"), "auto")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    programs: dict[str, Callable[[], object]] = {}
    for kind in ("fp32", "bf16", "int8"):
        for name, (narrow, wide) in _SHAPES.items():
            programs[f"{kind} {name}"] = _many(_product(kind, narrow, wide), 20)
    source = torch.zeros(_COPY, dtype=torch.uint8)
    target = torch.empty_like(source)
    programs["copy"] = _many(lambda: target.copy_(source), 5)
    parts = _operations(dtype)
    for name, (work, _, _) in parts.items():
        programs[f"part {name}"] = _many(work, 20)

    _, head, shard, _ = pooled(adapter="head")
    _, lora, whole, config = pooled()
    data = take(shard, _EXAMPLES).data
    view = ShardView(lora, take(whole, _EXAMPLES), "record", config.train)
    plan, records = plan_for(_EXAMPLES, 1.0, 1), np.arange(_EXAMPLES)

    def step() -> None:
        with hooks_for(lora, view.features):
            clipped_sum(lora, view.features, records, None, plan, micro_batch_tokens=_TOKENS)

    programs["frozen pass"], programs["private step"] = _frozen(head, data, precision), step
    done = {"frozen pass": _flops(head, programs["frozen pass"]), "private step": _flops(lora, step)}
    took = {name: statistics.median(times) for name, times in _times(programs, repeats).items()}

    products = {
        kind: max(2e-9 * 20 * _TOKENS * a * b / took[f"{kind} {name}"] for name, (a, b) in _SHAPES.items())
        for kind in ("fp32", "bf16", "int8")
    }
    bandwidth = 2e-9 * 5 * _COPY / took["copy"]  # what is read and what is written
    rate = products[precision]
    achieved = {name: 1e-9 * flops / took[name] for name, flops in done.items()}
    layers = len(list(head.base.encoder.layer))
    whole_layer = sum(took[f"part {name}"] / 20 for name in parts)
    tokens = float(data.lengths.sum())
    record: dict[str, Any] = {
        "question": "GFLOP/s of the frozen pass and of a private step of LoRA on all layers, over the "
        "fastest product",
        "precision": precision,
        "tokens_of_a_micro_batch": _TOKENS,
        "products_gflops": {kind: round(value, 1) for kind, value in products.items()},
        "bandwidth_gigabytes": round(bandwidth, 2),
        "parts": {
            name: {
                "microseconds": round(1e6 * took[f"part {name}"] / 20, 1),
                "share_of_a_layer": round(took[f"part {name}"] / 20 / whole_layer, 3),
                "gflops": round(1e-9 * flops * 20 / took[f"part {name}"], 1),
                "operations_a_byte": round(flops / moved, 2),
                "of_its_bound": round(
                    1e-9 * flops * 20 / took[f"part {name}"] / min(rate, bandwidth * flops / moved), 3
                ),
            }
            for name, (_, flops, moved) in parts.items()
        },
        "achieved_gflops": {name: round(value, 1) for name, value in achieved.items()},
        "texts_a_second": {name: round(_EXAMPLES / took[name], 1) for name in achieved},
        "of_the_product_rate": {name: round(value / rate, 3) for name, value in achieved.items()},
        # All operations of all layers one after another, for as many tokens: what the frozen pass could take.
        "frozen_over_its_parts": round(took["frozen pass"] / (layers * whole_layer * tokens / _TOKENS), 3),
        "target": "frozen pass at least 0.6 of the product rate",
    }
    write("roofline", record)
    if folder_of_records() == RECORDS:
        draw(record, OUTPUT / "roofline.png")


def draw(record: dict[str, Any], path: Path) -> None:
    """The roofline: operations a byte against GFLOP/s, both on a logarithmic scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bandwidth, reach = record["bandwidth_gigabytes"], np.geomspace(0.5, 400, 100)
    styles = {"int8": ":", "bf16": "-", "fp32": "--"}
    for kind, style in styles.items():
        top = record["products_gflops"][kind]
        axes.plot(reach, np.minimum(top, bandwidth * reach), style, color="#555555", lw=1.2)
        axes.annotate(
            f"{kind} products, {top:.0f}", (400, top), xytext=(0, 4), textcoords="offset points",
            ha="right", fontsize=9, color="#555555",
        )  # fmt: skip
    axes.annotate(
        f"memory, {bandwidth:.1f} GB/s", (2.4, 2.4 * bandwidth), xytext=(-6, 6), textcoords="offset points",
        ha="right", fontsize=9, color="#555555",
    )  # fmt: skip
    for index, (name, part) in enumerate(record["parts"].items()):
        x, y = part["operations_a_byte"], part["gflops"]
        axes.plot(x, y, "o", color=f"C{index}", ms=4 + 26 * part["share_of_a_layer"], label=name)
    for name, style, above in (("frozen pass", "-.", 3), ("private step", (0, (1, 1)), -11)):
        y = record["achieved_gflops"][name]
        axes.axhline(y, color="#b03030", lw=1, ls=style)
        axes.annotate(
            f"{name}, {y:.0f}",
            (0.55, y),
            xytext=(0, above),
            textcoords="offset points",
            fontsize=9,
            color="#b03030",
        )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", xlim=(0.5, 420))
    axes.set_title(
        f"One layer in {record['precision']}: each operation by itself; the larger, the more time",
        loc="left", fontsize=10,
    )  # fmt: skip
    axes.legend(loc="lower right", fontsize=9, frameon=False, ncols=2, markerscale=0.6)
    figure.savefig(path)
