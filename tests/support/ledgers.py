"""Made-up data as a ledger takes it, and what a ledger has charged to data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.ledger.identity import Identity, mark_of
from fedtune.privacy.ledger.ledger import PrivacyLedger

__all__ = ["charged", "identity"]


def identity(
    texts: Iterable[object], persons: Sequence[str] | None = None, fingerprint: str = ""
) -> Identity:
    """The records `texts`; `persons` are those that the data names."""
    marks = b"".join(mark_of((f"text {text}", None)) for text in texts)
    return Identity(np.frombuffer(marks, dtype=np.uint8).reshape(-1, 32), persons, fingerprint or "print")


def charged(ledger: PrivacyLedger, dataset: str, fingerprint: str | Identity) -> dict[Term, int] | None:
    """Everything that was charged to data all keys of which have one history."""
    histories = ledger.account(dataset=dataset, fingerprint=fingerprint).histories()
    assert len(histories) <= 1
    return compose_terms(*(run.charged for runs in histories for run in runs))
