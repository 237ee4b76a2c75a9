"""A whole run: what it leaves behind is complete, true, and can be gone on with."""

from __future__ import annotations

import errno
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedtune.errors import CalibrationError, CheckpointError, ConfigError, ModelError, ResourceError
from fedtune.federation.resources import RunResources
from fedtune.runs import record as records
from fedtune.runs.run import Interrupted, run
from tests.support import tiny_federation as tiny
from tests.support.golden import Golden


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


def config(world: dict[str, Path], folder: Path, **changes: Any) -> Any:
    return tiny.make_config(world["model"], world["data"], output=str(folder), **changes)


def test_everything_that_was_promised_is_in_the_folder(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    there = {path.name for path in folder.iterdir()}
    assert {"record.json", "adapter", "statement.md", "config.yaml", "checkpoint"} <= there
    assert (folder / "adapter" / "adapter_config.json").exists()
    made = records.read(folder)
    for path in made["artifacts"].values():
        assert (folder / path).exists() and not Path(path).is_absolute()


def test_the_record_says_what_ran(finished: tuple[Path, str]) -> None:
    made = records.read(finished[0])
    assert made["federation"]["nodes"] == 4 and made["federation"]["rounds"] == 3
    assert made["privacy"]["steps"] == 3 * 2
    assert [one["round"] for one in made["metrics"]["by_round"]] == [1, 2, 3]
    assert made["cost"]["bytes_up"] > 4 * 3 * made["cost"]["adapter_bytes"]
    # What was measured depends on private records: it is the owner's, in a file of his own.
    assert made["cost"]["flops_counted"] is None and made["cost"]["train_seconds"] is None
    measured = records.whole(finished[0])["cost"]
    assert measured["flops_counted"] > 0 and measured["train_seconds"] > 0
    # In its place what the plan expects, of records as long as texts are cut to, in full micro-batches.
    assert 0.2 < made["cost"]["flops"] / measured["flops_counted"] < 5
    assert made["cost"]["flops_source"].startswith("expected")
    assert measured["energy_kwh"] is None and "not installed" in measured["energy"]["note"]
    assert (finished[0] / "local.json").stat().st_mode & 0o777 == 0o600
    assert made["run"]["versions"]["fedtune"] and made["run"]["hardware"]["cores"] >= 1
    assert set(made["metrics"]["per_site"]) == {f"site-{i}" for i in range(4)}
    right = sum(row["accuracy"] * row["num_records"] for row in made["metrics"]["per_site"].values())
    assert right / made["metrics"]["num_records"] == pytest.approx(made["metrics"]["accuracy"])


def test_epsilon_is_what_the_ledgers_releases_cost_and_below_the_target(finished: tuple[Path, str]) -> None:
    import dp_accounting as dp

    privacy = records.read(finished[0])["privacy"]
    assert [one["releases"] for one in privacy["per_node"]] == [3, 3, 3, 3]
    assert [one["releases"] for one in privacy["ledger"]] == [3, 3, 3, 3]
    assert 0.9 * privacy["target_epsilon"] < privacy["epsilon"] <= privacy["target_epsilon"] == 8.0
    assert privacy["epsilon"] == max(one["epsilon"] for one in privacy["per_node"])
    # By another accountant, from the record's numbers alone.
    accountant = dp.rdp.RdpAccountant()
    step = dp.PoissonSampledDpEvent(privacy["sample_rate"], dp.GaussianDpEvent(privacy["noise_multiplier"]))
    accountant.compose(step, privacy["steps"])
    assert privacy["epsilon_rdp"] == pytest.approx(accountant.get_epsilon(privacy["delta"]), rel=1e-3)
    assert privacy["epsilon"] <= privacy["epsilon_rdp"]


def test_what_is_printed_names_epsilon_with_all_that_belongs_to_it(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    privacy = records.read(folder)["privacy"]
    assert (
        f"epsilon {privacy['epsilon']:.3f} at delta {privacy['delta']:.2e}, add or remove one record"
        in printed
    )
    for line in printed.splitlines():
        if line.startswith("round"):
            assert "delta" in line and "add or remove one record" in line
    for words in ("site-3", "record.json", "fedtune predict", "fedtune statement", "USD"):
        assert words in printed


@pytest.mark.slow
def test_without_privacy_epsilon_is_null_and_the_run_learns(world: dict[str, Path], tmp_path: Path) -> None:
    settings = {"train__learning_rate": 0.03, "train__local_steps": 6, "train__sample_rate": 0.6}
    settings |= {"federation__num_rounds": 5, "partition__name": "iid"}
    made = records.read(run(config(world, tmp_path / "run", **settings), console=quiet()))
    privacy = made["privacy"]
    assert privacy["epsilon"] is None and privacy["delta"] is None and privacy["epsilon_rdp"] is None
    assert privacy["noise_multiplier"] == 0.0 and privacy["max_grad_norm"] is None
    assert all(one["epsilon"] is None for one in [*privacy["per_node"], *made["metrics"]["by_round"]])
    assert made["metrics"]["accuracy"] > 0.75 > made["metrics"]["majority_rate"]


def test_a_site_alone_is_tested_on_all_sites(world: dict[str, Path], tmp_path: Path) -> None:
    alone = config(world, tmp_path / "run", data__only_site="site-2", data__declared_size=30)
    made = records.read(run(alone, console=quiet()))
    assert made["federation"]["node_names"] == ["site-2"]
    assert len(made["metrics"]["per_site"]) == 4
    assert sum(row["num_records"] for row in made["metrics"]["per_site"].values()) == 40
    assert list(made["data"]["declared_sizes"].values()) == [30]


class StopAfter:
    """Ctrl-C, pressed when a round is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, round: int, error: BaseException) -> None:
        from fedtune.federation.server import checkpoint

        self.left, original = round, checkpoint.save

        def save(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            if self.left == 0:
                raise error
            self.left -= 1
            return result

        monkeypatch.setattr(checkpoint, "save", save)


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_can_be_resumed(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 1, KeyboardInterrupt())
        with pytest.raises(Interrupted, match=r"fedtune run resume=.*run"):
            run(tiny.private(config(world, folder)), console=quiet())
    assert not (folder / "record.json").exists()
    assert issubclass(Interrupted, KeyboardInterrupt)

    from fedtune.config.loader import read_config

    again = read_config(folder)
    again.resume = again.output = str(folder)
    made = records.read(run(again, console=quiet()))
    assert made["run"]["attempt"] == 2
    assert [one["round"] for one in made["metrics"]["by_round"]] == [1, 2, 3]
    assert made["privacy"]["epsilon"] <= 8.0
    assert all(one["releases"] == 3 for one in made["privacy"]["per_node"])


def test_ctrl_c_before_the_first_round_says_that_nothing_was_kept(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation import resources as resident

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resident, "run_resources", interrupted)
    with pytest.raises(Interrupted, match="nothing to resume"):
        run(config(world, tmp_path / "run"), console=quiet())


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_is_used_up_is_told_in_one_paragraph(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, golden: Golden
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fedtune.federation.resources.RunResources.warm", full)
    with pytest.raises(ResourceError) as raised:
        run(config(world, tmp_path / "run", federation__num_rounds=1), console=quiet())
    assert "micro_batch_tokens" in str(raised.value)
    assert "resume=" in str(raised.value)
    golden(raised)


def test_texts_longer_than_the_encoder_takes(world: dict[str, Path], tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(ModelError) as raised:
        run(config(world, tmp_path / "run", data__max_length=40), console=quiet())
    assert "data.max_length" in str(raised.value)
    assert "40" in str(raised.value)
    assert "32" in str(raised.value)
    golden(raised)
    assert not list((tmp_path / "run").rglob("*.sqlite"))


@pytest.mark.parametrize("where", ["save_pretrained", "statement", "record"])
def test_a_full_disk_is_told_in_one_paragraph(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, golden: Golden
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    if where == "save_pretrained":
        from fedtune.models.classifier import AdaptedModel

        monkeypatch.setattr(AdaptedModel, "save", full)
    elif where == "statement":
        monkeypatch.setattr("fedtune.runs.record.write_statement", full)
    else:
        monkeypatch.setattr("os.fsync", full)
    folder = tmp_path / "run"
    with pytest.raises(ResourceError) as raised:
        run(config(world, folder, federation__num_rounds=1), console=quiet())
    golden(raised)
    assert "resume" in str(raised.value)
    assert not (folder / "record.json").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".record")]


def test_a_folder_that_holds_a_run_is_not_written_over(
    world: dict[str, Path], finished: tuple[Path, str], golden: Golden
) -> None:
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}
    with pytest.raises(CheckpointError) as raised:
        run(config(world, folder, seed=5), console=quiet())
    golden(raised)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_folder_that_cannot_be_made_is_refused(world: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="hydra.run.dir"):
        run(config(world, tmp_path / "file" / "run"), console=quiet())


def test_a_wrong_price_is_refused_before_anything_is_trained(world: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device_hour"):
        run(config(world, tmp_path / "run", pricing__device_hour=math.nan), console=quiet())
    assert not (tmp_path / "run" / "checkpoint").exists()


def _never(*_: object) -> None:
    raise AssertionError("the encoder ran, and no noise allows this run")


@pytest.mark.parametrize("epsilon", [1e-5, 1e6])
@pytest.mark.parametrize("declared", [None, 80])
def test_an_epsilon_that_no_noise_meets_is_refused_before_the_encoder_runs(
    world: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    golden: Golden,
    epsilon: float,
    declared: int | None,
) -> None:
    monkeypatch.setattr(RunResources, "using_model", _never)
    asked = tiny.private(config(world, tmp_path / "run", federation__evaluation="private"), epsilon)
    asked.data.declared_size, asked.privacy.delta = declared, 1e-7
    with pytest.raises(CalibrationError) as raised:
        run(asked, console=quiet())
    assert raised.value.setting == "privacy.epsilon"
    golden(raised)


@pytest.mark.slow
def test_a_run_that_can_only_have_learnt_noise_says_so(world: dict[str, Path], tmp_path: Path) -> None:
    run(tiny.private(config(world, tmp_path / "run"), epsilon=0.05), console=quiet())
    said = [text for text in records.read(tmp_path / "run")["privacy"]["cautions"] if "as long as" in text]
    assert len(said) == 1 and "from about epsilon" in said[0]


@pytest.mark.slow
def test_two_runs_with_one_seed_and_no_noise_are_the_same(world: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    weights = []
    for name in ("a", "b"):
        run(config(world, tmp_path / name, federation__num_rounds=2), console=quiet())
        weights.append(load_file(str(tmp_path / name / "adapter" / "adapter_model.safetensors")))
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_record_is_plain_json(finished: tuple[Path, str]) -> None:
    text = (finished[0] / "record.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    json.loads(text)


@pytest.mark.slow
def test_a_run_that_is_given_up_has_a_record_and_its_ledgers_charges(
    world: dict[str, Path], tmp_path: Path
) -> None:
    from fedtune.federation.events import PRUNED
    from fedtune.privacy.statement.facts import statement_markdown
    from fedtune.report.collect import collect

    given_up = tiny.private(config(world, tmp_path / "0"))
    run(given_up, console=quiet(), stop_rule=lambda s: f"{PRUNED} after 2 rounds." if s.round == 2 else None)
    made = records.read(tmp_path / "0")
    assert made["run"]["status"] == "pruned" and made["federation"]["rounds"] == 2
    assert made["federation"]["ended_early"] == f"{PRUNED} after 2 rounds."
    privacy = made["privacy"]
    assert {one["releases"] for one in privacy["ledger"]} == {2}
    assert 0 < privacy["epsilon"] < 0.95 * privacy["target_epsilon"], "two of three rounds were released"
    assert statement_markdown(made)
    run(tiny.private(config(world, tmp_path / "1")), console=quiet())
    found = collect([tmp_path])
    assert [one.pruned for one in found.runs] == [True, False]
    terms = [sum(one.terms["site-0"].values()) for one in found.runs if one.terms["site-0"] is not None]
    assert terms == [4, 6], "steps of two rounds, and of three"
