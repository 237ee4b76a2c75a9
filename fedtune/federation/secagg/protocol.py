"""Secure aggregation: the server learns the sum of the nodes' integer vectors and nothing else of them.

The protocol of Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning"),
four exchanges through the server, modulo 2^32:

    advertise   every node makes two X25519 key pairs and sends the public halves
    share       it draws a seed b_u, splits b_u and its masking key in Shamir shares, and sends every peer its
                two shares, sealed for that peer, with a hash of each
    mask        it sends y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv), s_uv agreed
                between masking keys, over all peers v that have shared
    unmask      for each peer it sends its share of b_v if y_v arrived, of v's masking key if it did not:
                one of the two, never both. The server takes the masks off the sum

A node may drop out before or in each exchange. Before `share` it was never there; before `mask` its pairwise
masks are recovered from its masking key; after that its vector is in the sum, and only `threshold` nodes
must answer the last exchange. Keys and seeds are new in every attempt of every round and used once.

Threat model. Honest but curious: the server and up to `max_colluders` nodes follow the protocol, keep all
that they see, pool it, and want to know more of the other nodes' vectors than the sum over the survivors.
They learn nothing more (Bonawitz et al. 2017, section 6), as long as X25519, HKDF, ChaCha20 and
Poly1305 hold.

Rules that nodes keep whatever the server says. They limit what lies can win, and are no proof against a
server that cheats, which needs a public-key infrastructure and a fifth exchange (there too):

- Few nodes. A node answers `unmask` only if at least `quorum` nodes survive, itself among them, so that
  nobody is shown a sum with less noise than the plan's.
- Both shares. threshold > (nodes + max_colluders) / 2, so that different lies about who survived, told to
  different nodes, cannot collect enough shares both of one node's seed and of its masking key.
- Two views of the keys. Shares are sealed with a digest of all advertised keys as associated data, so nodes
  that were shown different keys cannot open one another's shares, and stop.
- A second answer. Every exchange is answered once; its secrets are dropped with the answer. All keys are
  bound to run, round and attempt.

Detected and named: keys, shares or vectors that are malformed, shares that do not open or do not match
their hash, dealers whose shares do not give the secret they committed to. All of these end the round with
AggregationAborted: whoever sends them is broken or hostile, and its vector may be in the sum.

Not covered: a server that puts its own keys in place of a node's, or tells nodes different stories about who
has shared or survived in ways that the rules above do not catch (from two dropouts upwards such stories can
add up to the sum of fewer than `quorum` nodes, with less noise than the plan's); a node that sends a wrong
but well-formed vector (poisoning); denial of service; who takes part and when, which the server sees; timing
and memory.

A `Session` is public numbers and the rules that follow from them; each participant makes its own from the
plan, and believes nobody else's. `Masker` is a node's part, `MaskedSum` the server's: pure objects, which
`fedtune.federation.secagg.server` carries over Flower.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fedtune.errors import AggregationAborted, PrivacyError
from fedtune.federation.secagg import crypto

__all__ = ["MaskedSum", "Masker", "PublicKeys", "Sealed", "Session"]

Vector = npt.NDArray[np.uint32]
Commitments = tuple[bytes, bytes]  # of a peer's share of the seed, and of its share of the masking key


@dataclass(frozen=True)
class Session:
    """One attempt at one sum, in public numbers that every participant derives by itself.

    `nodes`: the names of all that were asked. `size`: numbers in a vector. `max_dropouts`: nodes that may be
    missing from the sum; `max_colluders`: nodes that may side with the server.

    Raises:
        PrivacyError: these cannot be had together.
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
    """The mask that two nodes share, the same from either end.

    Raises:
        ValueError: a key is unusable.
    """
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


@dataclass
class Masker:
    """A node's part. Call `advertise`, `share`, `mask`, `unmask`, each once and in this order.

    Between calls it is `to_json` and `from_json`: plain JSON, with secrets in it, which stay on the node.
    Every method raises AggregationAborted if it is called out of order or again, or if what came from the
    server or a peer cannot be right; the object is of no more use then.
    """

    session: Session
    node: str
    phase: str = "new"
    sealing_key: bytes = b""
    masking_key: bytes = b""
    seed: bytes = b""
    roster: dict[str, PublicKeys] = field(default_factory=dict)
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # others' shares: (seed, key)

    def _enter(self, phase: str, after: str) -> None:
        if self.phase != after:
            self.session.abort(
                f"node {self.node!r} was asked for a step that makes it '{phase}' when it was "
                f"'{self.phase}'. It answers each request of a round once and in order."
            )
        self.phase = phase

    def advertise(self) -> PublicKeys:
        """Makes fresh keys."""
        self._enter("advertised", after="new")
        if self.node not in self.session.nodes:
            self.session.abort(f"node {self.node!r} is not one of those that were asked.")
        self.sealing_key, sealing = crypto.new_key_pair()
        self.masking_key, masking = crypto.new_key_pair()
        return PublicKeys(sealing, masking)

    def _sealing_pair(self, digest: bytes, dealer: str, holder: str) -> tuple[bytes, bytes]:
        """Key and associated data for what `dealer` sends `holder`; this node is one of the two."""
        other = holder if dealer == self.node else dealer
        place = crypto.label("sealed shares", *self.session.place(digest, dealer, holder))
        return crypto.agree(self.sealing_key, self.roster[other].sealing, place), place

    def share(self, roster: Mapping[str, PublicKeys]) -> Sealed:
        """Splits this node's two secrets among the nodes of `roster`, which advertised these keys."""
        self._enter("shared", after="advertised")
        session = self.session
        check_roster(session, roster)
        mine = roster.get(self.node)
        if mine is None or not (
            crypto.same(mine.sealing, crypto.public_key(self.sealing_key))
            and crypto.same(mine.masking, crypto.public_key(self.masking_key))
        ):
            session.abort(f"the keys that the server lists for node {self.node!r} are not its own.")
        self.roster = dict(roster)
        self.seed = secrets.token_bytes(crypto.KEY_BYTES)
        digest = roster_digest(session, roster)
        points = [session.point(name) for name in roster]
        seeds = crypto.split_secret(self.seed, session.threshold, points)
        keys = crypto.split_secret(self.masking_key, session.threshold, points)
        shares, commitments = {}, {}
        for peer, of_seed, of_key in zip(roster, seeds, keys, strict=True):
            commitments[peer] = (
                crypto.commit(of_seed, "seed share", *session.place(self.node, peer)),
                crypto.commit(of_key, "key share", *session.place(self.node, peer)),
            )
            if peer == self.node:
                self.held[peer] = (of_seed, of_key)
                continue
            try:
                key, place = self._sealing_pair(digest, self.node, peer)
            except ValueError:
                session.abort(f"node {peer!r} advertised a key that no secret can be agreed with.")
            shares[peer] = crypto.seal(key, of_seed + of_key, place)
        return Sealed(shares, commitments, crypto.commit(self.seed, "seed", *session.place(self.node)))

    def mask(self, vector: Vector, received: Mapping[str, tuple[bytes, Commitments]]) -> Vector:
        """The masked vector, uint32 [size].

        `received`: by peer that has shared (this node not among them), its sealed shares for this node with
        their hashes. Call `check_received` first where the vector costs something.
        """
        if self.phase == "shared":
            self.check_received(received)
        self._enter("masked", after="ready")
        session = self.session
        if vector.shape != (session.size,) or vector.dtype != np.uint32:
            shape = f"{vector.dtype}{list(vector.shape)}"
            session.abort(f"node {self.node!r} has {shape} to add, not uint32[{session.size}].")
        digest = roster_digest(session, self.roster)
        masked = vector + self_mask(session, self.seed)
        for peer in received:
            try:
                public = self.roster[peer].masking
                mask = pair_mask(session, digest, self.masking_key, public, self.node, peer)
            except ValueError:
                session.abort(f"node {peer!r} advertised a key that no mask can be agreed with.")
            if self.node < peer:
                masked += mask
            else:
                masked -= mask
        # What made the masks is used up: no second vector can be masked with it.
        self.sealing_key = self.masking_key = self.seed = b""
        return np.asarray(masked, dtype=np.uint32)

    def check_received(self, received: Mapping[str, tuple[bytes, Commitments]]) -> None:
        """Opens the peers' shares and checks them; the part of `mask` that needs no vector."""
        self._enter("ready", after="shared")
        session = self.session
        unknown = sorted(set(received) - set(self.roster))
        if unknown or self.node in received:
            whose = ", ".join(unknown) or "itself"
            session.abort(f"node {self.node!r} got shares from {whose}, who has no key here.")
        session.require([self.node, *received], "share")
        digest = roster_digest(session, self.roster)
        for dealer, (sealed, commitments) in received.items():
            place = session.place(dealer, self.node)
            try:
                key, associated = self._sealing_pair(digest, dealer, self.node)
                opened = crypto.open_sealed(key, sealed, associated)
                shares = opened[: crypto.SHARE_BYTES], opened[crypto.SHARE_BYTES :]
                if len(opened) != 2 * crypto.SHARE_BYTES:
                    raise ValueError("of another length")
                if not (
                    crypto.same(commitments[0], crypto.commit(shares[0], "seed share", *place))
                    and crypto.same(commitments[1], crypto.commit(shares[1], "key share", *place))
                ):
                    raise ValueError("not what was committed to")
            except ValueError as error:
                session.abort(f"node {dealer!r} sent node {self.node!r} a share that is unusable ({error}).")
            self.held[dealer] = shares

    def unmask(self, survivors: Sequence[str]) -> dict[str, bytes]:
        """By peer, this node's share of its seed if it is among `survivors`, else of its masking key."""
        self._enter("done", after="masked")
        session = self.session
        alive = set(survivors)
        if not alive <= set(self.held) or len(alive) != len(survivors):
            session.abort(f"node {self.node!r} was told of survivors who never shared, or of one twice.")
        if self.node not in alive:
            session.abort(f"node {self.node!r} sent its vector and was told that it did not.")
        session.require(sorted(alive), "mask")
        answer = {peer: shares[0] if peer in alive else shares[1] for peer, shares in self.held.items()}
        self.held = {}
        return answer

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; inverse of `from_json`."""
        return {
            "session": {**asdict(self.session), "nodes": list(self.session.nodes)},
            "node": self.node,
            "phase": self.phase,
            "secrets": [self.sealing_key.hex(), self.masking_key.hex(), self.seed.hex()],
            "roster": {name: [keys.sealing.hex(), keys.masking.hex()] for name, keys in self.roster.items()},
            "held": {name: [part.hex() for part in parts] for name, parts in self.held.items()},
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Masker:
        """Inverse of `to_json`. For the node's own memory: it is not checked."""
        session = Session(**{**values["session"], "nodes": tuple(values["session"]["nodes"])})
        sealing, masking, seed = (bytes.fromhex(part) for part in values["secrets"])
        roster = {n: PublicKeys(bytes.fromhex(a), bytes.fromhex(b)) for n, (a, b) in values["roster"].items()}
        held = {n: (bytes.fromhex(a), bytes.fromhex(b)) for n, (a, b) in values["held"].items()}
        return cls(session, values["node"], values["phase"], sealing, masking, seed, roster, held)


class MaskedSum:
    """The server's part. Call `advertised`, `shared`, `masked` for each vector, `survivors`, `unmask`.

    Raises:
        AggregationAborted: something cannot be right; it names the node. See the module docstring.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._roster: dict[str, PublicKeys] = {}
        self._dealt: dict[str, Sealed] = {}
        self._total = np.zeros(session.size, dtype=np.uint32)
        self._arrived: list[str] = []

    def advertised(self, keys: Mapping[str, PublicKeys]) -> dict[str, PublicKeys]:
        """Keys of the nodes that answered -> the roster that each of them gets."""
        self._roster = {name: keys[name] for name in sorted(keys)}
        check_roster(self.session, self._roster)
        return dict(self._roster)

    def shared(self, dealt: Mapping[str, Sealed]) -> dict[str, dict[str, tuple[bytes, Commitments]]]:
        """What the nodes sent in `share` -> by node, what `mask` needs: its peers' sealed shares and
        hashes.
        """
        for name, sealed in dealt.items():
            peers = set(self._roster)
            if (
                name not in peers
                or set(sealed.commitments) != peers
                or set(sealed.shares) != peers - {name}
                or any([len(part) for part in pair] != [32, 32] for pair in sealed.commitments.values())
            ):
                self.session.abort(f"node {name!r} did not send one share to each of its peers.")
        self.session.require(sorted(dealt), "share")
        self._dealt = {name: dealt[name] for name in sorted(dealt)}
        return {
            holder: {
                dealer: (sealed.shares[holder], sealed.commitments[holder])
                for dealer, sealed in self._dealt.items()
                if dealer != holder
            }
            for holder in self._dealt
        }

    def masked(self, node: str, vector: Vector) -> None:
        """Adds a masked vector, uint32 [size]. A vector that comes a second time is an error of the
        caller's.
        """
        if node not in self._dealt or node in self._arrived:
            self.session.abort(f"node {node!r} sent a vector that nobody waits for.")
        if vector.shape != (self.session.size,) or vector.dtype != np.uint32:
            self.session.abort(
                f"node {node!r} sent {vector.dtype}{list(vector.shape)}, not uint32[{self.session.size}]."
            )
        self._total += vector
        self._arrived.append(node)

    def survivors(self) -> list[str]:
        """Who is in the sum, by name; what `unmask` tells the nodes."""
        self.session.require(sorted(self._arrived), "mask")
        return sorted(self._arrived)

    def unmask(self, answers: Mapping[str, Mapping[str, bytes]]) -> Vector:
        """The sum of the survivors' vectors modulo 2^32, uint32 [size], from what they answered in
        `unmask`.
        """
        session, alive = self.session, self.survivors()
        usable = {name: answers[name] for name in sorted(answers) if name in alive}
        for holder, shares in usable.items():
            if set(shares) != set(self._dealt):
                session.abort(f"node {holder!r} did not answer with one share for each node.")
            for dealer, share in shares.items():
                kind = 0 if dealer in alive else 1
                place = ("seed share", "key share")[kind], *session.place(dealer, holder)
                expected = self._dealt[dealer].commitments[holder][kind]
                if not crypto.same(expected, crypto.commit(share, *place)):
                    session.abort(f"node {holder!r} answered with a wrong share of node {dealer!r}'s secret.")
        if len(usable) < session.threshold:
            session.abort(
                f"{len(usable)} nodes answered 'unmask', and {session.threshold} are needed to take off the "
                "masks."
            )
        holders = sorted(usable)[: session.threshold]
        digest = roster_digest(session, self._roster)
        total = self._total.copy()
        for dealer, sealed in self._dealt.items():
            try:
                secret = crypto.combine_shares({session.point(h): usable[h][dealer] for h in holders})
            except ValueError:
                secret = b""
            if dealer in alive:
                if not crypto.same(sealed.seed, crypto.commit(secret, "seed", *session.place(dealer))):
                    session.abort(f"node {dealer!r} dealt shares that do not give the seed it committed to.")
                total -= self_mask(session, secret)
                continue
            if len(secret) != crypto.KEY_BYTES or not crypto.same(
                crypto.public_key(secret), self._roster[dealer].masking
            ):
                session.abort(f"node {dealer!r} dealt shares that do not give the key it advertised.")
            for peer in alive:
                mask = pair_mask(session, digest, secret, self._roster[peer].masking, dealer, peer)
                if peer < dealer:
                    total -= mask
                else:
                    total += mask
        return total
