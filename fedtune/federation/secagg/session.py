"""One attempt at one secure sum: what both sides of `fedtune.federation.secagg.protocol` know and derive.

A Session is public numbers and the rules that follow from them: how many shares give a secret back, how many
nodes must be in a sum, and the bytes that tie every key to this attempt. Each participant makes its own
from the plan, and believes nobody else's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from fedtune.errors import AggregationAborted, PrivacyError
from fedtune.federation.secagg import crypto

__all__ = [
    "Commitments",
    "PublicKeys",
    "Sealed",
    "Session",
    "Vector",
    "check_roster",
    "pair_mask",
    "roster_digest",
    "self_mask",
]

Vector = npt.NDArray[np.uint32]
Commitments = tuple[bytes, bytes]  # of a peer's share of the seed, and of its share of the masking key


@dataclass(frozen=True)
class Session:
    """One attempt at one sum, in public numbers that every participant derives by itself.

    `nodes`: the names of all that were asked. `size`: numbers in a vector. `max_dropouts`: nodes that may be
    missing from the sum; `max_colluders`: nodes that may side with the server.
    Raises `PrivacyError` if these cannot be had together.
    """

    run: str
    round: int
    attempt: int
    nodes: tuple[str, ...]
    size: int
    max_dropouts: int
    max_colluders: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(sorted(self.nodes)))
        n, dropouts, colluders = len(self.nodes), self.max_dropouts, self.max_colluders
        if len(set(self.nodes)) != n:
            raise PrivacyError("Secure aggregation needs nodes with different names.")
        if n < 2:
            raise PrivacyError(
                "Secure aggregation of one node hides nothing: its sum is the node's own vector. Use two or "
                "more nodes, or privacy.trust=local."
            )
        if dropouts < 0 or colluders < 0 or colluders > n - 2 or self.threshold > n - dropouts:
            raise PrivacyError(
                f"{n} nodes cannot hide their vectors from a server with {colluders} colluding nodes and "
                f"still finish when {dropouts} drop out: {self.threshold} must answer. Lower "
                f"privacy.max_dropouts to at most {max(0, n - self.threshold)}, or privacy.max_colluders, or "
                "take more nodes."
            )

    @property
    def threshold(self) -> int:
        """Shares that give a secret back: more than (nodes + max_colluders) / 2."""
        return (len(self.nodes) + self.max_colluders) // 2 + 1

    @property
    def quorum(self) -> int:
        """Nodes whose vectors must be in the sum."""
        return max(self.threshold, len(self.nodes) - self.max_dropouts)

    def place(self, *more: str | int | bytes) -> tuple[str | int | bytes, ...]:
        """Domain separation: the fields that keep this attempt's keys apart from every other's."""
        return (self._digest, *more)

    @cached_property
    def _digest(self) -> bytes:
        numbers = (self.round, self.attempt, self.size, self.max_dropouts, self.max_colluders)
        fields: tuple[str | int | bytes, ...] = (self.run, *numbers, *self.nodes)
        return hashlib.sha256(crypto.label("session", *fields)).digest()

    def point(self, node: str) -> int:
        """Where Shamir's polynomial is evaluated for `node`."""
        return self.nodes.index(node) + 1

    def abort(self, what: str) -> NoReturn:
        """Raises AggregationAborted for this round."""
        raise AggregationAborted(
            f"Secure aggregation of round {self.round} (attempt {self.attempt}) stopped: {what} "
            "The round is charged and its result discarded."
        )

    def require(self, present: Sequence[str], phase: str) -> None:
        """Raises AggregationAborted unless enough nodes are there to go on after `phase`."""
        if len(present) < self.quorum:
            missing = ", ".join(name for name in self.nodes if name not in set(present))
            self.abort(
                f"after '{phase}' {len(present)} of {len(self.nodes)} nodes are left, and {self.quorum} are "
                f"needed (privacy.max_dropouts={self.max_dropouts}); missing: {missing}."
            )


@dataclass(frozen=True)
class PublicKeys:
    """What a node advertises: 32 bytes each, for sealing shares and for agreeing on masks."""

    sealing: bytes
    masking: bytes


@dataclass(frozen=True)
class Sealed:
    """What a node shares. By peer: the sealed pair of shares, and the hashes of both; `seed`: a hash of its
    seed.
    """

    shares: dict[str, bytes]
    commitments: dict[str, Commitments]
    seed: bytes


def roster_digest(session: Session, roster: Mapping[str, PublicKeys]) -> bytes:
    """SHA-256 of every node's name and public keys, in this session: what all nodes must agree on."""
    fields: list[str | int | bytes] = []
    for name in sorted(roster):
        fields += [name, roster[name].sealing, roster[name].masking]
    return hashlib.sha256(crypto.label("roster", *session.place(), *fields)).digest()


def pair_mask(
    session: Session, digest: bytes, private: bytes, public: bytes, first: str, second: str
) -> Vector:
    """The mask that two nodes share, the same from either end. Raises ValueError for an unusable key."""
    low, high = sorted((first, second))
    key = crypto.agree(private, public, crypto.label("pair mask", *session.place(digest, low, high)))
    return crypto.mask_stream(key, session.size)


def self_mask(session: Session, seed: bytes) -> Vector:
    """The mask that a node adds for itself alone, stretched from its 32-byte `seed`; uint [session.size]."""
    key = hashlib.sha256(crypto.label("self mask", *session.place(seed))).digest()
    return crypto.mask_stream(key, session.size)


def check_roster(session: Session, roster: Mapping[str, PublicKeys]) -> None:
    """Raises AggregationAborted unless `roster` holds enough nodes, all asked, with distinct keys of 32
    bytes.
    """
    strangers = sorted(set(roster) - set(session.nodes))
    if strangers:
        session.abort(f"{', '.join(strangers)} was not asked and has keys.")
    seen: dict[bytes, str] = {}
    for name, keys in roster.items():
        for key in (keys.sealing, keys.masking):
            if len(key) != crypto.KEY_BYTES:
                session.abort(f"node {name!r} advertised a key of {len(key)} bytes, not {crypto.KEY_BYTES}.")
            if key in seen:
                session.abort(f"nodes {seen[key]!r} and {name!r} advertised the same key.")
            seen[key] = name
    session.require(sorted(roster), "advertise")
