"""Which sites a server lets in: enrolled and revoked keys, the heads of the sites' books, and the decision.

    nodes/SITE.pub          the key that SITE is let in by: one line, as its `fedtune node init` printed it
    revoked/PRINT.pub       a key that is never let in again, by its fingerprint; written by `--revoke`, and
                            for a site's old key where its new one is enrolled
    revoked/SITE.request    "whatever key SITE was let in by": where no file could be read to name the key

**Keys.** Only these files revoke. Flower forgets a node's key for good when it is told to, so it is told to
only for keys that were revoked. A key whose file is missing or broken is suspended: it stays registered,
counts as not connected, and each of its requests is answered with "not now" (HTTP status 503, at which a node
asks again) until the file is back, also after a restart of the server.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.files import replace_whole
from fedtune.deploy import certificates
from fedtune.deploy.heads import BookHeads
from fedtune.deploy.operators import ADMINISTRATOR, Operators
from fedtune.deploy.provision import Federation
from fedtune.deploy.rotation import Told
from fedtune.deploy.trail import Trail
from fedtune.errors import ConfigError, FedtuneError, ResourceError

__all__ = [
    "LOCAL",
    "Admission",
    "check_fingerprint",
    "enrol",
    "enrolled",
    "line_of",
    "note_revoked",
    "requests",
    "revoke",
    "revoked",
]

LOCAL = ADMINISTRATOR.name  # whoever may write into the server folder

_SITE_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_log = logging.getLogger("fedtune.server")
_UPDATE_SECONDS = 2.0
_NOT_ENROLLED = "This key is not enrolled at this server, or was revoked."


# --- keys: the files of a server folder ---------------------------------------------------------------


def line_of(text: str) -> str:
    """An enrolment line as it is, or read from the file that `text` names."""
    if "\n" not in text.strip() and len(text) < 1000 and " " not in text.strip() and Path(text).is_file():
        return Path(text).read_text().strip()
    return text.strip()


def check_fingerprint(line: str, told: str) -> None:
    """Compares the fingerprint of the key in an enrolment line with what its owner told.

    Raises:
        ConfigError: it is another key, or no such line.
    """
    key, name = certificates.read_public_line(line)
    shown = certificates.fingerprint(key)
    if "".join(told.split()).lower() != shown.replace(" ", ""):
        raise ConfigError(
            f"The key in the line for {name!r} has the fingerprint {shown}, and what was told is "
            f"{told.strip()[:60]!r}: it is another key, and nobody was let in. Ask for the line again, by "
            "another way."
        )


def enrol(server: Path, line: str, by: str = LOCAL) -> tuple[str, str]:
    """Enrols the public key in `line`; the site's former key is revoked.

    Args:
        server: the server folder.
        line: what `fedtune node init` printed.
        by: who does so, for the server's trail.

    Returns:
        (site, fingerprint of its key).

    Raises:
        ConfigError: an unknown site, a key that another site uses or that was revoked, or no such line.
    """
    key, site = certificates.read_public_line(line)
    known = Federation.read(server / "server.yaml").sites
    if site not in known:
        raise ConfigError(
            f"The key is for site {site!r}, and the federation's sites are {', '.join(known)}. Add it to the "
            "federation file and run `fedtune provision` again."
        )
    now = enrolled(server)
    for other, used in now.items():
        if used == key and other != site:
            raise ConfigError(
                f"The key of {site!r} is the key of {other!r} already. Each site makes its own with "
                "`fedtune node init`; a private key must not be copied."
            )
    shown = certificates.fingerprint(key)
    if key in revoked(server):
        raise ConfigError(
            f"The key of {site!r} (fingerprint {shown}) was revoked, and a key that was revoked stays so. "
            "The site moves its node.key away, makes a new one with `fedtune node init`, and sends that line."
        )
    if now.get(site, key) != key:
        note_revoked(server, site, now[site])
    _write(server / "nodes" / f"{site}.pub", line.strip() + "\n")
    Trail(server).note("site enrolled", by, site=site, fingerprint=shown)
    return site, shown


def revoke(server: Path, site: str, by: str = LOCAL) -> None:
    """Revokes the key of `site` for good; a running server no longer lets it in.

    A site whose file is broken or missing, though it was enrolled, loses every key that it was let in by.

    Args:
        server: the server folder.
        site: its name.
        by: who does so, for the server's trail.

    Raises:
        ConfigError: it was never enrolled, or has been revoked.
    """
    path = server / "nodes" / f"{site}.pub"
    broken: dict[str, str] = {}
    key = enrolled(server, broken).get(site)
    suspended = site in broken or (_SITE_FILE.fullmatch(site) and site in _known_to_the_server(server))
    if key is not None:
        note_revoked(server, site, key)
    elif suspended:
        _write(server / "revoked" / f"{site}.request", "every key that this site was let in by\n")
    else:
        raise ConfigError(
            f"No key of {site!r} is enrolled; enrolled are {', '.join(enrolled(server)) or 'none'}."
        )
    path.unlink(missing_ok=True)
    Trail(server).note("site revoked", by, site=site)


def enrolled(server: Path, unreadable: dict[str, str] | None = None) -> dict[str, bytes]:
    """Public keys (PEM) of the enrolled sites, by name.

    A file that is no key, or holds another site's (a copy: that site's books would be kept under this name),
    is passed over, so that it keeps no other site from being let in or revoked.

    Args:
        server: the server folder.
        unreadable: filled, by site, with what is wrong with a file that was passed over, and the way out.
    """
    found: dict[str, bytes] = {}
    wrong: dict[str, object] = {}
    for path in sorted((server / "nodes").glob("*.pub")):
        try:
            key, site = certificates.read_public_line(path.read_text())
        except FileNotFoundError:
            continue  # gone since the folder was listed
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            wrong[path.stem] = error
            continue
        if site == path.stem:
            found[site] = key
        else:
            wrong[path.stem] = f"it holds the key of site {site!r}."
    for site, key in found.items():
        if others := [other for other, used in found.items() if used == key and other != site]:
            wrong.setdefault(site, f"the key in it is also that of {', '.join(others)}.")
    if unreadable is not None:
        for site, why in wrong.items():
            unreadable[site] = (
                f"{server / 'nodes' / f'{site}.pub'} cannot be used: {why} Enrol {site} again (`fedtune "
                f"server DIR --enrol 'LINE'`), or revoke it (`fedtune server DIR --revoke {site}`)."
            )
    return {site: key for site, key in found.items() if site not in wrong}


def revoked(server: Path) -> dict[bytes, str]:
    """The revoked keys (PEM), each with the site that it was of.

    Raises:
        ConfigError: a file cannot be read: whom it keeps out would be let in.
    """
    found: dict[bytes, str] = {}
    folder = server / "revoked"
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(
            f"{folder} may not be read by this user, and says whom not to let in. Change its mode."
        )
    for path in sorted(folder.glob("*.pub")):
        try:
            key, site = certificates.read_public_line(path.read_text())
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}), and it names a key that must not be let in. Restore it "
                "from a backup; if there is none, revoke the site that it is of again, and remove this file."
            ) from error
        found[key] = site
    return found


def requests(server: Path) -> dict[str, Path]:
    """The sites of which every key is to be revoked, with the file that asks for it."""
    return {path.stem: path for path in sorted((server / "revoked").glob("*.request"))}


def note_revoked(server: Path, site: str, key: bytes) -> None:
    """Records durably that the public key (PEM) of `site` is revoked."""
    name = certificates.fingerprint(key).replace(" ", "")
    _write(server / "revoked" / f"{name}.pub", certificates.public_line(key, site) + "\n")


def _known_to_the_server(server: Path) -> set[str]:
    """The sites that the server's database lets in, without opening it as Flower does."""
    path = server / "superlink.sqlite"
    if not path.exists():
        return set()
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = connection.execute("SELECT name FROM node WHERE status != 'unregistered'")
            return {str(name) for (name,) in rows}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ResourceError(f"The server's database {path} cannot be read ({error}).") from error


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        replace_whole(path, text.encode())
        path.chmod(0o644)  # nothing secret; the server may be another user than who enrols
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.") from error


_enrol_line, _revoke_site = enrol, revoke  # for `Admission.changed`, whose words are the same


# --- whom a running server lets in --------------------------------------------------------------------


class Admission:
    """Whom a running server lets in.

    One thread updates it (`update`, `keep_updated`); any may ask (`refusal`, `nodes`).

    Args:
        state: Flower's LinkState.
        folder: the server folder.
        say: prints a line for the operator.
        people: the operators, who are read anew as the keys are.
        trail: is told of joins and leaves.

    Attributes:
        heads: what is kept of the sites' books; a site whose books went back is not let in either.
        authorities: what is told of them, and which each site trusts.
    """

    def __init__(
        self,
        state: Any,
        folder: Path,
        say: Callable[[str], None],
        people: Operators | None = None,
        trail: Trail | None = None,
    ) -> None:
        self._state, self._folder, self._say = state, folder, say
        self._people, self._trail = people, trail
        self._online: set[str] = set()
        self.heads, self.authorities = BookHeads(folder), Told(folder)
        self._admitted: dict[bytes, str] = {}  # site, by public key (PEM)
        self._suspended: dict[bytes, str] = {}  # reason, by public key (PEM)
        self._reported: set[str] = set()

    def nodes(self) -> list[Any]:
        """Flower's NodeInfo of each registered key, suspended ones too."""
        return [node for node in self._state.get_node_info() if node.status != "unregistered"]

    def runs(self, states: Sequence[str] | None, limit: int) -> list[Any]:
        """Flower's Run of the newest `limit` runs in one of `states` (None: in any), newest first."""
        found = self._state.get_run_info(statuses=states, order_by="pending_at", ascending=False, limit=limit)
        return list(found)

    def refusal(self, key: bytes) -> tuple[int, str] | None:
        """(HTTP status, reason) if the node with this public key (PEM) is not let in now; else None."""
        if key in self._admitted:
            back = self.heads.refusal(self._admitted[key])
            return None if back is None else (503, back)
        reason = self._suspended.get(key)
        return (403, _NOT_ENROLLED) if reason is None else (503, reason)

    def site_of(self, key: bytes) -> str | None:
        """The site that a public key (PEM) is enrolled for now; None for one that is not let in."""
        return self._admitted.get(key)

    def refusal_of_request(self, header: bytes) -> tuple[int, str] | None:
        """As `refusal`, for the key that a request to Flower's node interface names in its header."""
        try:
            return self.refusal(base64.b64decode(header, validate=True))
        except (binascii.Error, ValueError):
            return 403, _NOT_ENROLLED

    def update(self) -> int:
        """Enrols, revokes and suspends as the files say.

        Returns:
            How many sites are let in.

        Raises:
            ConfigError: the record of revoked keys cannot be read; nothing is changed.
        """
        self.heads.reload()
        problems = []
        if self._people is not None:
            self._people.reload()
            problems = self._people.problems
        revoked_keys = revoked(self._folder)
        registered = {bytes(node.public_key): node for node in self.nodes()}
        for site, path in requests(self._folder).items():
            for key, node in registered.items():
                if node.name == site and key not in revoked_keys:
                    note_revoked(self._folder, site, key)
                    revoked_keys[key] = site
            path.unlink(missing_ok=True)
        broken: dict[str, str] = {}
        wanted = {
            key: site for site, key in enrolled(self._folder, broken).items() if key not in revoked_keys
        }
        admitted = {key: site for key, site in wanted.items() if key in registered or self._enrol(key, site)}
        suspended = {
            key: self._why_suspended(node.name, broken)
            for key, node in registered.items()
            if key not in admitted and key not in revoked_keys
        }
        before, self._admitted, self._suspended = self._suspended, admitted, suspended
        for key, node in registered.items():
            if key in revoked_keys:
                self._remove(key, node)
            elif key in suspended and key not in before:
                self._state.deactivate_node(node.node_id)
                self._say(f"{node.name} is not let in for now: {suspended[key]}")
            elif key in admitted and key in before:
                self._say(f"{node.name} is let in again")
        for site, reason in broken.items():
            if reason not in self._reported and all(node.name != site for node in registered.values()):
                self._say(f"{reason} Until then that site is not let in.")
        back = {why for site in admitted.values() if (why := self.heads.refusal(site)) is not None}
        for why in back - self._reported:
            self._say(f"not let in: {why}")
        for why in set(problems) - self._reported:
            self._say(why)
        self._reported = {*broken.values(), *back, *problems}
        self._note_joins({node.name for node in self.nodes() if node.status == "online"})
        return len(admitted)

    def _note_joins(self, online: set[str]) -> None:
        if self._trail is not None:
            for site in sorted(online - self._online):
                self._trail.by_site("site joined", site)
            for site in sorted(self._online - online):
                self._trail.by_site("site left", site)
        self._online = online

    def note_trust(self, site: str, trusted: object) -> None:
        """Keeps which authorities a site says that it trusts. Raises OSError."""
        told = self.authorities.note(site, trusted)
        if told is not None and self._trail is not None:
            self._trail.by_site("site trusts", site, fingerprint=" and ".join(told))

    def changed(self, *, enrol: str, revoke: str, by: str) -> tuple[int, dict[str, Any]]:
        """Enrols or revokes a site as an operator asks over the network: (HTTP status, answer)."""
        try:
            if enrol:
                site, shown = _enrol_line(self._folder, enrol, by)
                return 200, {"enrolled": site, "fingerprint": shown}
            _revoke_site(self._folder, revoke, by)
            return 200, {"revoked": revoke}
        except FedtuneError as error:
            return 409, {"error": str(error)}

    def keep_updated(self, ending: threading.Event) -> None:
        """Calls `update` every two seconds until `ending` is set; what fails is tried again the next time."""
        last_error = ""
        while not ending.wait(_UPDATE_SECONDS):
            try:
                self.update()
                last_error = ""
            except FedtuneError as error:
                if str(error) != last_error:
                    self._say(str(error))
                last_error = str(error)
            except Exception as error:  # the database is busy, say
                _log.warning("keys could not be brought up to date: %s", error)

    def _enrol(self, key: bytes, site: str) -> bool:
        """Registers a new key; False if Flower has been told to forget it."""
        from fedtune.deploy import flower  # late: `--enrol` and `--revoke` need no Flower

        try:
            flower.register_node(self._state, key, site)
        except ValueError:
            note_revoked(self._folder, site, key)  # by a version that kept no record of its own
            self._say(f"the key of {site} was revoked before and stays so; the site makes a new one")
            return False
        self._say(f"enrolled {site} ({certificates.fingerprint(key)})")
        return True

    def _remove(self, key: bytes, node: Any) -> None:
        from fedtune.deploy import flower

        flower.forget_node(self._state, node.node_id)
        self._say(f"revoked the key of {node.name} ({certificates.fingerprint(key)})")

    def _why_suspended(self, site: str, broken: dict[str, str]) -> str:
        path = self._folder / "nodes" / f"{site}.pub"
        if site in broken:
            return f"the file with the key of site '{site}' at the server cannot be used, or not yet"
        if path.exists():
            return f"another key is enrolled for site '{site}'"
        return (
            f"the file with the key of site '{site}' is missing at the server; its operator puts it back, "
            "enrols the site again, or revokes it"
        )
