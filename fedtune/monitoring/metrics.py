"""What a process counts for Prometheus: never a text, a key, an address, or what private records alone show.

What tells of a federation passes the door of `fedtune.privacy.publication`: `Readings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fedtune.privacy.publication import publish

__all__ = ["Exposition", "Reading", "Readings"]

# Of one metric: its name (a counter's ends with `_total`), what it is, its labels' names, and its lines: the
# labels' values, and the number.
Reading = tuple[str, str, tuple[str, ...], Iterable[tuple[tuple[str, ...], float]]]


class Exposition:
    """What Prometheus is told; of one process' part alone.

    Attributes:
        registry: where metrics are made; this process' own memory, processor time and files are there.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

    def page(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self.registry)


class Readings(Collector):
    """Metrics that are read when Prometheus asks, so that a site or a run that is gone leaves no line.

    Args:
        exposition: that they are added to.
        sink: of `fedtune.privacy.publication`, in which each is declared by its name: what is declared
            `local` is left out unless the data is public, and so is what is declared nowhere.
        read: reads them all.
        public_data: whether the data's owner declared it public.
    """

    def __init__(
        self,
        exposition: Exposition,
        sink: str,
        read: Callable[[], Iterable[Reading]],
        *,
        public_data: bool = False,
    ) -> None:
        self._sink, self._read, self._public_data = sink, read, public_data
        exposition.registry.register(self)

    def describe(self) -> list[Any]:
        """Nothing before it is asked: reading may need a database that is not there yet."""
        return []

    def collect(self) -> Iterable[Any]:
        """prometheus_client's interface."""
        readings = {name: (what, labels, lines) for name, what, labels, lines in self._read()}
        published, own = publish(self._sink, readings, public_data=self._public_data)
        for name in published:
            if name in own:
                continue
            what, labels, lines = readings[name]
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, what, labels=labels)
            for values, value in lines:
                family.add_metric(values, value)
            yield family
