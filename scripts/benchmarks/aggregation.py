"""What secure aggregation and its noise cost, beside the training step that they protect."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from fedtune.federation.secagg.protocol import MaskedSum, Masker, Session
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from fedtune.privacy.mechanisms.noise import Entropy
from scripts.benchmarks.common import CLIP, NOISE_MULTIPLIER, in_turn, plan_for, pooled, write

NODES, SIZE, DROPOUTS = 10, 75_000, 1  # 300 KB in float32
RATE = 0.05


def _weight(value: Any) -> int:
    """Bytes of what a message carries, without its framing."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_weight(part) for pair in value.items() for part in pair)
    if isinstance(value, bytes | str):
        return len(value)
    return sum(_weight(part) for part in (vars(value).values() if hasattr(value, "__dict__") else value))


def one_round(session: Session, mechanism: DiscreteMechanism) -> tuple[dict[str, float], int]:
    """All that ten nodes and a server do in a round, but for the gradients; seconds of each part on one
    core, and the bytes that one node sends.

    One node drops out after it has shared, so that its masks are recovered.
    """
    clock, seconds = time.process_time, {}
    gradients = np.linspace(-CLIP, CLIP, session.size)

    start = clock()
    shares = {name: mechanism.share(gradients, Entropy.system()) for name in session.nodes}
    seconds["discrete noise"] = clock() - start

    start = clock()
    maskers, server = {name: Masker(session, name) for name in session.nodes}, MaskedSum(session)
    advertised = {name: masker.advertise() for name, masker in maskers.items()}
    roster = server.advertised(advertised)
    shared = {name: masker.share(roster) for name, masker in maskers.items()}
    received = server.shared(shared)
    for name in session.nodes[DROPOUTS:]:
        masked = maskers[name].mask(shares[name], received[name])
        server.masked(name, masked)
    alive = server.survivors()
    answers = {name: maskers[name].unmask(alive) for name in alive}
    total = server.unmask(answers)
    seconds["secure aggregation"] = clock() - start

    expected = np.sum([shares[name] for name in alive], axis=0, dtype=np.uint32)
    if not np.array_equal(total, expected):
        raise SystemExit("the secure sum is not the sum")
    last = session.nodes[-1]
    sent = sum(_weight(part) for part in (advertised[last], shared[last], masked, answers[last]))
    return seconds, sent


def aggregation(repeats: int = 5) -> None:
    """Secure aggregation of a 300 KB adapter among 10 nodes, over the step of the union that it protects."""
    from fedtune.training.dp_step import clipped_sum
    from fedtune.training.example_gradients import hooks_for
    from fedtune.training.local import ShardView

    _, model, shard, config = pooled("int8")
    session = Session("bench", 1, 1, tuple(f"node-{i}" for i in range(NODES)), SIZE, DROPOUTS, 0)
    plan = plan_for(shard.declared_size, RATE, 1)
    mechanism = DiscreteMechanism.design(
        dimension=SIZE, nodes=NODES, shares=NODES - DROPOUTS, noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP, sample_rate=RATE, expected_batch_size=plan.expected_batch_size(),
    )  # fmt: skip
    view = ShardView(model, shard, "record", config.train)
    rounds: list[tuple[dict[str, float], int]] = []

    def protect() -> None:
        rounds.append(one_round(session, mechanism))

    def train() -> Any:
        records = plan.sample(view.num_units, plan.entropy("bench", 1, 0))
        with hooks_for(model, view.features):
            return clipped_sum(
                model, view.features, records, None, plan, micro_batch_tokens=config.train.micro_batch_tokens
            )

    result = in_turn(protect, train, repeats)
    parts, sent = [seconds for seconds, _ in rounds], rounds[-1][1]
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
            "bytes_a_node_sends": sent,
            "bytes_over_float32": round(sent / (4 * SIZE), 4),
            **result,
            "target": "ratio_median below 1, bytes_over_float32 at most 2",
        },
    )
