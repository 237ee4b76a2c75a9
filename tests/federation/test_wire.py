"""Watches the wire: every key and value that leaves a node is on a list, and the list holds no secret.

The messages are looked at as bytes between node and server (`LocalGrid` serializes them), not where they
are made, so whatever a node sends by whatever way is seen.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

import fedtune
from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from fedtune.engines.local import LocalGrid
from fedtune.errors import FederationError
from fedtune.federation import flower as _flower
from fedtune.federation.client.app import app
from fedtune.federation.resources import run_resources
from fedtune.federation.server.loop import run_rounds
from fedtune.privacy.plan import make_plan
from tests.support.tiny_federation import BAD, GOOD, OTHER, private

# Spelt out again here on purpose: a key that someone adds to the code must be argued for in this file too.
ALLOWED = {
    # `delta`: of the owner's budget, chosen beforehand by the owner; 0 where there is none.
    "hello": {"version", "node", "declared_size", "shards", "software", "idle", "delta"},
    # Yes or no to the whole run, in words that say nothing of the data; which round the server asked last.
    "consent": {"version", "node", "run", "attempt", "refused", "refusal", "last_round"},
    "reply": {
        "version", "node", "run", "round", "attempt", "releases", "steps", "seconds", "refused", "refusal",
        "error",
    },
    "evaluation": {
        "version", "node", "run", "round", "attempt", "answers", "right", "wrong", "refused", "refusal",
        "error",
    },
}  # fmt: skip


class Tap(LocalGrid):
    """Keeps every message that goes up, as its bytes say it."""

    sent: list[Message]

    def _deliver(self, message: Message) -> Message:
        answer = super()._deliver(message)
        if not hasattr(self, "sent"):
            self.sent = []
        self.sent.append(_flower.deserialize(_flower.serialize(answer)))
        return answer


def watch(config: Config, run_dir: Path, *, fails: bool = False) -> list[Message]:
    grid = Tap(app, 4, {"fedtune": to_json(config)}, timeout=60.0)
    try:
        ends = pytest.raises(FederationError) if fails else nullcontext()
        with _flower.task_identity(grid.run_id), ends:
            run_rounds(grid, config, run_dir, expected_nodes=4)
    finally:
        grid.close()
    return grid.sent


@pytest.mark.parametrize("privately", [True, False])
def test_every_key_that_leaves_a_node_is_on_the_list(
    tiny: Callable[..., Config], tmp_path: Path, privately: bool
) -> None:
    config = tiny(federation__num_rounds=2)
    config = private(config) if privately else config
    sent = watch(config, tmp_path / "run")
    assert len(sent) == 4 + 4 + 2 * 4  # hellos, consents, two rounds
    prepared = run_resources(config).prepared
    size = run_resources(config).initial().size
    for message in sent:
        assert not message.has_error()
        for name, record in message.content.items():
            if isinstance(record, ArrayRecord):
                assert name == "update"
                assert list(record) == ["update"]
                assert record["update"].shape == (size,)
                assert record["update"].dtype == "float32"
                assert len(record["update"].data) <= 4 * size + 128  # numpy's header, and nothing behind it
            else:
                assert isinstance(record, ConfigRecord)
                assert set(record) == ALLOWED[name]
    # And the values: nothing that was counted from a shard is among them.
    declared = {shard.declared_size for shard in prepared.shards}
    for message in sent:
        for name, record in message.content.items():
            if not isinstance(record, ConfigRecord):
                continue
            public = {config.federation.num_rounds, config.train.local_steps, len(prepared.shards), *range(4)}
            for key, value in record.items():
                if isinstance(value, int) and not isinstance(value, bool):
                    assert value in public | declared, (name, key, value)
                if isinstance(value, float):
                    assert key == "seconds" or (key == "delta" and value == 0.0)
                if isinstance(value, str):
                    known = {shard.node for shard in prepared.shards} | {"", f"fedtune {fedtune.__version__}"}
                    assert value in known or key in ("run", "software")


def test_the_list_in_the_code_is_the_list_here() -> None:
    from fedtune.federation.messages import CONSENT_KEYS, EVALUATION_KEYS, HELLO_KEYS, REPLY_KEYS

    assert set(CONSENT_KEYS) == ALLOWED["consent"]
    assert set(EVALUATION_KEYS) == ALLOWED["evaluation"]
    assert set(HELLO_KEYS) == ALLOWED["hello"]
    assert set(REPLY_KEYS) == ALLOWED["reply"]


def test_a_failure_does_not_carry_text_of_the_data(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = run_resources(tiny()).prepared.train

    def quotes(*args: object, **options: object) -> None:
        raise ValueError(
            f"cannot tokenize record 17: 'the film was awful', label 0 of {texts.labels.tolist()}"
        )

    monkeypatch.setattr("fedtune.training.local.train_locally", quotes)
    config = tiny(federation__num_rounds=1)
    sent = watch(config, tmp_path / "run", fails=True)
    assert len(sent) == 4 + 4 + 4
    for message in sent:
        data = _flower.serialize(message)
        assert b"awful" not in data
        assert b"record 17" not in data


# --- private evaluation: two shards of other sizes and labels, and what differs on the wire ----------


def other_data(folder: Path, records: int, right: int) -> Path:
    """As the tiny federation's data, but so many records a site, of which the first `right` are positive."""
    folder.mkdir(parents=True)
    with (folder / "train.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label", "site"])
        for i in range(4 * records):
            label = "positive" if i // 4 < right else "negative"
            words = (
                f"{OTHER[i % 10]} {OTHER[i // 10 % 10]} {OTHER[i // 100 % 10]} {(GOOD + BAD)[i // 7 % 10]}"
            )
            writer.writerow([words, label, f"site-{i % 4}"])
    return folder


def said(config: Config, run_dir: Path) -> list[dict[str, object]]:
    """What leaves the nodes but for arrays: kind and values of each record; no times, no run's id."""
    found: list[dict[str, object]] = []
    for message in watch(config, run_dir):
        assert not message.has_error()
        for name, record in message.content.items():
            if isinstance(record, ConfigRecord):
                assert set(record) == ALLOWED[name]
                public = {key: value for key, value in record.items() if key not in ("run", "seconds")}
                found.append({"record": name, **public})
            else:
                assert name == "update"
    return sorted(found, key=lambda one: (str(one["record"]), str(one["node"]), str(one.get("round"))))


@pytest.mark.slow
def test_of_other_data_only_the_noised_counts_differ(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes 1 to 3, other labels, the same noise: whatever differs beside the two counts is a leak.

    The noise is fixed, so that the counts show that they are noised: taking it off gives the votes of
    what is held out, which are nowhere else.
    """
    # The owner declares the same size of both, as it may: a simulation would count and round.
    monkeypatch.setattr("fedtune.data.partition.round_size", lambda count: 60)
    answers: list[list[dict[str, object]]] = []
    for name, records, right in (("few", 30, 28), ("many", 90, 2)):
        config = private(tiny(federation__num_rounds=1))
        config.privacy.reproducible_noise = True
        config.data.path = str(other_data(tmp_path / name, records, right))
        config.federation.evaluation, config.federation.evaluation_share = "private", 0.4
        resources = run_resources(config)
        answers.append(said(config, tmp_path / f"run-{name}"))
        plan = make_plan(config, [shard.declared_size for shard in resources.prepared.shards]).evaluation()
        assert plan is not None
        (mine,) = [one for one in answers[-1] if one["record"] == "evaluation" and one["node"] == "site-1"]
        nobody = np.zeros(0, dtype=np.bool_)
        noise = plan.answer(nobody, None, plan.entropy("site-1", 1, int(str(mine["attempt"]))))
        votes = [int(str(mine[cell])) - drawn for cell, drawn in zip(("right", "wrong"), noise, strict=True)]
        held = resources.prepared.held_out[1].data.num_records
        assert sum(votes) == held * plan.scale  # the counts are those of the held-out part ...
        assert abs(noise[0]) > 0.01 * plan.scale  # ... under noise of the size of a unit
        assert all(int(str(mine[cell])) % plan.scale for cell in ("right", "wrong"))
    few, many = answers
    assert len(few) == len(many) == 4 + 4 + 4 + 4
    for one, other in zip(few, many, strict=True):
        differing = {key for key in one if one[key] != other[key]}
        if one["record"] == "evaluation":
            assert differing and differing <= {"right", "wrong"}
        else:
            assert differing == set()
