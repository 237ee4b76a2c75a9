"""Data of a real federation: a site has its own shard and nothing else, the server the public test split.

In a simulation one process cuts a corpus into shards (`prepare`); here nobody holds the corpus. A site's
file is its shard, whole: what is tested on is somewhere else. A public data set (opinions, hub), which is
there for a trial, is cut by site as the simulation cuts it. The size that a site tells is the one that its
owner declared, never a count.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from fedtune.config.choices import tests_openly
from fedtune.config.schema import Config, DataConfig
from fedtune.data.corpus import Corpus, Shard, TokenizedCorpus
from fedtune.data.prepare import PreparedData, holding_out, prepare
from fedtune.data.sources.columns import Columns, build_corpus
from fedtune.data.sources.files import beside, find_split, read_table
from fedtune.data.tokenize import tokenize
from fedtune.errors import DataError

__all__ = ["prepare_deployed"]

_log = logging.getLogger("fedtune.node")


def prepare_deployed(config: Config, tokenizer: Any, tokenizer_id: str) -> PreparedData:
    """A site's own shard (`data.only_site` names the site), or else the server's public test split.

    A site's `test` and a server's `train` and `shards` are empty, and so is a server's `test` where nothing
    is evaluated on public data: it then needs none. Raises DataError, ResourceError.
    """
    if config.data.only_site is not None:
        return _site(config, config.data.only_site, tokenizer, tokenizer_id)
    if config.data.source != "files":
        return dataclasses.replace(prepare(config, tokenizer, tokenizer_id), shards=[])
    if not tests_openly(config):
        nothing = _nothing(config.data)
        return PreparedData(nothing, nothing, [], nothing.label_names, config.data.public, ())
    split = "test_split" if config.data.test_split else "train_split"
    test = tokenize(_read(config.data, split), tokenizer, tokenizer_id, config.data.max_length)
    empty = test.subset(np.zeros(0, dtype=np.int64))
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
                f"`fedtune "
                "node --dry-run` there."
            ) from error
        train = tokenize(corpus, tokenizer, tokenizer_id, config.data.max_length)
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
    empty = train.subset(np.zeros(0, dtype=np.int64))
    prepared = PreparedData(train, empty, [shard], train.label_names, config.data.public, ())
    return holding_out(prepared, config)


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
    columns = Columns(
        text=data.text, label=data.label, text_pair=data.text_pair, unit=data.unit, site=data.site
    )
    table = read_table(path, columns)
    if data.site is not None and data.site not in table.columns:
        columns = dataclasses.replace(columns, site=None)
    return build_corpus(data.name, table, columns, labels, part=part)
