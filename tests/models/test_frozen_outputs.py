"""Cached outputs of frozen layers give the same results, survive damage, and never mix up texts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.config.files import cache_dir
from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ResourceError
from fedtune.models import encoder, frozen_outputs
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.frozen_outputs import Features, FeatureStore
from tests.models.conftest import random_corpus
from tests.support.golden import Golden


def load(folder: Path, quantization: str = "none", **adapter: object) -> AdaptedModel:
    model = load_model(
        ModelConfig(name=str(folder), quantization=quantization),
        AdapterConfig(**({"name": "lora", "rank": 2} | adapter)),
        2,
        0,
        "cpu",
    )
    model.set_vector(model.initial + np.random.default_rng(1).normal(0, 0.2, model.num_parameters))
    return model


def store_folder() -> Path:
    (folder,) = (cache_dir() / "frozen_layers").iterdir()
    return folder


@pytest.fixture(autouse=True)
def clean_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of this test's own: tests damage it, and others of the session share theirs."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    frozen_outputs._STORES.clear()
    frozen_outputs._RESIDENT.clear()


@pytest.mark.parametrize("adapter", [{"name": "lora", "layers": 1}, {"name": "head"}, {"name": "lora"}])
def test_logits_are_those_of_the_whole_model(tiny_bert: Path, adapter: dict[str, object]) -> None:
    model, corpus = load(tiny_bert, **adapter), random_corpus()
    for _ in range(2):  # computed, then read back
        frozen_outputs._STORES.clear()
        frozen_outputs._RESIDENT.clear()
        features = Features.of(model, corpus, 64)
        records = np.array([5, 0, 9])
        logits = model.base(**features.inputs(records, 4, 16, model.device))[:3]
        for row, record in enumerate(records):
            ids = torch.from_numpy(corpus.tokens(record).astype(np.int64))[None]
            assert torch.allclose(model.base(input_ids=ids)[0], logits[row], atol=5e-3)


def test_nothing_is_computed_twice_even_in_another_order(tiny_bert: Path) -> None:
    model, corpus = load(tiny_bert, layers=1), random_corpus(12)
    seen: list[tuple[int, int]] = []
    Features.of(model, corpus, 64, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
    other = corpus.subset([7, 3, 3])
    seen.clear()
    again = Features.of(model, other, 64, lambda done, total: seen.append((done, total)))
    assert not seen
    whole = Features.of(model, corpus, 64)
    assert np.array_equal(again.rows[0], whole.rows[7])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("adapter", [{"name": "lora", "layers": 1}, {"name": "head"}])
def test_what_is_kept_does_not_depend_on_the_batch_it_was_computed_in(
    tiny_bert: Path, adapter: dict[str, object], quantization: str, precision: str
) -> None:
    """So a site, which has only its own texts, keeps of each what a simulation of all sites keeps of it."""
    model, corpus = load(tiny_bert, quantization, **adapter), random_corpus(30)
    whole = Features.of(model, corpus, 256, precision=precision).rows
    assert whole is not None
    for folder, size, part in (("alone", 64, 1), ("few", 512, 7)):
        frozen_outputs._STORES.clear()
        store_folder().rename(store_folder().parent.parent / f"{folder}-{adapter['name']}-{quantization}")
        for first in range(0, 30, part):
            chosen = list(range(first, min(30, first + part)))[::-1]
            rows = Features.of(model, corpus.subset(chosen), size, precision=precision).rows
            assert rows is not None
            for record, kept in zip(chosen, rows, strict=True):
                np.testing.assert_array_equal(kept, whole[record])


def test_files_are_private(tiny_bert: Path) -> None:
    Features.of(load(tiny_bert, layers=1), random_corpus(), 64)
    for file in store_folder().iterdir():
        assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["values cut", "index cut", "index garbage"])
def test_damage_is_noticed_and_mended(tiny_bert: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    model, corpus = load(tiny_bert, layers=1), random_corpus()
    want = [rows.copy() for rows in Features.of(model, corpus, 64).rows]
    values, index = store_folder() / "values.f16", store_folder() / "index.bin"
    if damage == "values cut":
        values.write_bytes(values.read_bytes()[:1000])
    elif damage == "index cut":
        index.write_bytes(index.read_bytes()[:-7])
    else:
        index.write_bytes(b"\xff" * 320)
    frozen_outputs._STORES.clear()
    frozen_outputs._RESIDENT.clear()
    with caplog.at_level(logging.WARNING):
        got = Features.of(model, corpus, 64).rows
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_cache_that_cannot_be_written_costs_nothing_but_memory(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureStore, "_append", full)
    model, corpus = load(tiny_bert, layers=1), random_corpus()
    with caplog.at_level(logging.WARNING):
        features = Features.of(model, corpus, 16)  # several batches, one warning
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "No space left" in caplog.text
    assert [len(rows) for rows in features.rows] == list(corpus.lengths)


def test_a_disk_that_fills_is_given_back_what_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(tmp_path / "s", 4)
    store.add([(b"a" * 16, np.ones((2, 4), np.float16))])
    size = (tmp_path / "s" / "values.f16").stat().st_size
    fsync = os.fsync

    def full(file: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.add([(b"b" * 16, np.ones((500, 4), np.float16))])
    assert (tmp_path / "s" / "values.f16").stat().st_size == size
    assert store.rows(b"b" * 16).shape == (500, 4)  # in memory


def test_gigabytes_that_the_disk_lacks_are_refused_before_any_is_computed(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    monkeypatch.setattr(frozen_outputs, "_GIGABYTE", 100)
    usage = type("Usage", (), {"free": 3000})
    monkeypatch.setattr(frozen_outputs.shutil, "disk_usage", lambda _: usage)
    model, corpus = load(tiny_bert, layers=1), random_corpus()
    needed = 2 * 32 * int(corpus.lengths.sum())
    assert needed > 3000
    with pytest.raises(ResourceError) as raised:
        Features.of(model, corpus, 64)
    golden(raised)
    usage.free = needed + 101
    assert Features.of(model, corpus, 64).rows


def test_two_writers_do_not_overwrite_one_another(tmp_path: Path) -> None:
    one, two = FeatureStore(tmp_path / "s", 4), FeatureStore(tmp_path / "s", 4)
    a, b = np.full((2, 4), 1, np.float16), np.full((3, 4), 2, np.float16)
    one.add([(b"a" * 16, a)])
    two.add([(b"b" * 16, b)])
    fresh = FeatureStore(tmp_path / "s", 4)
    for store in (two, fresh):
        assert np.array_equal(store.rows(b"a" * 16), a)
        assert np.array_equal(store.rows(b"b" * 16), b)


def test_another_encoder_has_another_store(tiny_bert: Path) -> None:
    corpus = random_corpus()
    first = load(tiny_bert, layers=1)
    Features.of(first, corpus, 64)
    quantized = load_model(
        ModelConfig(name=str(tiny_bert), quantization="int8"),
        AdapterConfig(name="lora", layers=1),
        2,
        0,
        "cpu",
    )
    assert quantized.frozen_digest != first.frozen_digest
    seen: list[int] = []
    Features.of(quantized, corpus, 64, lambda done, _: seen.append(done))
    assert seen


def test_what_was_computed_in_another_precision_is_never_read(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` shares the store of what it stands for on this processor; the two are near, not equal."""
    model, corpus = load(tiny_bert, "int8", name="head"), random_corpus()
    seen: list[int] = []

    def kept(precision: str) -> np.ndarray:
        seen.clear()
        frozen_outputs._RESIDENT.clear()
        count = lambda done, _: seen.append(done)  # noqa: E731
        rows = Features.of(model, corpus, 64, count, precision=precision).rows
        assert rows is not None
        return np.concatenate(rows).astype(np.float32)

    exact, computed = kept("fp32"), bool(seen)
    fast, again = kept("bf16"), bool(seen)
    assert computed and again
    difference = np.linalg.norm(fast - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 2e-2
    for fast_here, same in ((False, exact), (True, fast)):
        monkeypatch.setattr(encoder, "fast_bf16", lambda _, answer=fast_here: answer)
        assert np.array_equal(kept("auto"), same) and not seen


def test_adapters_that_freeze_the_same_layers_share_a_store(tiny_bert: Path) -> None:
    corpus = random_corpus()
    Features.of(load(tiny_bert, layers=1), corpus, 64)
    seen: list[int] = []
    for name in ("ffa_lora", "bitfit"):
        Features.of(load(tiny_bert, name=name, layers=1), corpus, 64, lambda done, _: seen.append(done))
    assert not seen
