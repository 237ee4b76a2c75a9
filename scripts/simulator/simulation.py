"""One seed: a server, its sites, what happens to them, and what becomes of a run."""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import Context, RecordDict

from fedtune.config.convert import to_json
from fedtune.deploy import worker
from fedtune.deploy.site import books_of, check_books, open_ledger
from fedtune.errors import FederationError, FedtuneError, ResourceError
from fedtune.federation.client.policy import SiteSettings
from fedtune.federation.events import RoundSummary
from fedtune.federation.flower import (
    SERVER_NODE_ID,
    act_as,
    deserialize,
    error_answer,
    serialize_context,
)
from fedtune.federation.server.checkpoint import has_checkpoint
from fedtune.federation.server.loop import protocol_for, run_rounds
from fedtune.federation.server.rounds import RoundAsk, RoundOutcome
from scripts.simulator.disk import Crash, Disks, Machine
from scripts.simulator.network import Clock, Link, Network, Question, SimulatedGrid
from scripts.simulator.toys import SCENARIOS, ToyServer, site_values, toys
from scripts.simulator.witness import Violation, Witness

__all__ = ["Outcome", "simulate"]

_LONGEST = 20_000.0  # virtual seconds of a run; after half of them nothing fails any more
_ATTEMPTS, _MOST_ATTEMPTS = (
    8,
    14,
)  # starts of a run: after so many nothing fails any more; then it must have ended


@dataclass(frozen=True)
class Outcome:
    """What became of a seed. `problem`: what must not have happened, "" if nothing did."""

    seed: int
    scenario: str
    end: str
    problem: str
    failures: dict[str, int]
    attempts: int
    seconds: float  # virtual
    trace: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The same for what happened in the same way."""
        return hashlib.sha256("\n".join([*self.trace, self.problem]).encode()).hexdigest()[:16]


def simulate(seed: int, scenario: str | None = None) -> Outcome:
    """Runs one seed to its end. Never raises because of fedtune."""
    shared = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="fedtune-simulated-", dir=shared if shared.is_dir() else None))
    logger = logging.getLogger("fedtune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails is meant to
    try:
        return _Simulation(seed, root.resolve(), scenario).outcome()
    finally:
        logger.setLevel(level)
        shutil.rmtree(root)


class _Site:
    """A site's node and worker."""

    def __init__(self, world: _Simulation, number: int) -> None:
        self.world, self.name, self.id = world, f"site-{number}", 100 + number
        self.machine = world.disks.add(self.name, world.fate)
        self.settings = SiteSettings.from_dict(site_values(self.name, str(self.machine.folder)), "node.yaml")
        self.up, self.deaths = False, 0
        self._gone = 0.0
        self._contexts: dict[int, bytes] = {}  # what the ClientApp remembers, by run at the server
        self._busy_until = 0.0

    @property
    def free(self) -> bool:
        """It is up, and has no work of before."""
        return self.up and self._busy_until <= self.world.clock.now

    @property
    def heard(self) -> float:
        """When the server last heard of it."""
        return self.world.clock.now if self.up else self._gone

    def start(self) -> None:
        """The node starts, or tries to."""
        world = self.world
        self.machine.restart(world.cut)
        try:
            open_ledger(self.settings, setting=True)
            check_books(self.settings)
            head = books_of(self.settings).head()  # which the server is told
        except Crash as crash:
            self.dies(crash)
            return
        except FedtuneError as error:
            if world.calm:
                raise Violation(f"{self.name} does not start: {error}") from None
            world.clock.at(10.0, self.start)
            return
        world.looking = True
        world.witness.books(self.name)
        world.witness.heads[self.name] = head
        world.looking = False
        world.log(f"{self.name} is up")
        self.up = True

    def dies(self, crash: Crash) -> None:
        """Node and worker are gone, and with them what was not on the disk."""
        world = self.world
        world.log(f"{self.name} dies ({crash.kind})")
        if self.up:
            self._gone = world.clock.now
        self.up, self.deaths = False, self.deaths + 1
        self._contexts.clear()
        self._busy_until = 0.0
        world.clock.at(world.chance.choice([2.0, 20.0, 200.0]), self.start)

    def receive(self, question: Question) -> None:
        """The node has fetched a message."""
        clock, life = self.world.clock, self.deaths
        if clock.now < self._busy_until:
            clock.at(self._busy_until - clock.now, lambda: self._when_free(question, life))
        else:
            self._answer(question)

    def _when_free(self, question: Question, life: int) -> None:
        if self.up and self.deaths == life:
            self.receive(question)

    def _answer(self, question: Question) -> None:
        world, life = self.world, self.deaths
        world.log(f"{self.name} is asked {question.kind} ({question.id})")
        context = self._contexts.get(question.run) or self._new_context(question.run)
        header = {"task": 1, "run": question.run, "node": self.id}
        try:
            data, self._contexts[question.run] = worker.answer(question.data, context, header, self.settings)
            answer = deserialize(data)
        except Crash as crash:
            if crash.kind == "power" or world.chance.random() < 0.5:
                self.dies(crash)
                return
            world.log(f"the worker of {self.name} is killed")
            self.deaths, life = self.deaths + 1, life + 1
            try:  # as `MessageHandler` does
                self.machine.restart(world.cut)
                books_of(self.settings).append("worker died", message=question.kind, reason="killed")
            except ResourceError:
                pass
            except Crash as again:
                self.dies(again)
                return
            answer = error_answer(deserialize(question.data), "the worker ended by signal 9")
        finally:
            world.be_server()
        world.witness.leaves(self.name, world.run_of(question), answer)
        work = world.chance.expovariate(1.0 / world.work)
        self._busy_until = world.clock.now + work
        world.clock.at(work, lambda: self._send(question, answer, life))

    def _send(self, question: Question, answer: Any, life: int) -> None:
        if self.up and self.deaths == life:
            self.world.link.answer(question, answer)

    def _new_context(self, run: int) -> bytes:
        site, config = {"site": self.settings.to_json()}, {"fedtune": self.world.config_text}
        return serialize_context(Context(run, self.id, site, RecordDict(), config))


class _Told:
    """What the person at the keyboard sees."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    def on_start(self, info: dict[str, Any]) -> None:
        self._witness.started(info)

    def on_round(self, summary: RoundSummary) -> None:
        self._witness.tells(summary)

    def on_client(self, node: str, status: str) -> None:
        pass

    def on_wait(self, reason: str) -> None:
        pass

    def on_finish(self, result: Any) -> None:
        pass


class _Simulation:
    def __init__(self, seed: int, root: Path, scenario: str | None) -> None:
        self.chance = random.Random(seed)
        self.seed, self.name = seed, scenario or self.chance.choice(list(SCENARIOS))
        self.scenario = SCENARIOS[self.name].larger(self.chance.choice([0, 0, 0, 1, 2]))
        self.trace: list[str] = []
        self.clock, self.witness = Clock(), Witness()
        self.link = Link(self.clock, Network.drawn(self.chance), self.chance)
        self.work = self.chance.choice([0.1, 5.0, 20.0])  # seconds of an answer, in the mean
        self.left = self.chance.choice([0, 1, 1, 2, 3, 6, 12])  # failures to come, at most
        self.rate = self.chance.choice([0.004, 0.015, 0.05])  # of failures, a write
        self.failures: dict[str, int] = {}
        self.calm = self.serving = self.looking = False
        self.attempts = 0
        self.disks = Disks(root)
        self.server = self.disks.add("server", self.fate)
        self.config = self.scenario.config()
        self.config.engine.name = "deployment"
        self.config_text = to_json(self.config)
        self.run_dir = self.server.folder / "run"
        self.sites = [_Site(self, number) for number in range(self.scenario.sites)]

    # --- what happens

    def log(self, what: str) -> None:
        self.trace.append(f"{self.clock.now:10.2f}  {what}")

    def cut(self, most: int) -> int:
        return self.chance.randint(0, most)

    def _fails(self, kind: str) -> str:
        self.left -= 1
        self.failures[kind] = self.failures.get(kind, 0) + 1
        return kind

    def fate(self, machine: Machine, what: str) -> str:
        """What fails at a write."""
        if self.looking or self.calm or self.left == 0 or self.chance.random() >= self.rate:
            return ""
        kind = self._fails(self.chance.choice(["kill", "power", "error", "read-only"]))
        self.log(f"{machine.name}: {kind} at {what}")
        if kind == "read-only":
            machine.read_only = True
            self.clock.at(self.chance.uniform(1.0, 150.0), lambda: setattr(machine, "read_only", False))
            return "error"
        return kind

    def _strike(self) -> None:
        """Something dies that is not writing."""
        if self.clock.now > _LONGEST:
            raise Violation(f"the run has waited for {_LONGEST:g} s")
        if self.clock.now > _LONGEST / 2 and not self.calm:
            self._calm_down()
        self.clock.at(self.chance.expovariate(1 / 50.0), self._strike)
        if self.calm or self.left == 0:
            return
        kind = self._fails(self.chance.choice(["kill", "power"]))
        victim = self.chance.choice([self.server, self.server, *(site.machine for site in self.sites)])
        victim._died = kind
        if victim is self.server:
            self.log(f"the server dies ({kind})")
            if self.serving:
                raise Crash(victim, kind)
            return
        site = next(site for site in self.sites if site.machine is victim)
        if site.up:
            site.dies(Crash(victim, kind))

    def _calm_down(self) -> None:
        self.calm = self.link.calm = True
        self.link.network = Network(0.02, 0.0, 0.0)
        self.work = 0.1
        for machine in self.disks.machines.values():
            machine.read_only = False
        self.log("from here on nothing fails")

    def be_server(self) -> None:
        act_as(1, 1, SERVER_NODE_ID)

    def run_of(self, question: Question) -> str:
        """The run that a message is about, as the ledgers know it."""
        for record in deserialize(question.data).content.config_records.values():
            if "run" in record:
                return str(record["run"])
        return ""

    # --- the run

    def outcome(self) -> Outcome:
        end, problem = "", ""
        try:
            with self._installed():
                end = self._run()
                self._check_at_the_end()
        except Violation as violation:
            problem = str(violation)
        except Exception:
            problem = traceback.format_exc()
        self.log(end or problem.strip().splitlines()[-1])
        return Outcome(
            self.seed,
            self.name,
            end,
            problem,
            self.failures,
            self.attempts,
            self.clock.now,
            tuple(self.trace),
        )

    @contextmanager
    def _installed(self) -> Iterator[None]:
        from fedtune.federation.client import app, node_context
        from fedtune.federation.secagg import client
        from fedtune.federation.server import cohort, correlated, loop, rounds, tracking_grid

        with ExitStack() as stack:
            stack.enter_context(self.disks.installed())
            stack.enter_context(toys(self.witness.trains))
            for module in (app, node_context, client, cohort, loop, rounds, tracking_grid):
                stack.enter_context(mock.patch.object(module, "time", self.clock))
            home = lambda: self.server.folder  # noqa: E731
            stack.enter_context(mock.patch.object(correlated, "state_dir", home))
            self.be_server()
            yield

    def _run(self) -> str:
        """Starts the run, and goes on with it until it is over; in words how it ended."""
        for site in self.sites:
            self.witness.settings[site.name] = site.settings
            self.link.sites[site.id] = site
            site.start()
        self.clock.at(self.chance.expovariate(1 / 50.0), self._strike)
        run = next(self.link.runs)
        while True:
            self.attempts += 1
            if self.attempts > _ATTEMPTS and not self.calm:
                self._calm_down()
            if self.attempts > _MOST_ATTEMPTS:
                raise Violation("the run does not end, although nothing fails any more")
            try:
                if end := self._attempt(run):
                    return end
            except Crash as crash:
                if crash.machine is not self.server:
                    raise
            self.server.restart(self.cut)
            if self.chance.random() < 0.7:  # a submit stops what the one before it left at the server
                self.link.stop_run(run)
                run = next(self.link.runs)
            self.clock.sleep(self.chance.choice([1.0, 30.0, 400.0]))
            self.server.restart(self.cut)

    def _attempt(self, run: int) -> str:
        resume = str(self.run_dir) if has_checkpoint(self.run_dir) else None
        self.log(f"start {self.attempts}: " + ("the run goes on" if resume else "the run begins"))
        self.serving = True
        undisturbed = self.calm and all(site.free for site in self.sites)
        try:
            result = run_rounds(
                SimulatedGrid(self.link, run),
                replace(self.config, resume=resume),
                self.run_dir,
                _Told(self.witness),
                server_side=ToyServer(),
                protocol=self,
                expected_nodes=len(self.sites),
            )
        except FedtuneError as error:
            self.log(
                f"{type(error).__name__}: {error}"[:200]
                .replace(str(self.disks.root), "")
                .split(" of run ")[0]
            )
            if isinstance(error, FederationError) and self._used_up():
                return "used up"
            if "learned nothing" in str(error) and not self.witness.gave:
                return "learned nothing"
            if undisturbed:
                raise Violation(f"nothing fails any more, and the run ends with: {error}") from None
            return ""
        finally:
            self.serving = False
        self.witness.ended(result, adds=self.config.federation.strategy == "fedavg")
        return "used up" if result.ended_early else "done"

    def run_round(self, grid: Any, ask: RoundAsk, observer: Any) -> RoundOutcome:
        """The real protocol; the witness looks at its outcome."""
        self.log(
            f"round {ask.round}, attempt {ask.attempt}: asks {', '.join(node.name for node in ask.nodes)}"
        )
        outcome = protocol_for(ask.plan, self.config).run_round(grid, ask, observer)
        self.log(f"round {ask.round}: has {', '.join(outcome.used) or 'nobody'}")
        self.witness.summed(ask, outcome)
        return outcome

    def _used_up(self) -> bool:
        """Whether a site has been charged for all the rounds that it agreed to."""
        most = self.scenario.rounds
        return any(count >= most for key, count in self._charges().items() if key[2] == "training")

    def _charges(self) -> dict[tuple[str, str, str], int]:
        return {key: self.witness._charged(*key) for key in self.witness.touched}

    def _check_at_the_end(self) -> None:
        """All machines lose power; what is left on the disks must do."""
        self._calm_down()
        for site in self.sites:
            site.machine._died = "power"
            site.machine.restart(self.cut)
            open_ledger(site.settings, setting=True)
            check_books(site.settings)
            spare = site.machine.failures + site.deaths
            self.witness.books(site.name, spare=spare, planned=self.scenario.rounds)
