"""From overrides to Config, and saved configurations back."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config import Config
from fedtune.config.loader import load, read_config, save_config
from fedtune.errors import CheckpointError, ConfigError
from tests.support.golden import Golden


@pytest.mark.slow
def test_overrides_reach_the_config() -> None:
    config = load(["privacy.epsilon=2", "adapter=ffa_lora", "model.quantization=nf4", "federation.nodes=10"])
    assert config.privacy.epsilon == 2.0 and isinstance(config.privacy.epsilon, float)
    assert config.adapter.name == "ffa_lora"
    assert config.model.quantization == "nf4"
    assert config.federation.nodes == 10
    assert load(["data.labels=[no,yes]"]).data.labels == ["no", "yes"]


def test_noise_multiplier_replaces_epsilon_of_the_files() -> None:
    privacy = load(["privacy.noise_multiplier=1.5"]).privacy
    assert (privacy.epsilon, privacy.noise_multiplier) == (None, 1.5)


def test_noise_multiplier_and_epsilon_contradict_each_other(golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        load(["privacy.noise_multiplier=1.5", "privacy.epsilon=2"])
    golden(raised)


@pytest.mark.slow
def test_privacy_needs_one_of_them(golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        load(["privacy.epsilon=null"])
    assert "privacy.epsilon" in str(raised.value)
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        load(["privacy.noise_multiplier=0"])
    golden(raised)


@pytest.mark.parametrize(
    "overrides", [["privacy.trust=none"], ["privacy=none"], ["privacy=none", "privacy.epsilon=null"]]
)
def test_no_trust_model_no_epsilon(overrides: list[str]) -> None:
    privacy = load(overrides).privacy
    assert privacy.trust == "none"
    assert privacy.epsilon is None and privacy.noise_multiplier is None


@pytest.mark.parametrize("override", ["privacy.epsilon=2", "privacy.noise_multiplier=1"])
def test_a_promise_without_privacy_is_refused(override: str, golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        load(["privacy.trust=none", override])
    assert "privacy.trust=none" in str(raised.value)
    golden(raised)


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["federation.nodes=4", "federation.cohort_size=5"], "federation.cohort_size"),
        (["federation.nodes=4", "federation.min_updates=5"], "federation.min_updates"),
        (["privacy.adaptive_clipping=true"], "privacy.adaptive_clipping"),
        (["privacy=central", "adapter=lora", "privacy.head_norm=3"], "privacy.head_norm"),
        (["adapter=head", "privacy.head_norm=3"], "privacy.head_norm"),
    ],
)
def test_settings_that_do_not_fit_together(overrides: list[str], setting: str, golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        load(overrides)
    assert raised.value.setting == setting
    golden(raised)


def test_a_page_of_the_users_own(tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("source: files\nname: mine\npath: /x\ntext: body\n")
    config = load(["data=mine"], [tmp_path])
    assert (config.data.name, config.data.text, config.data.label) == ("mine", "body", "label")
    with pytest.raises(ConfigError) as raised:
        load(["data=mine"])
    assert "data=mine" in str(raised.value)
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        load(["data=opinions"], [tmp_path / "missing"])
    golden(raised)


@pytest.mark.parametrize(
    ("page", "setting", "words"),
    [
        ("source: files\ntxt: body\n", "data.txt", r"Did you mean data\.text"),
        ("source: files\nmax_length: long\n", "data.max_length", "=long"),
        ("source: files\nmax_length: .nan\n", "data.max_length", "is not allowed"),
        ("source: [files\n", None, "cannot be composed"),
        ("- source\n", None, "holds a list"),
        ("source: ${nothing.here}\n", None, "nothing"),
    ],
)
def test_a_broken_page_of_the_users_own(tmp_path: Path, page: str, setting: str | None, words: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(page)
    with pytest.raises(ConfigError, match=words) as caught:
        load(["data=mine"], [tmp_path])
    assert caught.value.setting == setting and (setting or "") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_save_and_read(tmp_path: Path) -> None:
    config = load(["privacy.trust=none", "data.labels=[a,'ü: #']", "data.revision=1e5"])
    save_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "no temporary file stays"


def test_resume_takes_the_saved_configuration(tmp_path: Path) -> None:
    save_config(load(["privacy.epsilon=3", "federation.num_rounds=7"]), tmp_path)
    config = load([f"resume={tmp_path}"])
    assert (config.privacy.epsilon, config.federation.num_rounds) == (3.0, 7)
    assert config.resume == config.output == str(tmp_path)


def test_resume_with_other_settings_names_them(tmp_path: Path, golden: Golden) -> None:
    save_config(Config(), tmp_path)
    with pytest.raises(ConfigError) as raised:
        load([f"resume={tmp_path}", "seed=2", "privacy.epsilon=3"])
    assert "privacy.epsilon, seed" in str(raised.value)
    golden(raised)
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir"):
        load([f"resume={tmp_path}", "hydra.run.dir=elsewhere"])


@pytest.mark.parametrize("text", [None, "", "a: [", "seed: x", "nonsense: 1", "[]", "\x00", "a: &a [*a]"])
def test_resume_from_a_broken_folder(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="config.yaml"):
        load([f"resume={tmp_path}"])


def test_a_page_that_holds_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("labels: &a [*a]\n")
    with pytest.raises(ConfigError, match="cannot be composed: .* holds itself"):
        load(["data=mine"], [tmp_path])


@pytest.mark.parametrize("date", ["0", "2026", "1 November 2026", "2026-13-01"])
def test_a_price_book_has_a_date_or_none(date: str) -> None:
    assert load(["pricing.date=2026-02-28"]).pricing.date == "2026-02-28"
    assert load(["pricing.date=''"]).pricing.date == ""
    with pytest.raises(ConfigError, match="a date such as 2026-11-01") as raised:
        load([f"pricing.date='{date}'"])
    assert raised.value.setting == "pricing.date"


def test_loading_leaves_hydra_as_it_was() -> None:
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    load()
    with pytest.raises(ConfigError):
        load(["federation.nodes=1", "federation.cohort_size=2"])
    assert GlobalHydra.instance().hydra is before


def test_a_setting_of_hydras_that_there_is_not_is_no_advice_to_add_it() -> None:
    with pytest.raises(ConfigError, match=r"'hydra\.run\.dirr'\. Did you mean hydra\.run\.dir\?") as caught:
        load(["hydra.run.dirr=x"])
    assert "+hydra" not in str(caught.value)
