"""What a round of secure aggregation sends: four requests, four answers, each checked on arrival.

Every record says its version, run, round, attempt and phase, and has exactly the keys of `ASKS` or `ANSWERS`:
public keys, sealed shares, hashes, and one masked vector of 32-bit integers. A test watches the wire. The
request for the vector is an ordinary `RoundRequest` with one record more, and its answer an ordinary
`RoundReply`'s record with the vector in place of the update.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from fedtune.errors import FederationError, PrivacyError, UpdateRejected
from fedtune.federation.messages import REPLY_KEYS, VERSION, RoundReply, publishable_record, read_config
from fedtune.federation.secagg.protocol import PublicKeys, Sealed, Session
from fedtune.privacy.mechanisms.distributed import Distributed
from fedtune.privacy.plan import PrivacyPlan

__all__ = [
    "ANSWERS",
    "ASKS",
    "KINDS",
    "PHASES",
    "PhaseId",
    "advertise_ask",
    "mask_answer",
    "mask_ask",
    "phase_records",
    "read_keys",
    "read_mask_answer",
    "read_received",
    "read_record",
    "read_roster",
    "read_sealed",
    "read_shares",
    "session_for",
    "share_answer",
    "share_ask",
    "split_mask_ask",
    "unmask_ask",
]

PHASES = ("advertise", "share", "mask", "unmask")
KINDS = {phase: f"{'train' if phase == 'mask' else 'query'}.secagg_{phase}" for phase in PHASES}
_PLACE: Mapping[str, type] = {"version": int, "run": str, "round": int, "attempt": int, "phase": str}
_DEALT: Mapping[str, type] = {"names": list, "sealed": list, "seed_hashes": list, "key_hashes": list}
ASKS: Mapping[str, Mapping[str, type]] = {
    "advertise": {**_PLACE, "plan": str, "size": int, "names": list},
    "share": {**_PLACE, "names": list, "sealing": list, "masking": list},
    "mask": {**_PLACE, **_DEALT},
    "unmask": {**_PLACE, "names": list},
}
ANSWERS: Mapping[str, Mapping[str, type]] = {
    "advertise": {**_PLACE, "sealing": bytes, "masking": bytes},
    "share": {**_PLACE, **_DEALT, "seed": bytes},
    "mask": {**_PLACE},
    "unmask": {**_PLACE, "names": list, "shares": list},
}
_NAME = "secagg"
Received = dict[str, tuple[bytes, tuple[bytes, bytes]]]


@dataclass(frozen=True)
class PhaseId:
    """Which attempt of which round a message belongs to, and which exchange of it."""

    run: str
    round: int
    attempt: int
    phase: str


def session_for(phase_id: PhaseId, plan: PrivacyPlan, names: Sequence[str], size: int) -> Session:
    """The Session that `plan` gives for the nodes that were asked; nodes of the plan that were not asked are
    dropouts already.

    Raises:
        PrivacyError: that many dropouts and colluders cannot be had together.
        FederationError: there are more nodes than planned, or too few.
    """
    mechanism = plan.mechanism
    if not isinstance(mechanism, Distributed):
        raise PrivacyError(f"A secure sum is for trust=distributed; this plan has trust={plan.trust}.")
    missing = plan.nodes - len(names)
    if missing < 0:
        raise FederationError(
            f"{len(names)} nodes are asked, and the noise was shared out over {plan.nodes}. Start a new run."
        )
    if missing > mechanism.max_dropouts:
        raise FederationError(
            f"{missing} of {plan.nodes} nodes are missing before round {phase_id.round} begins, and the "
            f"noise covers privacy.max_dropouts={mechanism.max_dropouts}. Bring them back, or start a new "
            "run without them."
        )
    left = mechanism.max_dropouts - missing
    # Of two nodes, one that sides with the server knows the other's part of the sum whatever the masks are;
    # its noise is full (`Distributed.honest_shares`).
    colluders = 0 if len(names) == 2 and mechanism.max_colluders == 1 else mechanism.max_colluders
    return Session(phase_id.run, phase_id.round, phase_id.attempt, tuple(names), size, left, colluders)


def phase_records(phase_id: PhaseId, **values: Any) -> RecordDict:
    """A record of `values` for this phase; the asks that carry no adapter are made of the same."""
    fixed: dict[str, Any] = {
        "version": VERSION,
        "run": phase_id.run,
        "round": phase_id.round,
        "attempt": phase_id.attempt,
    }
    return RecordDict({_NAME: publishable_record("secagg", {**fixed, "phase": phase_id.phase, **values})})


def read_record(
    content: RecordDict, keys: Mapping[str, type], phase: str, what: str
) -> tuple[PhaseId, dict[str, Any]]:
    """Phase and values of the record in `content`, with exactly `keys` of exactly these types.

    Raises:
        FederationError: it is anything else; it says whose message (`what`) it was.
    """
    values = read_config(content, _NAME, keys, what)
    lengths = {len(values[key]) for key, kind in keys.items() if kind is list}
    if len(lengths) > 1 or ("names" in keys and len(set(values["names"])) != len(values["names"])):
        raise FederationError(f"{what} lists nodes twice, or lists of different lengths.")
    if values["phase"] != phase:
        raise FederationError(f"{what} is for {values['phase']!r}, and {phase!r} was expected.")
    return PhaseId(values["run"], values["round"], values["attempt"], phase), values


def advertise_ask(phase_id: PhaseId, plan: PrivacyPlan, names: Sequence[str], size: int) -> RecordDict:
    """Asks for fresh keys, and says what will be asked for afterwards."""
    text = json.dumps(plan.to_json(), sort_keys=True)
    return phase_records(phase_id, plan=text, size=size, names=list(names))


def read_keys(values: Mapping[str, Any]) -> PublicKeys:
    """The keys in an answer to `advertise`."""
    return PublicKeys(values["sealing"], values["masking"])


def share_ask(phase_id: PhaseId, roster: Mapping[str, PublicKeys]) -> RecordDict:
    """Shows all advertised keys and asks for sealed shares."""
    return phase_records(
        phase_id,
        names=list(roster),
        sealing=[keys.sealing for keys in roster.values()],
        masking=[keys.masking for keys in roster.values()],
    )


def read_roster(values: Mapping[str, Any]) -> dict[str, PublicKeys]:
    """Inverse of `share_ask`."""
    rows = zip(values["names"], values["sealing"], values["masking"], strict=True)
    return {name: PublicKeys(sealing, masking) for name, sealing, masking in rows}


def share_answer(phase_id: PhaseId, dealt: Sealed) -> RecordDict:
    """A node's sealed shares; the one for itself is not sent and its place is empty."""
    names = list(dealt.commitments)
    return phase_records(
        phase_id,
        names=names,
        sealed=[dealt.shares.get(name, b"") for name in names],
        seed_hashes=[dealt.commitments[name][0] for name in names],
        key_hashes=[dealt.commitments[name][1] for name in names],
        seed=dealt.seed,
    )


def read_received(values: Mapping[str, Any]) -> Received:
    """Sealed shares with their hashes, by name: of the dealers in the ask, of the holders in the answer."""
    rows = zip(values["names"], values["sealed"], values["seed_hashes"], values["key_hashes"], strict=True)
    return {name: (sealed, (first, second)) for name, sealed, first, second in rows}


def read_sealed(values: Mapping[str, Any]) -> Sealed:
    """Inverse of `share_answer`."""
    rows = read_received(values)
    shares = {name: sealed for name, (sealed, _) in rows.items() if sealed}
    return Sealed(shares, {name: hashes for name, (_, hashes) in rows.items()}, values["seed"])


def mask_ask(phase_id: PhaseId, request: RecordDict, received: Received) -> RecordDict:
    """A round's request with the peers' shares for this node."""
    more = phase_records(
        phase_id,
        names=list(received),
        sealed=[sealed for sealed, _ in received.values()],
        seed_hashes=[hashes[0] for _, hashes in received.values()],
        key_hashes=[hashes[1] for _, hashes in received.values()],
    )
    return RecordDict({**request, **more})


def split_mask_ask(content: RecordDict) -> tuple[RecordDict, RecordDict]:
    """The two parts of `mask_ask`: the round's request, and the record of secure aggregation."""
    return (
        RecordDict({name: record for name, record in content.items() if name != _NAME}),
        RecordDict({name: record for name, record in content.items() if name == _NAME}),
    )


def mask_answer(
    phase_id: PhaseId, reply: RoundReply, masked: np.ndarray, *, public_data: bool = False
) -> RecordDict:
    """The masked vector, uint32 [P], with what an ordinary reply of such data tells."""
    vector = ArrayRecord({"masked": Array(np.ascontiguousarray(masked, dtype=np.uint32))})
    head = reply.to_records(public_data=public_data)
    return RecordDict({**head, **phase_records(phase_id), "masked": vector})


def read_mask_answer(
    content: RecordDict, *, node: str, phase_id: PhaseId, size: int
) -> tuple[RoundReply, np.ndarray | None]:
    """The reply and the masked vector; None where the node refused or failed, which the reply then says.

    Raises:
        UpdateRejected: it is neither, or of another form; it names the node.
    """
    what = f"The answer of node {node!r} in round {phase_id.round}"
    try:
        if "masked" not in content:
            return RoundReply.from_records(
                content, node=node, run=phase_id.run, round=phase_id.round, attempt=phase_id.attempt
            ), None
        if set(content) != {"reply", _NAME, "masked"}:
            raise FederationError(f"{what} carries records that nobody asked for: {sorted(content)}.")
        where, _ = read_record(content, ANSWERS["mask"], "mask", what)
        values = read_config(content, "reply", REPLY_KEYS, what)
        if where != phase_id or values["node"] != node:
            raise FederationError(f"{what} is of node {values['node']!r} for {where}.")
        record = content["masked"]
        array = record["masked"] if isinstance(record, ArrayRecord) and list(record) == ["masked"] else None
        # The header is checked before anything is allocated by it.
        if array is None or (array.dtype, tuple(array.shape)) != ("uint32", (size,)):
            raise FederationError(f"{what} has no vector uint32[{size}].")
        if not 4 * size <= len(array.data) <= 4 * size + 1024:
            raise FederationError(f"{what} has a vector of {len(array.data)} bytes for {size} numbers.")
        vector = array.numpy()
        if vector.dtype != np.uint32 or vector.shape != (size,):
            raise FederationError(f"{what} has a vector {vector.dtype}{list(vector.shape)}.")
    except (FederationError, ValueError, TypeError, EOFError) as error:
        raise UpdateRejected(str(error)) from error
    counts = {key: values[key] for key in ("releases", "steps", "seconds")}
    reply = RoundReply(node, phase_id.run, phase_id.round, phase_id.attempt, **counts)
    return reply, vector


def unmask_ask(phase_id: PhaseId, survivors: Sequence[str]) -> RecordDict:
    """Says whose vectors arrived, and asks for shares."""
    return phase_records(phase_id, names=list(survivors))


def read_shares(values: Mapping[str, Any]) -> dict[str, bytes]:
    """The shares in an answer to `unmask`, by whose secret they are of."""
    return dict(zip(values["names"], values["shares"], strict=True))
