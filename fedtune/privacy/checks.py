"""Which privacy settings have a meaning: every check that a plan must pass, each naming its field.

Apart from `plan` so that the plan can be read in one sitting. NaN, infinities where a number is meant, and
`True` where a count is meant are refused too: Python would let them pass for numbers.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from fedtune.config.schema import TRUSTS, UNITS
from fedtune.errors import PrivacyError

if TYPE_CHECKING:
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["MECHANISMS", "TRUSTS", "UNITS", "number", "validate", "whole"]

MECHANISMS = ("gaussian", "dp_ftrl")

# What an accountant can still tell apart. Below, nobody is protected; above, nothing is learnt.
_NOISE = (1e-6, 1e6)
_MOST_STEPS = 10**9


def number(value: Any, name: str) -> float:
    """`value` as a float; `PrivacyError` naming it if it is no number (infinity is one)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise PrivacyError(f"{name} must be a number, not {value!r}.")
    return float(value)


def whole(value: Any, name: str, least: int = 1) -> int:
    """`value` as an int of at least `least`; `PrivacyError` naming it if it is none. numpy's integers are."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise PrivacyError(f"{name} must be a whole number of {least} or more, not {value!r}.")
    return found


def _rate(value: Any, name: str) -> None:
    if not 0.0 < number(value, name) <= 1.0:
        raise PrivacyError(f"{name} is a probability in (0, 1], not {value!r}.")


def validate(plan: PrivacyPlan) -> None:
    """Raises `PrivacyError` naming the first field of `plan` that has no meaning, or breaks a promise."""
    if plan.trust not in TRUSTS:
        raise PrivacyError(f"privacy.trust must be one of {', '.join(TRUSTS)}, not {plan.trust!r}.")
    if plan.unit not in UNITS:
        raise PrivacyError(f"privacy.unit must be one of {', '.join(UNITS)}, not {plan.unit!r}.")
    if plan.weighting not in ("uniform", "declared"):
        raise PrivacyError(f"federation.weighting must be uniform or declared, not {plan.weighting!r}.")
    for name in ("reproducible_noise", "adaptive_clipping"):
        if not isinstance(getattr(plan, name), bool):
            raise PrivacyError(f"privacy.{name} must be true or false, not {getattr(plan, name)!r}.")
    _rate(plan.sample_rate, "train.sample_rate")
    _rate(plan.training_sample_rate, "train.sample_rate")
    for name in (
        "local_steps", "num_rounds", "declared_size", "records_per_unit", "nodes", "cohort_size",
        "training_steps",
    ):  # fmt: skip
        whole(getattr(plan, name), name)
    for name in ("max_dropouts", "max_colluders"):
        whole(getattr(plan, name), f"privacy.{name}", 0)
    if isinstance(plan.seed, bool) or not isinstance(plan.seed, int):
        raise PrivacyError(f"seed must be a whole number, not {plan.seed!r}.")
    noise = number(plan.noise_multiplier, "privacy.noise_multiplier")
    norm = number(plan.max_grad_norm, "privacy.max_grad_norm")
    delta = number(plan.delta, "privacy.delta")
    if norm <= 0.0:
        raise PrivacyError(f"privacy.max_grad_norm must be above 0, not {norm}.")
    if plan.target_epsilon is not None:
        target = number(plan.target_epsilon, "privacy.epsilon")
        if not 0.0 < target < math.inf:
            raise PrivacyError(f"privacy.epsilon must be finite and above 0, not {target}.")
    for name in ("bands", "min_separation"):
        whole(getattr(plan, name), f"privacy.{name}")
    if plan.mechanism not in MECHANISMS:
        raise PrivacyError(
            f"privacy.mechanism must be one of {', '.join(MECHANISMS)}, not {plan.mechanism!r}."
        )
    if plan.mechanism != "dp_ftrl" and (plan.bands, plan.min_separation) != (1, 1):
        raise PrivacyError(
            f"privacy.bands={plan.bands} and privacy.min_separation={plan.min_separation} are settings of "
            f"privacy.mechanism=dp_ftrl, and this plan's is {plan.mechanism}. Leave them out."
        )
    _validate_sizes(plan)
    if plan.trust == "none":
        _validate_evaluation(plan)
        if noise != 0.0 or delta != 0.0 or plan.target_epsilon is not None:
            raise PrivacyError(
                "privacy.trust=none has no noise, no delta and no epsilon; a noise multiplier of "
                f"{noise}, delta {delta} or epsilon {plan.target_epsilon} promises what nothing keeps."
            )
        return
    if not 0.0 < noise < math.inf:
        raise PrivacyError(
            f"privacy.noise_multiplier must be finite and above 0, not {noise}. For a run without noise, say "
            "so: privacy.trust=none."
        )
    _validate_extent(plan)
    if math.isinf(norm):
        raise PrivacyError("privacy.max_grad_norm must be finite: without a bound no noise is enough.")
    _validate_evaluation(plan)
    _check_delta(delta, plan)
    if (plan.trust == "central") != (plan.unit == "client"):
        raise PrivacyError(
            f"privacy.trust={plan.trust} cannot protect privacy.unit={plan.unit}: whole updates are clipped "
            "and noised only by a trusted server (trust=central, unit=client), and it protects clients, not "
            "single records or persons. For those use trust=local or distributed."
        )
    if plan.trust in ("distributed", "central") and plan.local_steps != 1:
        raise PrivacyError(
            f"privacy.trust={plan.trust} noises once a round; local_steps is {plan.local_steps}."
        )
    if plan.trust in ("distributed", "central") and plan.weighting != "uniform":
        raise PrivacyError(
            f"federation.weighting=declared does not fit privacy.trust={plan.trust}: the noise was sized for "
            "equal weights. Use federation.weighting=uniform."
        )
    if plan.trust == "distributed" and plan.honest_shares() < 1:
        raise PrivacyError(
            f"With {plan.nodes} nodes, privacy.max_dropouts={plan.max_dropouts} and privacy.max_colluders="
            f"{plan.max_colluders} leave no honest node to add noise: dropouts and colluders (one at least, "
            f"for a node knows its own noise) must be fewer than {plan.nodes} together. Lower "
            "privacy.max_dropouts or privacy.max_colluders, or use privacy.trust=local."
        )
    if plan.trust == "central" and plan.cohort_size > plan.declared_size:
        raise PrivacyError(
            f"federation.cohort_size={plan.cohort_size} is more than the {plan.declared_size} clients there "
            "are."
        )
    _validate_adaptive(plan)
    if plan.mechanism == "dp_ftrl":
        _validate_correlated(plan)


def _validate_extent(plan: PrivacyPlan) -> None:
    least, most = _NOISE
    for name, value in (
        ("privacy.noise_multiplier", plan.noise_multiplier),
        ("evaluation_noise", plan.evaluation_noise or 1.0),
    ):
        if not least <= value <= most:
            raise PrivacyError(
                f"{name} is {value:g}, and must lie between {least:g} and {most:g}: with less nobody is "
                "protected (privacy.trust=none says so), with more nothing is learnt."
            )
    if (steps := plan.steps() + plan.evaluation_answers) > _MOST_STEPS:
        raise PrivacyError(
            f"The plan has {steps:,} noised steps, and no more than {_MOST_STEPS:,} are accounted for. Lower "
            "federation.num_rounds or train.local_steps."
        )


def _validate_correlated(plan: PrivacyPlan) -> None:
    if plan.trust != "central":
        raise PrivacyError(
            f"privacy.mechanism=dp_ftrl needs a server that keeps the noise of earlier rounds: privacy.trust="
            f"central, not {plan.trust}."
        )
    if plan.adaptive_clipping:
        raise PrivacyError(
            "privacy.adaptive_clipping=true does not fit privacy.mechanism=dp_ftrl: noise that is taken back "
            "in later rounds must have one scale in all of them. Leave adaptive_clipping out."
        )
    for name in ("min_separation", "bands"):
        if getattr(plan, name) > plan.num_rounds:
            raise PrivacyError(
                f"privacy.{name}={getattr(plan, name)} is more than federation.num_rounds={plan.num_rounds}. "
                "Lower it, or raise the number of rounds."
            )
    if plan.cohort_size * plan.min_separation > plan.declared_size:
        needed = plan.cohort_size * plan.min_separation
        raise PrivacyError(
            f"privacy.min_separation={plan.min_separation} and federation.cohort_size={plan.cohort_size} ask "
            f"for {needed} clients to fill every round, and there are {plan.declared_size}. Lower one of the "
            "two; their product is at most the number of clients."
        )


def _validate_adaptive(plan: PrivacyPlan) -> None:
    quantile = number(plan.clip_quantile, "privacy.clip_quantile")
    if not 0.0 < quantile < 1.0:
        raise PrivacyError(f"privacy.clip_quantile must lie strictly between 0 and 1, not {quantile}.")
    spread = number(plan.quantile_noise, "quantile_noise")
    if not plan.adaptive_clipping:
        return
    if plan.trust != "central":
        raise PrivacyError("privacy.adaptive_clipping works with privacy.trust=central only.")
    if not plan.noise_multiplier < 2.0 * spread < math.inf:
        raise PrivacyError(
            f"Adaptive clipping spends part of the noise multiplier {plan.noise_multiplier:g} on its "
            f"quantile, and noise of {spread:g} on the count leaves nothing: it must be above "
            f"{plan.noise_multiplier / 2:g}."
        )


def _validate_evaluation(plan: PrivacyPlan) -> None:
    answers = whole(plan.evaluation_answers, "federation.evaluation_rounds", 0)
    share = number(plan.evaluation_share, "federation.evaluation_share")
    noise = number(plan.evaluation_noise, "evaluation_noise")
    if answers == 0:
        if share != 0.0 or noise != 0.0:
            raise PrivacyError(
                f"A plan without answers about held-out data has an evaluation_share of {share:g} and an "
                f"evaluation_noise of {noise:g}; both must be 0."
            )
        return
    if plan.trust == "central":
        raise PrivacyError(
            "A plan with trust=central has answers about held-out data: the noise that hides one client "
            "hides all that it could tell. Use federation.evaluation=public or none."
        )
    if not 0.0 < share < 1.0:
        raise PrivacyError(
            f"federation.evaluation_share must lie strictly between 0 and 1, not {share}: some units are "
            "trained on and others are evaluated on."
        )
    if plan.trust == "none":
        if noise != 0.0:
            raise PrivacyError(f"privacy.trust=none has no noise; evaluation_noise is {noise}.")
    elif not 0.0 < noise < math.inf:
        raise PrivacyError(f"evaluation_noise must be finite and above 0, not {noise}.")


def _validate_sizes(plan: PrivacyPlan) -> None:
    noise = number(plan.size_noise, "size_noise")
    if not 0.0 <= noise < math.inf:
        raise PrivacyError(f"size_noise must be finite and 0 or more, not {noise}.")
    if noise and plan.trust not in ("local", "distributed"):
        raise PrivacyError(
            f"A plan with trust={plan.trust} has sizes told with noise ({noise:g}): it needs none."
        )


def _check_delta(delta: float, plan: PrivacyPlan) -> None:
    if not 0.0 < delta < 1.0:
        raise PrivacyError(f"privacy.delta must lie strictly between 0 and 1, not {delta}.")
    most = plan.most_units()
    if delta < 1.0 / most:
        return
    hint = (
        f" With {most:.0f} clients a delta below {1.0 / most:.3g} is all that is asked for, but so few "
        "clients can hardly hide one another: for data like these unit=record or person with trust=local "
        "or distributed is the stronger choice."
        if plan.unit == "client"
        else ""
    )
    told = "as declared" if not plan.size_noise else "at most: a size that was told with noise may be too low"
    raise PrivacyError(
        f"privacy.delta={delta:g} is not below 1/n = {1.0 / most:.3g}, with n = {most:.0f} units "
        f"({plan.unit}) {told}: it would allow publishing somebody's data outright. Set it well below "
        "that, or leave it out." + hint
    )
