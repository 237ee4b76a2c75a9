"""Hub data sets, without the hub: `load_dataset` reads a folder of Parquet files as it reads a repository."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtune.config.schema import DataConfig
from fedtune.data.corpus import Corpus
from fedtune.data.sources.load import load_corpus
from fedtune.errors import DataError, ResourceError
from tests.support.golden import Golden

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two splits with class names in their features, and an unlabelled one."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "data").mkdir()
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "polarity": datasets.ClassLabel(names=["neg", "pos"]),
            "stars": datasets.Value("int64"),
            "author": datasets.Value("int64"),
        }
    )
    for split, size in (("train", 40), ("validation", 10), ("test", 10)):
        columns = {
            "sentence": [f"{split} sentence {i}" for i in range(size)],
            "polarity": [-1 if split == "test" else i % 2 for i in range(size)],
            "stars": [1 + i % 5 for i in range(size)],
            "author": [(1000 if split == "validation" else 0) + i // 4 for i in range(size)],
        }
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hub-cache")))


def load(name: str, **settings: Any) -> tuple[Corpus, Corpus]:
    settings = {"text": "sentence", "label": "polarity", **settings}
    return load_corpus(DataConfig(source="hub", name=name, **settings), 0)


def test_class_names_come_from_the_features(repository: str) -> None:
    train, test = load(repository, test_split="validation")
    assert (train.num_records, test.num_records) == (40, 10)
    assert train.label_names == ("neg", "pos")
    assert train.labels.tolist() == [0, 1] * 20
    assert train.notes == ()


def test_declared_labels_in_another_order_keep_their_meaning(repository: str) -> None:
    train, _ = load(repository, labels=["pos", "neg"], test_split="validation")
    assert train.label_names == ("pos", "neg")
    assert train.labels.tolist() == [1, 0] * 20


def test_without_a_test_split_persons_are_held_out(repository: str) -> None:
    train, test = load(repository, unit="author")
    assert train.units is not None and test.units is not None
    assert not set(train.units) & set(test.units)
    assert test.num_records == 8  # 15 percent of ten persons of four records each, rounded: two


def test_plain_numbers_without_class_names_are_said_to_be_derived(repository: str) -> None:
    train, _ = load(repository, label="stars", test_split="validation")
    assert train.label_names == ("1", "2", "3", "4", "5")
    assert any("taken from the training data" in note for note in train.notes)


def test_the_hidden_test_split(repository: str, golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        load(repository, test_split="test")
    golden(raised)


def test_a_wrong_column_names_the_nearest(repository: str, golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        load(repository, text="sentnce")
    golden(raised)


def test_a_wrong_split_names_the_nearest(repository: str, golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        load(repository, test_split="valdation")
    golden(raised)


def test_a_wrong_configuration_names_those_that_exist(repository: str, golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        load(repository, subset="nonsense")
    golden(raised)


def test_a_folder_without_data(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        load(str(tmp_path))
    golden(raised)


def test_files_that_are_no_table(tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "a", "polarity": 0}\nnot json at all\n')
    with pytest.raises(DataError) as raised:
        load(str(tmp_path))
    golden(raised)


def test_a_loading_script_is_not_run(tmp_path: Path, golden: Golden) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError) as raised:
        load(str(folder))
    golden(raised)
    assert not (tmp_path / "ran").exists()


def test_no_network_says_the_ways_out(golden: Golden) -> None:
    with pytest.raises(ResourceError) as raised:
        load("stanfordnlp/sst2")
    golden(raised)


def test_data_hub_alone_asks_for_a_name(golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        load("OWNER/NAME")
    golden(raised)


def raising(error: Exception) -> Any:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise error

    return load_dataset


def test_no_such_data_set(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    error = datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    with pytest.raises(DataError) as raised:
        load("a/b", revision="v9")
    golden(raised)


def test_no_disk_space(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    monkeypatch.setattr(datasets, "load_dataset", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ResourceError) as raised:
        load("a/b")
    golden(raised)


def test_a_file_that_is_not_in_the_local_cache(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(datasets, "load_dataset", raising(LocalEntryNotFoundError("not cached")))
    with pytest.raises(ResourceError) as raised:
        load("a/b")
    golden(raised)


def test_a_hub_that_refuses_is_not_a_full_disk(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    response = httpx.Response(429, request=httpx.Request("GET", "https://example.org"))
    monkeypatch.setattr(datasets, "load_dataset", raising(HfHubHTTPError("slow down", response=response)))
    with pytest.raises(ResourceError) as raised:
        load("a/b")
    golden(raised)


def test_a_network_that_goes_away_on_the_way(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    monkeypatch.setattr(datasets, "load_dataset", raising(httpx.ReadTimeout("nothing came")))
    with pytest.raises(ResourceError) as raised:
        load("a/b")
    golden(raised)


def test_an_unknown_failure_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", raising(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        load("a/b")


def test_progress_bars_are_as_the_user_left_them(repository: str) -> None:
    for wanted in (True, False):
        (datasets.enable_progress_bars if wanted else datasets.disable_progress_bars)()
        load(repository)
        assert datasets.is_progress_bar_enabled() == wanted
    datasets.enable_progress_bars()
