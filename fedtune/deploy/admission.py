"""Whom a running server lets in now, and why not the others; looked at anew every few seconds.

A node is let in while the file with its key is there (`enrolment`). Flower forgets a node's key for good when
it is told to, so it is told to only for keys that were revoked; a key whose file is missing or broken is
suspended: it stays registered, counts as not connected, and each of its requests is answered with "not now"
(HTTP status 503, at which a node asks again), until the file is back, also after a restart.

Uses Flower's internals (checked with 1.41): the LinkState of a SuperLink.
"""

from __future__ import annotations

import base64
import binascii
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.deploy import certificates
from fedtune.deploy.enrolment import enrolled, note_revoked, requests, revoked
from fedtune.deploy.heads import Heads
from fedtune.errors import FedtuneError

__all__ = ["Admission"]

_log = logging.getLogger("fedtune.server")
_LOOK_SECONDS = 2.0
_NOT_ENROLLED = "This key is not enrolled at this server, or was revoked."


class Admission:
    """Who is let in. One thread looks (`look`, `keep`); any may ask (`refusal`, `nodes`).

    Args:
        state: Flower's LinkState.
        folder: the server folder.
        say: tells the operator.

    Attributes:
        heads: what is kept of the sites' books; a site whose books went back is not let in either.
    """

    def __init__(self, state: Any, folder: Path, say: Callable[[str], None]) -> None:
        self._state, self._folder, self._say = state, folder, say
        self.heads = Heads(folder)
        self._admitted: dict[bytes, str] = {}  # site, by public key (PEM)
        self._suspended: dict[bytes, str] = {}  # reason, by public key (PEM)
        self._told: set[str] = set()

    def nodes(self) -> list[Any]:
        """Flower's NodeInfos of the keys that are registered, suspended ones too."""
        return [node for node in self._state.get_node_info() if node.status != "unregistered"]

    def refusal(self, key: bytes) -> tuple[int, str] | None:
        """(HTTP status, reason) if the node with this public key (PEM) is not let in now; else None."""
        if key in self._admitted:
            back = self.heads.reason(self._admitted[key])
            return None if back is None else (503, back)
        reason = self._suspended.get(key)
        return (403, _NOT_ENROLLED) if reason is None else (503, reason)

    def site_of(self, key: bytes) -> str | None:
        """The site that a public key (PEM) is enrolled for now; None for one that is not let in."""
        return self._admitted.get(key)

    def of_request(self, header: bytes) -> tuple[int, str] | None:
        """As `refusal`, for the key that a request to Flower's node interface names in its header."""
        try:
            return self.refusal(base64.b64decode(header, validate=True))
        except (binascii.Error, ValueError):
            return 403, _NOT_ENROLLED

    def look(self) -> int:
        """Enrols, revokes and suspends as the files say; how many are let in.

        Raises ConfigError, and changes nothing, if the record of revoked keys cannot be read.
        """
        self.heads.look()
        out = revoked(self._folder)
        registered = {bytes(node.public_key): node for node in self.nodes()}
        for site, path in requests(self._folder).items():
            for key, node in registered.items():
                if node.name == site and key not in out:
                    note_revoked(self._folder, site, key)
                    out[key] = site
            path.unlink(missing_ok=True)
        broken: dict[str, str] = {}
        wanted = {key: site for site, key in enrolled(self._folder, broken).items() if key not in out}
        admitted = {key: site for key, site in wanted.items() if key in registered or self._enrol(key, site)}
        suspended = {
            key: self._why(node.name, broken)
            for key, node in registered.items()
            if key not in admitted and key not in out
        }
        before, self._admitted, self._suspended = self._suspended, admitted, suspended
        for key, node in registered.items():
            if key in out:
                self._remove(key, node)
            elif key in suspended and key not in before:
                self._state.deactivate_node(node.node_id)
                self._say(f"{node.name} is not let in for now: {suspended[key]}")
            elif key in admitted and key in before:
                self._say(f"{node.name} is let in again")
        for site, reason in broken.items():
            if reason not in self._told and all(node.name != site for node in registered.values()):
                self._say(f"{reason} Until then that site is not let in.")
        back = {why for site in admitted.values() if (why := self.heads.reason(site)) is not None}
        for why in back - self._told:
            self._say(f"not let in: {why}")
        self._told = {*broken.values(), *back}
        return len(admitted)

    def keep(self, ending: threading.Event) -> None:
        """Looks every few seconds until `ending` is set; what fails is tried again at the next look."""
        said = ""
        while not ending.wait(_LOOK_SECONDS):
            try:
                self.look()
                said = ""
            except FedtuneError as error:
                if str(error) != said:
                    self._say(str(error))
                said = str(error)
            except Exception as error:  # the database is busy, say
                _log.warning("keys could not be brought up to date: %s", error)

    def _enrol(self, key: bytes, site: str) -> bool:
        """Registers a new key; False if Flower has been told to forget it."""
        from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID

        try:
            self._state.create_node(
                NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=site
            )
        except ValueError:
            told = f"the key of {site} was revoked before and stays so; the site makes a new one"
            note_revoked(self._folder, site, key)  # it was told by a version that kept no record of its own
            self._say(told)
            return False
        self._say(f"enrolled {site} ({certificates.fingerprint(key)})")
        return True

    def _remove(self, key: bytes, node: Any) -> None:
        from flwr.common.constant import NOOP_FLWR_AID

        self._state.delete_node(NOOP_FLWR_AID, node.node_id)
        self._say(f"revoked the key of {node.name} ({certificates.fingerprint(key)})")

    def _why(self, site: str, broken: dict[str, str]) -> str:
        path = self._folder / "nodes" / f"{site}.pub"
        if site in broken:
            return f"the file with the key of site '{site}' at the server cannot be used, or not yet"
        if path.exists():
            return f"another key is enrolled for site '{site}'"
        return (
            f"the file with the key of site '{site}' is missing at the server; its operator puts it back, "
            "enrols the site again, or revokes it"
        )
