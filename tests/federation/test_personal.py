"""A site's own part of the model: moved by what is released anyway, kept at the site, lost without harm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedtune.config.choices import resolved
from fedtune.config.convert import to_json
from fedtune.config.schema import AdapterConfig, Config
from fedtune.engines.local import ClientThread, LocalGrid
from fedtune.errors import FederationError
from fedtune.federation import flower
from fedtune.federation.client.app import app
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.events import FederationResult, RoundSummary
from fedtune.federation.personal import PersonalPart, place_of_part, place_of_simulated
from fedtune.federation.resources import forget, run_resources
from fedtune.federation.server.loop import run_rounds
from fedtune.training.local import train_locally
from tests.federation.client.test_client_app import Node
from tests.support.fake_federation import Watcher
from tests.support.tiny_federation import private

Make = Callable[..., Config]
NAMES = [f"site-{i}" for i in range(4)]


def personal(tiny: Make, **changes: Any) -> Config:
    """One gradient a round of all records, without noise or chance; the head alone."""
    settings: dict[str, Any] = {
        "adapter": AdapterConfig(name="head"), "train__personalize": "head", "train__local_steps": 1,
        "train__sample_rate": 1.0, "train__learning_rate": 0.2, "train__optimizer": "adam_mini",
        "train__averaging": 0.9, "federation__num_rounds": 4,
    }  # fmt: skip
    return tiny(**(settings | changes))


class Tap(LocalGrid):
    """Keeps every message, both ways, as its bytes."""

    def _deliver(self, message: Message) -> Message:
        answer = super()._deliver(message)
        self.seen = [*getattr(self, "seen", []), flower.serialize(message), flower.serialize(answer)]
        return answer


def run(config: Config, run_dir: Path, observer: Any = None) -> tuple[FederationResult, list[bytes]]:
    """A run in this process, and what was on the wire."""
    config = resolved(config)
    config.output = str(run_dir)
    nodes = len(run_resources(config).prepared.shards)
    grid = Tap(app, nodes, {"fedtune": to_json(config)}, timeout=60.0)
    try:
        with flower.task_identity(grid.run_id):
            result = run_rounds(grid, config, run_dir, observer, expected_nodes=nodes)
    finally:
        grid.close()
    return result, grid.seen


def part(config: Config, result_run: str, run_dir: Path, node: str) -> PersonalPart:
    head = run_resources(config).head()
    return PersonalPart(place_of_simulated(run_dir, node), result_run, resolved(config), head)


def gradient(config: Config, at: np.ndarray, shard: Any) -> np.ndarray:
    """Mean gradient over a shard's records, by plain autograd, one record at a time."""
    with run_resources(config).using_model() as model:
        model.set_vector(at.astype(np.float32))
        total = np.zeros(at.size)
        for i in range(shard.data.num_records):
            ids = torch.from_numpy(shard.data.tokens(i).astype(np.int64))[None]
            logits = model.base(input_ids=ids)
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([int(shard.data.labels[i])]))
            grads = torch.autograd.grad(loss, list(model.parameters.values()))
            total += np.concatenate([g.detach().numpy().ravel() for g in grads])
        return np.asarray(total / shard.declared_size)


def test_without_noise_both_parts_move_as_the_formulas_say(tiny: Make, tmp_path: Path) -> None:
    config = personal(tiny)
    result, _ = run(config, tmp_path)
    shards = run_resources(resolved(config)).prepared.shards
    sizes = np.array([shard.declared_size for shard in shards], dtype=float)

    class Mover:
        """Adam with one second moment, at half of the rate, and its average; written out again."""

        def __init__(self, x: np.ndarray) -> None:
            self.x, self.m, self.v, self.mean, self.t = x, np.zeros_like(x), 0.0, x, 0

        def step(self, g: np.ndarray) -> None:
            self.t += 1
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * float((g**2).mean())
            share = {"constant": 1.0, "rise": 0.5 + (self.t - 1) / 4}[str(resolved(config).train.schedule)]
            m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
            self.x = self.x - 0.1 * share * m / (np.sqrt(v) + 1e-8)
            a = min(0.9, self.t / (self.t + 9))
            self.mean = self.x if self.t == 1 else a * self.mean + (1 - a) * self.x

    common = Mover(run_resources(resolved(config)).initial().astype(float))
    own = [Mover(np.zeros_like(common.x)) for _ in shards]
    sent = common.x
    for step in range(4):
        share = min(0.9, (step + 1) / (step + 10)) if step else 0.0
        sent = share * sent + (1 - share) * common.x
        gradients = [gradient(config, common.x + d.x, s) for d, s in zip(own, shards, strict=True)]
        common.step(np.average(gradients, axis=0, weights=sizes))
        for d, g in zip(own, gradients, strict=True):
            d.step(g)
    np.testing.assert_allclose(result.adapter, common.mean, atol=2e-3)  # frozen outputs are kept in float16
    for name, d in zip(NAMES, own, strict=True):
        kept = part(config, result.run, tmp_path, name)
        assert kept.steps == 4
        np.testing.assert_allclose(kept.result(result.adapter), common.mean + d.mean, atol=4e-3)
        so_far = kept.so_far()
        assert so_far is not None and np.abs(sent - common.mean).max() > 0.02
        np.testing.assert_allclose(so_far, sent + d.mean, atol=4e-3)
        assert np.abs(d.mean).max() > 0.05  # of which the tolerance is little


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["head", "lora"])
def test_one_site_by_itself_trains_as_it_would_with_the_whole_rate(
    tiny: Make, tmp_path: Path, adapter: str
) -> None:
    settings: dict[str, Any] = {"data__only_site": "site-1", "data__declared_size": 30}
    settings |= {"train__optimizer": "sgd", "train__averaging": 0.5, "train__schedule": "constant"}
    settings |= {"train__personalize": "adapter", "train__head_rounds": 2}
    settings |= {} if adapter == "head" else {"train__head_learning_rate": 0.3}
    settings["adapter"] = AdapterConfig(name=adapter, rank=2, alpha=4.0)  # type: ignore[arg-type]
    alone, _ = run(personal(tiny, **settings | {"train__personalize": "none"}), tmp_path / "plain")
    config = personal(tiny, **settings)
    both, _ = run(config, tmp_path / "both")
    kept = part(config, both.run, tmp_path / "both", "site-1")
    np.testing.assert_allclose(kept.result(both.adapter), alone.adapter, atol=1e-5)
    assert np.abs(alone.adapter - both.adapter).max() > 0.01


@pytest.mark.parametrize("which", ["head", "adapter"])
def test_what_is_a_sites_own_is_in_no_message_and_no_file_of_the_server(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    marks: list[bytes] = []
    move = PersonalPart.move

    def marking(self: PersonalPart, update: np.ndarray, round: int, *rest: Any) -> None:
        move(self, update, round, *rest)
        adapter = np.zeros_like(update)
        for values in (self.training(adapter, round), self.result(adapter)):
            marks.append(values[-12:].tobytes())  # the head is last
        assert which == "adapter" or self.training(adapter, round)[: -2 * 33].any() == np.False_

    monkeypatch.setattr(PersonalPart, "move", marking)
    config = private(
        personal(
            tiny,
            adapter=AdapterConfig(name="lora", rank=2, alpha=4.0),
            train__personalize=which,
            train__head_rounds=2,
        )
    )
    _, wire = run(config, tmp_path)
    assert len(set(marks)) == 2 * 4 * 4 - 8  # twice an average begins, as the offset itself
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "offsets"]
    contents = wire + [path.read_bytes() for path in files]
    initial = run_resources(resolved(config)).initial()[-12:].tobytes()
    assert any(initial in content for content in wire)  # so would they be found
    assert not [mark for mark in marks if any(mark in content for content in contents)]
    for path in (tmp_path / "offsets").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_the_account_is_the_same_with_and_without(tiny: Make, tmp_path: Path) -> None:
    results = []
    for which in ("none", "head"):
        result, _ = run(private(personal(tiny, train__personalize=which)), tmp_path / which)
        results.append(result)
        assert [len(node_ledger().releases(run=result.run, node=name)) for name in NAMES] == [4] * 4
    without, having = results
    assert (having.epsilon, having.releases) == (without.epsilon, without.releases)
    assert having.plan == without.plan


class Stops(Watcher):
    def __init__(self, after: int = 2) -> None:
        super().__init__()
        self.after = after

    def on_round(self, summary: RoundSummary) -> None:
        if summary.round == self.after:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny: Make, tmp_path: Path) -> None:
    config = personal(tiny)
    whole, _ = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", Stops())
    config.resume = str(tmp_path / "cut")
    resumed, _ = run(config, tmp_path / "cut")
    np.testing.assert_array_equal(resumed.adapter, whole.adapter)
    for name in NAMES:
        one, other = (
            part(config, r.run, tmp_path / f, name) for r, f in ((whole, "whole"), (resumed, "cut"))
        )
        assert one.steps == other.steps == 4
        np.testing.assert_array_equal(one.result(whole.adapter), other.result(whole.adapter))
        np.testing.assert_array_equal(one.so_far(), other.so_far())


def node(tiny: Make, tmp_path: Path) -> Node:
    return Node(private(personal(tiny, output=str(tmp_path), federation__num_rounds=9)))


def kept(node: Node, tmp_path: Path) -> PersonalPart:
    return part(node.config, "r", tmp_path, node.name)


def test_it_moves_once_for_each_release(tiny: Make, tmp_path: Path) -> None:
    asked = node(tiny, tmp_path)
    first = asked.ask(round=1)
    offset = kept(asked, tmp_path).training(np.zeros_like(asked.start), 2)
    assert first.update is not None and offset @ first.update > 0
    assert asked.ask(round=1).error is not None  # answered already: nothing is released, and nothing moves
    assert kept(asked, tmp_path).steps == 1
    assert asked.ask(round=1, attempt=2).releases == 2  # the answer was lost, and is paid for again
    assert (kept(asked, tmp_path).steps, asked.charged()) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["none", "head"])
def test_where_noise_is_heavy_all_steps_are_a_tenth(tiny: Make, tmp_path: Path, which: str) -> None:
    """Of the common part and of each site's own; and the run says so."""
    moved, notices = [], []
    for damped in (True, False):
        changes = {"train__damped": damped, "train__personalize": which, "federation__num_rounds": 1}
        config = private(personal(tiny, **changes), epsilon=0.05)
        config.privacy.reproducible_noise = True
        config.train.centre = False
        result, _ = run(config, tmp_path / str(damped))
        start = run_resources(resolved(config)).initial()
        ends = [result.adapter - start]
        if which == "head":
            own = [part(config, result.run, tmp_path / str(damped), name) for name in NAMES]
            ends += [one.result(np.zeros_like(start)) for one in own]
        moved.append(np.stack(ends))
        notices.append([text for text in result.notices if "train.damped=false" in text])
    assert np.abs(moved[1]).max() > 0.01
    np.testing.assert_allclose(moved[0], 0.1 * moved[1], rtol=1e-4, atol=1e-6)
    assert [len(texts) for texts in notices] == [1, 0]


@pytest.mark.slow
def test_a_node_that_was_given_up_does_not_move_it_late(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had to say in round 1 is lost; it must not be written over what round 2 left."""
    asked, path = node(tiny, tmp_path), place_of_simulated(tmp_path, "site-0")
    hung, go_on = threading.Event(), threading.Event()
    whole = train_locally

    def hanging(*arguments: Any, round: int, **settings: Any) -> Any:
        result = whole(*arguments, round=round, **settings)
        if round == 1:
            hung.set()
            go_on.wait()  # outside of Python, as a product of matrices is
        return result

    monkeypatch.setattr("fedtune.training.local.train_locally", hanging)
    hangs = ClientThread()
    hangs._calls.put((lambda: asked.ask(round=1), [], threading.Event()))
    assert hung.wait(60.0)
    hangs.abandon()
    forget()
    assert asked.ask(round=2).update is not None
    written = path.read_bytes()
    go_on.set()
    hangs.abandon(wait=20.0)
    assert not hangs._thread.is_alive()
    assert path.read_bytes() == written
    assert asked.charged() == 2 and kept(asked, tmp_path).steps == 1


@pytest.mark.parametrize("what", ["gone", "torn", "of another run", "older"])
def test_a_part_that_is_lost_costs_nothing_and_is_said(
    tiny: Make, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked, path = node(tiny, tmp_path), place_of_simulated(tmp_path, "site-0")
    asked.ask(round=1)
    older = path.read_bytes()
    asked.ask(round=2)
    if what == "gone":
        path.unlink()
    else:
        other = older if what == "older" else path.read_bytes()[:100]
        path.write_bytes(other)
    if what == "of another run":
        asked.ask(round=3, run="s")
        asked.context.state.clear()
    with caplog.at_level(logging.WARNING, logger="fedtune.node"):
        reply = asked.ask(round=3)
    assert reply.update is not None and reply.releases == 3
    assert kept(asked, tmp_path).steps == (2 if what == "older" else 1)
    assert f"moved for {1 if what == 'older' else 0} of 2 releases of run r" in caplog.text
    caplog.clear()
    asked.ask(round=4)
    assert "releases of run" not in caplog.text  # once


def test_the_gradient_is_taken_with_it(tiny: Make, tmp_path: Path) -> None:
    config = personal(tiny, output=str(tmp_path), train__learning_rate=2.0)
    asked = Node(config)
    first, second = asked.ask(round=1), asked.ask(round=2)
    assert first.update is not None and second.update is not None
    offset = kept(asked, tmp_path)
    shard = run_resources(resolved(config)).prepared.shards[0]
    np.testing.assert_allclose(-first.update, gradient(config, asked.start, shard), atol=1e-4)
    assert offset.steps == 2
    assert np.abs(second.update - first.update).max() > 1e-3  # of the same adapter and the same records


def test_a_node_without_a_place_for_it_is_not_charged(tiny: Make, tmp_path: Path) -> None:
    asked = Node(private(personal(tiny)))
    assert "train.personalize=none" in str(asked.ask().error)
    assert asked.charged() == 0


def test_a_site_keeps_it_beside_its_ledger_under_a_name_that_is_one(tiny: Make, tmp_path: Path) -> None:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})

    class Site:
        ledger = str(tmp_path / "state" / "ledger.sqlite")

    site: Any = Site()
    config = personal(tiny)
    place = place_of_part(config, context, site, "0a1b", "site-0")
    assert place == tmp_path / "state" / "personal" / "0a1b.npz"
    for run_name in ("../ledger", "a/b", "", "x" * 65, "a\n"):
        with pytest.raises(FederationError):
            place_of_part(config, context, site, run_name, "site-0")
    assert place_of_part(personal(tiny, train__personalize="none"), context, site, "../x", "site-0") is None


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("personalize", ["none", "adapter"])
def test_a_run_that_stops_about_the_end_of_the_heads_rounds_ends_as_if_it_had_not(
    tiny: Make, tmp_path: Path, after: int, personalize: str
) -> None:
    """The head's average and the new optimizer come once, on whichever side the run goes on."""
    inside = AdapterConfig(name="lora", rank=2)
    config = personal(
        tiny, adapter=inside, train__head_rounds=2, train__personalize=personalize, train__optimizer="adam"
    )
    whole, _ = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", Stops(after))
    config.resume = str(tmp_path / "cut")
    resumed, _ = run(config, tmp_path / "cut")
    np.testing.assert_array_equal(resumed.adapter, whole.adapter)
    if personalize == "none":
        return
    for name in NAMES:
        own = [part(config, r.run, tmp_path / f, name) for r, f in ((whole, "whole"), (resumed, "cut"))]
        np.testing.assert_array_equal(*(one.result(whole.adapter) for one in own))
