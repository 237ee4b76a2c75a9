"""prepare: from a Config to tokenised, partitioned data, made once a process.

All nodes of a simulation and every round ask for the same thing; the answer is kept, so 100 nodes share
one copy of the text and each shard is cut once. What is kept is keyed by all that the answer depends
on, the sizes and times of files included.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.choices import resolved, tests_openly
from fedtune.config.schema import Config
from fedtune.data.corpus import Shard, TokenizedCorpus
from fedtune.data.holdout import hold_out
from fedtune.data.partition import make_shards
from fedtune.data.sources.files import state_of
from fedtune.data.sources.load import load_corpus
from fedtune.data.tokenize import tokenize
from fedtune.errors import DataError

__all__ = ["PreparedData", "clear_cache", "holding_out", "prepare"]

CACHE_SIZE = 8  # more than the seeds of most sweeps: fewer than they have would be none

_cache: OrderedDict[str, PreparedData] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Everything a simulation needs to know about its data.

    Fields: `train` and `test`, tokenised (`test` is empty unless the server evaluates without noise);
    `shards`, one a node, cut from `train`: what may be trained on. Where `data.declared_size` is not set
    their sizes are counts, which are private with private data: a node tells `fedtune.federation.sizes` what;
    `label_names`, public; `public`, whether the owner declared the data public; `notes`, what was decided
    while loading and belongs into the record; `held_out`, one a shard where evaluation is private: what is
    evaluated on and not in `shards` (else empty).
    """

    train: TokenizedCorpus
    test: TokenizedCorpus
    shards: list[Shard]
    label_names: tuple[str, ...]
    public: bool
    notes: tuple[str, ...]
    held_out: tuple[Shard, ...] = ()


def holding_out(prepared: PreparedData, config: Config) -> PreparedData:
    """`prepared` with its shards cut in two where `federation.evaluation` is private; else as it is."""
    if config.federation.evaluation != "private":
        return prepared
    parts = [hold_out(shard, config.federation.evaluation_share) for shard in prepared.shards]
    return dataclasses.replace(
        prepared, shards=[train for train, _ in parts], held_out=tuple(test for _, test in parts)
    )


def prepare(config: Config, tokenizer: Any, tokenizer_id: str) -> PreparedData:
    """Loads, splits, tokenises and partitions the data of `config`; warns of every note, once.

    The same object is returned for equal settings: treat its arrays as read-only.
    Raises as `load_corpus`, `tokenize` and `make_shards` do.
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
    tokens = tokenize(train, tokenizer, tokenizer_id, config.data.max_length)
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
    prepared = PreparedData(
        train=tokens,
        test=tokenize(test, tokenizer, tokenizer_id, config.data.max_length)
        if test.num_records
        else tokens.subset([]),
        shards=shards,
        label_names=train.label_names,
        public=config.data.public,
        notes=tuple(
            dict.fromkeys([*train.notes, *test.notes, *(str(warning.message) for warning in caught)])
        ),
    )
    return holding_out(prepared, config)


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
