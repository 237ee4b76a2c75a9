"""What `train=auto` chooses: every setting of the training that nobody has chosen in words.

Tuning on private data spends privacy, so what is chosen must be right the first time. It follows from public
settings alone (adapter, trust model, target epsilon, compute allowance), never from the data, so that server,
nodes and whoever reads a configuration see the same numbers, and no release can be conditioned on another.

Two ways to train, `federation.strategy`:

- `fedsgd` (McMahan et al. 2017, FedSGD; the default): each round is one noised gradient from every node, and
  one step of an optimizer on the server, which lives for the whole run. What the server does with the
  gradients is post-processing and costs no privacy: Adam, a rate that falls to zero, and an average of the
  late adapters, which is what is evaluated and saved (Polyak and Juditsky 1992).
- `fedavg` and its kin: each node takes several steps by itself. The default where a trusted server noises
  whole updates (trust=central), and where `train.local_steps` is above 1.

The constants were measured on four corpora (`simulations/private_accuracy`), and fit none of them alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fedtune.config.schema import ALL_LINEAR

if TYPE_CHECKING:
    from fedtune.config.schema import AdapterName, Config
    from fedtune.privacy.mechanisms.base import Mechanism

__all__ = ["adapter_of", "centre_rounds", "chosen", "filled", "head_rounds", "in_words"]

_OPINIONS = 20_000  # records in the training part of the embedded corpora, which are public
_LARGE, _FEW = 10_000, 10  # units and classes from which, and up to which, an adapter inside the encoder pays
# On the test split in one run: as many as a curve needs; inside the encoder each takes as long as a round.
_EVALUATIONS, _EVALUATIONS_INSIDE = 12, 5

# Where nodes train by themselves. What the others do not name is as here.
_ON_NODES: dict[str, Any] = {
    "train.sample_rate": 0.1,
    "train.local_steps": 4,
    "train.learning_rate": 0.01,
    "train.head_learning_rate": 0.01,
    "train.head_rounds": 0,
    "train.optimizer": "adam",
    "train.schedule": "constant",
    "train.averaging": 0.0,
    "train.damped": False,
    "train.centre": False,
    "train.label_smoothing": 0.0,
    "train.start": "zero",
    "privacy.max_grad_norm": 1.0,
    "privacy.head_norm": 0.0,
    "privacy.head_share": 0.1,
    "federation.num_rounds": 12,
    "federation.weighting": "uniform",
}

# Where the server adds noise to each average of whole updates: fewer averages, each of more steps, for the
# noise of one is the same however far its nodes went.
_FEW_AVERAGES: dict[str, Any] = {"train.local_steps": 8, "federation.num_rounds": 6}

# One step a round: the head alone, on outputs that are computed once. Every unit is in every step: sampling
# would save computing, of which there is next to none, and noise on a mean is smallest without it. One rate
# does for every epsilon, size and trust model: the second moment that it is divided by is that of the noise.
_HEAD: dict[str, Any] = _ON_NODES | {
    "train.sample_rate": 1.0,
    "train.local_steps": 1,
    "train.optimizer": "adam_mini",
    "train.schedule": "rise",
    "train.averaging": 0.9,
    "train.start": "names",
    "privacy.max_grad_norm": 0.9,
}
_HEAD_ROUNDS = {"quick": 40, "standard": 60, "thorough": 100}
_HEAD_RATE = 0.0375  # mean rate over 100 rounds
_FEW_STEPS = 0.03  # times the rounds: the most, for in very few of them noise would bury the start by names
_CENTRE_FROM = 10  # rounds: it costs one of them, and is not known to be worth more than a tenth

# One step a round inside the encoder: the head first, then head and adapter, each clipped by itself. What
# limits it is the number of steps that the time allows, not the noise: batches are as small as noise bears.
_INSIDE: dict[str, Any] = _ON_NODES | {
    "train.local_steps": 1,
    "train.head_learning_rate": 0.02,
    "train.schedule": "cosine",
    "train.label_smoothing": 0.1,
    "train.start": "names",
    "privacy.max_grad_norm": 1.05,  # of which 1 is the adapter's
    "privacy.head_norm": 3.0,  # clipped harder it grows too sure of itself: wrong examples cannot pull back
}
_HEAD_FIRST = 40  # rounds; each costs privacy, and next to no time
_MOST_RATE, _UNKNOWN_RATE = 0.5, 0.1  # of sampling; the second where nobody has said how many units there are
# Inside the encoder, where noise is light, where it is heavy, and without any: the largest rate, units in a
# step, and steps by what the run may take.
_LIGHT = (0.01, 512.0, {"quick": 50, "standard": 80, "thorough": 200})
_HEAVY = (0.008, 1000.0, {"quick": 25, "standard": 45, "thorough": 100})
_NONE = (0.002, 64.0, {"quick": 200, "standard": 400, "thorough": 1600})
_LIGHT_FROM = 6.0  # epsilon


def _units(config: Config) -> int | None:
    """How many units all nodes have together, as far as settings say: a public number."""
    known = config.data.declared_size
    return _OPINIONS if known is None and config.data.source == "opinions" else known


def _classes(config: Config) -> int | None:
    """How many classes there are, as far as settings say; they are not counted in the data."""
    return 2 if config.data.source == "opinions" else len(config.data.labels or ()) or None


def adapter_of(config: Config) -> AdapterName:
    """What `adapter=auto` is: LoRA where data is known to be large and has few classes, else the head.

    Under noise FFA-LoRA, whose noise is not multiplied with itself; without noise nothing speaks for it.
    """
    from fedtune.privacy.mechanisms.registry import mechanism_of

    units, classes = _units(config), _classes(config)
    if units is None or units < _LARGE or classes is None or classes > _FEW:
        return "head"
    return "ffa_lora" if mechanism_of(config.privacy.trust).is_private else "lora"


def _why(config: Config) -> str:
    """Why the adapter is what `adapter_of` says."""
    units, classes = _units(config), _classes(config)
    if units is None:
        return f"data.declared_size does not say that there are {_LARGE:,} units"
    if units < _LARGE:
        return f"{units:,} units, fewer than {_LARGE:,}"
    if classes is None:
        return f"data.labels does not say that there are at most {_FEW} classes"
    return f"{classes} classes, more than {_FEW}" if classes > _FEW else f"{units:,} units, {classes} classes"


def head_rounds(config: Config) -> int:
    """Rounds in which the head is trained alone, before there is more; none where there is no more."""
    return 0 if config.adapter.name == "head" else config.train.head_rounds or 0


def centre_rounds(config: Config) -> int:
    """Rounds at the beginning that set the centre and train nothing: one, or none."""
    return int(bool(config.train.centre))


def _set(config: Config, name: str) -> Any:
    """What the setting `name` (`train.sample_rate`) of `config` is."""
    group, _, setting = name.partition(".")
    return getattr(getattr(config, group), setting)


def filled(config: Config) -> Config:
    """`config` with the recipe's choice in place of every null that it has a choice for."""
    values = chosen(config)
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, _, setting = name.partition(".")
        if _set(config, name) is None:
            groups.setdefault(group, {})[setting] = value
    if not groups:
        return config
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **new) for name, new in groups.items()}
    )


def chosen(config: Config) -> dict[str, Any]:
    """By name of the setting: what the recipe chooses for `config`, whatever is set there already."""
    from fedtune.privacy.mechanisms.registry import mechanism_of  # late, so that `fedtune.config` is light

    kind = mechanism_of(config.privacy.trust)
    train, strategy = config.train, config.federation.strategy
    if strategy is None:
        by_nodes = (train.local_steps or 1) > 1 or train.proximal_mu > 0.0
        strategy = "fedavg" if by_nodes and "fedavg" in kind.strategies else kind.strategies[0]
    if strategy != "fedsgd":
        values = _ON_NODES | (_FEW_AVERAGES if kind.is_private and not kind.clips_gradients else {})
    elif config.adapter.name == "head":
        rounds = config.federation.num_rounds or _HEAD_ROUNDS[train.compute]
        rate = round(min(_HEAD_RATE * (100.0 / rounds) ** 0.75, _FEW_STEPS * rounds), 6)
        values = _HEAD | {
            "train.learning_rate": rate,
            "train.head_learning_rate": rate,
            "train.damped": train.start != "zero" or config.public.path is not None,
            "train.centre": config.model.normalize and rounds >= _CENTRE_FROM,
            "federation.num_rounds": rounds,
        }
    else:
        values = _inside(config, kind)
    if strategy == "fedsgd":
        values["federation.weighting"] = "declared" if kind.takes_local_steps else "uniform"
    values["federation.strategy"] = strategy
    rounds = config.federation.num_rounds or values["federation.num_rounds"]
    evaluations = _EVALUATIONS if config.adapter.name == "head" else _EVALUATIONS_INSIDE
    values["federation.evaluate_every"] = -(-rounds // evaluations)
    return values


def _inside(config: Config, kind: type[Mechanism]) -> dict[str, Any]:
    """What is chosen for an adapter inside the encoder."""
    epsilon = config.privacy.epsilon or _LIGHT_FROM  # a given noise says nothing without the data's size
    if kind.is_private and kind.takes_local_steps:
        epsilon /= 2.0  # every node adds all of the noise: with four of them that halves epsilon
    rate, batch, allowed = _NONE if not kind.is_private else _LIGHT if epsilon >= _LIGHT_FROM else _HEAVY
    if kind.is_private:
        rate = round(min(rate, 0.0055 * math.sqrt(epsilon)), 6)
    steps = allowed[config.train.compute]
    rounds, units = config.federation.num_rounds or _HEAD_FIRST + steps, _units(config)
    values = _INSIDE | {
        "train.sample_rate": _UNKNOWN_RATE if units is None else min(_MOST_RATE, batch / units),
        "train.learning_rate": rate,
        "train.averaging": 0.9 if steps < 80 else 0.95,
        "train.head_rounds": min(_HEAD_FIRST, rounds // 2),
        "federation.num_rounds": rounds,
    }
    if not kind.is_private:
        values["privacy.head_norm"] = 0.0  # nothing is clipped
        if config.adapter.name in ("lora", "ffa_lora"):
            values["adapter.target_modules"] = [ALL_LINEAR]  # more numbers are more noise: not with privacy
    return values


def in_words(config: Config) -> str:
    """One line on how `config` trains, and why; and which of it somebody chose in place of the recipe."""
    from fedtune.privacy.mechanisms.registry import mechanism_of

    config = filled(config)
    train, federation, adapter = config.train, config.federation, config.adapter.name
    own = [] if adapter in ("auto", adapter_of(config)) else ["adapter"]
    everywhere = config.adapter.target_modules == [ALL_LINEAR]
    what = f"{adapter} on every linear layer" if everywhere else adapter
    what = what if own else f"{what} ({_why(config)})"
    if federation.strategy == "fedsgd":
        how = (
            f"{federation.num_rounds} rounds of one gradient from each node at sampling rate "
            f"{train.sample_rate:g}, {train.optimizer} on the server at {train.learning_rate:g}"
        )
        how += ", the first for the texts' centre" if train.centre else ""
        how += {"rise": ", rising", "cosine": ", falling by a cosine"}.get(train.schedule or "", "")
        how += ", late adapters averaged" if train.averaging else ""
        how += f"; the head alone in the first {train.head_rounds}" if train.head_rounds else ""
        if train.personalize != "none":
            how += f", half of the rate for each site's own part ({train.personalize})"
    else:
        how = (
            f"{federation.num_rounds} rounds of {train.local_steps} steps on each node at sampling rate "
            f"{train.sample_rate:g}, {train.optimizer} at {train.learning_rate:g}, averaged by "
            f"{federation.strategy}"
        )
    how += ", from a start on public texts" if config.public.path is not None else ""
    own += [
        name
        for name, value in chosen(config).items()
        if name != "federation.evaluate_every" and _set(config, name) != value  # that one trains nothing
    ]
    free = dataclasses.replace(config, federation=dataclasses.replace(federation, num_rounds=None))
    if chosen(free)["federation.num_rounds"] != federation.num_rounds:
        own.append("federation.num_rounds")
    given = f"; given, not by the recipe: {', '.join(own)}" if own else ""
    private = mechanism_of(config.privacy.trust).is_private
    clipped = f"; clipped at {config.privacy.max_grad_norm:g}" if private else ""
    return f"{what}, {how}{clipped}{given}"
