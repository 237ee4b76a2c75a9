"""No privacy: the same code path as `local`, without noise. Epsilon is infinite, and every report says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedtune.errors import ConfigError
from fedtune.privacy.checks import HEAD_NORM
from fedtune.privacy.mechanisms.base import NODES_SEE, USERS_SEE
from fedtune.privacy.mechanisms.local import TrainingOnNodes

if TYPE_CHECKING:
    from fedtune.config.schema import Config, Evaluation, Unit
    from fedtune.privacy.accounting.epsilon import Term
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["NoPrivacy"]


@dataclass(frozen=True, kw_only=True)
class NoPrivacy(TrainingOnNodes):
    """Training without noise: a baseline, and what clients do under a server that they trust."""

    trust: ClassVar[str] = "none"
    is_private: ClassVar[bool] = False
    clips_gradients: ClassVar[bool] = False
    units: ClassVar[tuple[Unit, ...]] = ("record", "person", "client")

    @classmethod
    def default_evaluation(cls, config: Config) -> Evaluation:
        """What is held out is evaluated on as it is: such a run promises nothing."""
        return "held_out"

    @classmethod
    def check_settings(cls, config: Config) -> None:
        """Whoever names an epsilon or noise expects what this does not do."""
        privacy = config.privacy
        if privacy.epsilon is not None or privacy.noise_multiplier:
            given = (
                f"privacy.epsilon={privacy.epsilon:g}"
                if privacy.epsilon is not None
                else f"privacy.noise_multiplier={privacy.noise_multiplier:g}"
            )
            raise ConfigError(
                f"privacy.trust=none adds no noise and has no epsilon, but {given} was given. Leave it out, "
                "or choose privacy.trust=local.",
                setting="privacy.trust",
            )
        if privacy.head_norm:
            raise ConfigError(HEAD_NORM.format(privacy.head_norm, cls.trust), setting="privacy.head_norm")
        cls.check_server_noise(config)

    def terms(self, plan: PrivacyPlan, releases: int, after: int) -> dict[Term, int] | None:
        """No number of steps says what this costs."""
        return None

    def describe(self, plan: PrivacyPlan) -> str:
        return "none"

    @classmethod
    def who_sees_what(cls, privacy: Mapping[str, Any]) -> list[str]:
        server = "The server sees every node's raw updates."
        return [server, NODES_SEE, USERS_SEE, "Nobody is protected from any of them."]

    @classmethod
    def attacker_sees(cls, privacy: Mapping[str, Any]) -> str:
        return "everything that ever left a node"
