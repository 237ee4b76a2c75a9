"""Small corpora, tables and a tokenizer that needs no download."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.data.corpus import Corpus, TokenizedCorpus
from fedtune.data.sources import opinions
from fedtune.errors import ResourceError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fedtune home of this test's own."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class WordTokenizer:
    """Words to numbers by a stable rule; two special tokens around a text, three around a pair."""

    pad_token_id = 7
    model_max_length = 512

    def __init__(self) -> None:
        self.calls = 0

    def num_special_tokens_to_add(self, pair: bool) -> int:
        return 3 if pair else 2

    def __call__(
        self, texts: list[str], pairs: list[str] | None, *, max_length: int, **_: Any
    ) -> dict[str, Any]:
        self.calls += 1
        ids = []
        for i, text in enumerate(texts):
            second = [] if pairs is None else [2, *(10 + len(word) for word in pairs[i].split())]
            words = [10 + len(word) for word in text.split()]
            ids.append([1, *(words + second)[: max_length - 2], 2])
        return {"input_ids": ids}


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


def make_corpus(
    num_records: int = 40,
    labels: int = 2,
    people: int | None = None,
    sites: int | None = None,
    seed: int = 0,
) -> Corpus:
    """A corpus of random words; person i is at site i % sites."""
    rng = np.random.default_rng(seed)
    texts = tuple(f"record {i} " + "word " * int(rng.integers(0, 30)) for i in range(num_records))
    person = rng.integers(0, people, num_records) if people else np.arange(num_records)
    return Corpus(
        name="made",
        texts=texts,
        pairs=None,
        labels=rng.integers(0, labels, num_records),
        label_names=tuple(f"label-{i}" for i in range(labels)),
        units=np.array([f"person-{p}" for p in person]) if people else None,
        sites=np.array([f"site-{p % sites}" for p in person]) if sites else None,
    )


def make_tokens(**kwargs: Any) -> TokenizedCorpus:
    """`make_corpus`, tokenised in memory."""
    corpus = make_corpus(**kwargs)
    lengths = [2 + len(text.split()) for text in corpus.texts]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedCorpus(
        name=corpus.name,
        input_ids=np.arange(offsets[-1], dtype=np.int32),
        offsets=offsets,
        labels=corpus.labels,
        label_names=corpus.label_names,
        units=corpus.units,
        sites=corpus.sites,
        digests=corpus.digests,
        marks=corpus.marks,
        source=corpus.fingerprint(),
    )


def make_sdist(path: Path, **files: str) -> Path:
    """A source distribution shaped like vaderSentiment's, with these ground truth files by site."""

    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for site, (file, _) in opinions.SITES.items():
            add(archive, f"hutto_ICWSM_2014/{file}", files.get(site, "1\t0.5\tgood").encode("utf-8-sig"))
    with tarfile.open(path, "w:gz") as archive:
        add(archive, opinions.INNER, inner.getvalue())
    return path


@pytest.fixture(scope="session")
def real_sdist() -> Path:
    """The real file: from FEDTUNE_OPINIONS or this user's cache, or fetched once from PyPI."""
    try:
        return opinions.sdist_path()
    except ResourceError as error:
        pytest.skip(str(error))
