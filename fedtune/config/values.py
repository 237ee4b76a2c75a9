"""Which values each setting may take: one table, read by the checks, by the help and by the tests.

A setting is named as on the command line (`train.sample_rate`). What the table does not list may be
any value of the type that `fedtune.config.schema` declares. Rules that need two settings at once are in
`fedtune.config.convert.check_together`; rules that need the data (delta against the number of records,
nodes against sites) are made where the data is.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedtune.errors import ConfigError

__all__ = ["RULES", "Choice", "Range", "check_value", "nearest"]


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    options: tuple[str, ...]

    def describe(self) -> str:
        return "one of " + ", ".join(self.options)


@dataclass(frozen=True)
class Range:
    """A finite number between two bounds, each included or not."""

    low: float
    high: float = math.inf
    low_included: bool = True
    high_included: bool = True

    def describe(self) -> str:
        if math.isinf(self.high):
            return f"{self.low:g} or more" if self.low_included else f"above {self.low:g}"
        left = "[" if self.low_included else "("
        right = "]" if self.high_included else ")"
        return f"in {left}{self.low:.10g}, {self.high:.10g}{right}"

    def contains(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = value >= self.low if self.low_included else value > self.low
        below = value <= self.high if self.high_included else value < self.high
        return above and below


_COUNT = Range(1)
_POSITIVE = Range(0, low_included=False)
_NOT_NEGATIVE = Range(0)
_PROBABILITY = Range(0, 1, low_included=False, high_included=False)
_MOMENTUM = Range(0, 1, high_included=False)

RULES: dict[str, Choice | Range] = {
    "seed": Range(0, 2**32 - 1),
    "device": Choice(("auto", "cpu", "cuda", "mps")),
    "data.source": Choice(("opinions", "hub", "files")),
    "data.test_fraction": _PROBABILITY,
    "data.max_length": Range(4, 8192),
    "data.declared_size": _COUNT,
    "partition.name": Choice(("natural", "iid", "dirichlet")),
    "partition.alpha": _POSITIVE,
    "model.quantization": Choice(("none", "int8", "nf4")),
    "model.pooling": Choice(("mean", "cls")),
    "adapter.name": Choice(("lora", "ffa_lora", "bitfit", "head")),
    "adapter.layers": _COUNT,
    "adapter.rank": _COUNT,
    "adapter.alpha": _POSITIVE,
    "privacy.trust": Choice(("local", "distributed", "central", "none")),
    "privacy.unit": Choice(("auto", "record", "person", "client")),
    "privacy.epsilon": _POSITIVE,
    "privacy.delta": _PROBABILITY,
    "privacy.max_grad_norm": _POSITIVE,
    "privacy.noise_multiplier": _NOT_NEGATIVE,
    "privacy.records_per_unit": _COUNT,
    "privacy.clip_quantile": _PROBABILITY,
    "privacy.mechanism": Choice(("gaussian", "dp_ftrl")),
    "privacy.bands": _COUNT,
    "privacy.min_separation": _COUNT,
    "privacy.max_dropouts": _NOT_NEGATIVE,
    "privacy.max_colluders": _NOT_NEGATIVE,
    "train.sample_rate": Range(0, 1, low_included=False),
    "train.local_steps": _COUNT,
    "train.learning_rate": _POSITIVE,
    "train.optimizer": Choice(("sgd", "adam", "adamw")),
    "train.momentum": _MOMENTUM,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.proximal_mu": _NOT_NEGATIVE,
    "train.micro_batch_tokens": Range(16),
    "train.precision": Choice(("auto", "fp32", "bf16")),
    "federation.nodes": _COUNT,
    "federation.num_rounds": _COUNT,
    "federation.cohort_size": _COUNT,
    "federation.strategy": Choice(("fedavg", "fedavgm", "fedadam")),
    "federation.server_learning_rate": _POSITIVE,
    "federation.server_momentum": _MOMENTUM,
    "federation.min_updates": _COUNT,
    "federation.max_update_norm": _POSITIVE,
    "federation.weighting": Choice(("uniform", "declared")),
    "federation.round_timeout": _POSITIVE,
    "federation.evaluation": Choice(("auto", "public", "private", "held_out", "none")),
    "federation.evaluate_every": _COUNT,
    "federation.evaluation_rounds": _COUNT,
    "federation.evaluation_share": _PROBABILITY,
    "federation.evaluation_epsilon": _POSITIVE,
    "engine.name": Choice(("local", "ray", "deployment")),
    "engine.cpus_per_node": _POSITIVE,
    "pricing.device_hour": _NOT_NEGATIVE,
    "pricing.gigabyte_up": _NOT_NEGATIVE,
    "pricing.gigabyte_down": _NOT_NEGATIVE,
    "pricing.kilowatt_hour": _NOT_NEGATIVE,
    "pricing.carbon_kg_per_kwh": _NOT_NEGATIVE,
    "pricing.record": _NOT_NEGATIVE,
    "tracker.name": Choice(("none", "tensorboard", "mlflow", "wandb")),
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` most likely meant, or None; looks at whole names and at last parts.

    `epsilon` finds `privacy.epsilon`, and `privacy.epsilom` does too.
    """
    names = list(known)
    lowered = {name.lower(): name for name in reversed(names)}
    if word.lower() in lowered:
        return lowered[word.lower()]
    last = word.rpartition(".")[2].lower()
    same_ending = [name for name in names if name.rpartition(".")[2].lower() == last]
    if len(same_ending) == 1:
        return same_ending[0]
    whole = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    if whole:
        return lowered[whole[0]]
    by_ending = {name.rpartition(".")[2].lower(): name for name in reversed(names)}
    ending = difflib.get_close_matches(last, list(by_ending), n=1, cutoff=0.6)
    return by_ending[ending[0]] if ending else None


def check_value(name: str, value: object) -> None:
    """Raises `ConfigError` if the table forbids `value` (already of the right type, not None) for `name`."""
    rule = RULES.get(name)
    if rule is None:
        return
    if isinstance(rule, Choice):
        if value in rule.options:
            return
        guess = nearest(str(value), rule.options)
        hint = f" Did you mean {name}={guess}?" if guess else ""
        raise ConfigError(f"{name}={value} is not allowed: it must be {rule.describe()}.{hint}")
    if not isinstance(value, (int, float)) or not rule.contains(value):
        raise ConfigError(f"{name}={value} is not allowed: it must be a finite number {rule.describe()}.")
