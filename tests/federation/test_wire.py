"""Watches the wire: every key and value that leaves a node is on a list, and the list holds no secret.

The messages are looked at as bytes between node and server (`LocalGrid` serializes them), not where they
are made, so whatever a node sends by whatever way is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from fedtune.engines.local import LocalGrid
from fedtune.federation import _flower
from fedtune.federation.client_app import app
from fedtune.federation.resident import workplace
from fedtune.federation.server import run_rounds
from tests.tiny_federation import private

# Spelt out again here on purpose: a key that someone adds to the code must be argued for in this file too.
ALLOWED = {
    "hello": {"version", "node", "declared_size", "shards", "software", "idle"},
    "reply": {
        "version", "node", "run", "round", "attempt", "releases", "steps", "seconds", "refused", "refusal",
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


def watch(config: Config, run_dir: Path) -> list[Message]:
    grid = Tap(app, 4, {"fedtune": to_json(config)}, timeout=60.0)
    try:
        with _flower.task_identity(grid.run_id):
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
    assert len(sent) == 4 + 2 * 4
    prepared = workplace(config).prepared
    size = workplace(config).initial().size
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
                    assert key == "seconds"
                if isinstance(value, str):
                    known = {shard.node for shard in prepared.shards} | {"", "fedtune 0.1.0"}
                    assert value in known or key in ("run", "software")


def test_the_list_in_the_code_is_the_list_here() -> None:
    from fedtune.federation.messages import HELLO_KEYS, REPLY_KEYS

    assert set(HELLO_KEYS) == ALLOWED["hello"]
    assert set(REPLY_KEYS) == ALLOWED["reply"]


def test_a_failure_does_not_carry_text_of_the_data(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = workplace(tiny()).prepared.train

    def quotes(*args: object, **options: object) -> None:
        raise ValueError(
            f"cannot tokenize record 17: 'the film was awful', label 0 of {texts.labels.tolist()}"
        )

    monkeypatch.setattr("fedtune.training.local.train_locally", quotes)
    config = tiny(federation__num_rounds=1)
    sent = watch(config, tmp_path / "run")
    for message in sent:
        data = _flower.serialize(message)
        assert b"awful" not in data
        assert b"record 17" not in data
