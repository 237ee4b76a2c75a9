"""What the service counts for Prometheus: never a text, a key or an address."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from fedtune.monitoring.metrics import Exposition
from fedtune.serving.batcher import Batcher
from fedtune.serving.classifier import BATCH_TOKENS
from fedtune.serving.connections import Connections

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = (16, 64, 128, 256, BATCH_TOKENS)


class Metrics(Exposition):
    """What Prometheus is told; of one app alone."""

    def __init__(self, batcher: Batcher, connections: Connections) -> None:
        super().__init__()
        known: dict[str, Any] = {"registry": self.registry}
        asked = ["path", "model"]
        self.requests = Counter(
            "fedtune_requests", "Requests that were answered.", ["path", "model", "status"], **known
        )
        self.texts = Counter("fedtune_texts", "Texts that were asked about.", asked, **known)
        self.tokens = Counter("fedtune_tokens", "Tokens of them.", asked, **known)
        self.seconds = Histogram(
            "fedtune_request_seconds", "From a request to its answer.", ["path"], buckets=_SECONDS, **known
        )
        self.batch_tokens = Histogram("fedtune_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, **known)
        self.batch_texts = Counter("fedtune_batch_texts", "Texts in batches.", **known)
        self.batch_seconds = Histogram(
            "fedtune_batch_seconds", "That a batch took to compute.", buckets=_SECONDS, **known
        )
        for name, what, value in (
            ("fedtune_waiting_tokens", "Tokens accepted and not answered.", lambda: batcher.waiting),
            (
                "fedtune_waiting_tokens_limit",
                "Beyond which requests are refused.",
                lambda: batcher.max_waiting,
            ),
            ("fedtune_workers", "Batches that are being computed.", lambda: batcher.workers),
            ("fedtune_workers_limit", "That are computed at once at most.", lambda: batcher.max_workers),
            ("fedtune_connections", "Connections that are open.", lambda: len(connections)),
            (
                "fedtune_connections_limit",
                "Beyond which one that waits for its client is closed.",
                lambda: connections.most,
            ),
        ):
            Gauge(name, what, **known).set_function(value)
        self.model = Gauge(
            "fedtune_model", "1 for each model that is served.", ["model", "run", "format"], **known
        )
        turned = Counter(
            "fedtune_connections_turned", "Connections closed for others, or refused.", ["how"], **known
        )
        connections.noted = lambda how: turned.labels(how).inc()
        batcher.seen = self._batch

    def _batch(self, texts: int, tokens: int, seconds: float) -> None:
        self.batch_texts.inc(texts)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)
