"""Ray's workers of one run: one that dies is replaced, and what it was asked is asked once more.

A drop-in for the pool of Flower's simulation, which puts a dead worker back in front of its queue, where it
fails each message that follows. Here:

- A worker that died is killed for good and another started, if the cluster still has room for it; else the
  others do its work. Where none is left, each message is answered with an error, and the run ends by its own
  rules, with its checkpoint.
- Its message is sent once more, marked (`again`): the node does the work if its ledger shows no charge for
  it, and else says that the charge stays. So whatever the worker was killed in, nothing is drawn twice for
  one charge (`fedtune.federation.client.release`). A message that ends two workers is answered with an error.
- Whoever asks waits for a worker that is free, and for an answer no longer than `patience` seconds. A worker
  that has not started, and for which there is no room since a machine was lost, counts as dead: Ray would
  wait for another machine for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.clientapp import ClientApp

from fedtune.federation.flower import error_answer

__all__ = ["WorkerPool"]

_log = logging.getLogger(__name__)
AppOf = Callable[[], ClientApp]
_LOOK_SECONDS = 5.0  # between two looks at a cluster that does not answer
Job = tuple[AppOf, Any, str, Any]  # what makes the app, message, node's position, Context


class _Lost(Exception):
    """A worker, and why.

    `was_asked`: it may have begun what it was asked. `hopeless`: another would fare no better.
    """

    def __init__(self, reason: str, *, was_asked: bool = True, hopeless: bool = False) -> None:
        super().__init__(reason)
        self.was_asked, self.hopeless = was_asked, hopeless


@dataclass(frozen=True)
class _Unasked:
    """In the place of a future, where there is nobody to ask."""

    job: Job


class WorkerPool:
    """As Flower's `BasicActorPool`, whose method names it has to keep.

    Args:
        actor_type: a class of Ray actors.
        client_resources: options of each actor.
        actor_kwargs: of its constructor.
        room: how many such actors the cluster has room for now.
        again: the app that is asked the second time, of the first.
        patience: seconds that an answer may take, with the start of a worker.
    """

    def __init__(
        self,
        actor_type: Any,
        client_resources: dict[str, int | float],
        actor_kwargs: dict[str, Any] | None,
        *,
        room: Callable[[dict[str, int | float]], int],
        again: Callable[[Any], ClientApp],
        patience: float,
    ) -> None:
        self._new = lambda: actor_type.options(**client_resources).remote(**(actor_kwargs or {}))
        self._room_for = lambda: room(client_resources)
        self._again, self._patience = again, patience
        self._free: list[Any] = []
        self._started: dict[Any, Any] = {}  # by worker: what is there when it has started
        self._asked: dict[Any, tuple[Any, Any, Job]] = {}  # by future: who, how, what
        self._changed = threading.Condition()
        self.actors_capacity = self._room_for()
        self.num_actors = 0

    def is_actor_available(self) -> bool:
        """Whether one has nothing to do."""
        return bool(self._free)

    def add_actors_to_pool(self, num_actors: int) -> None:
        """Starts so many more."""
        with self._changed:
            for _ in range(num_actors):
                self._start()
            self._changed.notify_all()

    def terminate_all_actors(self) -> None:
        """Ends those that have nothing to do."""
        for actor in self._free:
            actor.terminate.remote()

    def submit(self, actor_fn: Callable[..., Any], job: Job) -> Any:
        """Hands `job` to a free worker, waiting for one; gives the future; `_Unasked` if nobody is."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or not self.num_actors)
            if not self._free:
                return _Unasked(job)
            actor = self._free.pop()
        future = actor_fn(actor, *job)
        self._asked[future] = (actor, actor_fn, job)
        return future

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> tuple[Any, Any]:
        """(answer, Context) of a job, done once more where its worker died; an error if that did not help.

        Raises:
            Exception: what the app raised.
        """
        died = False
        while not isinstance(future, _Unasked):
            _, actor_fn, job = self._asked[future]
            try:
                return self._answer(future)
            except _Lost as lost:
                self._replace(future)
                if lost.hopeless:
                    return _failed(job, str(lost))
                if lost.was_asked and died:
                    return _failed(job, f"two workers of Ray were lost that were asked this: {lost}")
                if lost.was_asked:
                    died, job = True, (partial(_asked_again, self._again, job[0]), *job[1:])
                _log.warning("%s. What it was asked is asked of another.", lost)
            except BaseException:
                self.add_actor_back_to_pool(future)
                raise
            future = self.submit(actor_fn, job)
        return _failed(future.job, "no worker of Ray is left, and the cluster has no room for another")

    def add_actor_back_to_pool(self, future: Any) -> None:
        """Whoever did a job is free again, unless it died."""
        with self._changed:
            if (done := self._asked.pop(future, None)) is not None:
                self._free.append(done[0])
                self._changed.notify()

    def _answer(self, future: Any) -> tuple[Any, Any]:
        """What a worker answers, which is free then. Raises `_Lost`, or what the app raised."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError

        actor, *_ = self._asked[future]
        end = time.monotonic() + self._patience
        while not ray.wait([future], timeout=_LOOK_SECONDS)[0]:
            if time.monotonic() > end:
                raise _Lost(f"a worker of Ray did not answer in {self._patience:g} s", hopeless=True)
            started = ray.wait([self._started[actor]], timeout=0)[0]
            if not started and self._room() < self.num_actors:
                raise _Lost(
                    "a worker of Ray has not started, and there is no room for it any more", was_asked=False
                )
        try:
            _, answer, context = ray.get(future)
        except (RayActorError, ObjectLostError) as error:
            raise _Lost(f"a worker of Ray died ({type(error).__name__})") from error
        self.add_actor_back_to_pool(future)
        return answer, context

    def _start(self) -> None:
        """One more that is free; call it with the lock."""
        actor = self._new()
        self._started[actor] = actor.__ray_ready__.remote()
        self._free.append(actor)
        self.num_actors += 1

    def _room(self) -> int:
        try:
            return self._room_for()
        except ValueError:  # Flower's word for none
            return 0

    def _replace(self, future: Any) -> None:
        """Another worker in the place of one that died, or of none if there is no room any more."""
        import ray

        with self._changed:
            actor, *_ = self._asked.pop(future)
            ray.kill(actor)  # Ray may only have lost sight of it
            del self._started[actor]
            self.num_actors -= 1
            if self.num_actors < self._room():
                self._start()
            self._changed.notify_all()


def _failed(job: Job, reason: str) -> tuple[Any, Any]:
    _, message, _, context = job
    return error_answer(message, reason), context


def _asked_again(again: Callable[[Any], ClientApp], app_of: AppOf) -> ClientApp:
    return again(app_of())
