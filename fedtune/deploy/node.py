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
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.deploy import authorities, certificates, channel, join, node_metrics
from fedtune.deploy.certificates import check_server, expiry_warning, wait_for_server
from fedtune.deploy.leaving import Leaving
from fedtune.deploy.node_metrics import NodeActivity
from fedtune.deploy.site import books_of, check_books, open_ledger
from fedtune.deploy.thin_app import AppAllowList
from fedtune.deploy.worker_process import WorkerProcess
from fedtune.errors import FederationError, FedtuneError, ResourceError
from fedtune.federation.client.audit_log import Books
from fedtune.federation.client.policy import SiteSettings

__all__ = ["guard", "publish_changes", "run_node"]

_log = logging.getLogger("fedtune.node")
_DAY = 86_400.0


def run_node(
    site: SiteSettings, say: Callable[[str], None], monitor: str | None = None, *, log_json: bool = False
) -> None:
    """Joins the federation and answers messages until it is stopped (Ctrl-C, SIGTERM).

    Args:
        site: the site's settings.
        say: prints a line for the site's administrator.
        monitor: where its administrator looks (`fedtune.deploy.node_metrics`); None: nowhere.
        log_json: its worker's log has JSON too.

    Raises:
        ConfigError, FederationError: it cannot join.
        LedgerError: the ledger or the audit log cannot be trusted.
    """
    key = certificates.load_private_key(Path(site.key))
    open_ledger(site, setting=True)
    check_books(site)
    say(f"site {site.site}: ledger {site.ledger}, audit log {site.audit_log}")
    activity, worker = NodeActivity(), WorkerProcess(site, log_json=log_json)
    leaving = Leaving(site.limits.stop_seconds, say)
    watching: AbstractContextManager[str | None] = nullcontext()
    if monitor is not None:
        watching = node_metrics.monitor(monitor, site, activity, lambda: worker.pid is not None)
    try:
        with watching as at:
            if at is not None:
                say(f"http://{at}/ has /metrics and /healthz")
            _wait_for_admission(site, key, say, activity)
            worker.start()
            _answer_messages(site, key, worker, activity, leaving, say)
    finally:
        worker.close()
        leaving.all_is_done()


def _wait_for_admission(
    site: SiteSettings, key: Any, say: Callable[[str], None], activity: NodeActivity
) -> None:
    """Returns when the server answers and lets this site in. Raises FederationError if it never will."""
    last, at = "", 0.0
    while True:
        activity.step = time.monotonic()
        if warning := expiry_warning(wait_for_server(site.server, authorities.trusted(site), say)):
            say(warning)
        try:
            return join.check_in(site, key, say, books=books_of(site))
        except ResourceError as error:  # it went away in between, or lets this site in later
            if str(error) != last or time.monotonic() - at > 60.0:
                say(f"{error} Trying again until it does.")
                last, at = str(error), time.monotonic()
            time.sleep(5.0)


def _answer_messages(
    site: SiteSettings,
    key: Any,
    worker: WorkerProcess,
    activity: NodeActivity,
    leaving: Leaving,
    say: Callable[[str], None],
) -> None:
    # Late: Flower takes seconds, and most of what keeps a site out is known before.
    from fedtune.deploy import flower
    from fedtune.deploy.message_loop import MessageHandler, run_message_loop

    joined, ending = threading.Event(), threading.Event()

    def on_joined() -> None:
        say(f"joined {site.server} as {site.site}")
        joined.set()
        activity.joined = True

    flower_log, apps, books = FlowerLog(), AppAllowList(), books_of(site)
    leaving.listen()
    state, store = flower.node_state(on_joined)
    answer = MessageHandler(state, store, site, worker, apps, leaving, activity)

    minutely = (site, key, worker, books, activity, ending, say)
    threading.Thread(target=_every_minute, args=minutely, daemon=True).start()
    try:
        while True:
            joined.clear()
            authority = authorities.trusted(site)
            trusts = authority.read_bytes()
            run_message_loop(
                state,
                store,
                server=site.server,
                authority=authority,
                key=key,
                node_config={"site": site.to_json()},
                guard=lambda connection: guard(connection, apps, books, activity),
                answer=answer,
                leaving=leaving,
                say=say,
                outdated=partial(_other_authorities, site, trusts),
            )
            activity.joined = False
            if _other_authorities(site, trusts):
                say("other authorities vouch for the server: joins again by these")
                _wait_for_admission(site, key, say, activity)
                continue
            # It ended unexpectedly. The node keeps its identity and what it knows of the runs.
            say(f"the connection ended ({flower_log.last()}); joining again")
            leaving.answering = False
            leaving.pause(5.0)
            _wait_for_admission(site, key, say, activity)
    except SystemExit:
        if leaving.asked:
            say("left the federation")
            return
        if not joined.is_set():
            raise FederationError(
                f"The server {site.server} did not let site '{site.site}' in. It said: {flower_log.last()}."
            ) from None
        if reason := join.refusal(site, key):
            raise FederationError(reason) from None
        raise FederationError(
            f"The connection to the server {site.server} was ended. It said: {flower_log.last()}."
        ) from None
    finally:
        ending.set()


def _other_authorities(site: SiteSettings, before: bytes) -> bool:
    return authorities.trusted(site).read_bytes() != before


def guard(connection: Any, apps: AppAllowList, books: Books, activity: NodeActivity) -> Any:
    """Puts the node's own checks before the functions of Flower's connection, and counts bytes.

    The app of a run is checked before Flower reads it, and a message that grows beyond `channel.MAX_MESSAGE`
    bytes is given up while it arrives.

    Args:
        connection: (node id, receive, send, get_run, get_fab, pull_object, push_object, confirm).
        apps: which runs came with fedtune's own app.
        books: where a message that is too large is noted.
        activity: where bytes are counted, and that the loop goes on.
    """
    node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
    runs: dict[int, Any] = {}
    size = [0]  # bytes of the message that arrives

    def counted_receive() -> Any:
        size[0] = 0
        activity.step = time.monotonic()
        return receive()

    def noted_run(run_id: int) -> Any:
        runs[run_id] = get_run(run_id)
        return runs[run_id]

    def checked_fab(fab_hash: str, run_id: int) -> Any:
        return apps.admit(get_fab(fab_hash, run_id), runs.pop(run_id))

    def bounded_pull(run_id: int, object_id: str) -> bytes:
        data: bytes = pull_object(run_id, object_id)
        size[0] += len(data)
        activity.transferred(received=len(data))
        if size[0] > channel.MAX_MESSAGE:
            reason = f"a message of run {run_id} has more than {channel.MAX_MESSAGE} bytes; it was given up"
            books.append("refused", reason=reason)
            raise FederationError(reason)
        return data

    def counted_push(*about: Any) -> Any:
        activity.transferred(sent=len(about[-1]))
        return push_object(*about)

    return node_id, counted_receive, send, noted_run, checked_fab, bounded_pull, counted_push, confirm


def _every_minute(
    site: SiteSettings,
    key: Any,
    worker: WorkerProcess,
    books: Books,
    activity: NodeActivity,
    ending: threading.Event,
    say: Callable[[str], None],
) -> None:
    """Until `ending` is set, every minute:

    - log whether the server is reachable, because Flower retries silently;
    - report to the server what the owner publishes and the head of the books, if either has changed;
    - end the worker if it is idle: here, because Flower's question for messages does not return while the
      server is away;
    - once a day, warn that the server's certificate expires soon.
    """
    warned, reported = time.monotonic(), None
    while True:
        try:
            reported = publish_changes(site, key, books, reported)
            activity.budget = reported["published"]
            if reason := join.suspension(site, key, books):
                say(f"the server does not let this site in for now: {reason}; asking again until it does")
        except FedtuneError as error:
            say(str(error))
        if ending.wait(60.0):
            return
        if worker.end_if_idle():
            say("nothing is asked: the worker has ended, and the next message starts it again")
        try:
            warning = expiry_warning(check_server(site.server, authorities.trusted(site)))
            if warning and time.monotonic() - warned > _DAY:
                say(warning)
                warned = time.monotonic()
        except FedtuneError as error:
            activity.step = time.monotonic()  # the loop waits for the server; it does not hang
            say(f"{error} Trying again.")


def publish_changes(site: SiteSettings, key: Any, books: Books, reported: Any) -> dict[str, Any]:
    """Reports to the server what the owner publishes, and the head of the books, if either has changed.

    The audit log says so before it leaves, once the server is known to answer: while it is away nothing
    leaves, and a line each minute would say otherwise. That an owner publishes nothing is reported once, so
    that the server forgets what it was told before.

    Args:
        site: the site's settings.
        key: the node's private key.
        books: its ledger and audit log.
        reported: what the server knows: what this returned last, None at the start.

    Returns:
        What the server knows now.
    """
    budget = join.budget_of(site)
    if reported is None or (budget, books.head()) != (reported["published"], reported["head"]):
        if budget is not None and (reported is None or budget != reported["published"]):
            check_server(site.server, authorities.trusted(site))
            books.append("published", message="budget", **budget)
        join.publish(site, key, budget, books)
    return {"published": budget, "head": books.head()}


class FlowerLog(logging.Handler):
    """Keeps the last errors that Flower would print, to be shown in fedtune's words."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: list[str] = []
        logger = logging.getLogger("flwr")
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(self)
        logger.setLevel(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the last five."""
        self._lines = [*self._lines[-4:], record.getMessage()]

    def last(self) -> str:
        """The last message, on one line."""
        lines = [" ".join(line.split()) for line in self._lines]
        text = lines[-1] if lines else "nothing"
        # Flower frames it with an exit code before, and the address of a page after.
        text = text.partition("For more information")[0]
        text = text.partition("[code:")[2].partition("]")[2] or text
        return text[:300].strip(" .,")
