"""From a Config to tokenised, partitioned data.

In a simulation (`prepare`) one process cuts a corpus into shards. All nodes and every round ask for the same
thing, so the answer is cached: 100 nodes share one copy of the text, and each shard is cut once. The cache
is keyed by all that the answer depends on, the sizes and times of files included.

In a real federation (`prepare_deployed`) nobody holds the corpus: a site has its own shard and nothing else,
the server the public test split. A site's file is its shard, whole: what is tested on is somewhere else. A
public data set (opinions, hub), which is there for a trial, is cut by site as the simulation cuts it. The
size that a site states is the one that its owner declared, never a count.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.choices import resolved, tests_openly
from fedtune.config.schema import Config, DataConfig
from fedtune.data.corpus import Corpus, Shard, TokenizedCorpus
from fedtune.data.partition import make_shards, split_shard
from fedtune.data.reading import reading_of
from fedtune.data.sources.columns import Columns, build_corpus
from fedtune.data.sources.files import beside, find_split, read_table, state_of
from fedtune.data.sources.load import load_corpus
from fedtune.data.tokenize import tokenize
from fedtune.errors import DataError

__all__ = ["PreparedData", "clear_cache", "prepare", "prepare_deployed"]

_log = logging.getLogger("fedtune.node")
_PACKAGE = Path(__file__).parents[1]

CACHE_SIZE = 8  # more than the seeds of most sweeps: fewer than they have would be none

_cache: OrderedDict[str, PreparedData] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Everything a simulation needs to know about its data.

    Attributes:
        train: tokenised.
        test: tokenised; empty unless the server evaluates without noise.
        shards: one a node, cut from `train`: what may be trained on. Where `data.declared_size` is not set
            their sizes are counts, which are private with private data: nodes then answer with noise
            (`fedtune.federation.sizes`).
        label_names: public.
        public: whether the owner declared the data public.
        notes: what was decided while loading and belongs into the record.
        held_out: one a shard where evaluation is private: what is evaluated on and not in `shards`.
    """

    train: TokenizedCorpus
    test: TokenizedCorpus
    shards: list[Shard]
    label_names: tuple[str, ...]
    public: bool
    notes: tuple[str, ...]
    held_out: tuple[Shard, ...] = ()


def _holding_out(prepared: PreparedData, config: Config) -> PreparedData:
    """`prepared` with its shards cut in two where `federation.evaluation` is private; else as it is."""
    if config.federation.evaluation != "private":
        return prepared
    parts = [split_shard(shard, config.federation.evaluation_share) for shard in prepared.shards]
    return dataclasses.replace(
        prepared, shards=[train for train, _ in parts], held_out=tuple(test for _, test in parts)
    )


def prepare(config: Config, tokenizer: Any, tokenizer_id: str) -> PreparedData:
    """Loads, splits, tokenises and partitions the data of `config`; warns of every note, once.

    The same object is returned for equal settings: treat its arrays as read-only.

    Raises:
        DataError: data, settings and tokenizer do not fit together (as `load_corpus`, `tokenize`,
            `make_shards`).
        ResourceError: the machine lacks what it takes to read them.
    """
    config = resolved(config)
    key = _key(config, tokenizer_id)
    # One lock for all: two threads that need the same data should not both make it.
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
        prepared = _prepare(config, tokenizer, tokenizer_id)
        _cache[key] = prepared
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    for note in prepared.notes:
        warnings.warn(note, stacklevel=2)
    return prepared


def clear_cache() -> None:
    """Forgets all prepared data of this process."""
    with _lock:
        _cache.clear()


def _prepare(config: Config, tokenizer: Any, tokenizer_id: str) -> PreparedData:
    train, test = load_corpus(config.data, config.seed, testing=tests_openly(config))
    tokens = tokenize(train, tokenizer, tokenizer_id, config.data.longest, config.data.windows)
    if config.data.only_site is not None:
        tokens = _one_site(tokens, config.data.only_site)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shards = make_shards(
            tokens, config.partition, config.federation.nodes, config.seed, config.privacy.unit
        )
    if (total := config.data.declared_size) is not None:
        each = max(1, round(total / len(shards)))
        shards = [dataclasses.replace(shard, declared_size=each) for shard in shards]
    # Threads share what is caught: what a library says meanwhile (codecarbon's start) is no note of the data.
    ours = [str(one.message) for one in caught if Path(one.filename).is_relative_to(_PACKAGE)]
    told = reading_of(train, tokens, tokenizer, config.data).notes(config)
    prepared = PreparedData(
        train=tokens,
        test=tokenize(test, tokenizer, tokenizer_id, config.data.longest, config.data.windows)
        if test.num_records
        else tokens.subset([]),
        shards=shards,
        label_names=train.label_names,
        public=config.data.public,
        notes=tuple(dict.fromkeys([*train.notes, *test.notes, *told, *ours])),
    )
    return _holding_out(prepared, config)


def _one_site(train: TokenizedCorpus, site: str) -> TokenizedCorpus:
    """What the site has by itself: the comparison that shows what a federation is for."""
    if train.sites is None:
        raise DataError(
            f"data.only_site={site} needs to know which record is whose, and {train.name!r} has no site "
            "column. Name it in data.site."
        )
    rows = np.flatnonzero(train.sites == site)
    if not len(rows):
        raise DataError(
            f"{train.name!r} has no site {site!r} (data.only_site); it has "
            f"{', '.join(str(name) for name in np.unique(train.sites))}."
        )
    return train.subset(rows)


def _key(config: Config, tokenizer_id: str) -> str:
    parts: list[Any] = [
        dataclasses.asdict(config.data),
        dataclasses.asdict(config.partition),
        config.federation.nodes,
        tests_openly(config),
        config.federation.evaluation == "private" and config.federation.evaluation_share,
        config.seed,
        config.privacy.unit,
        tokenizer_id,
    ]
    if config.data.source == "files" and config.data.path:
        parts.append(state_of(Path(config.data.path).expanduser()))
    return json.dumps(parts, sort_keys=True, default=str)


def prepare_deployed(config: Config, tokenizer: Any, tokenizer_id: str) -> PreparedData:
    """A site's own shard (`data.only_site` names the site), or else the server's public test split.

    A site's `test` and a server's `train` and `shards` are empty, and so is a server's `test` where nothing
    is evaluated on public data: it then needs none.

    Raises:
        DataError: as `prepare`, or no label set is declared.
        ResourceError: as `prepare`.
    """
    if config.data.only_site is not None:
        return _site(config, config.data.only_site, tokenizer, tokenizer_id)
    if config.data.source != "files":
        return dataclasses.replace(prepare(config, tokenizer, tokenizer_id), shards=[])
    if not tests_openly(config):
        nothing = _nothing(config.data)
        return PreparedData(nothing, nothing, [], nothing.label_names, config.data.public, ())
    split = "test_split" if config.data.test_split else "train_split"
    corpus = _read(config.data, split)
    test = tokenize(corpus, tokenizer, tokenizer_id, config.data.longest, config.data.windows)
    empty = test.subset([])
    return PreparedData(empty, test, [], test.label_names, config.data.public, ())


def _site(config: Config, site: str, tokenizer: Any, tokenizer_id: str) -> PreparedData:
    if config.data.source == "files":
        try:
            corpus = _read(config.data, "train_split", part=True)
        except DataError as error:
            # It counts records and names rows: right for the site, private to everybody else.
            _log.error("The data of site %r cannot be used: %s", site, error)
            raise DataError(
                f"The data of site '{site}' cannot be used; the site's own log says why, and so does "
                "`fedtune node --dry-run` there."
            ) from error
        train = tokenize(corpus, tokenizer, tokenizer_id, config.data.longest, config.data.windows)
        told = reading_of(corpus, train, tokenizer, config.data).notes(config)
        for note in (*corpus.notes, *told):
            _log.warning("Data of site %r: %s", site, note)  # for its owner alone
        size = config.data.declared_size or 1
        rows = np.arange(train.num_records, dtype=np.int64)
        shard = Shard(site, train, size, train.source, config.data.name, rows)
    else:
        # Not cut for private evaluation: how much is held out follows from the size that the site declares,
        # below. The test part that the server has of public data is not among it.
        cut = config.data.public
        uncut = dataclasses.replace(config.federation, evaluation="public" if cut else "none")
        whole = prepare(dataclasses.replace(config, federation=uncut), tokenizer, tokenizer_id)
        train = whole.train
        shard = whole.shards[0]
        shard = dataclasses.replace(shard, declared_size=config.data.declared_size or shard.declared_size)
    empty = train.subset([])
    prepared = PreparedData(train, empty, [shard], train.label_names, config.data.public, ())
    return _holding_out(prepared, config)


def _nothing(data: DataConfig) -> TokenizedCorpus:
    """No records, with the declared label set."""
    none = np.zeros(0, dtype=np.int64)
    return TokenizedCorpus(
        name=data.name,
        input_ids=none.astype(np.int32),
        offsets=np.zeros(1, dtype=np.int64),
        labels=none,
        label_names=_declared_labels(tuple(data.labels) if data.labels else None),
        units=None,
        sites=None,
        digests=np.zeros((0, 32), dtype=np.uint8),
        marks=np.zeros((0, 32), dtype=np.uint8),
        source="",
    )


def _declared_labels(labels: tuple[str, ...] | None) -> tuple[str, ...]:
    if labels is None:
        raise DataError(
            "In a real federation the label set is public and declared beforehand: give data.labels, such as "
            "data.labels=[negative,positive], to `fedtune submit`, and to `fedtune node --dry-run`."
        )
    return labels


def _read(data: DataConfig, setting: str, *, part: bool = False) -> Corpus:
    """One file as a corpus; the label set is declared, for no site may derive one from its texts."""
    path = find_split(data, setting)
    labels = _declared_labels(tuple(data.labels) if data.labels else beside(path))
    columns = Columns.of(data)
    table = read_table(path, columns)
    if data.site is not None and data.site not in table.columns:
        columns = dataclasses.replace(columns, site=None)
    return build_corpus(data.name, table, columns, labels, part=part)
