"""People: the operators of a server, each by name with a key and rights of their own.

    operators/NAME.yaml       key: the line that NAME's `fedtune operator` printed; rights: a list
    operators/NAME.revoked    a key of NAME that is never let in again

Whoever has the server folder's `operator.token` may do everything, by the name `operator`: it is for the
administrator on the server's own machine. Everybody else has a key, of which the private half stays with
them, and each request is signed by it, for this server alone (`audience`) and for once (`replays`): what
somebody sends to one server opens no other that knows the same key, and this one no second time. A running
server reads the folder anew every two seconds, so that a right that was taken back is gone without a
restart. What is broken lets nobody in.
"""

from __future__ import annotations

import datetime
import hmac
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import yaml

from fedtune.config.files import replace_whole
from fedtune.deploy import certificates, signing
from fedtune.deploy.authorities import authority_fingerprint, authority_fingerprints
from fedtune.deploy.provision import check_word
from fedtune.deploy.replays import Replays
from fedtune.deploy.trail import Trail
from fedtune.errors import ConfigError, ResourceError

__all__ = [
    "ADMINISTRATOR",
    "PURPOSE",
    "RIGHTS",
    "Operator",
    "Operators",
    "Right",
    "add",
    "audience",
    "operators",
    "revoke",
]

Right = Literal["submit", "stop", "enrol", "read"]
RIGHTS: tuple[Right, ...] = get_args(Right)
PURPOSE = b"fedtune-operator:"


@dataclass(frozen=True)
class Operator:
    """Somebody who may ask this server for something.

    `submit`: start runs, and stop one's own; `stop`: stop any; `enrol`: let sites in; `read`: see sites,
    runs, and what sites publish.
    """

    name: str
    rights: frozenset[str]
    key: bytes | None = None  # PEM; None: the holder of the operator's token

    @property
    def credential(self) -> bytes:
        """What a connection has shown when this operator used it."""
        return self.key or b"operator"


ADMINISTRATOR = Operator("operator", frozenset(RIGHTS))


class Operators:
    """Whom a running server knows; `reload` reads the folder again.

    Args:
        folder: of the server.
        token: the operator's token.

    Raises:
        ConfigError: an empty token, which everybody would have.
    """

    def __init__(self, folder: Path, token: str) -> None:
        if not token:
            raise ConfigError("The operator's token is empty: everybody would have it. Nothing is served.")
        self._folder, self._token = folder, token.encode()
        self._lock = threading.Lock()
        self._by_key: dict[bytes, Operator] = {}
        self._audiences: list[bytes] = []
        self._replays = Replays(folder / "operators")
        self.problems: list[str] = []
        self.reload()

    def reload(self) -> None:
        """Reads who may do what."""
        broken: list[str] = []
        found = {one.key: one for one in operators(self._folder, broken) if one.key is not None}
        try:
            # Each authority that vouches for this server: an operator may have an older ca.crt.
            names = authority_fingerprints(self._folder / "ca.crt") if found else []
        except ConfigError as error:
            names = []
            broken.append(f"{error} No operator is let in by a key.")
        with self._lock:
            self._by_key, self.problems = found, broken
            self._audiences = [name.encode() for name in names]

    def who(self, headers: Mapping[bytes, bytes], token_header: str) -> Operator | None:
        """Who sent a request with these headers, now and for the first time; None: nobody that is known.

        Raises:
            ResourceError: it is not known whether it is the first time (`replays`).
        """
        given = headers.get(token_header.encode(), b"")
        if given:
            return ADMINISTRATOR if hmac.compare_digest(given, self._token) else None
        named = {name: headers.get(name.encode(), b"") for name in _HEADERS}
        with self._lock:
            audiences, by_key = self._audiences, self._by_key
        for signed_for in audiences if named[signing.KEY] else ():
            try:
                key, when = signing.signed_by(named, PURPOSE, signed_for)
            except ValueError:
                continue
            ahead = (when - datetime.datetime.now(datetime.UTC)).total_seconds()
            if key not in by_key or not -signing.BEHIND < ahead < signing.AHEAD:
                return None
            return by_key[key] if self._replays.is_first(key, when) else None
        return None


_HEADERS = (signing.KEY, signing.TIME, signing.SIGNATURE)


def audience(folder: Path) -> bytes:
    """What an operator's requests to a server are signed for: its authority, by the `ca.crt` in `folder`.

    Raises:
        ConfigError: there is no certificate.
    """
    return authority_fingerprint(folder / "ca.crt").encode()


def operators(server: Path, broken: list[str] | None = None) -> list[Operator]:
    """The operators of a server folder; a file that cannot be used lets nobody in.

    Args:
        server: the server folder.
        broken: filled with what is wrong with such a file, and the way out.
    """
    found: list[Operator] = []
    gone = _revoked(server)
    for path in sorted((server / "operators").glob("*.yaml")):
        try:
            values = yaml.safe_load(path.read_text())
            key, name = certificates.read_public_line(str(values["key"]))
            rights = frozenset(_rights(values["rights"]))
            if name != path.stem:
                raise ConfigError(f"it holds the key of {name!r}")
            if key in gone or any(one.key == key for one in found):
                raise ConfigError("its key was revoked, or is another operator's")
            found.append(Operator(name, rights, key))
        except (ConfigError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            if broken is not None:
                broken.append(
                    f"{path} cannot be used ({error}), and lets nobody in. Add {path.stem} again (`fedtune "
                    f"server DIR --operator 'LINE' --rights ...`), or remove the file."
                )
    return found


def add(server: Path, line: str, rights: Iterable[str]) -> Operator:
    """Lets an operator in, or gives one other rights or another key; the former key is revoked.

    Args:
        server: the server folder.
        line: what `fedtune operator` printed.
        rights: some of `RIGHTS`.

    Raises:
        ConfigError: no such line or right, a key that was revoked, or that another operator has.
    """
    key, name = certificates.read_public_line(line)
    check_word(name)
    wanted = _rights(list(rights))
    if name in (ADMINISTRATOR.name, "server"):
        whom = "the server itself" if name == "server" else "whoever has the operator's token"
        raise ConfigError(f"{name!r} is how {whom} is named in the trail. Choose another name.")
    if key in _revoked(server):
        raise ConfigError(
            f"The key of operator {name!r} (fingerprint {certificates.fingerprint(key)}) was revoked, and "
            "stays so. They move their operator.key away, and make another with `fedtune operator`."
        )
    for other in operators(server):
        if other.key == key and other.name != name:
            raise ConfigError(f"The key of {name!r} is {other.name!r}'s already; each has their own.")
        if other.name == name and other.key != key and other.key is not None:
            _write(server / "operators" / f"{name}.revoked", _former(server, name, other.key))
    text = yaml.safe_dump({"key": line.strip(), "rights": wanted}, sort_keys=False, width=1000)
    _write(server / "operators" / f"{name}.yaml", text)
    Trail(server).note(
        "operator added", ADMINISTRATOR.name, reason=name, rights=", ".join(wanted),
        fingerprint=certificates.fingerprint(key),
    )  # fmt: skip
    return Operator(name, frozenset(wanted), key)


def revoke(server: Path, name: str) -> None:
    """Lets an operator in no more, for good.

    Raises:
        ConfigError: there is no such operator.
    """
    path = server / "operators" / f"{check_word(name)}.yaml"
    if not path.exists():
        known = ", ".join(one.name for one in operators(server)) or "none"
        raise ConfigError(f"There is no operator {name!r}; there are {known}.")
    for one in operators(server):
        if one.name == name and one.key is not None:
            _write(path.with_suffix(".revoked"), _former(server, name, one.key))
    path.unlink()
    Trail(server).note("operator revoked", ADMINISTRATOR.name, reason=name)


def _former(server: Path, name: str, key: bytes) -> str:
    path = server / "operators" / f"{name}.revoked"
    before = path.read_text() if path.exists() else ""
    return before + certificates.public_line(key, name) + "\n"


def _revoked(server: Path) -> set[bytes]:
    found: set[bytes] = set()
    for path in sorted((server / "operators").glob("*.revoked")):
        try:
            found |= {certificates.read_public_line(line)[0] for line in path.read_text().splitlines()}
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}), and it names a key that must not be let in. Restore it "
                "from a backup."
            ) from error
    return found


def _rights(given: object) -> list[str]:
    named = list(given) if isinstance(given, (list, tuple)) else [given]
    if not named or any(one not in RIGHTS for one in named):
        raise ConfigError(
            f"rights are {', '.join(RIGHTS)}, one or more with commas between them, and not "
            f"{', '.join(map(repr, named)) or 'none'}"
        )
    return [right for right in RIGHTS if right in named]


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        replace_whole(path, text.encode())
        path.chmod(0o644)  # nothing secret; the server may be another user than who adds operators
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.") from error
