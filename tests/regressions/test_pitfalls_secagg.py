"""Privacy bugs that others have shipped in secure aggregation and distributed noise; numbers as in PITFALLS.

Whole rounds with dropouts, retries and lies are in tests/federation/secagg/test_distributed_round.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from fedtune.errors import AggregationAborted, PrivacyError
from fedtune.federation.secagg import crypto as secagg_crypto
from fedtune.federation.secagg.messages import PhaseId, session_for
from fedtune.federation.secagg.protocol import MaskedSum, Masker, Session
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from fedtune.privacy.mechanisms.noise import Entropy, discrete_gaussian
from fedtune.privacy.plan import PrivacyPlan
from tests.support.events import distributed_epsilon
from tests.support.plans import plan_of

SIZE = 6000
NAMES = tuple(f"site-{i}" for i in range(6))


def plan(**changes) -> PrivacyPlan:
    settings = {
        "trust": "distributed", "unit": "record", "sample_rate": 0.1, "num_rounds": 20,
        "noise_multiplier": 1.2, "max_grad_norm": 0.7, "declared_size": 3000, "delta": 1e-4, "nodes": 6,
        "max_dropouts": 1, "max_colluders": 1,
    }  # fmt: skip
    return plan_of(**{**settings, **changes})


def noise_of(mechanism: DiscreteMechanism, nodes: int) -> float:
    """Measured standard deviation of the noise in a sum of `nodes` nodes."""
    total = np.zeros(mechanism.dimension, dtype=np.uint32)
    for _ in range(nodes):
        total += mechanism.share(np.zeros(mechanism.dimension), Entropy.system())
    return float(mechanism.decode(total).std())


def rounds_of_keys(session: Session) -> tuple[MaskedSum, dict[str, Masker], dict]:
    maskers = {name: Masker(session, name) for name in session.nodes}
    server = MaskedSum(session)
    roster = server.advertised({name: masker.advertise() for name, masker in maskers.items()})
    return server, maskers, server.shared({name: m.share(roster) for name, m in maskers.items()})


def test_pitfall_21_dropouts_do_not_lower_the_noise_below_the_plan():
    """Everybody answers, one drops out, one more tells its noise: what is left is the plan's, or more."""
    made = DiscreteMechanism.for_plan(plan(), SIZE)
    wanted, tolerance = 1.2 * 0.7, 5.5 / math.sqrt(2 * SIZE)
    for honest in (4, 5, 6):
        assert noise_of(made, honest) > wanted * (1 - tolerance)
    # The bug: shares of sigma^2 / n. With one dropout and one colluder the noise is too small, and it shows.
    wrong = dataclasses.replace(made, scale=made.scale * math.sqrt(6 / 4))
    assert noise_of(wrong, 4) < wanted * (1 - tolerance)
    assert made.noise_std(1) >= plan().noise_std() / math.sqrt(plan().mechanism.honest_shares(plan()))


def test_pitfall_21_more_dropouts_than_planned_give_no_sum():
    session = session_for(PhaseId("r", 1, 1, "advertise"), plan(), NAMES, SIZE)
    assert session.quorum == 5
    server, maskers, received = rounds_of_keys(session)
    for name in NAMES[:4]:
        server.masked(name, maskers[name].mask(np.zeros(SIZE, np.uint32), received[name]))
    with pytest.raises(AggregationAborted, match=r"4 of 6 nodes are left, and 5 are needed.*charged"):
        server.survivors()
    # A server that goes on all the same gets nothing from the nodes.
    with pytest.raises(AggregationAborted, match="5 are needed"):
        maskers["site-0"].unmask(NAMES[:4])


def test_pitfall_21_and_22_a_retried_round_has_new_keys_new_masks_and_new_noise():
    drawn = []
    for attempt in (1, 2):
        session = session_for(PhaseId("r", 1, attempt, "advertise"), plan(), NAMES, SIZE)
        _, maskers, received = rounds_of_keys(session)
        made = DiscreteMechanism.for_plan(plan(), SIZE)
        entropy = plan().entropy("site-0", 1)
        share = made.share(np.zeros(SIZE), entropy)
        drawn.append((share, maskers["site-0"].mask(share, received["site-0"])))
    (first, masked), (second, masked_again) = drawn
    assert (first != second).mean() > 0.99
    # Noise that is used twice cancels in the difference of two answers; this difference is as wide as two
    # noises.
    difference = (first - second).view(np.int32).astype(float)
    assert difference.std() == pytest.approx(math.sqrt(2) * made.std, rel=0.06)
    assert (masked != masked_again).mean() > 0.99


def test_pitfall_23_and_24_noise_is_integers_and_no_seed_reaches_it():
    made = DiscreteMechanism.for_plan(plan(seed=42), SIZE)
    shares = []
    for _ in range(2):
        np.random.seed(42)  # noqa: NPY002  (the generator that other frameworks draw noise from)
        shares.append(made.share(np.zeros(SIZE), plan(seed=42).entropy("site-0", 1, 1)))
    assert shares[0].dtype == np.uint32
    assert (shares[0] != shares[1]).mean() > 0.99
    assert discrete_gaussian(10, 5, Entropy.system()).dtype == np.int64


def test_pitfall_25_masks_are_integers_of_a_key_for_each_pair_and_dropouts_are_recovered():
    """The bug: float masks, all from one secret that every node knows, and no way on without a node."""
    session = session_for(PhaseId("r", 1, 1, "advertise"), plan(), NAMES, SIZE)
    server, maskers, received = rounds_of_keys(session)
    keys = {
        (u, v): secagg_crypto.agree(maskers[u].masking_key, maskers[u].roster[v].masking, b"pair")
        for u, v in itertools.permutations(NAMES, 2)
    }
    assert all(keys[u, v] == keys[v, u] for u, v in keys)
    assert len(set(keys.values())) == len(keys) / 2  # no two pairs share one
    assert len({masker.seed for masker in maskers.values()}) == 6
    # Huge values, which floats of any kind would round, come back exactly; one node never answers.
    vectors = {name: np.full(SIZE, 2**32 - 1 - i, dtype=np.uint32) for i, name in enumerate(NAMES)}
    for name in NAMES[:5]:
        masked = maskers[name].mask(vectors[name], received[name])
        assert masked.dtype == np.uint32
        server.masked(name, masked)
    alive = server.survivors()
    total = server.unmask({name: maskers[name].unmask(alive) for name in alive})
    expected = sum(int(vectors[name][0]) for name in alive) % 2**32
    assert (total == expected).all()


def test_pitfall_5_clip_sensitivity_and_noise_are_one_setting():
    """Twice the clipping norm is twice the noise and the same epsilon; nothing can be set apart."""
    small = DiscreteMechanism.for_plan(plan(max_grad_norm=0.5), SIZE)
    large = DiscreteMechanism.for_plan(plan(max_grad_norm=1.0), SIZE)
    assert large.noise_std(4) == pytest.approx(2 * small.noise_std(4), rel=1e-6)
    assert small.sensitivity == pytest.approx(large.sensitivity, rel=1e-6)
    assert distributed_epsilon(small, 20, 1e-4) == pytest.approx(distributed_epsilon(large, 20, 1e-4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        small.scale = 1.0  # type: ignore[misc]


def test_pitfall_8_the_plans_epsilon_is_a_bound_on_what_the_integers_really_cost():
    """The accounted multiplier counts rounding, float32 and the sum of discrete Gaussians against the
    plan.
    """
    made = DiscreteMechanism.for_plan(plan(), SIZE)
    assert made.effective_noise_multiplier >= plan().noise_multiplier
    assert plan().epsilon() >= distributed_epsilon(made, 20, 1e-4)["epsilon"] * (1 - 1e-9)
    # Had sensitivity been taken without rounding, the noise would be short of it.
    naive = math.sqrt(made.shares) * made.std / (made.scale * made.max_grad_norm)
    assert naive > made.effective_noise_multiplier


def test_pitfall_20_and_28_the_server_cannot_choose_who_is_in_a_sum(golden):
    """Amplification counts on a sample nobody sees; a sum over a few chosen nodes would show more of it."""
    session = session_for(PhaseId("r", 1, 1, "advertise"), plan(), NAMES, SIZE)
    for few in range(1, session.quorum):
        _, maskers, received = rounds_of_keys(session)
        maskers["site-0"].mask(np.zeros(SIZE, np.uint32), received["site-0"])
        with pytest.raises(AggregationAborted, match="needed"):
            maskers["site-0"].unmask(NAMES[:few])
    with pytest.raises(PrivacyError) as raised:
        session_for(PhaseId("r", 1, 1, "advertise"), plan(nodes=1, max_dropouts=0, max_colluders=0), ["a"], 5)
    golden(raised)
