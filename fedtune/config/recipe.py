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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.config.schema import Config

__all__ = ["chosen", "filled", "in_words"]

_EVALUATIONS = 12  # on the test split in one run: as many as a curve needs

# Where nodes train by themselves.
_ON_NODES: dict[str, Any] = {
    "train.sample_rate": 0.1,
    "train.local_steps": 4,
    "train.head_rounds": 0,
    "train.learning_rate": 0.01,
    "train.head_learning_rate": 0.01,
    "train.optimizer": "adam",
    "train.schedule": "constant",
    "train.averaging": 0.0,
    "train.label_smoothing": 0.0,
    "privacy.max_grad_norm": 1.0,
    "privacy.head_norm": 0.0,
    "privacy.head_share": 0.1,
    "federation.num_rounds": 12,
    "federation.weighting": "uniform",
}

# One step a round: the head alone, on outputs that are computed once. Every unit is in every step: sampling
# would save computing, of which there is next to none, and the noise on a mean is smallest without it.
_HEAD: dict[str, Any] = {
    "train.sample_rate": 1.0,
    "train.local_steps": 1,
    "train.head_rounds": 0,
    "train.learning_rate": 0.06,
    "train.head_learning_rate": 0.06,
    "train.optimizer": "adam_mini",
    "train.schedule": "constant",
    "train.averaging": 0.9,
    "train.label_smoothing": 0.0,
    "privacy.max_grad_norm": 0.8,
    "privacy.head_norm": 0.0,
    "privacy.head_share": 0.1,
    "federation.num_rounds": 60,
}


def filled(config: Config) -> Config:
    """`config` with the recipe's choice in place of every null that it has a choice for."""
    values = chosen(config)
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, _, setting = name.partition(".")
        if getattr(getattr(config, group), setting) is None:
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
    values = dict(_HEAD if strategy == "fedsgd" else _ON_NODES)
    if strategy == "fedsgd":
        values["federation.weighting"] = "declared" if kind.takes_local_steps else "uniform"
    values["federation.strategy"] = strategy
    rounds = config.federation.num_rounds or values["federation.num_rounds"]
    values["federation.evaluate_every"] = -(-rounds // _EVALUATIONS)
    return values


def in_words(config: Config) -> str:
    """One line on how `config` trains, and which of it somebody chose in words instead of the recipe."""
    train, federation = config.train, config.federation
    if federation.strategy == "fedsgd":
        how = (
            f"{federation.num_rounds} rounds of one gradient from each node at sampling rate "
            f"{train.sample_rate:g}, {train.optimizer} on the server at {train.learning_rate:g}"
        )
        how += "" if train.schedule == "constant" else f", falling ({train.schedule})"
        how += ", late adapters averaged" if train.averaging else ""
    else:
        how = (
            f"{federation.num_rounds} rounds of {train.local_steps} steps on each node at sampling rate "
            f"{train.sample_rate:g}, {train.optimizer} at {train.learning_rate:g}, averaged by "
            f"{federation.strategy}"
        )
    own = [
        name
        for name, value in chosen(config).items()
        if getattr(getattr(config, name.partition(".")[0]), name.partition(".")[2]) != value
    ]
    given = f"; given, not by the recipe: {', '.join(own)}" if own else ""
    return f"{how}; clipped at {config.privacy.max_grad_norm:g}{given}"
