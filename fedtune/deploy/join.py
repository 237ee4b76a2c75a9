"""May this site join? The node asks, the server answers, and the node says in words what is wrong.

Whether its key is not enrolled, its key is in use or its clock is off: Flower's SuperNode learns only that
it was refused. So before it is started, the node sends one signed request of fedtune's own, and the
server answers which site it knows by that key, whether such a node is connected, what time it is and which
fedtune it has. Only who holds a key learns anything about it. The head of a site's books
(`admission.BookHeads`) goes the same way, and so does what the server tells of its authorities
(`authorities.learn`) and which of them this site trusts.

So does what a site publishes of its budget: by default nothing. With `publish_budget: true` in its node.yaml
a node reports how much epsilon is left, with delta and unit, when it joins and within a minute of each
release; its audit log says so before. The server keeps the last report (`published.json`) and shows it to
whoever has the operator's token: `fedtune status`.
"""

from __future__ import annotations

import datetime
import http.client
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.config.build import build
from fedtune.config.files import replace_whole
from fedtune.config.schema import UNITS
from fedtune.deploy import authorities, certificates, signing
from fedtune.deploy.admission import Admission
from fedtune.deploy.site import open_ledger
from fedtune.errors import ConfigError, FederationError, FedtuneError, ResourceError
from fedtune.federation.client.audit_log import Books
from fedtune.federation.client.policy import SiteSettings
from fedtune.federation.protocol import PROTOCOL
from fedtune.privacy import publication

__all__ = [
    "HEARTBEAT_SECONDS",
    "PATH",
    "PublishedBudgets",
    "answer",
    "as_enrolled",
    "budget_of",
    "budget_text",
    "check_in",
    "checked_budget",
    "is_refusal",
    "publish",
    "refusal",
    "suspension",
]

PATH = "/v1/fedtune/join"
_KEY, _TIME, _SIGNATURE = signing.KEY, signing.TIME, signing.SIGNATURE
_PUBLISHED = "x-fedtune-published"  # JSON; without it, a question only
_PURPOSE = b"fedtune-join:"
_AHEAD, _BEHIND = signing.AHEAD, signing.BEHIND
# To Flower's server a node that was killed is connected until it has missed two heartbeats, and the one that
# was started in its place is refused until then. At Flower's 30 s that is a minute without rounds; 10 s is
# the least that the server accepts.
HEARTBEAT_SECONDS = 10
_LEFT_SECONDS = 3.0 * HEARTBEAT_SECONDS
_ASK_SECONDS = 5.0
_REPORTING = threading.Lock()
_log = logging.getLogger("fedtune.server")
_node_log = logging.getLogger("fedtune.node")
_BUDGET_KEYS = ("epsilon_left", "epsilon", "delta", "unit")
_UNITS = (*UNITS, "any")


@dataclass(frozen=True)
class JoinAnswer:
    """What the server answers.

    Attributes:
        software: the server's build of fedtune.
        protocol: that it speaks (`fedtune.federation.protocol`).
        site: the site that the key is enrolled for; None for a key that is not enrolled.
        connected: a node with this key is connected.
        ahead: how far this machine's clock is ahead of the server's, in seconds.
        suspended: why the key, which is enrolled, is not let in for now.
        kept: the head of the site's books that the server had before this request.
        back: why the site is not let in if its books went back.
        notice: what the server tells of its authorities, if anything.
    """

    software: str
    protocol: int
    site: str | None
    connected: bool
    ahead: float
    suspended: str | None = None
    kept: str | None = None
    back: str | None = None
    notice: str | None = None


def answer(
    headers: Mapping[bytes, bytes], admission: Admission, budgets: PublishedBudgets | None = None
) -> tuple[int, dict[str, Any]]:
    """The server's (HTTP status, answer) to a node's request.

    What an enrolled site reports is noted: what it publishes in `budgets`, the head of its books in
    `admission`. Nothing of a request that is old is noted: somebody may have recorded it and sent it again.
    """
    try:
        report_text = headers.get(_PUBLISHED.encode(), b"")
        given = {name: headers.get(name.encode(), b"") for name in (_KEY, _TIME, _SIGNATURE)}
        public, signed_at = signing.signed_by(given, _PURPOSE, report_text)
        values = json.loads(report_text) if report_text else None
        ahead = (signed_at - _now()).total_seconds()
    except (ValueError, RecursionError):
        return 403, {"error": "This needs a request that is signed by a site's key."}
    report = values if isinstance(values, dict) and -_BEHIND < ahead < _AHEAD else {}
    site = admission.site_of(public)
    kept = None if site is None else admission.heads.kept(site)
    if site is not None and isinstance(report.get("head"), str):
        try:
            admission.heads.note(site, report["head"], report.get("lost") is True)
            admission.note_trust(site, report.get("trusts"))
        except (ConfigError, OSError) as error:
            _log.error("the head of site %s cannot be kept: %s", site, error)
            return 503, {"error": "The server cannot keep the head of this site's books now."}
    back = None if site is None else admission.heads.refusal(site)
    refused = admission.refusal(public)
    suspended = refused[1] if refused is not None and refused[0] == 503 else None
    known = None
    if refused is None or suspended is not None:  # a stranger's question costs no query
        known = next((node for node in admission.nodes() if bytes(node.public_key) == public), None)
    if site is not None and "budget" in report and budgets is not None:
        budgets.note(site, checked_budget(report["budget"]))
    return 200, {
        "fedtune": build(),
        "protocol": PROTOCOL,
        "time": datetime.datetime.now(datetime.UTC).isoformat(),
        "site": known.name if known else None,
        "connected": known is not None and known.status == "online",
        "suspended": suspended if back is None else None,
        "kept": kept,
        "back": back,
        "authorities": None if site is None else admission.authorities.notice(),
    }


def is_refusal(status: int, values: Mapping[str, Any]) -> bool:
    """Whether `answer` was given to somebody whose key is not enrolled, or who has none."""
    return status == 403 or (
        status == 200 and not any(values[name] for name in ("site", "suspended", "back"))
    )


def check_in(
    site: SiteSettings,
    key: ec.EllipticCurvePrivateKey,
    say: Callable[[str], None],
    patience: float = _LEFT_SECONDS,
    books: Books | None = None,
) -> None:
    """Returns if the server lets this site in.

    Args:
        site: the site's settings.
        key: its private key.
        say: prints a line for its administrator.
        patience: seconds to wait for another node with this key to be gone.
        books: compared with the head that the server keeps of them, before the present head is reported.

    Raises:
        FederationError: what is wrong (also that the books went back), and who mends it.
        ResourceError: the server does not answer, or has suspended this site: it may let it in later.
    """
    end, announced = time.monotonic() + patience, False
    while True:
        if books is None:
            reply, lost = _ask(site, key, timeout=10.0), list[str]()
        else:
            reply, lost = _report(site, key, books, joins=True)
        if reason := _problem(site, key, reply):
            raise FederationError(" ".join([reason, *lost]))
        if lost:
            raise FederationError(f"{' '.join(lost)} The server keeps head {reply.kept}.")
        if reply.suspended:
            raise ResourceError(f"The server {site.server} does not let this site in now: {reply.suspended}.")
        if not reply.connected:
            return
        if time.monotonic() > end:
            raise FederationError(
                f"Another node with the key of site '{site.site}' (fingerprint {_shown(key)}) is connected "
                f"to {site.server}. One key is one node: end the other one, or, if nobody here started it, "
                "have the operator revoke this key, for somebody else has it."
            )
        if not announced:
            say(
                f"a node with this site's key is connected, or was until a moment ago; waiting up to "
                f"{patience:.0f} s for it to be gone"
            )
            announced = True
        time.sleep(min(_ASK_SECONDS, patience / 4))


def publish(
    site: SiteSettings,
    key: ec.EllipticCurvePrivateKey,
    values: dict[str, Any] | None,
    books: Books,
) -> None:
    """Reports what this site publishes (None: nothing any more), and the head of its books.

    Raises:
        ResourceError: the server does not answer.
        FederationError: it is another version, or another program.
    """
    _report(site, key, books, budget=values)


def _report(
    site: SiteSettings, key: ec.EllipticCurvePrivateKey, books: Books, *, joins: bool = False, **values: Any
) -> tuple[JoinAnswer, list[str]]:
    """Reports `values` and the present head of the books: (the answer, what the books lack of the head that
    the server keeps).

    A node that `joins` reports which authorities it trusts, too: its connections are by these from now on,
    while one that has joined has to join anew first.

    The head that the server keeps is asked first: one that went back and has grown since would replace it,
    and nobody would notice any more.
    """
    with _REPORTING:  # of two threads that report a head, the later one must have the later head
        reply = _ask(site, key, timeout=10.0)
        kept = reply.kept
        lost = [] if kept is None else books.against(kept)
        if joins:
            _learn(site, reply, books)
            values["trusts"] = authorities.authority_fingerprints(authorities.trusted(site))
        report = {**values, "head": books.head(), **({"lost": True} if lost else {})}
        text = json.dumps(publication.publish("join", report, public_data=False)[0])
        return _ask(site, key, timeout=10.0, report=text.encode()), lost


def as_enrolled(message: Any, site_of: Callable[[int], str | None]) -> Any:
    """A node's message, or an error in its place if it answers by another name than its key is enrolled for.

    A node names itself in its hello; a site that took another's name would take its place in a run.
    """
    from fedtune.deploy import flower

    hello = message.content.get("hello") if message.has_content() else None
    name = hello.get("node") if isinstance(hello, Mapping) else None
    if name is None or name == (site := site_of(message.metadata.src_node_id)):
        return message
    reason = f"It says that it is {str(name)[:100]!r}, and its key is enrolled for {site!r}: it has no part."
    return flower.error_in_place_of(message, reason)


def suspension(site: SiteSettings, key: ec.EllipticCurvePrivateKey, books: Books) -> str | None:
    """Why the server does not let this site in for now; None if it does. Raises as `publish` does.

    What the server tells of its authorities is taken up.
    """
    reply = _ask(site, key, timeout=10.0)
    _learn(site, reply, books)
    return reply.suspended or reply.back


def _learn(site: SiteSettings, reply: JoinAnswer, books: Books) -> None:
    """Takes up what the server tells of its authorities; the audit log says so."""
    if reply.notice is None or reply.site != site.site:
        return
    try:
        if now := authorities.learn(site, reply.notice):
            books.append("authorities", fingerprints=now)
            _node_log.info("trusts the authorities %s from now on, newest first; told by the former", now)
    except FedtuneError as error:
        _node_log.warning("%s", error)


def refusal(site: SiteSettings, key: ec.EllipticCurvePrivateKey) -> str | None:
    """Why the server no longer lets this site in; None if it does, or does not answer at once."""
    try:
        return _problem(site, key, _ask(site, key, timeout=2.0))
    except (FederationError, ResourceError):
        return None


def _ask(
    site: SiteSettings, key: ec.EllipticCurvePrivateKey, timeout: float, report: bytes = b""
) -> JoinAnswer:
    now = _now()
    headers = {
        **signing.sign(key, _PURPOSE, report, now),
        **({_PUBLISHED: report.decode()} if report else {}),
    }
    connection = certificates.https_connection(site.server, authorities.trusted(site), timeout)
    try:
        connection.request("GET", PATH, headers=headers)
        response = connection.getresponse()
        status, body = response.status, response.read(20_000)
    except (OSError, http.client.HTTPException) as error:
        raise ResourceError(f"The server {site.server} does not answer ({error}).") from error
    finally:
        connection.close()
    if status in (500, 503):
        raise ResourceError(
            f"The server {site.server} cannot answer now (HTTP status {status}); its operator's own log says "
            "why."
        )
    try:
        if status != 200:
            raise ValueError
        values = json.loads(body)
        ahead = (now - datetime.datetime.fromisoformat(values["time"])).total_seconds()

        def text(name: str, longest: int) -> str | None:
            return str(values[name])[:longest] if values.get(name) else None

        return JoinAnswer(
            software=str(values["fedtune"])[:80],
            protocol=int(values.get("protocol", 1)),  # a server of before had no number
            site=text("site", 100),
            connected=values["connected"] is True,
            ahead=ahead,
            suspended=text("suspended", 500),
            kept=text("kept", 1000),
            back=text("back", 1000),
            notice=text("authorities", 8000),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FederationError(
            f"The server {site.server} does not answer as fedtune {build()} does (HTTP status {status}): "
            "it is another version, or another program. Ask its operator which fedtune it runs."
        ) from error


def _problem(site: SiteSettings, key: ec.EllipticCurvePrivateKey, reply: JoinAnswer) -> str | None:
    """What keeps this site out, as a paragraph."""
    if reply.protocol != PROTOCOL:
        return (
            f"The server {site.server} runs fedtune {reply.software}, which speaks protocol "
            f"{reply.protocol}, and this node fedtune {build()}, which speaks protocol {PROTOCOL}. They must "
            "speak the same: upgrade whichever has the lower number (`fedtune --version` says it)."
        )
    if reply.back is not None:
        return f"The server {site.server} does not let this site in: {reply.back}."
    if reply.site is None:
        return (
            f"The key of site '{site.site}' (fingerprint {_shown(key)}) is not enrolled at {site.server}, or "
            "was revoked. Send the operator the line that `fedtune node init` printed, for `fedtune server "
            "DIR --enrol`; a key that was revoked stays so: make a new one."
        )
    if reply.site != site.site:
        return (
            f"The key {site.key} (fingerprint {_shown(key)}) is enrolled for site '{reply.site}', and "
            f"this is site '{site.site}'. Use the site's own key, made here by `fedtune node init`; a key "
            "must not be copied from one site to another."
        )
    if not -_BEHIND < reply.ahead < _AHEAD:
        how = "ahead of" if reply.ahead > 0 else "behind"
        return (
            f"This machine's clock is {abs(reply.ahead):.0f} s {how} the server's ({site.server}), "
            f"which accepts {_AHEAD:.0f} s ahead and {_BEHIND:.0f} s behind. Set the clock of whichever is "
            "wrong; a time service (NTP) keeps both right."
        )
    return None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _shown(key: ec.EllipticCurvePrivateKey) -> str:
    return certificates.fingerprint(certificates.public_key_of(key))


# --- what a site publishes of its budget --------------------------------------------------------------


def budget_of(site: SiteSettings) -> dict[str, Any] | None:
    """What this site publishes now; None if its owner publishes nothing.

    `epsilon_left` is the unspent part of the budget, for that state of the data which has spent most, rounded
    down.

    Raises:
        LedgerError: the ledger cannot be trusted.
    """
    if not site.publish_budget:
        return None
    ledger, budget = open_ledger(site), site.budget
    used = {(release.dataset, release.fingerprint) for release in ledger.releases() if not release.public}
    spent = max(
        (ledger.epsilon(dataset=name, fingerprint=data, delta=budget.delta) for name, data in used),
        default=0.0,
    )
    return {
        "epsilon_left": math.floor(max(0.0, budget.epsilon - spent) * 1e4) / 1e4,
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "unit": budget.unit or "any",
    }


def checked_budget(values: Any) -> dict[str, Any] | None:
    """`values` if they are what `budget_of` makes; None for anything else."""
    if not isinstance(values, dict) or set(values) != set(_BUDGET_KEYS) or values["unit"] not in _UNITS:
        return None
    numbers = [values[name] for name in _BUDGET_KEYS[:3]]
    valid = all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in numbers)
    return values if valid else None


def budget_text(values: dict[str, Any] | None) -> str:
    """A published budget in words."""
    if values is None:
        return "budget not published"
    unit = "" if values["unit"] == "any" else f", unit {values['unit']}"
    return (
        f"epsilon {values['epsilon_left']:g} of {values['epsilon']:g} left at delta {values['delta']:g}{unit}"
    )


class PublishedBudgets:
    """What each site published last, in a file of the server folder."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def all(self) -> dict[str, Any]:
        """By site; empty if the file is missing or cannot be read."""
        try:
            budgets = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return budgets if isinstance(budgets, dict) else {}

    def note(self, site: str, values: dict[str, Any] | None) -> None:
        """Stores what a site publishes; None removes it."""
        with self._lock:
            budgets = self.all()
            if budgets.get(site) == values:
                return
            budgets[site] = values
            content = json.dumps({name: budget for name, budget in budgets.items() if budget is not None})
            replace_whole(self._path, content.encode(), mode=0o600)
