"""What a run used: wall seconds, FLOPs, peak memory, bytes on the wire, energy.

A `Cost` is a plain sum type: `a + b` is what doing both costs, one after the other (times, FLOPs, bytes
and energy add up, peaks take the maximum), `Cost()` changes nothing, and *unknown* (`None`) stays unknown
whatever is added to it. So a number in a report is measured, or absent; never a guess for a missing part.

`Meter` measures what this process can see by itself: time, peak memory, energy. FLOPs come from the
training layer (torch's own counter), bytes from the engine (the serialized messages), and both are handed
in. Energy is an **estimate** by codecarbon (an optional extra): it reads the processor's counters where it
may, and a table of typical powers times utilisation where it may not, over the whole machine. Its start
takes seconds, so it starts in a thread beside the run, and what it missed is shown (`covered_seconds`).

Does not do: money (`fedtune.cost.prices`), memory of other machines, energy of the network or the server
room. With engine ray the memory of the worker processes is sampled, so a short peak may be missed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import resource
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Cost", "EnergyReading", "Meter", "machine_peak_bytes"]

# Linux's own files, for psutil knows no peak, and cannot begin a new one.
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What something cost; `None` means unknown, and unknown plus anything is unknown.

    Attributes:
        seconds: wall time, in seconds.
        train_seconds: time that nodes spent training, summed over the nodes, in seconds.
        flops: floating point operations of the training, as torch counts them.
        peak_memory_bytes: highest resident memory of the process (and its workers), in bytes.
        peak_device_bytes: highest memory allocated on the accelerator, in bytes; 0 without one.
        bytes_up: serialized bytes from the nodes to the server.
        bytes_down: serialized bytes from the server to the nodes.
        energy_kwh: estimated energy of the whole machine, in kilowatt hours.
    """

    seconds: float | None = 0.0
    train_seconds: float | None = 0.0
    flops: int | None = 0
    peak_memory_bytes: int | None = 0
    peak_device_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    energy_kwh: float | None = 0.0

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(
            seconds=_sum(self.seconds, other.seconds),
            train_seconds=_sum(self.train_seconds, other.train_seconds),
            flops=None if self.flops is None or other.flops is None else self.flops + other.flops,
            peak_memory_bytes=(
                None
                if self.peak_memory_bytes is None or other.peak_memory_bytes is None
                else max(self.peak_memory_bytes, other.peak_memory_bytes)
            ),
            peak_device_bytes=max(self.peak_device_bytes, other.peak_device_bytes),
            bytes_up=self.bytes_up + other.bytes_up,
            bytes_down=self.bytes_down + other.bytes_down,
            energy_kwh=_sum(self.energy_kwh, other.energy_kwh),
        )


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True)
class EnergyReading:
    """An energy estimate, or the reason why there is none.

    Attributes:
        kwh: kilowatt hours of the whole machine over `covered_seconds`; None where nothing was measured.
        note: how the number came about, or why there is none; fit to be shown beside it.
        covered_seconds: the part of the run that the estimate covers.
        start_seconds: what starting the estimator took, beside the run and not before it.
    """

    kwh: float | None
    note: str
    covered_seconds: float = 0.0
    start_seconds: float = 0.0


class Meter:
    """Measures one run in this process. Use as a context manager; `energy=False` leaves codecarbon out.

    Args:
        energy: estimate energy with codecarbon, if it is installed.
        children: count the memory of child processes too (engine ray), by sampling twice a second.
    """

    def __init__(self, *, energy: bool = True, children: bool = False) -> None:
        self._energy = _EnergyThread() if energy else None
        self._children = _ChildMemory() if children else None
        self._started = 0.0
        self._stopped: float | None = None
        self._reset = False
        self._peak: int | None = None
        self._device = 0
        self.energy = EnergyReading(None, "energy was not asked for")

    def __enter__(self) -> Meter:
        self._started = time.perf_counter()
        self._reset = _reset_peak()
        _reset_device_peak()
        if self._energy is not None:
            self._energy.start()
        if self._children is not None:
            self._children.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the measurement; a second call changes nothing."""
        if self._stopped is not None:
            return
        self._stopped = time.perf_counter()
        self._peak, self._device = machine_peak_bytes(), _device_peak()
        if self._energy is not None:
            self.energy = self._energy.finish()
        if self._children is not None:
            self._children.finish()

    @property
    def seconds(self) -> float:
        """Wall seconds from entering until now, or until `stop`."""
        return (self._stopped if self._stopped is not None else time.perf_counter()) - self._started

    @property
    def peak_memory_note(self) -> str:
        """What the peak of `cost()` covers."""
        own = "this run" if self._reset else "the whole life of the process"
        return f"peak resident memory over {own}" + (", workers sampled" if self._children else "")

    def cost(
        self, *, train_seconds: float = 0.0, flops: int | None = None, bytes_up: int = 0, bytes_down: int = 0
    ) -> Cost:
        """The measured cost, with what other layers counted filled in; until now, or until `stop`."""
        running = self._stopped is None
        peak = machine_peak_bytes() if running else self._peak
        if peak is not None and self._children is not None:
            peak += self._children.peak
        return Cost(
            seconds=self.seconds,
            train_seconds=train_seconds,
            flops=flops,
            peak_memory_bytes=peak,
            peak_device_bytes=_device_peak() if running else self._device,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            energy_kwh=self.energy.kwh,
        )


def machine_peak_bytes() -> int:
    """Highest resident memory of this process in bytes, since the last reset."""
    try:
        with _STATUS.open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _reset_peak() -> bool:
    """Sets Linux's high-water mark to the present size, so that a sweep's runs do not share one peak."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _cuda() -> Any:
    """torch.cuda if torch is loaded and has a device; never imports torch by itself."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda


def _reset_device_peak() -> None:
    cuda = _cuda()
    if cuda is not None and cuda.is_initialized():
        cuda.reset_peak_memory_stats()


def _device_peak() -> int:
    cuda = _cuda()
    return int(cuda.max_memory_allocated()) if cuda is not None and cuda.is_initialized() else 0


class _EnergyThread:
    """codecarbon's tracker, started beside the run: its start takes seconds and may fail, the run may not."""

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._start, name="fedtune-energy", daemon=True)
        self._tracker: Any = None
        self._failure: str | None = None
        self._start_seconds = 0.0

    def start(self) -> None:
        if importlib.util.find_spec("codecarbon") is None:
            self._failure = "no energy estimate: codecarbon is not installed (pip install 'fedtune[energy]')"
            return
        self._thread.start()

    def _start(self) -> None:
        begun = time.perf_counter()
        try:
            import codecarbon

            # Its import sets the level to INFO, and the tracker writes before it reads log_level.
            logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
            tracker = codecarbon.OfflineEmissionsTracker(
                country_iso_code="USA",  # it insists on one for carbon; only its energy is used here
                log_level="critical",
                save_to_file=False,
                allow_multiple_runs=True,
                tracking_mode="machine",
                measure_power_secs=15,
            )
            tracker.start()
            self._tracker = tracker
        except Exception as error:  # whatever an optional estimator does, the run goes on
            self._failure = f"no energy estimate: codecarbon failed ({type(error).__name__}: {error})"
        self._start_seconds = time.perf_counter() - begun

    def finish(self, wait_seconds: float = 5.0) -> EnergyReading:
        if self._failure is None and self._thread.ident is not None:
            self._thread.join(wait_seconds)
            if self._thread.is_alive():
                return EnergyReading(
                    None, f"no energy estimate: codecarbon did not start in {wait_seconds:.0f} s"
                )
        if self._failure is not None:
            return EnergyReading(None, self._failure, start_seconds=self._start_seconds)
        if self._tracker is None:
            return EnergyReading(None, "no energy estimate: the meter was never started")
        try:
            self._tracker.stop()
            data = self._tracker.final_emissions_data
            kwh, covered = float(data.energy_consumed), float(data.duration)
            version = str(data.codecarbon_version)
        except Exception as error:
            return EnergyReading(
                None,
                f"no energy estimate: codecarbon failed ({type(error).__name__}: {error})",
                start_seconds=self._start_seconds,
            )
        if not 0.0 <= kwh < float("inf"):
            return EnergyReading(None, f"no energy estimate: codecarbon said {kwh} kWh")
        note = f"estimate by codecarbon {version}, whole machine, over {covered:.0f} s"
        return EnergyReading(kwh, note, covered, self._start_seconds)


class _ChildMemory:
    """The highest sum of resident memory over all child processes, sampled twice a second."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fedtune-memory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)

    def _watch(self) -> None:
        process = psutil.Process(os.getpid())
        while True:
            total = 0
            for child in process.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:  # it ended between the listing and the look
                    continue
            self.peak = max(self.peak, total)
            if self._done.wait(0.5):
                return
