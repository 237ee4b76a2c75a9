"""What a person may mistype on the command line, and what is said about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedtune.config.loader import load
from fedtune.config.overrides import check_overrides
from fedtune.errors import ConfigError


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    text = str(caught.value)
    assert "\n" not in text, "an error is one paragraph"
    return text


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("privacy.epsilom=2", "privacy.epsilon"),
        ("epsilon=2", "privacy.epsilon"),
        ("+privacy.epsilom=2", "privacy.epsilon"),
        ("++privacy.epsilom=2", "privacy.epsilon"),
        ("num_rounds=2", "federation.num_rounds"),
        ("dta=opinions", "data"),
        ("federation.num_round=3", "federation.num_rounds"),
        ("Seed=3", "seed"),
    ],
)
def test_unknown_setting_names_the_nearest(override: str, hint: str) -> None:
    assert f"Did you mean {hint}" in refusal(override)


def test_added_keys_do_not_pass_silently() -> None:
    """Hydra's `+key=value` would add a key that nothing reads."""
    assert "xyzzy" in refusal("+xyzzy=1")
    assert "privacy.xyzzy" in refusal("++privacy.xyzzy=1")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model=bert_tniy", "model=bert_tiny"),
        ("adapter=ffalora", "adapter=ffa_lora"),
        ("data=opinion", "data=opinions"),
        ("privacy=lokal", "privacy=local"),
        ("experiment=smok", "experiment=smoke"),
        ("engine=rey", "engine=ray"),
    ],
)
def test_unknown_option_names_the_nearest_and_all(override: str, hint: str) -> None:
    text = refusal(override)
    assert f"Did you mean {hint}?" in text
    assert "There are: " in text


@pytest.mark.parametrize(
    "override",
    [
        "privacy.epsilon=0",
        "privacy.epsilon=-1",
        "privacy.epsilon=nan",
        "privacy.epsilon=inf",
        "privacy.epsilon=two",
        "privacy.epsilon=true",
        "privacy.delta=0",
        "privacy.delta=1",
        "privacy.noise_multiplier=-0.5",
        "privacy.noise_multiplier=nan",
        "privacy.max_grad_norm=0",
        "privacy.max_grad_norm=nan",
        "privacy.records_per_unit=0",
        "privacy.trust=everyone",
        "privacy.unit=patient",
        "train.sample_rate=0",
        "train.sample_rate=1.5",
        "train.local_steps=0",
        "train.local_steps=2.5",
        "train.optimizer=lion",
        "train.learning_rate=0",
        "train.learning_rate=[1]",
        "federation.nodes=0",
        "federation.num_rounds=-3",
        "federation.num_rounds=ten",
        "federation.cohort_size=0",
        "model.quantization=int4",
        "partition.alpha=0",
        "data.test_fraction=1",
        "data.max_length=0",
        "data.text=null",
        "data.text=''",
        "data.labels=positive",
        "data.public=maybe",
        "seed=-1",
        "seed=true",
        "device=tpu",
    ],
)
def test_wrong_value_says_what_is_allowed(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([override])
    name, text = override.partition("=")[0], str(caught.value)
    assert caught.value.setting == name and name in text
    assert "must be" in text and "\n" not in text


@pytest.mark.parametrize(
    "override",
    [
        "seed",
        "~seed",
        "data@x=opinions",
        "data={a:1}",
        "privacy=null",
        "federation.nodes=[",
        "privacy=[local,none]x",
    ],
)
def test_odd_forms_are_refused(override: str) -> None:
    refusal(override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hydra.sweeper.n_trials=3", "no option 'n_trials'. Did you mean trials"),
        ("+hydra.sweeper.batch=3", "There are: params, max_batch_size"),
    ],
)
def test_a_sweepers_option_that_does_not_exist(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_overrides([override, "seed=1,2"], multirun=True)
    check_overrides([override, "hydra/sweeper=other", "seed=1,2"], multirun=True)


def test_the_same_setting_twice() -> None:
    assert "twice" in refusal("seed=1", "seed=2")


def test_run_folder_has_one_name() -> None:
    assert "hydra.run.dir" in refusal("output=here")


def test_values_with_commas_need_multirun_or_quotes() -> None:
    assert "-m" in refusal("seed=1,2")
    assert load(["data.name='a,b'"]).data.name == "a,b"
    check_overrides(["seed=1,2"], multirun=True)


def test_labels_without_brackets_are_answered_with_what_works_as_typed() -> None:
    with pytest.raises(ConfigError, match="gives several values") as caught:
        load(["data.labels=no,yes"])
    meant = str(caught.value).split("put it in brackets: '")[1].removesuffix("'.")
    assert load([meant]).data.labels == ["no", "yes"]


def test_each_value_of_a_sweep_is_checked() -> None:
    for sweep in ("privacy.epsilon=1,0", "model=minilm,nimilm", "seed=choice(1,2,x)", "seed=range(-1,3)"):
        with pytest.raises(ConfigError, match=r"not allowed|There is no"):
            check_overrides([sweep], multirun=True)
    good = check_overrides(
        ["privacy.epsilon=1,2", "model=minilm,bert_tiny", "seed=range(0,3)", "adapter=glob(*)"], multirun=True
    )
    assert good.keys == {"privacy.epsilon", "model", "seed", "adapter"}


@pytest.mark.parametrize("value", ["1e5", "007", "123", "1.10"])
def test_a_text_that_looks_like_a_number_stays_as_typed(value: str) -> None:
    assert load([f"data.revision={value}"]).data.revision == value


@pytest.mark.parametrize("path", ["/a/b c", "/a/(b)", "C:\\data\\x", "it's", "/a/b=c", "./x,y"])
def test_paths_arrive_as_typed(path: str) -> None:
    if "," in path:
        assert "quote" in refusal(f"data.path={path}")
    else:
        assert load([f"data.path={path}"]).data.path == path


@pytest.mark.slow
def test_experiment_with_and_without_plus() -> None:
    assert load(["+experiment=smoke"]) == load(["experiment=smoke"])
    assert load(["experiment=null"]) == load()


@pytest.mark.parametrize(
    ("typed", "labels"),
    [
        ("[très,ça]", ["très", "ça"]),
        ("[C#,C++]", ["C#", "C++"]),
        ("[否定, 肯定]", ["否定", "肯定"]),
        ("[no,yes]", ["no", "yes"]),
        ("[0,1]", ["0", "1"]),
        ("[true,false]", ["true", "false"]),
        ("[1e3,007]", ["1e3", "007"]),
        ("[very good,not so good!]", ["very good", "not so good!"]),
        ("[50%,(none)]", ["50%", "(none)"]),
        ("['a,b',c]", ["a,b", "c"]),
        ("[l'été,hiver]", ["l'été", "hiver"]),
        ('[6",a[1]]', ['6"', "a[1]"]),
        ("[{a},b]", ["{a}", "b"]),
    ],
)
def test_labels_work_as_they_are_typed(typed: str, labels: list[str]) -> None:
    assert load([f"data.labels={typed}"]).data.labels == labels


@pytest.mark.parametrize(
    "word",
    ["train.lr", "lr", "epochs", "privacy.eps", "federation.rounds", "data.max_len", "num_clients",
     "train.learning_rat", "privacy.epsilom", "data.lable", "sigma", "batch_size", "adapter.r", "model.nam"],
)  # fmt: skip
def test_what_may_have_been_meant_works_as_typed(word: str) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean (\S+)\?") as raised:
        load([f"{word}=1"])
    meant = re.search(r"Did you mean (\S+)\?", str(raised.value))
    assert meant is not None
    load([f"{meant[1]}={16 if meant[1] == 'data.max_length' else 1}"])


def test_half_a_character_is_no_text_of_a_setting() -> None:
    with pytest.raises(ConfigError, match="halves of characters"):
        load(["data.path=caf\udce9"])


def page(folder: Path, name: str, text: str) -> list[Path]:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return [folder]


def test_an_experiments_page_without_its_package_is_refused(tmp_path: Path) -> None:
    own = page(tmp_path, "experiment/mine.yaml", "train:\n  learning_rate: 0.5\n")
    with pytest.raises(ConfigError, match="first line must be '# @package _global_'"):
        load(["experiment=mine"], own)
    page(tmp_path, "experiment/mine.yaml", "# @package _global_\ntrain:\n  learning_rate: 0.5\n")
    assert load(["experiment=mine"], own).train.learning_rate == 0.5


def test_an_own_page_with_the_name_of_a_shipped_one_is_refused(tmp_path: Path) -> None:
    own = page(tmp_path, "pricing/cloud_cpu.yaml", "device_hour: 9\n")
    with pytest.raises(ConfigError, match="my_cloud_cpu.yaml, and use pricing=my_cloud_cpu"):
        load(["pricing=cloud_cpu"], own)
    (tmp_path / "pricing" / "cloud_cpu.yaml").rename(tmp_path / "pricing" / "my_cloud_cpu.yaml")
    assert load(["pricing=my_cloud_cpu"], own).pricing.device_hour == 9
    page(tmp_path, "pricing/other.yml", "device_hour: 9\n")
    with pytest.raises(ConfigError, match="name it other.yaml"):
        load([], own)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# @package _global_\ntrain.learning_rate: 0.5\n", "write 'train:', and below it, further in"),
        (b"\xef\xbb\xbf# @package _global_\ntrain:\n  learning_rate: 0.5\n", "byte order mark"),
        (b"# @package _global_ \xe9\n", "not UTF-8 text \\(byte 20\\)"),
        (b"", "A page of experiment/ is empty"),
        (b"- train\n", "holds a list, which would be ignored"),
        (b"train\n", "holds a text, which would be ignored"),
    ],
)
def test_what_no_page_can_mean_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    own = page(tmp_path, "experiment/mine.yaml", "")
    (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load(["experiment=mine"], own)


def test_a_page_that_ends_in_yml_is_named_where_it_is_asked_for(tmp_path: Path) -> None:
    own = page(tmp_path, "experiment/mine.yml", "# @package _global_\n")
    with pytest.raises(ConfigError, match=r"name it mine\.yaml"):
        load(["experiment=mine"], own)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("train.learning_rate=\u22120.1", "must be a finite number"),
        ("seed=\u00b2", "must be a whole number"),
        ("~train", "another option of the group: auto, default"),
    ],
)
def test_advice_on_what_cannot_be_read_works_as_typed(given: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load([given])
