"""May this site join? The node asks, the server answers, and the node says in words what is wrong.

Flower's SuperNode learns of a key that is not enrolled, of a key that is in use and of a clock that is off
only that it was refused. So before it is started, the node sends one signed request of fedtune's own, and the
server answers which site it knows by that key, whether such a node is connected, what time it is and which
fedtune it has. Only who holds a key learns anything about it. The head of a site's books
(`admission.BookHeads`) goes the same way.

So does what a site publishes of its budget: by default nothing. With `publish_budget: true` in its node.yaml
a node reports how much epsilon is left, with delta and unit, when it joins and within a minute of each
release; its audit log says so before. The server keeps the last report (`published.json`) and shows it to
whoever has the operator's token: `fedtune status`.
"""

from __future__ import annotations

import base64
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

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune import __version__
from fedtune.config.files import replace_whole
from fedtune.config.schema import UNITS
from fedtune.deploy import certificates
from fedtune.deploy.admission import Admission
from fedtune.deploy.certificates import parse_address, tls_context
from fedtune.deploy.site import open_ledger
from fedtune.errors import ConfigError, FederationError, ResourceError
from fedtune.federation.client.audit_log import Books
from fedtune.federation.client.policy import SiteSettings
from fedtune.privacy.publication import publish as door

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
    "publish",
    "refusal",
    "suspension",
]

PATH = "/v1/fedtune/join"
_KEY, _TIME, _SIGNATURE = "x-fedtune-key", "x-fedtune-time", "x-fedtune-signature"
_PUBLISHED = "x-fedtune-published"  # JSON; without it, a question only
_PURPOSE = b"fedtune-join:"
# Flower's server accepts a signature from the future up to 5 s, and from the past up to 305 s.
_AHEAD, _BEHIND = 5.0, 305.0
# Flower's server holds a node that was killed for connected until it has missed two heartbeats, and lets the
# one that was started in its place in no earlier. At Flower's 30 s that is a minute in the way of rounds;
# 10 s is the least that the server takes.
HEARTBEAT_SECONDS = 10
# A node that died without a word counts as connected until it has missed two heartbeats.
_LEFT_SECONDS = 3.0 * HEARTBEAT_SECONDS
_ASK_SECONDS = 5.0
_TELLING = threading.Lock()
_log = logging.getLogger("fedtune.server")
_NOT_ITSELF = 3  # any of flwr's ErrorCode will do: the reason is what is read
_BUDGET_KEYS = ("epsilon_left", "epsilon", "delta", "unit")
_UNITS = (*UNITS, "any")


@dataclass(frozen=True)
class Welcome:
    """What the server answers. `site` is None for a key that is not enrolled; `ahead` is in seconds;
    `suspended` says why the key, which is enrolled, is not let in for now, `back` that its books went back;
    `kept` is the head of them that the server had.
    """

    software: str
    site: str | None
    connected: bool
    ahead: float
    suspended: str | None = None
    kept: str | None = None
    back: str | None = None


def answer(
    headers: Mapping[bytes, bytes], admission: Admission, board: PublishedBudgets | None = None
) -> tuple[int, dict[str, Any]]:
    """The server's (HTTP status, answer). What an enrolled site tells is noted: what it publishes on `board`,
    the head of its books with `admission`; nothing of a request that is old, which may be one of before that
    somebody repeats."""
    try:
        given = {name: headers[name.encode()] for name in (_KEY, _TIME, _SIGNATURE)}
        key = serialization.load_der_public_key(base64.b64decode(given[_KEY], validate=True))
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("another kind of key")
        signature = base64.b64decode(given[_SIGNATURE], validate=True)
        told = headers.get(_PUBLISHED.encode(), b"")
        key.verify(signature, _signed(given[_TIME], told), ec.ECDSA(hashes.SHA256()))
        values = json.loads(told) if told else None
        signed_at = datetime.datetime.fromisoformat(given[_TIME].decode())
        ahead = (signed_at - _now()).total_seconds()
    except (KeyError, ValueError, TypeError, RecursionError, InvalidSignature, UnsupportedAlgorithm):
        return 403, {"error": "This needs a request that is signed by a site's key."}
    public = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    told_of = values if isinstance(values, dict) and -_BEHIND < ahead < _AHEAD else {}
    site = admission.site_of(public)
    kept = None if site is None else admission.heads.kept(site)
    if site is not None and isinstance(told_of.get("head"), str):
        try:
            admission.heads.note(site, told_of["head"], told_of.get("lost") is True)
        except (ConfigError, OSError) as error:
            _log.error("the head of site %s cannot be kept: %s", site, error)
            return 503, {"error": "The server cannot keep the head of this site's books now."}
    back = None if site is None else admission.heads.reason(site)
    refused = admission.refusal(public)
    suspended = refused[1] if refused is not None and refused[0] == 503 else None
    known = next((node for node in admission.nodes() if bytes(node.public_key) == public), None)
    if refused is not None and suspended is None:
        known = None
    if site is not None and "budget" in told_of and board is not None:
        board.note(site, checked_budget(told_of["budget"]))
    return 200, {
        "fedtune": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(),
        "site": known.name if known else None,
        "connected": known is not None and known.status == "online",
        "suspended": suspended if back is None else None,
        "kept": kept,
        "back": back,
    }


def check_in(
    site: SiteSettings,
    key: ec.EllipticCurvePrivateKey,
    say: Callable[[str], None],
    patience: float = _LEFT_SECONDS,
    books: Books | None = None,
) -> None:
    """Returns if the server lets this site in; waits `patience` seconds for one with its key to be gone.

    `books`: held to the head that the server keeps of them, before it is told the one that they have now.
    Raises FederationError, which says what is wrong (also that the books went back) and who mends it;
    ResourceError if the server does not answer, or has suspended this site: it may let it in later.
    """
    end, told = time.monotonic() + patience, False
    while True:
        if books is None:
            welcome, lost = _ask(site, key, timeout=10.0), list[str]()
        else:
            welcome, lost = _tell(site, key, books)
        if reason := _problem(site, key, welcome):
            raise FederationError(" ".join([reason, *lost]))
        if lost:
            raise FederationError(f"{' '.join(lost)} The server keeps head {welcome.kept}.")
        if welcome.suspended:
            raise ResourceError(
                f"The server {site.server} does not let this site in now: {welcome.suspended}."
            )
        if not welcome.connected:
            return
        if time.monotonic() > end:
            raise FederationError(
                f"Another node with the key of site '{site.site}' (fingerprint {_print(key)}) is connected "
                f"to {site.server}. One key is one node: end the other one, or, if nobody here started it, "
                "have the operator revoke this key, for somebody else has it."
            )
        if not told:
            say(
                f"a node with this site's key is connected, or was until a moment ago; waiting up to "
                f"{patience:.0f} s for it to be gone"
            )
            told = True
        time.sleep(min(_ASK_SECONDS, patience / 4))


def publish(
    site: SiteSettings,
    key: ec.EllipticCurvePrivateKey,
    values: dict[str, Any] | None,
    books: Books,
) -> None:
    """Tells the server what this site publishes (None: nothing any more), and the head of its books."""
    _tell(site, key, books, budget=values)


def _tell(
    site: SiteSettings, key: ec.EllipticCurvePrivateKey, books: Books, **values: Any
) -> tuple[Welcome, list[str]]:
    """Tells the server `values`, and the head of the books as it is at that moment: (its answer, what the
    books lack of the head that it keeps).

    What it keeps is asked first: a head that went back and has grown since would take the place of the one
    that is kept, and nothing would be known of it any more.
    """
    with _TELLING:  # of two threads that tell a head, the later one must have the later head
        kept = _ask(site, key, timeout=10.0).kept
        lost = [] if kept is None else books.against(kept)
        told = {**values, "head": books.head(), **({"lost": True} if lost else {})}
        text = json.dumps(door("join", told, public_data=False)[0])
        return _ask(site, key, timeout=10.0, told=text.encode()), lost


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
    return flower.error_in_place_of(message, _NOT_ITSELF, reason)


def suspension(site: SiteSettings, key: ec.EllipticCurvePrivateKey) -> str | None:
    """Why the server does not let this site in for now; None if it does. Raises as `publish` does."""
    welcome = _ask(site, key, timeout=10.0)
    return welcome.suspended or welcome.back


def refusal(site: SiteSettings, key: ec.EllipticCurvePrivateKey) -> str | None:
    """Why the server no longer lets this site in; None if it does, or does not answer at once."""
    try:
        return _problem(site, key, _ask(site, key, timeout=2.0))
    except (FederationError, ResourceError):
        return None


def _signed(stamp: bytes, told: bytes) -> bytes:
    return b"\n".join((_PURPOSE, stamp, told))


def _ask(site: SiteSettings, key: ec.EllipticCurvePrivateKey, timeout: float, told: bytes = b"") -> Welcome:
    now = _now()
    stamp = now.isoformat().encode()
    public = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    headers = {
        _KEY: base64.b64encode(public).decode(),
        _TIME: stamp.decode(),
        _SIGNATURE: base64.b64encode(key.sign(_signed(stamp, told), ec.ECDSA(hashes.SHA256()))).decode(),
        **({_PUBLISHED: told.decode()} if told else {}),
    }
    host, port = parse_address(site.server)
    connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=tls_context(Path(site.ca)))
    try:
        connection.request("GET", PATH, headers=headers)
        response = connection.getresponse()
        status, body = response.status, response.read(10_000)
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
        said = json.loads(body)
        ahead = (now - datetime.datetime.fromisoformat(said["time"])).total_seconds()
        name = said["site"]
        software, suspended = str(said["fedtune"])[:40], said.get("suspended")
        kept, back = (said.get(key) and str(said[key])[:1000] for key in ("kept", "back"))
        return Welcome(
            software,
            name and str(name)[:100],
            said["connected"] is True,
            ahead,
            suspended and str(suspended)[:500],
            kept,
            back,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FederationError(
            f"The server {site.server} does not answer as fedtune {__version__} does (HTTP status {status}): "
            f"it is another version, or another program. Ask its operator which fedtune it runs."
        ) from error


def _problem(site: SiteSettings, key: ec.EllipticCurvePrivateKey, welcome: Welcome) -> str | None:
    """What keeps this site out, as a paragraph."""
    if welcome.software != __version__:
        return (
            f"The server {site.server} runs fedtune {welcome.software}, and this node fedtune {__version__}. "
            f"They must be the same: install `fedtune=={welcome.software}` here, or {__version__} there."
        )
    if welcome.back is not None:
        return f"The server {site.server} does not let this site in: {welcome.back}."
    if welcome.site is None:
        return (
            f"The key of site '{site.site}' (fingerprint {_print(key)}) is not enrolled at {site.server}, or "
            "was revoked. Send the operator the line that `fedtune node init` printed, for `fedtune server "
            "DIR --enrol`; a key that was revoked stays so: make a new one."
        )
    if welcome.site != site.site:
        return (
            f"The key {site.key} (fingerprint {_print(key)}) is enrolled for site '{welcome.site}', and "
            f"this is site '{site.site}'. Use the site's own key, made here by `fedtune node init`; a key "
            "must not be copied from one site to another."
        )
    if not -_BEHIND < welcome.ahead < _AHEAD:
        how = "ahead of" if welcome.ahead > 0 else "behind"
        return (
            f"This machine's clock is {abs(welcome.ahead):.0f} s {how} the server's ({site.server}), "
            f"which accepts {_AHEAD:.0f} s ahead and {_BEHIND:.0f} s behind. Set the clock of whichever is "
            "wrong; a time service (NTP) keeps both right."
        )
    return None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _print(key: ec.EllipticCurvePrivateKey) -> str:
    return certificates.fingerprint(certificates.public_key_of(key))


# --- what a site publishes of its budget --------------------------------------------------------------


def budget_of(site: SiteSettings) -> dict[str, Any] | None:
    """What this site publishes now; None if its owner did not ask for it. Raises LedgerError.

    `epsilon_left` is what no release has spent, of whichever state of its data has spent most, rounded down.
    """
    if not site.publish_budget:
        return None
    ledger, budget = open_ledger(site), site.budget
    releases = [one for one in ledger.releases() if not one.public]
    used = {(one.dataset, one.fingerprint) for one in releases}
    spent = max(
        (ledger.epsilon(dataset=name, fingerprint=mark, delta=budget.delta) for name, mark in used),
        default=0.0,
    )
    return {
        "epsilon_left": math.floor(max(0.0, budget.epsilon - spent) * 1e4) / 1e4,
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "unit": budget.unit or "any",
    }


def checked_budget(values: Any) -> dict[str, Any] | None:
    """`values` if a site may have published them; None for anything else."""
    if not isinstance(values, dict) or set(values) != set(_BUDGET_KEYS) or values["unit"] not in _UNITS:
        return None
    numbers = [values[name] for name in _BUDGET_KEYS[:3]]
    right = all(type(one) in (int, float) and math.isfinite(one) and one >= 0 for one in numbers)
    return values if right else None


def budget_text(values: dict[str, Any] | None) -> str:
    """For a person."""
    if values is None:
        return "budget not published"
    unit = "" if values["unit"] == "any" else f", unit {values['unit']}"
    return (
        f"epsilon {values['epsilon_left']:g} of {values['epsilon']:g} left at delta {values['delta']:g}{unit}"
    )


class PublishedBudgets:
    """What the sites published last, by name; in a file of the server's, so that it outlives it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def all(self) -> dict[str, Any]:
        """By site; nothing where the file is missing or cannot be read."""
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, site: str, values: dict[str, Any] | None) -> None:
        """Keeps what a site published; None takes it down."""
        with self._lock:
            kept = self.all()
            if kept.get(site) == values:
                return
            kept[site] = values
            content = json.dumps({name: one for name, one in kept.items() if one is not None})
            replace_whole(self._path, content.encode(), mode=0o600)
