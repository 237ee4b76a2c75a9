"""What secure aggregation and its noise cost, beside the training step that they protect."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from fedtune.federation.secure_aggregation import MaskedSum, Masker, Session
from fedtune.privacy.discrete import DiscreteMechanism
from fedtune.privacy.noise import Entropy
from scripts.benchmarks.common import CLIP, NOISE_MULTIPLIER, in_turn, plan_for, pooled, write

NODES, SIZE, DROPOUTS = 10, 75_000, 1  # 300 KB in float32
RATE = 0.05


def one_round(session: Session, mechanism: DiscreteMechanism) -> dict[str, float]:
    """All that ten nodes and a server do in a round, but for the gradients; seconds of each part, one core.

    One node drops out after it has shared, so that its masks are recovered.
    """
    clock, seconds = time.process_time, {}
    gradients = np.linspace(-CLIP, CLIP, session.size)

    start = clock()
    shares = {name: mechanism.share(gradients, Entropy.system()) for name in session.nodes}
    seconds["discrete noise"] = clock() - start

    start = clock()
    maskers, server = {name: Masker(session, name) for name in session.nodes}, MaskedSum(session)
    roster = server.advertised({name: masker.advertise() for name, masker in maskers.items()})
    received = server.shared({name: masker.share(roster) for name, masker in maskers.items()})
    for name in session.nodes[DROPOUTS:]:
        server.masked(name, maskers[name].mask(shares[name], received[name]))
    alive = server.survivors()
    total = server.unmask({name: maskers[name].unmask(alive) for name in alive})
    seconds["secure aggregation"] = clock() - start

    expected = np.sum([shares[name] for name in alive], axis=0, dtype=np.uint32)
    if not np.array_equal(total, expected):
        raise SystemExit("the secure sum is not the sum")
    return seconds


def aggregation(repeats: int = 5) -> None:
    """Secure aggregation of a 300 KB adapter among 10 nodes, over the step of the union that it protects."""
    from fedtune.training.dp_step import clipped_sum, per_example_gradients
    from fedtune.training.local import ShardView

    _, model, shard, config = pooled("int8")
    session = Session("bench", 1, 1, tuple(f"node-{i}" for i in range(NODES)), SIZE, DROPOUTS, 0)
    plan = plan_for(shard.declared_size, RATE, 1)
    mechanism = DiscreteMechanism.design(
        dimension=SIZE, nodes=NODES, shares=NODES - DROPOUTS, noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP, sample_rate=RATE, expected_batch_size=plan.expected_batch_size(),
    )  # fmt: skip
    view = ShardView(model, shard, "record", config.train)
    parts: list[dict[str, float]] = []

    def protect() -> None:
        parts.append(one_round(session, mechanism))

    def train() -> Any:
        records = plan.sample(view.num_units, plan.entropy("bench", 1, 0))
        with per_example_gradients(model):
            return clipped_sum(
                model, view.features, records, None, plan, micro_batch_tokens=config.train.micro_batch_tokens
            )

    result = in_turn(protect, train, repeats)
    write(
        "aggregation",
        {
            "question": "seconds of noise and secure aggregation, 10 nodes and the server together, over "
            "those of the step over the union (opinions, int8, LoRA r=8 on all layers, expected batch "
            f"{plan.expected_batch_size():.0f})",
            "nodes": NODES,
            "numbers": SIZE,
            "parts_seconds": {name: round(min(p[name] for p in parts), 4) for name in parts[0]},
            "noise_inflation": round(mechanism.inflation, 6),
            **result,
            "target": "ratio_median below 1",
        },
    )
