"""How strong a guarantee is, read from epsilon and delta together.

An attacker looks at everything that was released and says of each unit (a person, say) whether it was in the
data. The best that he can do is the trade-off curve (Dong, Roth and Su 2022): of the units that were in it,
the share that he finds (true positive rate), by the share of the others that he is wrong about (false
positive rate). Every pair (epsilon, delta) that holds is a bound on it,

    found <= delta + e^epsilon wrong,    found <= 1 - e^-epsilon (1 - delta - wrong),

and all pairs together are the whole curve (their proposition 2.12). Where a run's steps are known, its
pairs come from its composed privacy loss distribution (upper bounds on delta); else there is one pair, which
says much less. Either way the curve here is an upper bound.

Epsilon alone grades nothing: with delta 1/8, an epsilon of 1 allows to publish one person in eight. So the
grade is of what an attacker finds while he is wrong about one in a thousand (Carlini et al. 2022 say why
there), of his largest advantage (found less wrong, wherever that is largest), and of delta itself, since for
that share of the outcomes nothing is promised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedtune.privacy.accounting.epsilon import Term, deltas_of_terms, epsilon_of_terms

__all__ = ["WEAK", "WRONG", "TradeOff", "caution", "grade", "percent", "trade_off"]

WRONG = (0.001, 0.01, 0.1)  # shares of those not in the data that an attacker is wrong about, as shown
_LARGEST = 10_000.0  # epsilon from which on a curve says nothing more than one pair

# The largest share found at WRONG[0], advantage and delta that a word is used for. By them a typical run
# (Gaussian noise, delta 1e-5) is strong up to an epsilon of about 1.7 and moderate up to about 9; one pair
# without its curve, up to 1 and 3.
WEAK = "A weak protection at best"
_GRADES = (("strong", 0.004, 0.5, 1e-3), ("moderate", 0.1, 0.95, 1e-2))


@dataclass(frozen=True)
class TradeOff:
    """An upper bound on what any attacker finds out about who was in the data.

    Attributes:
        pairs: (epsilon, delta) that hold together.
        own: whether they are the run's own curve, or one pair.
    """

    pairs: tuple[tuple[float, float], ...]
    own: bool

    def found(self, wrong: float) -> float:
        """Largest share found of those in the data, if the attacker is wrong about `wrong` of the others."""
        found = 1.0
        for epsilon, delta in self.pairs:
            if epsilon < 700.0:
                found = min(found, delta + math.exp(epsilon) * wrong)
            found = min(found, 1.0 - math.exp(-epsilon) * (1.0 - delta - wrong))
        return min(max(found * (1.0 + 1e-12), wrong), 1.0)

    def advantage(self) -> float:
        """Largest difference between the share found and the share that is wrong: the total variation."""
        # Found is larger than wrong by most where the two lines of a pair meet.
        each = (1.0 - 2.0 * (1.0 - delta) / (1.0 + math.exp(min(eps, 700.0))) for eps, delta in self.pairs)
        return min(max(min(each, default=1.0) * (1.0 + 1e-12), 0.0), 1.0)


def trade_off(terms: Mapping[Term, int] | None, epsilon: float, delta: float) -> TradeOff:
    """The trade-off curve of `terms`, a run's steps, or of the one pair (`epsilon`, `delta`) promised.

    The pair alone is taken where the steps are not known (None), or cost less than the pair (then they are
    not all that was released), or where epsilon is absurd.
    """
    pair = ((float(epsilon), float(delta)),)
    if not terms or not epsilon < _LARGEST or epsilon_of_terms(terms, delta) < 0.99 * epsilon:
        return TradeOff(pair, own=False)
    # Up to where delta is next to nothing.
    epsilons = np.concatenate([np.linspace(0.0, 1.0, 40), np.geomspace(1.02, max(3.0 * epsilon, 12.0), 120)])
    deltas = deltas_of_terms(terms, epsilons, resolution=2000)
    return TradeOff((*pair, *((float(e), float(d)) for e, d in zip(epsilons, deltas, strict=True))), own=True)


def grade(curve: TradeOff, delta: float) -> str:
    """`strong`, `moderate` or `weak`."""
    found, advantage = curve.found(WRONG[0]), curve.advantage()
    for word, most_found, most_advantage, most_delta in _GRADES:
        if found <= most_found and advantage <= most_advantage and delta <= most_delta:
            return word
    return "weak"


def caution(curve: TradeOff, epsilon: float, delta: float) -> str | None:
    """What a person should know who relies on a guarantee that is graded weak; None if it is not."""
    if grade(curve, delta) != "weak":
        return None
    return (
        f"{WEAK}, epsilon {epsilon:.4g} at delta {delta:.3g}: an attacker who is wrong about 1 in 1,000 of "
        f"those not in the data may recognise {percent(curve.found(WRONG[0]))} of those in it."
    )


def percent(share: float) -> str:
    """`share` in percent, rounded up: rounded down it would be no bound."""
    value = 100.0 * share
    if value >= 99.995:
        return "more than 99.99 percent"
    digits = 1 if 1.0 <= value < 99.0 else 2
    return f"{math.ceil(round(value * 10**digits, 9)) / 10**digits:.{digits}f} percent"
