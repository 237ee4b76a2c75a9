"""What `auto` means: the safe choice that follows from what the owner of the data has declared.

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

from fedtune.config.schema import Config, DataConfig, Evaluation, Unit

if TYPE_CHECKING:
    from fedtune.privacy.mechanisms.base import Mechanism

__all__ = ["AUTO", "public_test", "resolved", "tests_openly"]

AUTO = "auto"


def resolved(config: Config) -> Config:
    """`config` with a choice in place of every `auto`; `config` itself where there is none."""
    privacy, federation = config.privacy, config.federation
    if privacy.unit == AUTO:
        privacy = dataclasses.replace(privacy, unit=_unit(config))
    if federation.evaluation == AUTO:
        federation = dataclasses.replace(federation, evaluation=_evaluation(config))
    if privacy is config.privacy and federation is config.federation:
        return config
    return dataclasses.replace(config, privacy=privacy, federation=federation)


def public_test(data: DataConfig) -> bool:
    """Whether there is something to test on that the owner declared public."""
    return data.public or (data.test_public and data.test_split is not None)


def tests_openly(config: Config) -> bool:
    """Whether the model is evaluated by the server, without noise: then there is a test part, else none is
    taken off the data."""
    return resolved(config).federation.evaluation in ("public", "held_out")


def _unit(config: Config) -> Unit:
    return _mechanism(config).default_unit(config.data.unit is not None)


def _evaluation(config: Config) -> Evaluation:
    return "public" if public_test(config.data) else _mechanism(config).default_evaluation(config)


def _mechanism(config: Config) -> type[Mechanism]:
    from fedtune.privacy.mechanisms.registry import mechanism_of  # late, so that `fedtune.config` is light

    return mechanism_of(config.privacy.trust)
