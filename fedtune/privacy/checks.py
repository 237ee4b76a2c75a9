"""What the settings of every plan must obey, each check naming its field.

NaN, infinities where a number is meant, and `True` where a count is meant are refused too: Python would let
them pass for numbers. What only one trust model asks is in its own file (`fedtune.privacy.mechanisms`).
"""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fedtune.config.schema import UNITS
from fedtune.errors import PrivacyError

if TYPE_CHECKING:
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["UNITS", "default_delta", "number", "probability", "validate", "whole"]


HEAD_NORM = (
    "privacy.head_norm={:g} works where gradients are clipped, and with privacy.trust={} none are. Leave it "
    "out, or use privacy.trust=local or distributed."
)

# What an accountant can still tell apart. Below, nobody is protected; above, nothing is learnt.
_LEAST_NOISE, _MOST_NOISE = 1e-6, 1e6
_MOST_STEPS = 10**9
_LEAST_NORM = 1e-20  # far below it the parts of a gradient are too small for float32, and round up beyond it
_MOST_APART = 1000.0  # of max_grad_norm to head_norm, and back: the head is scaled by it, and so is its noise
_MOST_COUNT = 10**18


def number(value: Any, name: str) -> float:
    """`value` as a float.

    Raises:
        PrivacyError: it is no number (infinity is one); NaN and `True`, which Python lets pass, are none.
    """
    found = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an int that no float holds
            found = float(value)
    if math.isnan(found):
        raise PrivacyError(f"{name} must be a number, not {value!r}.", setting=name)
    return found


def whole(value: Any, name: str, least: int = 1) -> int:
    """`value` as an int. numpy's integers are whole numbers too.

    Raises:
        PrivacyError: it is not a whole number, is below `least`, or too large for a count.
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least:
        raise PrivacyError(f"{name} must be a whole number of {least} or more, not {value!r}.", setting=name)
    if count > _MOST_COUNT:  # what follows computes with floats
        raise PrivacyError(f"{name} must be {_MOST_COUNT:.0e} or less, not {value!r}.", setting=name)
    return count


def probability(value: Any, name: str) -> float:
    """`value` as a float. Raises `PrivacyError` unless it lies in (0, 1]."""
    found = number(value, name)
    if not 0.0 < found <= 1.0:
        raise PrivacyError(f"{name} is a probability in (0, 1], not {value!r}.", setting=name)
    return found


def default_delta(units: float) -> float:
    """min(n^-1.1, 1e-3) for n `units`: below 1/n for every n above 1, and small where n is.

    With a delta of 1/n a mechanism may publish one of n people outright (Dwork and Roth 2014, section 2.3).
    """
    return min(units**-1.1, 1e-3)


def validate(plan: PrivacyPlan) -> None:
    """Raises `PrivacyError` naming the first field of `plan` that has no meaning, or breaks a promise.

    The mechanism has checked its own settings when it was made.
    """
    trust = plan.mechanism.trust
    if plan.unit not in UNITS:
        raise PrivacyError(
            f"privacy.unit must be one of {', '.join(UNITS)}, not {plan.unit!r}.", setting="privacy.unit"
        )
    if not isinstance(plan.reproducible_noise, bool):
        raise PrivacyError(
            f"privacy.reproducible_noise must be true or false, not {plan.reproducible_noise!r}.",
            setting="privacy.reproducible_noise",
        )
    for name in ("num_rounds", "declared_size", "records_per_unit", "nodes"):
        whole(getattr(plan, name), name)
    if isinstance(plan.seed, bool) or not isinstance(plan.seed, int):
        raise PrivacyError(f"seed must be a whole number, not {plan.seed!r}.", setting="seed")
    if whole(plan.head_rounds, "train.head_rounds", 0) > plan.num_rounds:
        raise PrivacyError(
            f"train.head_rounds={plan.head_rounds} is more than federation.num_rounds={plan.num_rounds}.",
            setting="train.head_rounds",
        )
    noise = number(plan.noise_multiplier, "privacy.noise_multiplier")
    norm = number(plan.max_grad_norm, "privacy.max_grad_norm")
    delta = number(plan.delta, "privacy.delta")
    head, share = number(plan.head_norm, "privacy.head_norm"), number(plan.head_share, "privacy.head_share")
    if norm <= 0.0:
        raise PrivacyError(
            f"privacy.max_grad_norm must be above 0, not {norm}.", setting="privacy.max_grad_norm"
        )
    if not 0.0 <= head < math.inf:
        raise PrivacyError(
            f"privacy.head_norm must be finite and 0 or more, not {head}.", setting="privacy.head_norm"
        )
    if not (0.0 < share < 1.0 if head else share == 0.0):
        raise PrivacyError(
            f"privacy.head_share must lie strictly between 0 and 1 where the head has a norm of its own, and "
            f"be 0 where it has none (privacy.head_norm={head:g}), not {share}.",
            setting="privacy.head_share",
        )
    if head and not plan.mechanism.clips_gradients:
        raise PrivacyError(HEAD_NORM.format(head, trust), setting="privacy.head_norm")
    if head and not norm / _MOST_APART <= head <= norm * _MOST_APART:
        raise PrivacyError(
            f"privacy.head_norm={head:g} is too far from privacy.max_grad_norm={norm:g}: the head's part is "
            "scaled from one to the other, and back with its noise, and would drown or be lost. Give one "
            f"between {norm / _MOST_APART:g} and {norm * _MOST_APART:g}, or 0 for one norm over everything.",
            setting="privacy.head_norm",
        )
    if plan.target_epsilon is not None:
        target = number(plan.target_epsilon, "privacy.epsilon")
        if not 0.0 < target < math.inf:
            raise PrivacyError(
                f"privacy.epsilon must be finite and above 0, not {target}.", setting="privacy.epsilon"
            )
    _validate_sizes(plan)
    _validate_evaluation(plan)
    _validate_centre(plan)
    if not plan.is_private():
        if noise != 0.0 or delta != 0.0 or plan.target_epsilon is not None:
            raise PrivacyError(
                f"privacy.trust={trust} has no noise, no delta and no epsilon; a noise multiplier of "
                f"{noise}, delta {delta} or epsilon {plan.target_epsilon} promises what nothing keeps.",
                setting="privacy.trust",
            )
        return
    if not 0.0 < noise < math.inf:
        raise PrivacyError(
            f"privacy.noise_multiplier must be finite and above 0, not {noise}. For a run without noise, say "
            "so: privacy.trust=none.",
            setting="privacy.noise_multiplier",
        )
    _validate_extent(plan)
    if norm < _LEAST_NORM:
        raise PrivacyError(
            f"privacy.max_grad_norm is {norm:g}, and must be at least {_LEAST_NORM:g}: what is clipped to "
            "less is rounded, and no bound any more.",
            setting="privacy.max_grad_norm",
        )
    if math.isinf(norm):
        raise PrivacyError(
            "privacy.max_grad_norm must be finite: without a bound no noise is enough.",
            setting="privacy.max_grad_norm",
        )
    _check_delta(delta, plan)
    if plan.unit not in plan.mechanism.units:
        raise PrivacyError(
            f"privacy.trust={trust} cannot protect privacy.unit={plan.unit}: whole updates are clipped "
            "and noised only by a trusted server (trust=central, unit=client), and it protects clients, not "
            "single records or persons. For those use trust=local or distributed.",
            setting="privacy.unit",
        )
    plan.mechanism.check(plan)


def _validate_extent(plan: PrivacyPlan) -> None:
    for name, value in (
        ("privacy.noise_multiplier", plan.noise_multiplier),
        ("evaluation_noise", plan.evaluation_noise or 1.0),
    ):
        if not _LEAST_NOISE <= value <= _MOST_NOISE:
            raise PrivacyError(
                f"{name} is {value:g}, and must lie between {_LEAST_NOISE:g} and {_MOST_NOISE:g}: with less "
                "nobody is protected (privacy.trust=none says so), with more nothing is learnt.",
                setting=name,
            )
    if (steps := plan.steps() + plan.evaluation_answers) > _MOST_STEPS:
        raise PrivacyError(
            f"The plan has {steps:,} noised steps, and no more than {_MOST_STEPS:,} are accounted for. Lower "
            "federation.num_rounds or train.local_steps."
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
    if not plan.mechanism.answers:
        raise PrivacyError(
            f"A plan with trust={plan.trust} has answers about held-out data: the noise that hides one "
            "client hides all that it could tell. Use federation.evaluation=public or none."
        )
    if not 0.0 < share < 1.0:
        raise PrivacyError(
            f"federation.evaluation_share must lie strictly between 0 and 1, not {share}: some units are "
            "trained on and others are evaluated on.",
            setting="federation.evaluation_share",
        )
    if not plan.is_private():
        if noise != 0.0:
            raise PrivacyError(
                f"privacy.trust={plan.trust} has no noise; evaluation_noise is {noise}.",
                setting="privacy.trust",
            )
    elif not 0.0 < noise < math.inf:
        raise PrivacyError(
            f"evaluation_noise must be finite and above 0, not {noise}.", setting="evaluation_noise"
        )


def _validate_sizes(plan: PrivacyPlan) -> None:
    noise = number(plan.size_noise, "size_noise")
    if not 0.0 <= noise < math.inf:
        raise PrivacyError(f"size_noise must be finite and 0 or more, not {noise}.", setting="size_noise")
    if noise and not (plan.is_private() and plan.mechanism.tells_size):
        raise PrivacyError(
            f"A plan with trust={plan.trust} has sizes told with noise ({noise:g}): it needs none."
        )


def _validate_centre(plan: PrivacyPlan) -> None:
    rounds = whole(plan.centre_rounds, "centre_rounds", 0)
    one_step = plan.local_steps == 1 and "fedsgd" in plan.mechanism.strategies
    if rounds > 1 or (rounds and (plan.num_rounds < 2 or not one_step)):
        raise PrivacyError(
            f"A plan of {plan.num_rounds} rounds of {plan.local_steps} steps with trust={plan.trust} has "
            f"{rounds} that set the centre. At most one does, the first of two or more, where each is one "
            "step that a server takes (federation.strategy=fedsgd). Leave train.centre out.",
            setting="train.centre",
        )


def _check_delta(delta: float, plan: PrivacyPlan) -> None:
    if not 0.0 < delta < 1.0:
        raise PrivacyError(
            f"privacy.delta must lie strictly between 0 and 1, not {delta}.", setting="privacy.delta"
        )
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
    exact = (
        "as declared" if not plan.size_noise else "at most: a size that was told with noise may be too low"
    )
    raise PrivacyError(
        f"privacy.delta={delta:g} is not below 1/n = {1.0 / most:.3g}, with n = {most:.0f} units "
        f"({plan.unit}) {exact}: it would allow publishing somebody's data outright. Set it well below "
        "that, or leave it out." + hint,
        setting="privacy.delta",
    )
