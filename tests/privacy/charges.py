"""What a ledger has charged to data, for tests that compare it with what was released."""

from __future__ import annotations

from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.ledger.identity import Identity
from fedtune.privacy.ledger.ledger import PrivacyLedger

__all__ = ["charged"]


def charged(ledger: PrivacyLedger, dataset: str, fingerprint: str | Identity) -> dict[Term, int] | None:
    """Everything that was charged to data all keys of which have one history."""
    histories = ledger.account(dataset=dataset, fingerprint=fingerprint).histories()
    assert len(histories) <= 1
    return compose_terms(*(run.charged for runs in histories for run in runs))
