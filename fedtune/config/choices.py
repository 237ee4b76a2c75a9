"""What `auto` means, and which settings contradict each other.

`auto` is the safe choice that follows from what the owner of the data has declared.

One place, so that messages, plan, record and whoever reads a configuration see the choice and never the word.
`resolved` is called wherever a `Config` comes in (the loader, JSON from a server, Python); it changes nothing
that was chosen in words, so it may be called as often as one likes.

`privacy.unit`: a client under trust=central; else a person, where `data.unit` says whose record is whose;
else a record.

`federation.evaluation`, so that no data is evaluated on without noise that its owner has not declared public:

- `public` where all the data is (`data.public`), or a test split is named and declared (`data.test_public`);
- `held_out` without privacy (trust=none): what is held out of private data is evaluated on as it is, for
  such a run promises nothing; no other run may do that;
- `none` under trust=central, where no noise but the clients' own hides what one client tells; and where the
  noise is given (`privacy.noise_multiplier`) and it is not said what answers may cost;
- else `private`: nodes answer with noised counts, inside epsilon.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fedtune.config.recipe import adapter_of, chosen, filled, head_rounds
from fedtune.config.schema import Config, DataConfig, Evaluation, Unit
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.privacy.mechanisms.base import Mechanism

__all__ = ["AUTO", "check_together", "public_test", "resolved", "tests_openly"]

AUTO = "auto"


def resolved(config: Config) -> Config:
    """`config` with a choice in place of every `auto`, and of every null that the recipe of training has a
    choice for; `config` itself where there is none."""
    privacy, federation = config.privacy, config.federation
    if privacy.unit == AUTO:
        privacy = dataclasses.replace(privacy, unit=_unit(config))
    if federation.evaluation == AUTO:
        federation = dataclasses.replace(federation, evaluation=_evaluation(config))
    if privacy is not config.privacy or federation is not config.federation:
        config = dataclasses.replace(config, privacy=privacy, federation=federation)
    if config.adapter.name == AUTO:
        config = dataclasses.replace(
            config, adapter=dataclasses.replace(config.adapter, name=adapter_of(config))
        )
    return filled(config)


def public_test(data: DataConfig) -> bool:
    """Whether there is something to test on that the owner declared public."""
    return data.public or (data.test_public and data.test_split is not None)


def tests_openly(config: Config) -> bool:
    """Whether the model is evaluated by the server, without noise: then there is a test part, else none is
    taken off the data."""
    return resolved(config).federation.evaluation in ("public", "held_out")


def check_together(config: Config) -> None:
    """Rules that need two settings. Raises `ConfigError` with both of them named."""
    federation = config.federation
    _check_evaluation(config)
    _check_windows(config.data)
    _check_public(config)
    kind = _mechanism(config)
    _check_strategy(config)
    kind.check_settings(config)
    _check_head(config, kind)
    alone, rounds = config.train.head_rounds, federation.num_rounds
    if alone is not None and rounds is not None and alone > rounds and config.adapter.name != "head":
        raise ConfigError(
            f"train.head_rounds={alone} is more than federation.num_rounds={rounds}: nothing but the head "
            "would be trained, for which there is adapter=head. Lower train.head_rounds.",
            setting="train.head_rounds",
        )
    if kind.tells_size:
        _check_unit(config)
    nodes, cohort = federation.nodes, federation.cohort_size
    if nodes is not None and cohort is not None and cohort > nodes:
        raise ConfigError(
            f"federation.cohort_size={cohort} is more than federation.nodes={nodes}: a round cannot ask more "
            "nodes than there are.",
            setting="federation.cohort_size",
        )
    most = cohort if cohort is not None else nodes
    if most is not None and federation.min_updates > most:
        raise ConfigError(
            f"federation.min_updates={federation.min_updates} can never be met: a round asks {most} nodes. "
            "Lower federation.min_updates.",
            setting="federation.min_updates",
        )


def _check_windows(data: DataConfig) -> None:
    if data.long_text == "window" and data.text_pair is not None:
        raise ConfigError(
            f"data.long_text=window cuts one text into windows, and data.text_pair={data.text_pair} brings a "
            "second one, which every window would need. Use data.long_text=cut.",
            setting="data.long_text",
        )


def _check_public(config: Config) -> None:
    public = config.public
    for column in ("text", "text_pair", "label"):
        if public.path is None and (name := getattr(public, column)) is not None:
            raise ConfigError(
                f"public.{column}={name} names a column of the file of public texts, and public.path names "
                f"none. Name it, or leave public.{column} out.",
                setting=f"public.{column}",
            )
    if public.text_pair is not None and config.data.text_pair is None:
        raise ConfigError(
            f"public.text_pair={public.text_pair} brings a second text, and the run's texts have none "
            "(data.text_pair). Leave it out.",
            setting="public.text_pair",
        )


def _check_unit(config: Config) -> None:
    data = config.data
    # A real site names its own columns, and opinions knows its persons.
    if config.privacy.unit != "person" or data.unit is not None or data.source == "opinions":
        return
    if config.engine.name == "deployment":
        return
    raise ConfigError(
        f"privacy.unit=person needs to know whose record is whose, and {data.name!r} has no unit column. "
        "Name it in data.unit, or use privacy.unit=record.",
        setting="privacy.unit",
    )


def _check_strategy(config: Config) -> None:
    """What only one of the two ways to train has is refused under the other, never ignored."""
    train, federation = config.train, config.federation
    kind, strategy = _mechanism(config), federation.strategy
    if strategy is None:
        return  # nobody has filled it in yet
    if strategy not in kind.strategies:
        raise ConfigError(
            f"federation.strategy={strategy} does not fit privacy.trust={config.privacy.trust}, which has "
            f"{', '.join(kind.strategies)}. Leave it out."
        )
    if train.personalize != "none":
        _check_personal(config)
    if train.centre:
        _check_centre(config)
    if strategy == "fedsgd":
        if kind.takes_local_steps and train.local_steps not in (None, 1):
            raise ConfigError(
                f"federation.strategy=fedsgd sends one gradient a round, and train.local_steps is "
                f"{train.local_steps}. Leave train.local_steps out, or use federation.strategy=fedavg."
            )
        if train.proximal_mu:
            raise ConfigError(
                f"train.proximal_mu={train.proximal_mu:g} holds nodes back that train by themselves, and "
                "with federation.strategy=fedsgd none does. Leave it out, or use federation.strategy=fedavg."
            )
        if federation.server_learning_rate != 1.0:
            raise ConfigError(
                f"federation.server_learning_rate={federation.server_learning_rate:g} is for the average of "
                "updates, and with federation.strategy=fedsgd the server steps with train.learning_rate. "
                "Leave it out."
            )
        return
    if train.optimizer == "adam_mini":
        raise ConfigError(
            f"train.optimizer=adam_mini is an optimizer on the server (federation.strategy=fedsgd), and "
            f"federation.strategy is {strategy}. Use adam, adamw or sgd."
        )
    for name, idle in (("schedule", "constant"), ("averaging", 0.0), ("damped", False)):
        value = getattr(train, name)
        if value not in (None, idle):
            raise ConfigError(
                f"train.{name}={value} is for an optimizer on the server (federation.strategy=fedsgd), and "
                f"federation.strategy is {strategy}. Leave it out."
            )


def _check_head(config: Config, kind: type[Mechanism]) -> None:
    """A norm, a share or a rate that the head alone would have is refused where it would do nothing."""
    privacy, train, adapter = config.privacy, config.train, config.adapter.name
    if privacy.head_norm and adapter == "head":
        raise ConfigError(
            f"privacy.head_norm={privacy.head_norm:g} is for a head beside something else that is trained, "
            "and with adapter=head nothing is. Leave it out and use privacy.max_grad_norm.",
            setting="privacy.head_norm",
        )
    if config.federation.strategy is None:
        return  # nobody has filled it in yet
    idle = chosen(config)
    share = privacy.head_share
    if not privacy.head_norm and share not in (None, idle["privacy.head_share"]):
        grouped = adapter != "head" and kind.clips_gradients
        raise ConfigError(
            f"privacy.head_share={share:g} is the share of a head that is clipped by itself, and this one is "
            "not (privacy.head_norm=0). Leave it out"
            + (", or give the head a norm: privacy.head_norm=3." if grouped else "."),
            setting="privacy.head_share",
        )
    # A run of adapter=head that an earlier version began has the rate here too.
    known = (None, idle["train.head_learning_rate"], train.learning_rate)
    alone = config.federation.strategy == "fedsgd" and head_rounds(config)
    if not alone and train.head_learning_rate not in known:
        why = "adapter=head" if adapter == "head" else "train.head_rounds=0"
        if config.federation.strategy != "fedsgd":
            why = f"federation.strategy={config.federation.strategy}"
        raise ConfigError(
            f"train.head_learning_rate={train.head_learning_rate:g} is the server's rate in rounds of a head "
            f"alone, before the rest is trained, and with {why} there are none. Leave it out; the rate is "
            "train.learning_rate.",
            setting="train.head_learning_rate",
        )


def _check_personal(config: Config) -> None:
    """A site's own part moves by what the site releases by itself; where that is nothing there is none."""
    asked, kind = f"train.personalize={config.train.personalize}", _mechanism(config)
    if kind.round != "plain":
        raise ConfigError(
            f"{asked} moves a site's own part of the model by the gradient that the site releases, and with "
            f"privacy.trust={kind.trust} no site releases one by itself: {kind.no_own_release}. Use "
            "privacy=local, or train.personalize=none.",
            setting="train.personalize",
        )
    if config.federation.strategy != "fedsgd":
        raise ConfigError(
            f"{asked} needs nodes that send one gradient a round (federation.strategy=fedsgd), and "
            f"federation.strategy is {config.federation.strategy}. Use federation.strategy=fedsgd "
            "train.local_steps=1 train.proximal_mu=0, or train.personalize=none.",
            setting="train.personalize",
        )


def _check_centre(config: Config) -> None:
    federation = config.federation
    for fits, name, value, words in (
        (config.adapter.name == "head", "adapter", config.adapter.name, "trains inside the encoder"),
        (federation.strategy == "fedsgd", "federation.strategy", federation.strategy, "trains on nodes"),
        (config.model.normalize, "model.normalize", "false", "takes texts' vectors as they are"),
        (federation.num_rounds != 1, "federation.num_rounds", 1, "has no round left to train in"),
    ):
        if not fits:
            raise ConfigError(
                "train.centre=true gives the first round to the mean of the texts' vectors, from which a "
                "head (adapter=head, federation.strategy=fedsgd, model.normalize=true) then sees them, and "
                f"{name}={value} {words}. Leave train.centre out.",
                setting="train.centre",
            )


def _check_evaluation(config: Config) -> None:
    data, evaluation = config.data, config.federation.evaluation
    if data.test_public and data.test_split is None:
        raise ConfigError(
            "data.test_public=true says that a test split is public, and data.test_split names none. Name it "
            "(data.test_split=test), or leave data.test_public out.",
            setting="data.test_public",
        )
    if evaluation == "public" and not public_test(data):
        split = "test" if data.test_split is None else data.test_split
        raise ConfigError(
            f"federation.evaluation=public would evaluate on {data.name!r} without noise, and its owner has "
            "declared neither all of it nor a test split public: what is held out of private data is "
            "private. Leave federation.evaluation out (nodes then answer with noised counts, inside "
            "epsilon), or, if it is true, declare a test split: "
            f"data.test_split={split} data.test_public=true.",
            setting="federation.evaluation",
        )


def _unit(config: Config) -> Unit:
    return _mechanism(config).default_unit(config.data.unit is not None)


def _evaluation(config: Config) -> Evaluation:
    return "public" if public_test(config.data) else _mechanism(config).default_evaluation(config)


def _mechanism(config: Config) -> type[Mechanism]:
    from fedtune.privacy.mechanisms.registry import mechanism_of  # late, so that `fedtune.config` is light

    return mechanism_of(config.privacy.trust)
