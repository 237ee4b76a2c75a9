"""How a corpus becomes shards: `natural` (by site), `iid`, or `dirichlet` (uneven labels).

The partitioners are Flower's (`flwr_datasets`); what they are given is a table of *persons*, not of
records, because a person must not be on two nodes: then adding or removing that person would change
two releases and no node's epsilon would hold for them. So persons are dealt out and their records
follow. For `dirichlet` a person counts under the label that most of their records have (the lower
label if equal). A corpus without a unit column has one person a record.

Declared sizes. The expected batch size and delta are computed from a shard's size, and a size counted
from private data is a release. So a size is *declared* by the shard's owner, publicly and beforehand,
and need not be exact: the sampling rate, not the size, is what the accountant uses. A simulation has no
owners to ask: of public data it declares the true count rounded to two significant digits, of private
data without `data.declared_size` each node tells a noised count (`fedtune.federation.sizes`).

Private evaluation cuts each shard in two, by a rule that looks at one unit alone: a hash of the person's
name (of the record's text, where the data names no persons) is below the declared share, or not. So one
unit more or less moves no other unit from one part to the other, as the accounting needs; a random deal of
the whole shard would not do that. All texts of a person, and all copies of a text, are in one part. No seed
enters: the same persons are held out in every run, and those of a smaller share are among those of a larger
one, so that a server that asks twice does not get one half tested on a model that was trained on it. How
large the parts really are is private; only the share is public. A part may be empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.config.schema import PartitionConfig
from fedtune.data.array_cache import load_array, store_array, warn_unusable
from fedtune.data.corpus import Int64Array, Shard, TokenizedCorpus
from fedtune.errors import PartitionError

__all__ = ["DEFAULT_NODES", "is_held_out", "make_shards", "round_size", "split_shard", "split_size"]

DEFAULT_NODES = 4  # where the data has no sites and federation.nodes is not set
DIRICHLET_DRAWS = 20  # times Flower's own 10


def make_shards(
    train: TokenizedCorpus,
    partition: PartitionConfig,
    nodes: int | None,
    seed: int,
    unit: str = "record",
) -> list[Shard]:
    """Cuts `train` into one Shard a node.

    Guarantee: every record is in exactly one shard; records of a person are in one shard (for `natural`,
    where the data says who is where, this is checked if `unit` is 'person').

    Args:
        train: what is dealt out.
        partition: which way, and how uneven.
        nodes: None for as many as there are sites (4 without sites).
        seed: drives the deal, and no noise.
        unit: of privacy, in which sizes are declared: persons for 'person', else records.

    Raises:
        PartitionError: there are fewer persons than nodes, `natural` does not fit `nodes`, a person is at
            two sites, or no draw leaves every node with data.
    """
    name = partition.name
    if nodes is not None and nodes < 1:
        raise PartitionError(f"federation.nodes is {nodes}; at least one node must hold data.")
    if unit == "person" and train.units is None:
        raise PartitionError(
            f"privacy.unit=person needs to know whose record is whose, and {train.name!r} has no unit column."
            " Name it in data.unit, or use privacy.unit=record."
        )
    if name == "natural" and train.sites is None:
        warnings.warn(
            f"{train.name!r} has no site column, so partition=natural deals the records out at random over "
            f"{nodes or DEFAULT_NODES} nodes (as partition=iid). Name a column in data.site for real sites.",
            stacklevel=2,
        )
        name = "iid"
    if name == "natural":
        names = _check_natural(train, nodes, unit)
    elif name in ("iid", "dirichlet"):
        names = _check_dealt(train, name, partition.alpha, nodes)
    else:
        raise PartitionError(f"There is no partition {name!r}; choose natural, iid or dirichlet.")
    node_of_record = _assignment(train, name, partition.alpha, len(names), seed)
    # The records of each node in their order; of every node, for there may be a hundred thousand.
    order = np.argsort(node_of_record, kind="stable")
    ends = np.cumsum(np.bincount(node_of_record, minlength=len(names)))[:-1]
    return [_shard(train, node, rows, unit) for node, rows in zip(names, np.split(order, ends), strict=True)]


def round_size(count: int) -> int:
    """`count` rounded to two significant digits (half up), at least 1."""
    scale: int = 10 ** max(0, len(str(count)) - 2)
    return max(1, (count + scale // 2) // scale * scale)


def _shard(train: TokenizedCorpus, node: str, rows: Int64Array, unit: str) -> Shard:
    data = train.subset(rows)
    return Shard(
        node=node,
        data=data,
        declared_size=round_size(data.num_units if unit == "person" else data.num_records),
        fingerprint=train.source,
        dataset=train.name,
        record_index=rows,
    )


def _check_natural(train: TokenizedCorpus, nodes: int | None, unit: str) -> list[str]:
    """Names of the nodes: the sites, sorted."""
    assert train.sites is not None
    sites, codes = np.unique(train.sites, return_inverse=True)
    if nodes is not None and nodes != len(sites):
        raise PartitionError(
            f"partition=natural gives {train.name!r} one node for each of its {len(sites)} sites, and "
            f"federation.nodes is {nodes}. Set federation.nodes=null, or use partition=iid or dirichlet."
        )
    if unit == "person":
        at_site = np.unique(np.stack([train.unit_index, codes]), axis=1)
        split = int((np.bincount(at_site[0]) > 1).sum())
        if split:
            raise PartitionError(
                f"{split} of the {train.num_units} persons in {train.name!r} have records at more than one "
                "site, so no node alone could keep a promise to them. Use partition=iid or dirichlet, which "
                "keep a person together, or privacy.unit=record."
            )
    for site in map(str, sites):
        if {"/", "\\", "\0"} & set(site) or site in (".", "..") or len(site.encode()) > 200:
            raise PartitionError(
                f"A site of {train.name!r} is called {site[:60]!r}, and a node's ledger is a file of its "
                "name: it may hold no slash, backslash or zero byte, nor more than 200 bytes. Rename it in "
                "the column that data.site names."
            )
    return [str(site) for site in sites]


def _check_dealt(train: TokenizedCorpus, name: str, alpha: float, nodes: int | None) -> list[str]:
    """Names of the nodes: node-0 and on, as wide as the last."""
    if nodes is None:
        nodes = DEFAULT_NODES if train.sites is None else len(np.unique(train.sites))
    if nodes > train.num_units:
        what = "records" if train.units is None else "persons"
        raise PartitionError(
            f"federation.nodes is {nodes}, and the training part of {train.name!r} has only {train.num_units}"
            f" {what}; every node needs at least one. Set federation.nodes to {train.num_units} or less."
        )
    if name == "dirichlet" and not (np.isfinite(alpha) and alpha > 0):
        raise PartitionError(f"partition.alpha is {alpha}; a Dirichlet concentration is a number above 0.")
    width = len(str(nodes - 1))
    return [f"node-{i:0{width}d}" for i in range(nodes)]


def _assignment(train: TokenizedCorpus, name: str, alpha: float, nodes: int, seed: int) -> Int64Array:
    """The node of each record, [n], from the cache or from Flower's partitioner.

    Cached on disk because importing `flwr_datasets` (with seaborn, matplotlib and scipy) takes seconds
    and 200 MB, which every worker process would pay.
    """
    from fedtune.config.files import cache_dir

    version = importlib.metadata.version("flwr-datasets")
    key = hashlib.sha256(train.digests.tobytes() + train.labels.tobytes() + train.unit_index.tobytes())
    if name == "natural":
        key.update("\n".join(map(str, train.sites if train.sites is not None else ())).encode())
    key.update(f"|{name}|{alpha if name == 'dirichlet' else ''}|{nodes}|{seed}|{version}".encode())
    path = cache_dir() / "partitions" / f"{key.hexdigest()[:40]}.npy"
    cached = load_array(path)
    if cached is not None:
        if len(cached) == train.num_records and np.array_equal(np.unique(cached), np.arange(nodes)):
            return cached.astype(np.int64)
        warn_unusable(path, f"it does not deal {train.num_records} records to {nodes} nodes")
    node_of_record = _partition(train, name, alpha, nodes, seed)
    store_array(path, node_of_record.astype(np.int32))
    return node_of_record


def _partition(train: TokenizedCorpus, name: str, alpha: float, nodes: int, seed: int) -> Int64Array:
    """The node of each record, [n], as Flower's partitioners deal them."""
    if name == "natural":
        from flwr_datasets.partitioner import NaturalIdPartitioner

        natural = NaturalIdPartitioner(partition_by="site")
        assert train.sites is not None
        names, first, site_of_record = np.unique(train.sites, return_index=True, return_inverse=True)
        # A row a site, in the order in which they appear: Flower's loops over records take seconds.
        order = np.argsort(first)
        with _quiet():
            natural.dataset = _table(site=names[order], code=order)
            dealt = [_column(natural.load_partition(i), "code") for i in range(nodes)]
        return _nodes_of(dealt, site_of_record)
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    # Flower's iid partitioner cuts the table in its order, so the order must be random.
    order = generator.permutation(train.num_units)
    if name == "dirichlet":
        dealt = _dirichlet(train, order, alpha, nodes, generator)
    else:
        from flwr_datasets.partitioner import IidPartitioner

        iid = IidPartitioner(num_partitions=nodes)
        with _quiet():
            iid.dataset = _table(person=order)
            dealt = [_column(iid.load_partition(i), "person") for i in range(nodes)]
    return _nodes_of(dealt, train.unit_index)


def _nodes_of(dealt: list[Int64Array], group: Int64Array) -> Int64Array:
    """The node of each record, [n], which is of `group` [n], where `dealt` has the groups of each node."""
    node = np.empty(int(group.max(initial=-1)) + 1, dtype=np.int64)
    node[np.concatenate(dealt)] = np.repeat(np.arange(len(dealt)), [len(groups) for groups in dealt])
    return node[group]


def _dirichlet(
    train: TokenizedCorpus, order: Int64Array, alpha: float, nodes: int, generator: np.random.Generator
) -> list[Int64Array]:
    from flwr_datasets.partitioner import DirichletPartitioner

    counts = np.zeros((train.num_units, len(train.label_names)), dtype=np.int64)
    np.add.at(counts, (train.unit_index, train.labels), 1)
    label = counts.argmax(axis=1)
    with _quiet():
        table = _table(person=order, label=label[order])
        # A small alpha often leaves some node with nothing; draw again, as Flower does ten times.
        for _ in range(DIRICHLET_DRAWS):
            partitioner = DirichletPartitioner(
                num_partitions=nodes,
                partition_by="label",
                alpha=float(alpha),
                min_partition_size=1,
                seed=int(generator.integers(2**31)),
            )
            partitioner.dataset = table
            try:
                return [_column(partitioner.load_partition(i), "person") for i in range(nodes)]
            except ValueError:
                continue
    raise PartitionError(
        f"partition=dirichlet with partition.alpha={alpha} left one of {nodes} nodes without data in each of "
        f"{DIRICHLET_DRAWS * 10} draws. Raise partition.alpha or lower federation.nodes."
    )


def _table(**columns: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def _column(table: Any, name: str) -> Int64Array:
    return np.asarray(table.with_format("numpy")[:][name], dtype=np.int64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Flower's partitioners draw a progress bar and warn at each new draw; neither helps anyone here."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_held_out(data: TokenizedCorpus, share: float) -> npt.NDArray[np.bool_]:
    """For each record, whether its unit is held out at `share`: bool [n]."""
    if data.units is None:
        places = [_place(row.tobytes()) for row in data.digests]
    else:
        of_unit = {name: _place(str(name).encode("utf-8", "surrogatepass")) for name in set(data.units)}
        places = [of_unit[name] for name in data.units]
    return np.array(places, dtype=np.float64) < share


def split_shard(shard: Shard, share: float) -> tuple[Shard, Shard]:
    """(what is trained on, what is evaluated on) of `shard`; no unit is in both.

    Both parts remember the whole, so that a release from either is charged to all of it. Declared
    sizes are the declared share of the declared size, never a count, and at least 1.
    """
    held_out = is_held_out(shard.data, share)

    def part(rows: Int64Array, declared_size: int) -> Shard:
        return dataclasses.replace(
            shard,
            data=shard.data.subset(rows),
            record_index=shard.record_index[rows],
            declared_size=declared_size,
            whole=shard.data if shard.whole is None else shard.whole,
        )

    train_size, test_size = split_size(shard.declared_size, share)
    return part(np.flatnonzero(~held_out), train_size), part(np.flatnonzero(held_out), test_size)


def split_size(declared_size: int, share: float) -> tuple[int, int]:
    """The sizes to declare of what is trained on and of what is held out, of a whole of `declared_size`."""
    test_size = max(1, round(declared_size * share))
    return max(1, declared_size - test_size), test_size


def _place(unit: bytes) -> float:
    """Where a unit lies in [0, 1), evenly."""
    digest = hashlib.sha256(b"fedtune held out 1|" + unit).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
