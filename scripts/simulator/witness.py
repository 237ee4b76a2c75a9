"""What must hold, whatever happens: the witness sees all machines at once, and complains at the first
breach."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from fedtune.federation.client.audit_log import Books
from fedtune.federation.client.policy import SiteSettings
from fedtune.federation.events import FederationResult, RoundSummary
from fedtune.federation.server.rounds import RoundAsk, RoundOutcome
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from scripts.simulator.toys import SIZE

__all__ = ["Violation", "Witness"]


class Violation(AssertionError):
    """Something happened that must not."""


class Witness:
    """Of one simulation. Training is told apart from answers about held-out data, which have rounds below
    0."""

    def __init__(self) -> None:
        self.settings: dict[str, SiteSettings] = {}
        self.touched: dict[tuple[str, str, str], int] = Counter()  # site, run, purpose -> how often
        self.left: dict[tuple[str, str, str], set[str]] = defaultdict(set)  # ... -> contents
        self.made: dict[tuple[str, int], list[np.ndarray]] = defaultdict(
            list
        )  # site, round -> updates or shares
        self.heads: dict[str, str] = {}  # what the server kept of each site's books
        self.rounds: dict[int, np.ndarray] = {}  # aggregates, of the last attempt at each
        self.used: dict[int, list[str]] = {}  # whose updates are in them
        self.told = 0  # the last round of which the person at the keyboard was told
        self.gave: set[int] = set()  # rounds that were told as not void
        self._unique = itertools.count(1)

    # --- at a site

    def trains(self, site: str, run: str, round: int, share: np.ndarray | None) -> np.ndarray:
        """Data is touched, here and now. Returns what is made of it."""
        purpose = "evaluation" if round < 0 else "training"
        key = site, run, purpose
        self.touched[key] += 1
        charged = self._charged(site, run, purpose)
        if charged < self.touched[key]:
            raise Violation(
                f"{site} touches data the {self.touched[key]}. time ({purpose}), and {charged} are charged"
            )
        if share is None:
            share = np.linspace(0.1, 0.3, SIZE, dtype=np.float32) + np.float32(next(self._unique) / 4096)
        if round > 0:
            self.made[site, round].append(np.array(share))
        return share

    def leaves(self, site: str, run: str, answer: Message) -> None:
        """An answer leaves a site."""
        if not answer.has_content():
            return
        content = answer.content
        counts = content.config_records.get("evaluation")
        if counts is not None and (counts.get("right") or counts.get("wrong")):
            self._left(site, run, "evaluation", repr(sorted(counts.items())).encode())
        for record in content.array_records.values():
            self._left(site, run, "training", b"".join(array.data for array in record.values()))

    def _left(self, site: str, run: str, purpose: str, content: bytes) -> None:
        left = self.left[site, run, purpose]
        left.add(hashlib.sha256(content).hexdigest())
        charged = self._charged(site, run, purpose)
        if len(left) > charged:
            raise Violation(f"{len(left)} releases ({purpose}) have left {site}, and {charged} are charged")

    def _charged(self, site: str, run: str, purpose: str) -> int:
        ledger = PrivacyLedger.open(Path(self.settings[site].ledger), require_budget=True)
        return len(ledger.rounds(run=run, node=site, purpose=purpose))

    def books(self, site: str, *, spare: int | None = None, planned: int | None = None) -> None:
        """The books of a site that has just started (or of which nothing but the disk is left).

        `spare`: for how many releases it may be charged that it did not begin; `planned`: releases of one
        run.
        """
        settings = self.settings[site]
        books = Books(Path(settings.ledger), Path(settings.audit_log))
        ledger = PrivacyLedger.open(Path(settings.ledger), require_budget=True)
        wrong = [
            *ledger.verify()[1],
            *books.log.verify(),
            *(one for part in books.problems() for one in part),
        ]
        if site in self.heads:
            wrong += books.against(self.heads[site])
        if wrong:
            raise Violation(f"the books of {site} do not verify: {' '.join(wrong)}")
        charged = Counter((release.run, release.purpose) for release in ledger.releases())
        for (whose, run, purpose), count in self.touched.items():
            if whose != site:
                continue
            have = charged[run, purpose]
            if have < count:
                raise Violation(
                    f"{site} has touched data {count} times ({purpose}), and {have} are on its disk"
                )
            if spare is not None and have > count + spare:
                raise Violation(f"{site} was charged {have} times ({purpose}) for {count}; {spare} failures")
            if planned is not None and purpose == "training" and have > planned:
                raise Violation(f"{site} was charged {have} rounds of a run of {planned}")

    # --- at the server

    def started(self, info: dict[str, Any]) -> None:
        """A run begins, or goes on."""
        if info["first_round"] <= self.told:
            raise Violation(
                f"round {self.told} was told, and the run goes on with round {info['first_round']}"
            )

    def tells(self, summary: RoundSummary) -> None:
        """The person at the keyboard is told of a round."""
        self.told = summary.round
        if not summary.void:
            self.gave.add(summary.round)

    def summed(self, ask: RoundAsk, outcome: RoundOutcome) -> None:
        """A round is over."""
        names = sorted(outcome.used)
        if outcome.aggregate is None:
            return
        # A trusted server counts an answer that failed as zero: it is used, and nothing was released.
        clipped = ask.plan.mechanism.round == "clipped"
        self.rounds[ask.round] = np.array(outcome.aggregate)
        self.used[ask.round] = [] if clipped else names
        if clipped:
            return  # noised at the server
        candidates = itertools.product(*(self.made[name, ask.round] for name in names))
        if not any(self._is_sum(ask, names, parts, outcome.aggregate) for parts in candidates):
            raise Violation(f"round {ask.round}: the aggregate is not that of what {', '.join(names)} made")

    @staticmethod
    def _is_sum(
        ask: RoundAsk, names: Sequence[str], parts: Sequence[np.ndarray], aggregate: np.ndarray
    ) -> bool:
        if ask.plan.mechanism.round == "plain":
            sizes = {node.name: node.declared_size for node in ask.nodes}
            weights = dict(zip(sizes, ask.plan.aggregation_weights(list(sizes), sizes), strict=True))
            total = sum(
                weights[name] * part.astype(np.float64) for name, part in zip(names, parts, strict=True)
            )
            return np.allclose(aggregate, total / sum(weights[name] for name in names), rtol=0, atol=1e-12)
        whole = np.zeros(SIZE, dtype=np.uint32)
        for part in parts:
            whole = whole + part
        average = ask.plan.average(DiscreteMechanism.for_plan(ask.plan, SIZE).decode(whole))
        return np.allclose(aggregate, -average, rtol=0, atol=1e-12)

    def ended(self, result: FederationResult, *, adds: bool) -> None:
        """A run is over. `adds`: its optimizer adds the aggregates up."""
        gave = {summary.round for summary in result.history if not summary.void}
        if lost := self.gave - gave:
            raise Violation(f"rounds {sorted(lost)} were told, and are not in the result")
        if adds:
            expected = sum((self.rounds[round] for round in gave), np.zeros(SIZE))
            if not np.allclose(result.adapter, expected, rtol=0, atol=1e-4):
                raise Violation(f"the result is {result.adapter}, and its rounds add up to {expected}")
        for name, count in result.releases.items():
            if count < sum(name in self.used[round] for round in gave):
                raise Violation(f"{count} releases of {name} are in the account of a result made of more")
        counted = [summary.round for summary in result.history]
        if counted != list(range(1, len(counted) + 1)):
            raise Violation(f"the history has the rounds {counted}")
