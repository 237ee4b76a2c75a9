"""A worker of a simulation on Ray that dies is replaced, and nothing is drawn twice for one charge."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fedtune import engines
from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from fedtune.engines import ray_workers
from fedtune.engines.ray_workers import WorkerPool
from fedtune.errors import FederationError
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.client.release import ASKED_AGAIN, ask_for_release
from fedtune.federation.events import FederationResult, RoundSummary
from fedtune.federation.flower import simulation_workers
from fedtune.federation.messages import RoundRequest
from tests.support.mortal import DiesBefore, DiesCharged, DiesTwice
from tests.support.tiny_federation import private

ray = pytest.importorskip("ray")
from ray.exceptions import ActorDiedError  # noqa: E402


class Actor:
    """Answers at once: what the app of a job says; `dying` jobs kill it."""

    def __init__(self) -> None:
        self.dead, self.started = False, True
        self.__ray_ready__ = SimpleNamespace(remote=lambda: self)

    def asked(self, app_of: Callable[[], Any], message: str, cid: str, context: str) -> Future:
        return Future(self, app_of, message, cid, context)


class Future:
    def __init__(self, actor: Actor, app_of: Callable[[], Any], *about: str) -> None:
        self.actor, self.app_of, self.about = actor, app_of, about


class FakeRay:
    """What the pool needs of Ray, without processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 2) -> None:
        self.room, self.actors, self.killed = room, list[Actor](), list[Actor]()
        monkeypatch.setattr(ray_workers, "error_answer", lambda message, reason: f"{message}: {reason}")
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(ray, "wait", self.wait)
        monkeypatch.setattr(ray, "kill", self.killed.append)
        kind = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.start))
        self.pool = WorkerPool(
            kind,
            {"num_cpus": 1},
            None,
            room=lambda _: self.room,
            again=lambda app: f"{app} again",
            patience=0.05,
        )  # type: ignore[arg-type, return-value]
        self.pool.add_actors_to_pool(self.pool.actors_capacity)

    def start(self) -> Actor:
        self.actors.append(Actor())
        return self.actors[-1]

    def wait(self, futures: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """What is done of futures, or of actors that have started."""
        (one,) = futures
        actor = one if isinstance(one, Actor) else one.actor
        silent = isinstance(one, Future) and one.about[0] == "never answered"
        return (futures, []) if actor.started and not silent else ([], futures)

    def get(self, future: Future) -> tuple[str, str, str]:
        app = future.app_of()
        message, cid, context = future.about
        if future.actor.dead or message == "deadly" or (message == "deadly once" and "again" not in app):
            future.actor.dead = True
            raise ActorDiedError
        if message == "raises":
            raise ValueError("of the app")
        return cid, f"{app}: {message}", context

    def ask(self, message: str) -> tuple[Any, Any]:
        """As Flower's `RayBackend.process_message`."""
        future = None
        try:
            future = self.pool.submit(Actor.asked, (lambda: "app", message, "7", "context"))  # type: ignore[arg-type, return-value]
            return self.pool.fetch_result_and_return_actor_to_pool(future)
        except Exception:
            if future is not None:
                self.pool.add_actor_back_to_pool(future)
            raise


def test_a_worker_that_died_is_replaced_and_its_message_asked_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRay(monkeypatch)
    assert fake.ask("a") == ("app: a", "context")
    assert fake.ask("deadly once") == ("app again: deadly once", "context")
    assert "deadly: two workers of Ray were lost" in fake.ask("deadly")[0]
    assert fake.killed == [actor for actor in fake.actors if actor.dead] and len(fake.killed) == 3
    assert fake.pool.num_actors == 2 and fake.pool.is_actor_available()
    for _ in range(4):  # nobody is asked who is dead
        assert fake.ask("a")[0] == "app: a"


def test_an_app_that_raises_and_one_that_never_answers_are_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRay(monkeypatch)
    with pytest.raises(ValueError, match="of the app"):
        fake.ask("raises")
    assert (len(fake.actors), fake.killed) == (2, [])
    assert fake.ask("never answered") == (
        "never answered: a worker of Ray did not answer in 0.05 s", "context",
    )  # fmt: skip
    assert (len(fake.actors), len(fake.killed)) == (3, 1)


def test_a_cluster_that_shrinks_goes_on_with_those_left_and_ends_when_none_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRay(monkeypatch)
    held = fake.pool.submit(Actor.asked, (lambda: "app", "held", "7", "context"))  # type: ignore[arg-type, return-value]
    fake.room = 1
    found: list[tuple[Any, Any]] = []
    waits = threading.Thread(target=lambda: found.append(fake.ask("deadly once")))
    waits.start()
    while fake.pool.num_actors > 1:
        time.sleep(0.001)
    assert found == [], "it waits for the one that is left"
    fake.pool.fetch_result_and_return_actor_to_pool(held)
    waits.join(10)
    assert found == [("app again: deadly once", "context")]
    fake.room = 0
    assert "no worker of Ray is left" in fake.ask("deadly once")[0]
    assert "no worker of Ray is left" in fake.ask("a")[0]


def test_a_worker_that_has_not_started_is_given_up_when_there_is_no_room_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its machine was lost while it started: Ray waits for another machine, and the run waited for Ray."""
    fake = FakeRay(monkeypatch)
    fake.actors[-1].started, fake.room = False, 1
    assert fake.ask("a") == ("app: a", "context"), "nobody was asked it before"
    assert (fake.pool.num_actors, fake.killed) == (1, [fake.actors[1]])


def test_a_machine_that_is_lost_before_ray_knows_it_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker is unavailable, there seems to be room for another, and that one never starts."""
    fake = FakeRay(monkeypatch)
    start = fake.start

    def on_the_lost_machine() -> Actor:
        fake.room = 1
        start().started = False
        return fake.actors[-1]

    fake.pool._new = on_the_lost_machine
    assert fake.ask("deadly once") == ("app again: deadly once", "context")
    assert fake.pool.num_actors == 1


def test_flowers_simulation_takes_the_pool_and_has_its_own_afterwards() -> None:
    """Its backend makes the pool by this name; a version of Flower that does not would lose the run again."""
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool

    made: list[dict[str, Any]] = []

    class Taken(Exception):
        pass

    def pool(**options: Any) -> Any:
        made.append(options)
        raise Taken

    backend = RayBackend.__new__(RayBackend)
    backend.client_resources, backend.actor_kwargs = {"num_cpus": 1}, {}
    with simulation_workers(pool), pytest.raises(Taken):
        backend.build(ClientApp)
    assert set(made[0]) == {"actor_type", "client_resources", "actor_kwargs", "room"}
    own = {name for name in vars(BasicActorPool) if not name.startswith("_")}
    assert {name for name in own if name != "actors_capacity"} <= set(dir(WorkerPool))
    from flwr.server.superlink.fleet.vce.backend import raybackend

    assert raybackend.BasicActorPool is BasicActorPool


# --- with processes that are killed

CHANGES = {"federation__num_rounds": 3, "federation__round_timeout": 400.0, "engine__name": "ray"}


class Watching:
    """An Observer that does something after a round."""

    def __init__(self, after: Callable[[int], None] = lambda round: None) -> None:
        self.after, self.summaries = after, list[RoundSummary]()

    def on_round(self, summary: RoundSummary) -> None:
        self.summaries.append(summary)
        self.after(summary.round)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def charged(result: FederationResult) -> dict[str, list[int]]:
    """The rounds that each node's ledger shows as charged."""
    return {f"site-{i}": node_ledger().rounds(run=result.run, node=f"site-{i}") for i in range(4)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mortal", [DiesBefore, DiesCharged, DiesTwice])
def test_a_worker_that_is_killed_costs_a_round_at_most_what_it_was_charged_for(
    tiny: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mortal: type,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fedtune.engines.ray.ConfiguredClientApp", mortal)
    seen = Watching()
    result = engines.run(private(tiny(**CHANGES)), tmp_path / "run", seen)  # type: ignore[arg-type]
    whole = mortal is DiesBefore
    assert [one.updates for one in result.history] == [4, 4 if whole else 3, 4]
    once = {"site-0": [1, 2, 3] if mortal is not DiesTwice else [1, 3]}
    assert charged(result) == {f"site-{i}": [1, 2, 3] for i in range(4)} | once
    reasons = [reason for one in seen.summaries for _, reason in one.dropped]
    assert len(reasons) == (0 if whole else 1)
    if mortal is DiesCharged:
        assert "died in round 2, for which the ledger shows a charge. The charge stays" in reasons[0]
    if mortal is DiesTwice:
        assert "two workers of Ray were lost that were asked this" in reasons[0]
    assert "Traceback" not in "".join(capfd.readouterr())


def workers() -> list[psutil.Process]:
    """Ray's processes below this one that hold a worker of Flower's simulation: not those of other tests."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if (child.cmdline() or [""])[0].startswith("ray::ClientAppActor"):
                found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_two_ray_nodes_survives_a_killed_worker_and_a_lost_node(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    hurt: list[int] = []

    def after(round: int) -> None:
        if round == 1:
            alive = workers()
            hurt.append(len(alive))
            os.kill(alive[0].pid, signal.SIGKILL)
        if round == 2:
            cluster.remove_node(second, allow_graceful=False)

    try:
        seen = Watching(after)
        config = private(tiny(**{**CHANGES, "federation__num_rounds": 4}))
        result = engines.run(config, tmp_path / "run", seen)  # type: ignore[arg-type]
    finally:
        cluster.shutdown()
    assert hurt == [2]
    assert len(result.history) == 4
    for rounds in charged(result).values():
        assert sorted(set(rounds)) == rounds, "each round is charged once at most"
    lost = [reason for one in seen.summaries for _, reason in one.dropped]
    assert all("The charge stays" in reason for reason in lost)
    assert sum(one.updates for one in result.history) == 16 - len(lost)
    assert result.history[-1].updates == 4


@pytest.mark.slow
@pytest.mark.parametrize("asked_again", [True, False])
def test_what_a_ledger_shows_as_charged_is_not_drawn_for_who_asks_again(
    tiny: Callable[..., Config], tmp_path: Path, asked_again: bool
) -> None:
    config = private(tiny(federation__num_rounds=2))
    run = engines.run(config, tmp_path / "run")
    node_ledger().close()
    context = Context(
        run_id=1, node_id=7, node_config={"partition-id": 0, "num-partitions": 4}, state=RecordDict(),
        run_config={"fedtune": to_json(dataclasses.replace(config, output=str(tmp_path / "run")))}
        | ({ASKED_AGAIN: True} if asked_again else {}),
    )  # fmt: skip
    assert run.plan is not None

    def ask(round: int) -> Any:
        request = RoundRequest(run.run, round, 2, run.plan, run.adapter)
        return ask_for_release(request, context).wanted.round

    if asked_again:
        with pytest.raises(FederationError, match="for which the ledger shows a charge. The charge stays"):
            ask(2)
    else:  # a resumed run asks anew, and is charged anew
        assert ask(2) == 2
    assert ask(3) == 3
