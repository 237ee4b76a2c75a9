from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.schema import Config, DataConfig, ModelConfig
from fedtune.data import prepare as module
from fedtune.data.prepare import clear_cache, prepare
from fedtune.models.encoder import load_tokenizer
from tests.data.conftest import WordTokenizer
from tests.support.tiny_federation import make_model


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    clear_cache()
    yield
    clear_cache()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rows = "".join(f"some text {i},{'ab'[i % 2]},s{i % 3}\n" for i in range(60))
    (tmp_path / "train.csv").write_text("text,label,place\n" + rows)
    data = DataConfig(source="files", name="mine", path=str(tmp_path), site="place", labels=["a", "b"])
    return Config(data=data)


def test_prepares_everything(config: Config, home: Path, tokenizer: WordTokenizer) -> None:
    data = prepare(config, tokenizer, "words")
    assert (data.train.num_records, data.test.num_records) == (60, 0)  # private: nothing to test on openly
    assert [shard.node for shard in data.shards] == ["s0", "s1", "s2"]
    assert sum(part.data.num_records for part in (*data.shards, *data.held_out)) == 60
    assert data.label_names == ("a", "b")
    assert data.public is False
    assert data.notes == ()


def test_equal_settings_give_the_same_object(config: Config, home: Path, tokenizer: WordTokenizer) -> None:
    first = prepare(config, tokenizer, "words")
    config.train.learning_rate = 0.5  # nothing to do with data
    assert prepare(config, tokenizer, "words") is first
    config.seed += 1
    assert prepare(config, tokenizer, "words") is not first


def test_every_setting_that_data_depends_on_counts(
    config: Config, home: Path, tokenizer: WordTokenizer
) -> None:
    first = prepare(config, tokenizer, "words")
    assert prepare(config, tokenizer, "other") is not first
    config.partition.name = "iid"
    second = prepare(config, tokenizer, "words")
    config.federation.nodes = 5
    third = prepare(config, tokenizer, "words")
    config.data.max_length = 8
    fourth = prepare(config, tokenizer, "words")
    assert len({id(data) for data in (first, second, third, fourth)}) == 4


def test_a_file_that_changed_is_read_again(config: Config, home: Path, tokenizer: WordTokenizer) -> None:
    first = prepare(config, tokenizer, "words")
    file = Path(str(config.data.path)) / "train.csv"
    file.write_text(file.read_text() + "one more,a,s0\n")
    second = prepare(config, tokenizer, "words")
    assert second.train.num_records + second.test.num_records == 61
    assert first.train.num_records + first.test.num_records == 60


def test_the_cache_is_small(config: Config, home: Path, tokenizer: WordTokenizer) -> None:
    for seed in range(module.CACHE_SIZE + 3):
        config.seed = seed
        prepare(config, tokenizer, "words")
    assert len(module._cache) == module.CACHE_SIZE


def test_notes_are_kept_and_said_once(config: Config, home: Path, tokenizer: WordTokenizer) -> None:
    config.data.labels, config.data.site = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = prepare(config, tokenizer, "words")
    said = [str(warning.message) for warning in caught]
    assert any("taken from the training data" in text for text in said)
    assert any("no site column" in text for text in said)
    assert data.notes == tuple(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(config, tokenizer, "words")


def test_what_a_library_says_meanwhile_is_no_note_of_the_data(
    config: Config, home: Path, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = module.make_shards

    def beside(*given: Any) -> Any:  # as codecarbon, which starts in a thread of its own
        warnings.warn_explicit("parameters are deprecated", FutureWarning, "/lib/codecarbon/output.py", 1)
        warnings.warn_explicit("dealt out at random", UserWarning, module.__file__, 1)
        return cut(*given)

    monkeypatch.setattr(module, "make_shards", beside)
    assert prepare(config, tokenizer, "words").notes == ("dealt out at random",)


def test_threads_share_one_preparation(config: Config, home: Path, tokenizer: WordTokenizer) -> None:
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare(config, tokenizer, "words"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1


def test_importing_the_package_imports_nothing_slow() -> None:
    code = (
        "import sys, fedtune.data, fedtune.data.prepare, fedtune.data.sources.files\n"
        "import fedtune.data.sources.hub, fedtune.data.batches\n"
        "slow = {'torch', 'transformers', 'datasets', 'flwr_datasets', 'flwr',"
        " 'pandas', 'pyarrow', 'matplotlib'}\nprint(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_texts_that_are_cut_or_unknown_are_told_before_they_are_trained_on(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    rows = ["text,label"] + [f"{'the film ' * (1 + 9 * (i % 2))}映画,{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    config = Config(
        data=DataConfig(source="files", path=str(tmp_path / "train.csv"), max_length=12, labels=["a", "b"]),
        model=ModelConfig(name=str(model)),
    )
    with pytest.warns(UserWarning, match="unknown"):
        notes = " ".join(prepare(config, *load_tokenizer(config.model)).notes)
    assert "20 of 40 texts" in notes and "data.max_length=24" in notes
    assert "are unknown to the tokenizer" in notes
    config.data.max_length = 32
    with pytest.warns(UserWarning, match="unknown"):
        assert "texts of" not in " ".join(prepare(config, *load_tokenizer(config.model)).notes)
