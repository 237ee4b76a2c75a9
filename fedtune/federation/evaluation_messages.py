"""What a node answers when it is asked how right the model is on data that it holds out.

The question is a `RoundRequest` (adapter, plan, run, round, attempt), as for training. The answer is what
`EVALUATION_KEYS` lists: two noised counts and how many such answers the node has given in this run, which
the server knows. No seconds: how long evaluation takes depends on how much is held out. Checked on
arrival as everything is (`fedtune.federation.messages`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import RecordDict

from fedtune.errors import FederationError, UpdateRejected
from fedtune.federation.messages import VERSION, only_records, publishable_record, read_config

__all__ = ["EVALUATION_KEYS", "EvaluationReply"]

EVALUATION_KEYS: Mapping[str, type] = {
    "version": int, "node": str, "run": str, "round": int, "attempt": int, "answers": int, "right": int,
    "wrong": int, "refused": str, "refusal": str, "error": str,
}  # fmt: skip
_COUNTS = ("right", "wrong")
_MAX_TEXT = 2000
_MAX_COUNT = 2**62


@dataclass(frozen=True)
class EvaluationReply:
    """Two noised counts, or why there are none. Exactly one of counts, refused and error is set.

    `counts` are in steps of the plan (`EvaluationPlan.scale` of them are one unit), noised, and may be
    negative. `answers` counts this run's answers in the node's ledger. `refused`, `refusal` and `error`
    as in `RoundReply`.
    """

    node: str
    run: str
    round: int
    attempt: int
    answers: int = 0
    counts: tuple[int, int] | None = None  # right, wrong
    refused: str | None = None
    refusal: str | None = None
    error: str | None = None

    def to_records(self) -> RecordDict:
        """Inverse of `from_records`; sends nothing that is not in `EVALUATION_KEYS`."""
        right, wrong = self.counts or (0, 0)
        values: dict[str, Any] = {
            "version": VERSION,
            "node": self.node,
            "run": self.run,
            "round": self.round,
            "attempt": self.attempt,
            "answers": self.answers,
            "right": right,
            "wrong": wrong,
            "refused": (self.refused or "")[:_MAX_TEXT],
            "refusal": self.refusal or "",
            "error": (self.error or "")[:_MAX_TEXT],
        }
        return RecordDict({"evaluation": publishable_record("evaluation", values)})

    @classmethod
    def from_records(
        cls, content: RecordDict, *, node: str, run: str, round: int, attempt: int
    ) -> EvaluationReply:
        """Raises UpdateRejected, which names `node` and `round`, if anything is missing, unknown, of another
        type, too large, or an answer to another question."""
        what = f"The answer of node {node!r} about its held-out data after round {round}"
        try:
            only_records(content, {"evaluation"}, what)
            values = read_config(content, "evaluation", EVALUATION_KEYS, what, signed=_COUNTS)
        except FederationError as error:
            raise UpdateRejected(str(error)) from error
        for key, expected in (("node", node), ("run", run), ("round", round), ("attempt", attempt)):
            if values[key] != expected:
                raise UpdateRejected(f"{what} is for {key} {values[key]!r}, and {expected!r} was asked.")
        if max(abs(values[key]) for key in _COUNTS) > _MAX_COUNT:
            raise UpdateRejected(f"{what} counts more than there can be.")
        refused, refusal, failed = (values[key] or None for key in ("refused", "refusal", "error"))
        if refused is not None and failed is not None:
            raise UpdateRejected(f"{what} should be one of two counts, a refusal and an error.")
        counted = refused is None and failed is None
        return cls(
            node=node,
            run=run,
            round=round,
            attempt=attempt,
            answers=values["answers"],
            counts=(values["right"], values["wrong"]) if counted else None,
            refused=refused,
            refusal=refusal,
            error=failed,
        )
