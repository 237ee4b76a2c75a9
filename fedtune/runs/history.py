"""How long runs of a kind take on this machine: written after each run, read before a sweep begins.

One line of JSON a run in `runs.jsonl` of the state folder: a hash of the settings that time depends on, a
hash of the machine, seconds and usage; no text, no label and no metric. A kind that this machine has never
run has no estimate: from operation counts it would be off by the factor between a matrix product and a round.

Without the file there is no estimate, so a failure to read or write it is no error. Does not do: estimate a
run that is under way (`fedtune.sweeps.progress`).
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.config.convert import to_dict
from fedtune.config.files import replace_whole, state_dir
from fedtune.config.schema import Config
from fedtune.cost.meter import Cost
from fedtune.cost.prices import Money, price
from fedtune.errors import FedtuneError
from fedtune.runs.record import bought_records

__all__ = ["NAME", "RunEstimate", "RunHistory", "again", "kind", "note_run"]

NAME = "runs.jsonl"
_MOST_LINES = 2000  # the last ones count; a busy machine changes, and the file is read whole
_MOST_BYTES = 2_000_000
_LIKE = 5  # the newest runs of a kind, whose median is taken

# SearchSettings that change what a run gives, and not how long it takes.
_KEEP_DURATION = frozenset(
    [
        "seed",
        "resume",
        "output",
        "data.public",
        "privacy.epsilon",
        "privacy.delta",
        "privacy.max_grad_norm",
        "privacy.head_norm",
        "privacy.head_share",
        "privacy.noise_multiplier",
        "privacy.reproducible_noise",
        "privacy.clip_quantile",
        "train.learning_rate",
        "train.momentum",
        "train.weight_decay",
        "federation.num_rounds",
        "federation.server_learning_rate",
        "federation.server_momentum",
        "federation.max_update_norm",
        "federation.round_timeout",
    ]
)


@dataclass(frozen=True)
class RunEstimate:
    """What one run should take.

    Attributes:
        seconds: wall time of a run by itself.
        again: of another of its kind in the same process, which finds texts encoded and encoder loaded.
        kind: equal for runs that prepare the same.
        money: None where its price or its usage is unknown.
    """

    seconds: float
    again: float
    kind: str
    money: Money | None


def keeps_duration(name: str) -> bool:
    """Whether runs that differ in this setting alone take equally long."""
    return name in _KEEP_DURATION or name.split(".")[0] == "pricing"


def kind(config: Mapping[str, Any]) -> str:
    """Equal for configurations (as nested dictionaries) whose rounds take as long as one another's."""
    left = {}
    for group, value in config.items():
        if isinstance(value, Mapping):
            left[group] = {name: one for name, one in value.items() if not keeps_duration(f"{group}.{name}")}
        elif not keeps_duration(group):
            left[group] = value
    # null is how an older version says what a newer one has a name for
    return _hash({group: _given(value) for group, value in left.items()})


def machine(hardware: Mapping[str, Any]) -> str:
    """Equal for machines that are alike."""
    return _hash({name: hardware.get(name) for name in ("processor", "usable_cores", "memory_bytes")})


def note_run(made: Mapping[str, Any]) -> None:
    """Writes down what the finished run of this record took; not a resumed one, whose time is in parts."""
    rounds = [float(one["seconds"]) for one in made["metrics"]["by_round"]]
    if not rounds or made["run"]["attempt"] != 1:
        return
    cost = made["cost"]
    line = {
        "kind": kind(made["config"]),
        "machine": machine(made["run"]["hardware"]),
        "rounds": len(rounds),
        "seconds": made["run"]["seconds"],
        "in_rounds": sum(rounds),
        "records": bought_records(made),
        "cost": {name: cost[name] for name in ("train_seconds", "bytes_up", "bytes_down", "energy_kwh")},
    }
    try:
        path = state_dir() / NAME
        if path.exists() and path.stat().st_size > _MOST_BYTES:
            lines = path.read_text(encoding="utf-8").splitlines()[-_MOST_LINES // 2 :]
            replace_whole(path, ("\n".join(lines) + "\n").encode(), mode=0o600)
        # Measured times of private runs are among it: for the owner alone.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except (OSError, FedtuneError):
        return


class RunHistory:
    """The runs that this machine has finished.

    Args:
        hardware: as in a record; None: that of this machine.
    """

    def __init__(self, hardware: Mapping[str, Any] | None = None) -> None:
        if hardware is None:
            from fedtune.runs import environment

            hardware = environment.hardware()
        here = machine(hardware)
        self._runs: dict[str, list[Mapping[str, Any]]] = {}
        for one in _lines():
            if one.get("machine") == here:
                self._runs.setdefault(str(one.get("kind")), []).append(one)

    def estimate(self, config: Config) -> RunEstimate | None:
        """The median of the last runs like `config`, for its rounds and prices; None if there is none."""
        name = kind(to_dict(config))
        runs = self._runs.get(name, [])[-_LIKE:]
        try:
            found = [_scaled(run, config) for run in runs]
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None
        if not found:
            return None
        amounts = [money for *_, money in found if money is not None and money.total is not None]
        middle = sorted(amounts, key=lambda money: money.total or 0.0)[len(amounts) // 2] if amounts else None
        outside, in_rounds = [run[0] for run in found], [run[1] for run in found]
        whole = statistics.median(sum(pair) for pair in zip(outside, in_rounds, strict=True))
        return RunEstimate(whole, min(whole, again(outside, in_rounds)), name, middle)


def again(outside: Sequence[float], in_rounds: Sequence[float], processes: int = 1) -> float:
    """Seconds of another run after these, from their seconds outside of rounds and in them.

    The first run of each process prepares for the others (it encodes all texts, say): its time outside of
    rounds does not come again.
    """
    later = sorted(outside)[: len(outside) - processes]
    return statistics.median(in_rounds) + (statistics.median(later) if later else 0.0)


def _scaled(run: Mapping[str, Any], config: Config) -> tuple[float, float, Money | None]:
    """Of a run like `run` by `config`: seconds outside of rounds, in rounds, and money."""
    rounds = int(run["rounds"])
    share = (config.federation.num_rounds or rounds) / rounds
    outside = max(0.0, float(run["seconds"]) - float(run["in_rounds"]))
    in_rounds = share * float(run["in_rounds"])

    def scaled(name: str) -> Any:
        value = run["cost"][name]
        return None if value is None else value * share

    cost = Cost(
        seconds=outside + in_rounds,
        train_seconds=scaled("train_seconds"),
        flops=None,
        peak_memory_bytes=None,
        bytes_up=int(scaled("bytes_up") or 0),
        bytes_down=int(scaled("bytes_down") or 0),
        energy_kwh=scaled("energy_kwh"),
    )
    return outside, in_rounds, price(config.pricing, cost, records=run["records"])


def _lines() -> Sequence[dict[str, Any]]:
    try:
        text = (state_dir() / NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, FedtuneError):
        return []
    found = []
    for line in text.splitlines()[-_MOST_LINES:]:
        try:
            one = json.loads(line)
        except ValueError:
            continue  # half of a line, from a process that was killed
        if isinstance(one, dict):
            found.append(one)
    return found


def _given(value: Any) -> Any:
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
