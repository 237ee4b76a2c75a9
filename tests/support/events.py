"""dp_accounting's events as references of tests: what fedtune's own steps are held to."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting as dp
from dp_accounting.rdp import RdpAccountant

from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms, epsilon_rdp_of_terms
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism

__all__ = ["distributed_epsilon", "epsilon_of", "epsilon_rdp", "terms_of"]


def terms_of(event: dp.DpEvent) -> dict[Term, int] | None:
    """The steps of `event` with their counts; None if it contains one without any privacy."""
    terms: dict[Term, int] = {}
    stack: list[tuple[Any, int]] = [(event, 1)]
    while stack:
        current, count = stack.pop()
        rate = 1.0
        if isinstance(current, dp.NoOpDpEvent) or count == 0:
            continue
        if isinstance(current, dp.NonPrivateDpEvent):
            return None
        if isinstance(current, dp.SelfComposedDpEvent):
            stack.append((current.event, count * current.count))
            continue
        if isinstance(current, dp.ComposedDpEvent):
            stack.extend((part, count) for part in current.events)
            continue
        if isinstance(current, dp.PoissonSampledDpEvent):
            rate = float(current.sampling_probability)
            current = current.event
        assert isinstance(current, dp.GaussianDpEvent), type(current)
        sigma = float(current.noise_multiplier)
        if rate == 0.0:
            continue
        if sigma == 0.0:
            return None
        term = Term(rate, sigma)
        terms[term] = terms.get(term, 0) + count
    return terms


def epsilon_of(event: dp.DpEvent, delta: float) -> float:
    """Upper bound on epsilon of `event` at `delta`."""
    return epsilon_of_terms(terms_of(event), delta)


def epsilon_rdp(event: dp.DpEvent, delta: float) -> float:
    """The same from Renyi DP."""
    return epsilon_rdp_of_terms(terms_of(event), delta)


def distributed_epsilon(mechanism: DiscreteMechanism, rounds: int, delta: float) -> dict[str, float]:
    """What `rounds` rounds cost every unit of the union, at `delta`.

    Returns `epsilon`, the rigorous bound (privacy loss distribution of the dominating event, slack included;
    steps 4 and 5 of the argument); `epsilon_rdp`, a second rigorous bound by other means; and
    `epsilon_ideal`, that of a trusted server with continuous noise of exactly noise_multiplier *
    max_grad_norm.

    The second bound needs no continuous Gaussian: at an integer order a the Renyi divergence between N_Z(0,
    v) and its shift by an integer vector is at most a * shift^2 / 2v (Canonne, Kamath and Steinke 2020,
    proposition 5), and for P (without the unit) and Q (with it) the moments of (1 - q) + q Q/P under P are
    polynomials in those of Q/P. The other direction is no larger, because a reflection of the integers
    swaps P and Q (Mironov, Talwar and Zhang 2019, theorem 5). That is the formula of the sampled continuous
    Gaussian at integer orders.
    """

    def steps(multiplier: float) -> Any:
        step = dp.PoissonSampledDpEvent(mechanism.sample_rate, dp.GaussianDpEvent(multiplier))
        return dp.SelfComposedDpEvent(step, rounds)

    slack = mechanism.slack(rounds)
    left = delta * math.exp(-slack)
    rdp = RdpAccountant(orders=[*range(2, 129), 160, 192, 256, 512])
    rdp.compose(steps(math.sqrt(mechanism.shares) * mechanism.std / mechanism.sensitivity))
    return {
        "epsilon": epsilon_of(steps(mechanism.effective_noise_multiplier), left) + 2.0 * slack,
        "epsilon_rdp": float(rdp.get_epsilon(left)) + 2.0 * slack,
        "epsilon_ideal": epsilon_of(steps(mechanism.noise_multiplier), delta),
    }
