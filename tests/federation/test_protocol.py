"""What programs of one protocol rely on stays as it was when the protocol got its number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.build import build, commit
from fedtune.config.convert import changes_to_json, config_from_json, settings, to_json
from fedtune.config.loader import load
from fedtune.config.schema import Config
from fedtune.errors import ConfigError
from fedtune.federation import messages
from fedtune.federation.protocol import PROTOCOL
from fedtune.federation.secagg import messages as secagg
from fedtune.privacy import plan
from fedtune.privacy.mechanisms.registry import MECHANISMS

GOLDEN = Path(__file__).parents[1] / "golden" / "protocol.json"
_WHERE = f"Raise PROTOCOL in fedtune/federation/protocol.py, and write {GOLDEN.name} anew with `told()`."


def told() -> dict[str, Any]:
    """All that the number stands for."""

    def types(keys: Any) -> dict[str, str]:
        return {name: kind.__name__ for name, kind in keys.items()}

    named = {
        name: types(getattr(messages, name)) for name in sorted(vars(messages)) if name.endswith("_KEYS")
    }
    phases = {
        f"{part} {phase}": types(keys)
        for part, group in (("ask", secagg.ASKS), ("answer", secagg.ANSWERS))
        for phase, keys in group.items()
    }
    return {
        "protocol": PROTOCOL,
        "messages": named | phases,
        "plan": {
            "version": plan._VERSION,
            "fields": sorted(field.name for field in dataclasses.fields(plan.PrivacyPlan)),
        },
        "mechanisms": {
            name: sorted(field.name for field in dataclasses.fields(kind))
            for name, kind in MECHANISMS.items()
        },
        "defaults": {name: repr(setting.default) for name, setting in settings().items()},
    }


def test_what_the_protocols_number_stands_for_is_as_it_was() -> None:
    was, now = json.loads(GOLDEN.read_text()), told()
    assert was["protocol"] == now["protocol"], f"Write {GOLDEN.name} anew with `told()`."
    for part in ("messages", "plan", "mechanisms"):
        assert now[part] == was[part], f"What nodes are told has changed ({part}). {_WHERE}"
    kept = {name: now["defaults"].get(name) for name in was["defaults"]}
    assert kept == was["defaults"], f"A setting is gone or has another default. {_WHERE}"


@pytest.mark.parametrize("words", [[], ["privacy.epsilon=2", "train=default", "data.labels=[a,b]", "seed=7"]])
def test_a_node_reads_the_same_run_from_what_differs_from_the_defaults(words: list[str]) -> None:
    config = load(words)
    sent = changes_to_json(config)
    assert config_from_json(sent) == config_from_json(to_json(config))
    assert len(sent) < len(to_json(config)) / 2


def test_a_setting_that_an_older_node_does_not_know_is_sent_only_if_it_is_used() -> None:
    assert "micro_batch_tokens" not in changes_to_json(Config())
    sent = json.loads(changes_to_json(Config()))
    sent.setdefault("train", {})["of_the_next_version"] = 3
    with pytest.raises(ConfigError, match="of_the_next_version"):
        config_from_json(json.dumps(sent))


def test_a_build_is_told_apart_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = commit()
    assert head is None or build().endswith(f"+{head[:12]}")
    package = tmp_path / "fedtune"  # as a wheel has it: no checkout
    package.mkdir()
    monkeypatch.setattr("fedtune.config.build._PACKAGE", package)
    assert commit() == (None, None)
    (package / "_commit").write_text("1a2b3c4d5e6f7a8b changed\n")
    assert commit() == ("1a2b3c4d5e6f7a8b", True)
    build.cache_clear()
    try:
        assert build().endswith("+1a2b3c4d5e6f")
    finally:
        build.cache_clear()
