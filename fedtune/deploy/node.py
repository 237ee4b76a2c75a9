"""`fedtune node`: a SuperNode for one site, which runs its own installed fedtune and nothing else.

The connection, the identity and the messages are kept by Flower's parts; what Flower would do with an app or
a message is replaced (`thin_app.AppAllowList`, `message_loop.MessageHandler`). Before it joins, the node asks
the server whether this site may (`join`), because Flower would not say in words why not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.deploy import certificates, channel, join
from fedtune.deploy.certificates import check_server, expiry_warning, wait_for_server
from fedtune.deploy.site import books_of, check_books, open_ledger
from fedtune.deploy.thin_app import AppAllowList
from fedtune.deploy.worker_process import WorkerProcess
from fedtune.errors import FederationError, FedtuneError, ResourceError
from fedtune.federation.client.audit_log import Books
from fedtune.federation.client.policy import SiteSettings

__all__ = ["run_node"]

_log = logging.getLogger("fedtune.node")
_DAY = 86_400.0


def run_node(site: SiteSettings, say: Callable[[str], None]) -> None:
    """Joins the federation and answers until it is told to end (Ctrl-C, SIGTERM).

    Raises ConfigError or FederationError if it cannot join, LedgerError if the ledger cannot be trusted.
    """
    key = certificates.load_private_key(Path(site.key))
    open_ledger(site, setting=True)
    check_books(site)
    say(f"site {site.site}: ledger {site.ledger}, audit log {site.audit_log}")
    _enter(site, key, say)
    worker = WorkerProcess(site)
    try:
        worker.start()
        _join(site, key, worker, say)
    finally:
        worker.close()


def _enter(site: SiteSettings, key: Any, say: Callable[[str], None]) -> None:
    """Returns when the server is there and lets this site in; raises if it never will."""
    said, at = "", 0.0
    while True:
        if warning := expiry_warning(wait_for_server(site.server, Path(site.ca), say)):
            say(warning)
        try:
            return join.check_in(site, key, say, books=books_of(site))
        except ResourceError as error:  # it went away in between, or lets this site in later
            if str(error) != said or time.monotonic() - at > 60.0:
                say(f"{error} Trying again until it does.")
                said, at = str(error), time.monotonic()
            time.sleep(5.0)


def _join(site: SiteSettings, key: Any, worker: WorkerProcess, say: Callable[[str], None]) -> None:
    # Late: Flower takes seconds, and most of what keeps a site out is known before.
    from fedtune.deploy import flower
    from fedtune.deploy.message_loop import MessageHandler, run_message_loop

    joined, ending = threading.Event(), threading.Event()

    def on_joined() -> None:
        say(f"joined {site.server} as {site.site}")
        joined.set()

    flower_log, apps, books = FlowerLog(), AppAllowList(), books_of(site)
    state, store = flower.node_state(on_joined)
    answer = MessageHandler(state, store, site, worker, apps)

    threading.Thread(target=_watch, args=(site, key, worker, books, ending, say), daemon=True).start()
    try:
        while True:
            joined.clear()
            run_message_loop(
                state,
                store,
                server=site.server,
                authority=Path(site.ca),
                key=key,
                node_config={"site": site.to_json()},
                guard=lambda connection: guard(connection, apps, books),
                answer=answer,
                say=say,
            )
            # Something unforeseen ended it; identity and memory of runs are kept.
            say(f"the connection ended ({flower_log.last()}); joining again")
            time.sleep(5.0)
            _enter(site, key, say)
    except SystemExit:
        if not joined.is_set():
            raise FederationError(
                f"The server {site.server} did not let site '{site.site}' in. It said: {flower_log.last()}."
            ) from None
        # Flower ends in the same way when it is told to and when the server refuses the key.
        if reason := join.refusal(site, key):
            raise FederationError(reason) from None
        say("left the federation")
    finally:
        ending.set()


def guard(connection: Any, apps: AppAllowList, log: Books) -> Any:
    """Flower's connection (eight functions), with the app of a run judged before Flower reads it, and a
    message that grows beyond `channel.MAX_FRAME` bytes given up while it arrives."""
    node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
    runs: dict[int, Any] = {}
    size = [0]

    def counted_receive() -> Any:
        size[0] = 0
        return receive()

    def noted_run(run_id: int) -> Any:
        runs[run_id] = get_run(run_id)
        return runs[run_id]

    def judged_fab(fab_hash: str, run_id: int) -> Any:
        return apps.admit(get_fab(fab_hash, run_id), runs.pop(run_id))

    def bounded_pull(run_id: int, object_id: str) -> bytes:
        data: bytes = pull_object(run_id, object_id)
        size[0] += len(data)
        if size[0] > channel.MAX_FRAME:
            reason = f"a message of run {run_id} has more than {channel.MAX_FRAME} bytes; it was given up"
            log.append("refused", reason=reason)
            raise FederationError(reason)
        return data

    return node_id, counted_receive, send, noted_run, judged_fab, bounded_pull, push_object, confirm


def _watch(
    site: SiteSettings,
    key: Any,
    worker: WorkerProcess,
    log: Books,
    ending: threading.Event,
    say: Callable[[str], None],
) -> None:
    """Once a minute: says that the server does not answer, for Flower tries again by itself, and silently;
    tells it what the owner publishes, if that has changed; and ends a worker of which nothing is asked, here
    because Flower's question for messages does not return while the server is away.
    Once a day: that its certificate ends soon."""
    warned, told = time.monotonic(), None
    while True:
        try:
            told = publish(site, key, log, told)
            if reason := join.suspension(site, key):
                say(f"the server does not let this site in for now: {reason}; asking again until it does")
        except FedtuneError as error:
            say(str(error))
        if ending.wait(60.0):
            return
        if worker.rest():
            say("nothing is asked: the worker has ended, and the next message starts it again")
        try:
            warning = expiry_warning(check_server(site.server, Path(site.ca)))
            if warning and time.monotonic() - warned > _DAY:
                say(warning)
                warned = time.monotonic()
        except FedtuneError as error:
            say(f"{error} Trying again.")


def publish(site: SiteSettings, key: Any, log: Books, told: Any) -> dict[str, Any]:
    """Tells the server what the owner publishes, and the head of the books, unless it is what was `told`
    before; what it knows now.

    The log says so before it leaves, once the server is known to be there: while it is away nothing leaves,
    and a line each minute would say otherwise. An owner who publishes nothing has that told once: what the
    server kept of a time when it was otherwise is taken down.
    """
    books, values = books_of(site), join.budget_of(site)
    if told is None or (values, books.head()) != (told["published"], told["head"]):
        if values is not None and (told is None or values != told["published"]):
            check_server(site.server, Path(site.ca))
            log.append("published", message="budget", **values)
        join.publish(site, key, values, books)
    return {"published": values, "head": books.head()}


class FlowerLog(logging.Handler):
    """Keeps what Flower would print, to be told in fedtune's words."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: list[str] = []
        logger = logging.getLogger("flwr")
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(self)
        logger.setLevel(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the last few."""
        self._lines = [*self._lines[-4:], record.getMessage()]

    def last(self) -> str:
        """The last line, in one."""
        lines = [" ".join(line.split()) for line in self._lines]
        text = lines[-1] if lines else "nothing"
        # Flower frames it with an exit code before, and the address of a page after.
        text = text.partition("For more information")[0]
        text = text.partition("[code:")[2].partition("]")[2] or text
        return text[:300].strip(" .,")
