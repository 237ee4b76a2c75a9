"""load_corpus: the train and the test Corpus of a data configuration, from `opinions`, `hub` or `files`.

There is a test part only where the server evaluates without noise: on what its owner declared public, or in a
run without privacy (`fedtune.config.choices`). Else all of the data is trained on, and nodes hold out what
they answer about. The test part is by person: no person is on both sides. Where no test split is named,
`test_fraction` of the persons of each site are held out, drawn with `seed` and nothing else. A named test
split that shares persons with the train split is refused, not repaired.

The label set is public, always: `data.labels`, else what the source declares (a hub data set's class
names, a label file beside the files). Only if there is neither is it taken from the training labels,
and then a note says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedtune.config.schema import DataConfig
from fedtune.data.corpus import Corpus
from fedtune.data.sources.columns import Columns, Table, build_corpus, derive_labels, missing_column
from fedtune.errors import DataError

__all__ = ["LABELS_TAKEN", "hold_out", "load_corpus"]

LABELS_TAKEN = (  # a note of the data, and a caution of the run
    "Nobody declared the label set, so it was taken from the training data itself, which no epsilon covers: "
    "that each of these labels occurs there is told exactly. Declare it: data.labels=[FIRST,SECOND]."
)


def load_corpus(config: DataConfig, seed: int, *, testing: bool = True) -> tuple[Corpus, Corpus]:
    """(train, test), with equal `label_names`; what was decided on the way is in `notes`.

    Args:
        config: where the data is, and which column is which.
        seed: drives who is held out, where no test split is named.
        testing: False: nothing is held out or read to test on, `train` is all there is, `test` is empty.

    Raises:
        DataError: the data is missing or unusable.
        ResourceError: the machine lacks what it takes to read it.
    """
    if config.source == "opinions":
        from fedtune.data.sources.opinions import load_opinions

        whole = load_opinions()
        if config.name != whole.name:
            whole = replace(whole, name=config.name)  # a new object, which is hashed anew
        return hold_out(whole, config.test_fraction, seed) if testing else (whole, whole.subset([]))
    if config.source == "hub":
        from fedtune.data.sources.hub import read_split

        splits = [config.train_split, *([config.test_split] if testing and config.test_split else [])]
        tables = [read_split(config, split) for split in splits]
        declared = tables[0].class_names
        notes: list[str] = []
    elif config.source == "files":
        tables, declared, notes = _read_files(config, testing)
    else:
        raise DataError(f"There is no data source {config.source!r}; choose opinions, hub or files.")
    columns = Columns.of(config)
    if columns.label not in tables[0].columns:
        raise missing_column(tables[0].where, "label", columns.label, list(tables[0].columns))
    labels = tuple(config.labels) if config.labels else declared
    if labels is None:
        labels = derive_labels(tables[0], columns.label)
        notes.append(LABELS_TAKEN)
    corpora = [build_corpus(config.name, table, columns, labels) for table in tables]
    train = corpora[0]
    if config.test_split is not None and not testing and not (config.test_public or config.public):
        notes.append(
            f"data.test_split={config.test_split} is not used: nobody declared it public, so the model is "
            "not evaluated on it without noise. If it is public: data.test_public=true."
        )
    if not testing:
        test = train.subset([])
    elif len(corpora) == 1:
        train, test = hold_out(train, config.test_fraction, seed)
    else:
        test = corpora[1]
        _refuse_shared_persons(train, test, config)
    return _with_notes(train, notes), test


def hold_out(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Splits off `fraction` of the persons of each site (at least one, if a site has two) as the test part.

    A person with records at several sites is counted where their first record is. Records keep their order.

    Guarantee: no person is on both sides.

    Raises:
        DataError: either side would be empty.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.test_fraction is {fraction}; give a number between 0 and 1, such as 0.15.")
    if corpus.units is None:
        codes = first = np.arange(corpus.num_records)
    else:
        _, first, codes = np.unique(corpus.units, return_index=True, return_inverse=True)
    site_of_person = np.zeros(len(first), dtype=np.int64)
    if corpus.sites is not None:
        site_of_person = np.unique(corpus.sites, return_inverse=True)[1][first]
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    held_out = np.zeros(len(first), dtype=np.bool_)
    for site in np.unique(site_of_person):
        persons = generator.permutation(np.flatnonzero(site_of_person == site))
        count = min(len(persons) - 1, max(1, round(fraction * len(persons))))
        held_out[persons[:count]] = True
    in_test = held_out[codes]
    if not in_test.any() or in_test.all():
        raise DataError(
            f"{corpus.name!r} has {len(first)} {'records' if corpus.units is None else 'persons'}, too few to"
            " hold out a test part with nobody on both sides. Add data, or name a test split in"
            " data.test_split."
        )
    return corpus.subset(np.flatnonzero(~in_test)), corpus.subset(np.flatnonzero(in_test))


def _read_files(config: DataConfig, testing: bool) -> tuple[list[Table], tuple[str, ...] | None, list[str]]:
    from fedtune.data.sources.files import beside, find_split, list_splits, read_table

    paths = [find_split(config, "train_split")]
    notes = []
    if config.test_split is not None and testing:
        paths.append(find_split(config, "test_split"))
    elif config.test_split is None:
        unused = [
            path.name for split, path in list_splits(config).items() if split in ("test", "validation", "dev")
        ]
        if unused:
            notes.append(
                f"{' and '.join(unused)} beside {paths[0].name} is not used: data.test_split is null"
                + (f", so {config.test_fraction:.0%} of {paths[0].name} is held out" if testing else "")
                + ". To test on it: data.test_split, and data.test_public=true if it is declared public."
            )
    return [read_table(path, Columns.of(config)) for path in paths], beside(paths[0]), notes


def _refuse_shared_persons(train: Corpus, test: Corpus, config: DataConfig) -> None:
    if train.units is None or test.units is None:
        return
    shared = len(np.intersect1d(train.units, test.units))
    if shared:
        raise DataError(
            f"{shared} of the {len(np.unique(train.units))} persons (data.unit={config.unit}) in split"
            f" {config.train_split!r} of {config.name!r} are in split {config.test_split!r} too, so testing"
            " on it would measure memory and publish metrics on their data. Set data.test_split=null to hold"
            " out persons."
        )


def _with_notes(corpus: Corpus, notes: list[str]) -> Corpus:
    return replace(corpus, notes=(*corpus.notes, *notes))
