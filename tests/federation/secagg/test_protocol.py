"""The protocol without Flower: sums are exact, views are uniform, liars are named, nothing is answered
twice.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedtune.errors import AggregationAborted, PrivacyError
from fedtune.federation.secagg import crypto
from fedtune.federation.secagg import protocol as secure_aggregation
from fedtune.federation.secagg.protocol import MaskedSum, Masker, PublicKeys, Sealed, Session
from tests.support.work import calls_of

NAMES = ("ada", "bob", "cleo", "dan", "eve")


def session(n=5, size=16, dropouts=0, colluders=0, *, run="run", round=1, attempt=1) -> Session:
    return Session(run, round, attempt, NAMES[:n], size, dropouts, colluders)


class Exchange:
    """Everybody in one place; `view` is all that the server was sent."""

    def __init__(self, made: Session, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.session = made
        self.vectors = {n: generator.integers(0, 2**32, made.size, dtype=np.uint32) for n in made.nodes}
        self.maskers = {n: Masker(made, n) for n in made.nodes}
        self.server = MaskedSum(made)
        self.masked: dict[str, np.ndarray] = {}
        self.sealed: dict[str, Sealed] = {}
        self.answers: dict[str, dict[str, bytes]] = {}

    def until_shared(self, before_advertise=(), before_share=()):
        keys = {n: m.advertise() for n, m in self.maskers.items() if n not in before_advertise}
        self.roster = self.server.advertised(keys)
        self.sealed = {n: self.maskers[n].share(self.roster) for n in self.roster if n not in before_share}
        self.received = self.server.shared(self.sealed)

    def until_masked(self, before_advertise=(), before_share=(), before_mask=()):
        self.until_shared(before_advertise, before_share)
        for name, received in self.received.items():
            if name not in before_mask:
                self.masked[name] = self.maskers[name].mask(self.vectors[name], received)
                self.server.masked(name, self.masked[name])

    def finish(self, before_unmask=()):
        alive = self.server.survivors()
        self.answers = {n: self.maskers[n].unmask(alive) for n in alive if n not in before_unmask}
        return self.server.unmask(self.answers)

    def plain(self, names) -> np.ndarray:
        return np.sum([self.vectors[n] for n in names], axis=0, dtype=np.uint64).astype(np.uint32)


# --- the sum ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_sum_is_exact_for_every_pattern_of_dropouts(n):
    """Every node leaves in any phase or never: exact sum, or a refusal exactly where the rules ask for
    one.
    """
    phases = ("advertise", "share", "mask", "unmask", "never")
    most = (n - 1) // 2
    made = session(n, size=3, dropouts=most)
    outcomes = {"sum": 0, "aborted": 0}
    patterns = itertools.product(phases, repeat=n)
    if n == 5:  # all 3125 would take a minute: patterns up to renaming, each with a random assignment
        generator = np.random.default_rng(1)
        patterns = [
            tuple(generator.permutation(p)) for p in itertools.combinations_with_replacement(phases, n)
        ]
    for leaves in patterns:
        gone = {phase: [m for m, w in zip(made.nodes, leaves, strict=True) if w == phase] for phase in phases}
        early = len(gone["advertise"]) + len(gone["share"]) + len(gone["mask"])
        enough = n - early >= made.quorum and n - early - len(gone["unmask"]) >= made.threshold
        exchange = Exchange(made)
        try:
            exchange.until_masked(gone["advertise"], gone["share"], gone["mask"])
            total = exchange.finish(gone["unmask"])
        except AggregationAborted:
            assert not enough, leaves
            outcomes["aborted"] += 1
            continue
        assert enough, leaves
        np.testing.assert_array_equal(total, exchange.plain(gone["unmask"] + gone["never"]))
        outcomes["sum"] += 1
    assert outcomes["sum"] and outcomes["aborted"]


@given(st.data(), st.integers(2, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_law_masks_cancel_in_the_sum_of_those_who_stayed(data, n, size, seed):
    """Whoever leaves, as far as the plan allows: the rest is the sum of their vectors, modulo 2^32."""
    made = session(n, size=size, dropouts=(n - 1) // 2)
    gone = data.draw(st.sets(st.sampled_from(made.nodes), max_size=(n - 1) // 2))
    exchange = Exchange(made, seed)
    exchange.until_masked(before_mask=gone)
    total = exchange.finish()
    assert total.dtype == np.uint32 and total.shape == (size,)
    np.testing.assert_array_equal(total, exchange.plain([name for name in made.nodes if name not in gone]))


@given(st.data(), st.binary(min_size=32, max_size=32), st.sets(st.integers(1, 2**32), min_size=1, max_size=6))
def test_law_any_threshold_of_the_shares_gives_the_secret(data, secret, points):
    points = sorted(points)
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, crypto.split_secret(secret, threshold, points), strict=True))
    some = data.draw(st.sets(st.sampled_from(points), min_size=threshold))
    assert crypto.combine_shares({point: shares[point] for point in some}) == secret


def test_more_dropouts_than_the_plan_allows_end_the_round(golden):
    with pytest.raises(AggregationAborted) as caught:
        Exchange(session(5, dropouts=1)).until_shared(["eve"], ["bob"])
    golden(caught)
    assert "3 of 5" in str(caught.value) and "4 are needed" in str(caught.value)


# --- what the server sees -----------------------------------------------------------------------------


def uniform(vector: np.ndarray) -> float:
    """P value of a chi-square test of the high and the low bytes of uint32 numbers against uniform."""
    return min(
        float(stats.chisquare(np.bincount((vector >> shift) & 255, minlength=256)).pvalue)
        for shift in (np.uint32(0), np.uint32(8), np.uint32(24))
    )


def server_view(n=4, size=60_000) -> tuple[Exchange, dict[str, np.ndarray]]:
    """Small vectors, and each node's masked vector less the self mask, which an honest server learns."""
    exchange = Exchange(session(n, size))
    generator = np.random.default_rng(8)
    exchange.vectors = {m: generator.integers(0, 200, size).astype(np.uint32) for m in exchange.session.nodes}
    exchange.until_masked()
    total = exchange.finish()
    np.testing.assert_array_equal(total, exchange.plain(exchange.session.nodes))
    seen = {}
    holders = exchange.session.nodes[: exchange.session.threshold]
    for name in exchange.session.nodes:
        shares = {exchange.session.point(h): exchange.answers[h][name] for h in holders}
        seen[name] = exchange.masked[name] - secure_aggregation.self_mask(
            exchange.session, crypto.combine_shares(shares)
        )
    return exchange, seen


def test_the_server_sees_uniform_numbers_but_for_the_whole_sum():
    exchange, seen = server_view()
    for masked in exchange.masked.values():
        assert uniform(masked) > 1e-9
    for size in (1, 2, 3):  # every part of the nodes, with what unmasking reveals taken off
        for part in itertools.combinations(seen, size):
            assert uniform(np.sum([seen[p] for p in part], axis=0, dtype=np.uint32)) > 1e-9
    whole = np.sum(list(seen.values()), axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(whole, exchange.plain(exchange.session.nodes))
    assert uniform(whole) < 1e-12


def late_vector(size=60_000) -> tuple[np.ndarray, np.ndarray]:
    """A node is given up, its masking key recovered, and then its vector comes: (what it hides, what the
    server makes of it with all that it knows)."""
    exchange = Exchange(session(4, size, dropouts=1))
    exchange.vectors["dan"] = np.arange(size, dtype=np.uint32) % 200
    exchange.until_masked(before_mask=["dan"])
    total = exchange.finish()
    np.testing.assert_array_equal(total, exchange.plain(["ada", "bob", "cleo"]))
    stripped = exchange.maskers["dan"].mask(exchange.vectors["dan"], exchange.received["dan"])
    key = crypto.combine_shares(
        {exchange.session.point(h): exchange.answers[h]["dan"] for h in exchange.answers}
    )
    digest = secure_aggregation.roster_digest(exchange.session, exchange.roster)
    for peer in ("ada", "bob", "cleo"):
        stripped += secure_aggregation.pair_mask(
            exchange.session, digest, key, exchange.roster[peer].masking, peer, "dan"
        )
    return exchange.vectors["dan"], stripped


def test_a_vector_that_comes_too_late_stays_hidden():
    hidden, seen = late_vector()
    assert uniform(seen) > 1e-9
    assert uniform(hidden) < 1e-12


@pytest.mark.parametrize("lost", ["pair_mask", "self_mask"])
def test_a_mask_that_is_left_out_shows(monkeypatch, lost):
    """Mutants of the tests above: without either mask every sum is still right, and a view is bare."""

    def nothing(made, *_):
        return np.zeros(made.size, dtype=np.uint32)

    monkeypatch.setattr(secure_aggregation, lost, nothing)
    if lost == "pair_mask":
        _, seen = server_view()
        assert max(uniform(one) for one in seen.values()) < 1e-12
    else:
        hidden, seen_late = late_vector()
        np.testing.assert_array_equal(seen_late, hidden)


def test_keys_seeds_and_masks_are_new_in_every_attempt_and_bound_to_it():
    first, second = Exchange(session(3, attempt=1)), Exchange(session(3, attempt=2))
    first.until_masked()
    second.until_masked()
    for name in first.session.nodes:
        assert first.roster[name] != second.roster[name]
        assert (first.masked[name] != second.masked[name]).all()
    # Even with one and the same key, another run, round, attempt, or set of nodes gives another mask.
    private, public = crypto.new_key_pair()[0], crypto.new_key_pair()[1]
    places = [
        session(3), session(3, run="other"), session(3, round=2), session(3, attempt=2), session(4),
        session(3, dropouts=1),
    ]  # fmt: skip
    masks = [secure_aggregation.pair_mask(s, b"d", private, public, "ada", "bob").tobytes() for s in places]
    assert len(set(masks)) == len(masks)
    assert secure_aggregation.pair_mask(session(3), b"d", private, public, "bob", "ada").tobytes() == masks[0]
    assert (
        secure_aggregation.pair_mask(session(3), b"d", private, public, "ada", "cleo").tobytes() != masks[0]
    )


def test_fewer_shares_than_the_threshold_say_nothing():
    secret = bytes(31) + b"\x05"
    shares = crypto.split_secret(secret, 3, [1, 2, 3, 4])
    for points in itertools.combinations(range(4), 3):
        assert crypto.combine_shares({p + 1: shares[p] for p in points}) == secret
    # Two of three shares fit every secret equally well: byte values over many dealings are uniform.
    dealings = (crypto.split_secret(secret, 3, [1, 2, 3])[:2] for _ in range(400))
    pooled = b"".join(share[1:] for two in dealings for share in two)
    assert stats.chisquare(np.bincount(np.frombuffer(pooled, np.uint8), minlength=256)).pvalue > 1e-9


# --- rules that hold against a server that lies -------------------------------------------------------


def test_no_node_gives_both_kinds_of_share(golden):
    exchange = Exchange(session(5, dropouts=2))
    exchange.until_masked()
    masker = exchange.maskers["ada"]
    held = dict(masker.held)
    answer = masker.unmask(["ada", "bob", "cleo"])
    for name, (of_seed, of_key) in held.items():
        assert answer[name] == (of_seed if name in ("ada", "bob", "cleo") else of_key)
    assert masker.held == {}
    with pytest.raises(AggregationAborted) as raised:
        masker.unmask(["ada", "bob", "cleo", "dan", "eve"])
    golden(raised)


@pytest.mark.parametrize(("n", "colluders"), [(3, 0), (4, 0), (5, 0), (5, 1), (5, 2), (5, 3)])
def test_no_two_lies_about_survivors_reach_both_thresholds(n, colluders):
    """Honest nodes give one kind of one node's shares each, colluders both."""
    made = session(n, colluders=colluders)
    assert 2 * made.threshold > n + colluders
    assert made.threshold <= n


@pytest.mark.parametrize(
    ("survivors", "said"),
    [
        (["ada", "bob"], "needed"),
        (["bob", "cleo", "dan", "eve"], "was told that it did not"),
        (["ada", "bob", "cleo", "zoe"], "never shared"),
        (["ada", "ada", "bob", "cleo"], "twice"),
    ],
)
def test_a_node_refuses_survivors_that_cannot_be(survivors, said):
    exchange = Exchange(session(5, dropouts=1))
    exchange.until_masked()
    with pytest.raises(AggregationAborted, match=said):
        exchange.maskers["ada"].unmask(survivors)
    with pytest.raises(AggregationAborted):  # and gives no second chance
        exchange.maskers["ada"].unmask(list(NAMES))


@pytest.mark.parametrize("step", ["advertise", "share", "mask", "unmask"])
def test_every_request_is_answered_once(step, golden):
    exchange = Exchange(session(3))
    exchange.until_masked()
    exchange.finish()
    masker = exchange.maskers["ada"]
    again = {
        "advertise": masker.advertise,
        "share": lambda: masker.share(exchange.roster),
        "mask": lambda: masker.mask(exchange.vectors["ada"], exchange.received["ada"]),
        "unmask": lambda: masker.unmask(["ada", "bob", "cleo"]),
    }
    with pytest.raises(AggregationAborted) as raised:
        again[step]()
    assert "'ada'" in str(raised.value)
    golden(raised)


def test_requests_out_of_order_are_refused(golden):
    exchange = Exchange(session(3))
    with pytest.raises(AggregationAborted) as raised:
        exchange.maskers["ada"].share({})
    golden(raised)
    exchange = Exchange(session(3))
    exchange.until_shared()
    with pytest.raises(AggregationAborted) as raised:
        exchange.maskers["ada"].unmask(list(NAMES[:3]))
    golden(raised)


def test_a_vector_is_masked_once_though_the_node_remembers_through_a_restart():
    exchange = Exchange(session(3))
    exchange.until_shared()
    kept = exchange.maskers["ada"].to_json()
    restored = Masker.from_json(kept)
    assert restored == exchange.maskers["ada"]
    restored.mask(exchange.vectors["ada"], exchange.received["ada"])
    after = Masker.from_json(restored.to_json())
    assert (after.masking_key, after.seed, after.sealing_key) == (b"", b"", b"")
    with pytest.raises(AggregationAborted):
        after.mask(exchange.vectors["ada"], exchange.received["ada"])


def test_a_server_that_shows_nodes_different_keys_is_noticed(golden):
    exchange = Exchange(session(3))
    keys = {n: m.advertise() for n, m in exchange.maskers.items()}
    other = {**keys, "cleo": PublicKeys(crypto.new_key_pair()[1], crypto.new_key_pair()[1])}
    sealed = {
        "ada": exchange.maskers["ada"].share(keys),
        "bob": exchange.maskers["bob"].share(other),
        "cleo": exchange.maskers["cleo"].share(keys),
    }
    server = MaskedSum(exchange.session)
    server.advertised(keys)
    received = server.shared(sealed)
    with pytest.raises(AggregationAborted) as raised:
        exchange.maskers["ada"].check_received(received["ada"])
    assert "'bob'" in str(raised.value)
    assert "'ada'" in str(raised.value)
    golden(raised)


def test_a_node_looks_for_its_own_keys(golden):
    exchange = Exchange(session(3))
    keys = {n: m.advertise() for n, m in exchange.maskers.items()}
    swapped = {**keys, "ada": PublicKeys(keys["ada"].sealing, crypto.new_key_pair()[1])}
    with pytest.raises(AggregationAborted) as raised:
        exchange.maskers["ada"].share(swapped)
    assert "'ada'" in str(raised.value)
    golden(raised)


# --- nodes that cheat or are broken -------------------------------------------------------------------


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_wrong_share_in_the_last_exchange_names_who_sent_it(golden):
    exchange = Exchange(session(5, dropouts=1))
    exchange.until_masked(before_mask=["eve"])
    alive = exchange.server.survivors()
    answers = {n: exchange.maskers[n].unmask(alive) for n in alive}
    for dealer in ("ada", "eve"):
        wrong = {**answers, "cleo": {**answers["cleo"], dealer: flip(answers["cleo"][dealer])}}
        with pytest.raises(
            AggregationAborted, match=f"'cleo' answered with a wrong share of node '{dealer}'"
        ):
            exchange.server.unmask(wrong)
    # The other kind of share than was asked for is a wrong one too.
    with pytest.raises(AggregationAborted) as raised:
        exchange.server.unmask({**answers, "dan": {"ada": answers["dan"]["ada"]}})
    assert "'dan'" in str(raised.value)
    golden(raised)
    with pytest.raises(AggregationAborted) as raised:
        exchange.server.unmask({**answers, "dan": dict.fromkeys(answers["dan"], b"")})
    assert "'dan'" in str(raised.value)
    golden(raised)
    np.testing.assert_array_equal(exchange.server.unmask(answers), exchange.plain(alive))


def test_a_sealed_share_that_was_changed_or_moved_names_its_dealer(golden):
    for change in ("bit", "dealer", "commitment"):
        exchange = Exchange(session(3))
        exchange.until_shared()
        received = dict(exchange.received["ada"])
        sealed, (of_seed, of_key) = received["bob"]
        received["bob"] = {
            "bit": (flip(sealed), (of_seed, of_key)),
            "dealer": received["cleo"],
            "commitment": (sealed, (of_seed, flip(of_key))),
        }[change]
        with pytest.raises(AggregationAborted) as raised:
            exchange.maskers["ada"].mask(exchange.vectors["ada"], received)
        assert "'bob'" in str(raised.value)
        assert "'ada'" in str(raised.value)
        golden(raised)


@pytest.mark.parametrize("secret", ["seed", "masking_key"])
def test_a_dealer_of_shares_that_fit_nothing_is_named(monkeypatch, secret, golden):
    """The dealer commits to its wrong shares, so that every holder finds them in order."""
    exchange = Exchange(session(5, dropouts=1))
    honest = crypto.split_secret
    which = iter([secret == "seed", secret == "masking_key"])

    def dishonest(value, threshold, points):
        return honest(bytes(32) if next(which) else value, threshold, points)

    keys = {n: m.advertise() for n, m in exchange.maskers.items()}
    roster = exchange.server.advertised(keys)
    sealed = {n: m.share(roster) for n, m in exchange.maskers.items() if n != "dan"}
    monkeypatch.setattr(crypto, "split_secret", dishonest)
    sealed["dan"] = exchange.maskers["dan"].share(roster)
    monkeypatch.undo()
    received = exchange.server.shared(sealed)
    for name in sorted(received):
        if name == "dan" and secret == "masking_key":
            continue  # the key comes into play when its owner drops out
        exchange.server.masked(name, exchange.maskers[name].mask(exchange.vectors[name], received[name]))
    with pytest.raises(AggregationAborted) as raised:
        exchange.finish()
    assert "'dan'" in str(raised.value)
    golden(raised)


def test_malformed_contributions_are_named(golden):
    exchange = Exchange(session(3))
    keys = {n: m.advertise() for n, m in exchange.maskers.items()}
    for wrong, said in (
        ({**keys, "bob": PublicKeys(b"short", keys["bob"].masking)}, "'bob' advertised a key of 5 bytes"),
        ({**keys, "bob": keys["ada"]}, "'ada' and 'bob' advertised the same key"),
        ({**keys, "zoe": keys["ada"]}, "zoe was not asked"),
    ):
        with pytest.raises(AggregationAborted, match=said):
            MaskedSum(exchange.session).advertised(wrong)
    small = {**keys, "bob": PublicKeys(bytes(32), keys["bob"].masking)}  # a point of small order
    with pytest.raises(AggregationAborted) as raised:
        exchange.maskers["ada"].share(small)
    assert "'bob'" in str(raised.value)
    golden(raised)
    exchange = Exchange(session(3))
    exchange.until_shared()
    with pytest.raises(AggregationAborted) as raised:
        exchange.server.shared({**exchange.sealed, "bob": Sealed({}, {}, b"")})
    assert "'bob'" in str(raised.value)
    golden(raised)
    for bad in (np.zeros(15, np.uint32), np.zeros(16, np.int64), np.zeros((4, 4), np.uint32)):
        with pytest.raises(AggregationAborted) as raised:
            exchange.server.masked("bob", bad)
        assert "'bob'" in str(raised.value)
        golden(raised)
    with pytest.raises(AggregationAborted) as raised:
        exchange.server.masked("zoe", np.zeros(16, np.uint32))
    golden(raised)


@pytest.mark.parametrize(
    ("n", "dropouts", "colluders"), [(1, 0, 0), (2, 1, 0), (4, 2, 0), (5, 2, 2), (5, 0, 4), (3, -1, 0)]
)
def test_what_the_protocol_cannot_promise_is_refused_before_it_starts(n, dropouts, colluders):
    with pytest.raises(PrivacyError, match=r"nodes|node"):
        session(n, dropouts=dropouts, colluders=colluders)


def test_the_prime_is_prime_and_the_first_one_above_every_secret():
    """Miller and Rabin's test, with enough bases for a chance of error below 2^-80."""

    def probably_prime(n, bases=40):
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in range(2, 2 + bases):
            x = pow(base, odd, n)
            if x in (1, n - 1):
                continue
            if all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
                return False
        return True

    assert probably_prime(crypto.PRIME)
    assert not any(probably_prime(2**256 + k, 2) for k in range(1, 297, 2))


def test_labels_do_not_collide():
    assert crypto.label("a", "bc") != crypto.label("ab", "c")
    assert crypto.label("a", 1) != crypto.label("a", "1")
    assert crypto.label("a", b"x", "y") != crypto.label("a", "x", b"y")


def test_no_number_is_handled_by_itself():
    """A hundred times the numbers is no more Python: they are masked and summed as arrays."""
    names = tuple(f"node-{i}" for i in range(10))

    def calls(length):
        exchange = Exchange(Session("run", 1, 1, names, length, 2, 1))

        def run():
            exchange.until_masked(before_mask=["node-3"])
            total = exchange.finish(["node-4"])
            np.testing.assert_array_equal(total, exchange.plain([n for n in names if n != "node-3"]))

        return calls_of(run)

    assert calls(300_000) < 1.3 * calls(3_000)
