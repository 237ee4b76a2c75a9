"""What `fedtune node` counts, and what it answers on its administrator's port (`--monitor`).

    /healthz   the process answers its messages or waits for the server;   /readyz   it has joined
    /metrics   for Prometheus;   /   the same

What is counted may be stored for years and be seen by more people than this site's, so it passes the same
door as what leaves the site: messages, bytes and refusals, which the server sees too; of the budget what
node.yaml says may be published, as it was reported last. How long answers took depends on private records and
is told of public data only. No count, label, loss or accuracy of this site's data is ever here.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fedtune.federation.client.policy import SiteSettings
from fedtune.monitoring.endpoint import PORT, Page, endpoint, watched

if TYPE_CHECKING:
    from fedtune.monitoring.metrics import Reading

__all__ = ["PORT", "NodeActivity", "monitor", "readings"]

_KINDS = ("train", "hello", "propose", "evaluate")
_SILENT_SECONDS = 300.0  # without a step of the message loop, beyond the owner's limit for one message


class NodeActivity:
    """What a node has done since it started. Any thread may count or read.

    Attributes:
        joined: whether the server has let it in, and the connection stands.
        answers: by the message's kind and `answered`, `refused` or `died` (the worker did).
        seconds: that answers took, by the message's kind.
        received: bytes of messages.
        sent: bytes of answers.
        budget: what was last published of the budget; None: nothing.
        step: when the message loop did something last (`time.monotonic`).
    """

    def __init__(self) -> None:
        self.joined, self.received, self.sent = False, 0, 0
        self.answers: Counter[tuple[str, str]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.budget: dict[str, Any] | None = None
        self.step = time.monotonic()
        self._lock = threading.Lock()

    def answered(self, message_type: str, how: str, seconds: float) -> None:
        """Counts an answer. A server may send any `message_type`: one that is not known is `other`."""
        word = message_type.rpartition(".")[2]
        kind = "secagg" if word.startswith("secagg_") else word if word in _KINDS else "other"
        with self._lock:
            self.answers[kind, how] += 1
            self.seconds[kind] += seconds

    def transferred(self, *, received: int = 0, sent: int = 0) -> None:
        """Counts bytes; several threads send at once."""
        with self._lock:
            self.received += received
            self.sent += sent


def readings(activity: NodeActivity, worker_runs: Callable[[], bool]) -> Iterator[Reading]:
    """All metrics of a node; `fedtune.monitoring.metrics.Readings` leaves out what may not be told."""
    yield "fedtune_node_joined", "1 while the server lets it in.", (), [((), float(activity.joined))]
    yield "fedtune_node_worker_running", "1 while its worker runs.", (), [((), float(worker_runs()))]
    answers = [(words, float(count)) for words, count in activity.answers.copy().items()]
    yield "fedtune_node_answers_total", "Messages that were answered.", ("message", "answer"), answers
    yield "fedtune_node_received_bytes_total", "Bytes of messages.", (), [((), float(activity.received))]
    yield "fedtune_node_sent_bytes_total", "Bytes of answers.", (), [((), float(activity.sent))]
    seconds = [((kind,), value) for kind, value in dict(activity.seconds).items()]
    yield "fedtune_node_answer_seconds_total", "What answering took; public data.", ("message",), seconds
    if (budget := activity.budget) is not None:
        left = [((), float(budget["epsilon_left"]))]
        yield "fedtune_node_epsilon_left", "What is left of the budget, as it is published.", (), left
        yield "fedtune_node_epsilon_budget", "That budget.", (), [((), float(budget["epsilon"]))]


def monitor(
    listen: str, site: SiteSettings, activity: NodeActivity, worker_runs: Callable[[], bool]
) -> AbstractContextManager[str]:
    """The administrator's port of a node; see `fedtune.monitoring.endpoint.endpoint`."""
    from fedtune.monitoring.metrics import Exposition, Readings  # late: only who is watched needs it

    exposition = Exposition()
    Readings(
        exposition, "node_metrics", lambda: readings(activity, worker_runs), public_data=site.data.public
    )
    longest = site.limits.message_seconds + _SILENT_SECONDS

    def lives() -> bool:
        return not activity.joined or time.monotonic() - activity.step < longest

    pages = watched(exposition.page, lives, lambda: activity.joined)
    return endpoint(listen, {"/": lambda _: Page(exposition.page()), **pages})
