"""What travels, and that anything else is refused with a name and numbers."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.errors import FederationError, FedtuneError, UpdateRejected
from fedtune.federation.flower import serialized_size, task_identity
from fedtune.federation.messages import NodeHello, RoundReply, RoundRequest, check_update, coarse_seconds
from fedtune.privacy.plan import make_plan
from tests.support.fake_federation import fake_config
from tests.support.golden import Golden

PLAN = make_plan(fake_config(), [100, 200])
VECTOR = np.array([1.0, -0.5, 2.0], dtype=np.float32)


def request() -> RoundRequest:
    return RoundRequest("run", 2, 1, PLAN, VECTOR)


def reply(**changes: object) -> RoundReply:
    values = {
        "node": "a",
        "run": "run",
        "round": 2,
        "attempt": 1,
        "releases": 2,
        "steps": 5,
        "seconds": 1.25,
    }
    return RoundReply(**{**values, "update": VECTOR, **changes})  # type: ignore[arg-type]


def read(content: RecordDict) -> RoundReply:
    return RoundReply.from_records(content, node="a", run="run", round=2, attempt=1)


def test_a_request_comes_back_as_it_was() -> None:
    got = RoundRequest.from_records(request().to_records())
    assert (got.run, got.round, got.attempt, got.plan) == ("run", 2, 1, PLAN)
    np.testing.assert_array_equal(got.adapter, VECTOR)


def test_a_reply_comes_back_as_it_was() -> None:
    got = read(reply().to_records(public_data=True))
    np.testing.assert_array_equal(got.update, VECTOR)
    assert (got.releases, got.steps, got.seconds) == (2, 5, 1.25)
    # How long it took depends on who was drawn: of private data it is not told.
    assert read(reply().to_records()).seconds == 0.0


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=FINITE), st.integers(1, 10**6), st.integers(1, 99)
)
def test_law_an_adapter_travels_bit_for_bit(vector: np.ndarray, round: int, attempt: int) -> None:
    """Zeros keep their sign and the smallest numbers their last bit; a reader's copy is its own."""
    sent = RoundRequest("run", round, attempt, PLAN, vector)
    got = RoundRequest.from_records(sent.to_records())
    assert (got.run, got.round, got.attempt, got.plan) == ("run", round, attempt, PLAN)
    assert got.adapter.dtype == np.float32 and got.adapter.tobytes() == vector.tobytes()
    assert read(reply(update=vector).to_records()).update.tobytes() == vector.tobytes()


def test_a_refusal_comes_back_as_it_was() -> None:
    got = read(reply(update=None, refused="no", refusal="BudgetExhausted").to_records())
    assert (got.update, got.refused, got.refusal, got.error) == (None, "no", "BudgetExhausted", None)


def test_a_hello_comes_back_as_it_was() -> None:
    hello = NodeHello("a", 10, 4, "fedtune 0")
    assert NodeHello.from_records(hello.to_records()) == hello


def test_a_hello_without_a_size_is_refused_unless_the_node_is_idle(golden: Golden) -> None:
    with pytest.raises(FederationError, match="declared size 0"):
        NodeHello.from_records(NodeHello("a", 0, 4, "x").to_records())
    assert NodeHello.from_records(NodeHello("", 0, 4, "x", idle=True).to_records()).idle
    for delta in (5e-324, 1e-300, 1.0, 3.0):  # the smallest delta of all is the run's
        with pytest.raises(FederationError) as raised:
            NodeHello.from_records(NodeHello("a", 10, 4, "x", delta=delta).to_records())
        assert "'a'" in str(raised.value)
        golden(raised)
    for delta in (0.0, 1e-12):
        assert NodeHello.from_records(NodeHello("a", 10, 4, "x", delta=delta).to_records()).delta == delta


@pytest.mark.parametrize("adapter", [np.array([np.nan], np.float32), np.array([np.inf], np.float32)])
def test_a_request_with_an_adapter_that_is_not_finite_is_refused(adapter: np.ndarray, golden: Golden) -> None:
    with pytest.raises(FederationError) as raised:
        RoundRequest.from_records(RoundRequest("run", 2, 1, PLAN, adapter).to_records())
    golden(raised)


@pytest.mark.parametrize("plan", ["", "[]", "{}", '{"version": 1}', "null", '{"version": NaN}'])
def test_a_request_with_an_unreadable_plan_is_refused(plan: str) -> None:
    records = request().to_records()
    records["request"]["plan"] = plan
    with pytest.raises(FedtuneError):
        RoundRequest.from_records(records)


def _tampered() -> dict[str, RecordDict]:
    cases = {}

    def case(name: str, key: str, value: object) -> None:
        records = reply().to_records()
        records["reply"][key] = value  # type: ignore[index]
        cases[name] = records

    case("unknown key", "num-examples", 12)
    case("bool for int", "releases", True)
    case("float for int", "steps", 5.0)
    case("negative count", "releases", -1)
    case("negative time", "seconds", -1.0)
    case("NaN time", "seconds", float("nan"))
    case("version", "version", 99)
    case("other node", "node", "b")
    case("other run", "run", "another")
    case("other round", "round", 3)
    case("other attempt", "attempt", 0)
    case("refusal with update", "refused", "no")
    missing = reply().to_records()
    del missing["reply"]["seconds"]
    cases["missing key"] = missing
    extra = reply().to_records()
    extra["loss"] = ConfigRecord({"loss": 0.1})
    cases["extra record"] = extra
    cases["nothing"] = RecordDict()
    arrays = {
        "0-d": np.array(1.0, np.float32),
        "2-d": VECTOR[None],
        "float64": VECTOR.astype(np.float64),
        "integers": np.array([1, 2, 3]),
    }
    for name, array in arrays.items():
        wrong = reply().to_records()
        wrong["update"] = ArrayRecord({"update": Array(array)})
        cases[name] = wrong
    two = reply().to_records()
    two["update"] = ArrayRecord({"update": Array(VECTOR), "second": Array(VECTOR)})
    cases["two arrays"] = two
    whole = Array(VECTOR)
    for name, header in {
        "garbage": Array("float32", (3,), whole.stype, b"\x93NUMPY garbage"),
        "pickle": Array("float32", (3,), whole.stype, b"\x80\x04K\x01."),
        "header says more": Array("float32", (4,), whole.stype, whole.data),
        "long data": Array("float32", (3,), whole.stype, whole.data + b"\0" * 5000),
        "torch": Array("float32", (3,), "torch.Tensor", whole.data),
    }.items():
        wrong = reply().to_records()
        wrong["update"] = ArrayRecord({"update": header})
        cases[name] = wrong
    return cases


@pytest.mark.parametrize(("name", "records"), list(_tampered().items()), ids=list(_tampered()))
def test_anything_but_the_right_reply_is_rejected_by_name(name: str, records: RecordDict) -> None:
    with pytest.raises(UpdateRejected, match=r"node 'a' in round 2"):
        read(records)


def test_exactly_one_of_update_refusal_and_error(golden: Golden) -> None:
    with pytest.raises(UpdateRejected) as raised:
        read(reply(update=None).to_records())
    golden(raised)
    with pytest.raises(UpdateRejected) as raised:
        read(reply(update=None, refused="a", error="b").to_records())
    golden(raised)


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (np.full(3, np.nan, np.float32), "some of its 3 values are NaN"),
        (np.array([1, np.inf, 1], np.float32), "some of its 3 values"),
        (np.full(3, 1e30, np.float32), "norm is over federation.max_update_norm=10"),
        (np.zeros(2, np.float32), r"float32\[2\] and should be float32\[3\]"),
        (np.zeros(3, np.float64), "float64"),
        (np.float32(1.0) * np.ones((), np.float32), "should be"),
    ],
)
def test_an_unusable_update_is_rejected_with_node_round_and_limit(update: np.ndarray, says: str) -> None:
    with pytest.raises(UpdateRejected, match=says) as caught:
        check_update(np.asarray(update), node="clinic", round=4, size=3, max_norm=10.0)
    assert "'clinic'" in str(caught.value)
    assert "Round 4" in str(caught.value)


def test_a_usable_update_is_measured() -> None:
    assert check_update(np.array([3, 4, 0], np.float32), node="a", round=1, size=3, max_norm=5.0) == 5.0
    # The largest finite float32 values: their norm must not overflow to infinity, or underflow the check.
    with pytest.raises(UpdateRejected, match="norm"):
        check_update(np.full(3, 3e38, np.float32), node="a", round=1, size=3, max_norm=5.0)


def test_time_is_reported_on_a_coarse_grid() -> None:
    seconds = np.linspace(0.01, 100, 5000)
    coarse = np.array([coarse_seconds(s) for s in seconds])
    assert len(set(coarse)) < 50
    assert np.all(np.abs(coarse / seconds - 1) < 0.126)
    assert coarse_seconds(0.0) == coarse_seconds(-1.0) == coarse_seconds(float("nan")) == 0.0


@pytest.mark.parametrize("public", [True, False])
def test_a_replys_length_tells_nothing_of_what_a_node_measured(public: bool) -> None:
    update = np.random.default_rng(0).normal(size=100).astype(np.float32)
    replies = [
        RoundReply("a", "r", 1, 1, releases=1, steps=4, seconds=seconds, update=values)
        for seconds in (0.0, 1e-3, 7.5, 1e9)
        for values in (update, np.zeros_like(update))
    ]
    with task_identity(1):
        sizes = {
            serialized_size(Message(reply.to_records(public_data=public), 1, "train")) for reply in replies
        }
    assert len(sizes) == 1


def test_a_nodes_words_are_shown_and_not_obeyed_by_a_terminal() -> None:
    """A node that is not honest could take lines out of what the operator sees."""
    reply = RoundReply("a", "r", 1, 1, refused="PrivacyError: \x1b[1A\x1b[2Kno \u202e more\n", refusal="x")
    read = RoundReply.from_records(reply.to_records(), node="a", run="r", round=1, attempt=1)
    assert read.refused == "PrivacyError: ?[1A?[2Kno ? more"
