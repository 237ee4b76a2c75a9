"""A new authority in the place of the former, step by step: `fedtune provision ... --rotate STEP`.

    DIR/authority/rotation.json   which authorities there are, and which has signed the server's certificate
    DIR/authority/                the first one: ca.key, ca.crt
    DIR/authority/2/, 3/, ...     the later ones

**announce** makes the new authority. The server still shows its certificate by the former; it tells the
sites of both in a notice that the former has signed (`fedtune.deploy.authorities`), and each site trusts both
within a minute, or when it next joins.
**switch** makes a server certificate by the new authority, which a running server takes up. It refuses while
an enrolled site has not joined with trust in both, so that none is locked out.
**retire** ends the trust in the former: the notice names the new one alone, and the new one has signed it.

What each step decides is one small file, replaced whole. All else (`server/ca.crt`, the notice, certificate,
archives) is made from it, so whoever was interrupted calls `fedtune provision` again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedtune.config.files import replace_whole
from fedtune.deploy import certificates
from fedtune.deploy.authorities import NOTICE, authority_fingerprint, make_notice
from fedtune.errors import ConfigError

__all__ = ["KNOWN", "STEPS", "Held", "Step", "Told", "advance", "put_notice"]

Step = Literal["announce", "switch", "retire"]
STEPS: tuple[Step, ...] = get_args(Step)
KNOWN = "authorities-known.json"  # in a server folder: which authorities each site said that it trusts
_FILE = "rotation.json"


@dataclass(frozen=True)
class Held:
    """The authorities of a federation.

    Attributes:
        folder: DIR/authority.
        trusted: the numbers of one or two authorities, newest first; 1 is the first that was made.
        serving: the one that has signed the server's certificate.
        notices: how many notices there were.
    """

    folder: Path
    trusted: tuple[int, ...] = (1,)
    serving: int = 1
    notices: int = 0

    @classmethod
    def read(cls, folder: Path) -> Held:
        """What `DIR/authority` says. Raises ConfigError if it cannot be read."""
        path = folder / _FILE
        try:
            values: Any = json.loads(path.read_text())
            trusted = tuple(int(one) for one in values["trusted"])
            held = cls(folder, trusted, int(values["serving"]), int(values["notices"]))
            if not 1 <= len(trusted) <= 2 or held.serving not in trusted:
                raise ValueError("it names no authority that signs")
        except FileNotFoundError as error:
            if later := sorted(one.parent.name for one in folder.glob("*/ca.key")):
                raise ConfigError(
                    f"{path} is missing, and {folder / later[-1]} is a later authority: nobody knows any "
                    "more which ones the sites trust. Restore it from a backup of the folder. If there is "
                    "none, make a new federation folder with the same sites, as docs/administrator.md says "
                    "of a stolen key."
                ) from error
            return cls(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}), and it says which authorities the sites trust. Restore "
                "it from a backup of the folder."
            ) from error
        return held

    def write(self) -> None:
        """Replaces what is said, whole."""
        values = {"trusted": self.trusted, "serving": self.serving, "notices": self.notices}
        replace_whole(self.folder / _FILE, json.dumps(values).encode())

    def place(self, number: int) -> Path:
        """The folder of an authority."""
        return self.folder if number == 1 else self.folder / str(number)

    @property
    def newest(self) -> Path:
        """The folder of the newest, which signs what is handed out."""
        return self.place(self.trusted[0])

    @property
    def signing(self) -> Path:
        """The folder of the one that signs the server's certificate."""
        return self.place(self.serving)

    def certificates(self) -> list[bytes]:
        """In PEM, newest first."""
        return [(self.place(one) / "ca.crt").read_bytes() for one in self.trusted]


def advance(held: Held, step: str, name: str, server: Path, without: Sequence[str]) -> Held:
    """Takes one step of a rotation, and writes it down.

    Args:
        held: the authorities now.
        step: one of `STEPS`.
        name: of the federation.
        server: the server folder.
        without: sites that may be left behind by a switch; they need a new archive.

    Raises:
        ConfigError: it is not this step's turn, or a site does not trust the new authority yet.
    """
    turn: Step = "switch" if held.newest != held.signing else "retire" if held.trusted[1:] else "announce"
    if step != turn:
        raise ConfigError(
            f"--rotate takes {', '.join(STEPS)}, in this order, and it is the turn of {turn!r}; {step!r} was "
            "given. Nothing was changed."
        )
    if step == "announce":
        number = max(held.trusted) + 1
        folder = held.place(number)
        held.write()  # so that from now on the file is missed
        folder.mkdir(mode=0o700, exist_ok=True)
        if not (folder / "ca.key").exists():  # else it was made, and told to nobody: its step was interrupted
            certificates.make_authority(folder, name)
        after = Held(held.folder, (number, *held.trusted), held.serving, held.notices + 1)
    elif step == "switch":
        _check_that_all_know(server, authority_fingerprint(held.newest / "ca.crt"), without)
        after = Held(held.folder, held.trusted, held.trusted[0], held.notices)
    else:
        after = Held(held.folder, held.trusted[:1], held.serving, held.notices + 1)
    for number in after.trusted:
        certificates.check_authority(after.place(number))
    after.write()
    return after


def put_notice(held: Held, name: str, server: Path) -> bool:
    """Writes the notice that the server tells, if it is not there already. Returns whether it was written.

    The one that announces is signed by the former authority, the one that retires it by the new one: each by
    the newest that sites trust until they have it.
    """
    path = server / NOTICE
    if not held.notices:
        return False
    try:
        if json.loads(path.read_text())["number"] == held.notices:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or a part of one
    signer = held.place(held.trusted[-1])
    replace_whole(path, make_notice(name, held.notices, held.certificates(), signer))
    return True


class Told:
    """What a running server tells of its authorities, and which of them each site said that it trusts.

    Args:
        folder: of the server.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()

    def notice(self) -> str | None:
        """The present notice; None before there is one."""
        try:
            return (self._folder / NOTICE).read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def note(self, site: str, trusted: object) -> list[str] | None:
        """Keeps what a site says that it trusts. Returns it if it is new.

        Raises:
            OSError: it cannot be kept.
        """
        if not isinstance(trusted, list) or not 1 <= len(trusted) <= 2:
            return None
        told = [str(one)[:40] for one in trusted]
        with self._lock:
            known = _known(self._folder)
            if known.get(site) == told:
                return None
            replace_whole(self._folder / KNOWN, json.dumps({**known, site: told}).encode(), mode=0o600)
        return told


def _known(server: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((server / KNOWN).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _check_that_all_know(server: Path, new: str, without: Sequence[str]) -> None:
    known = _known(server)
    sites = sorted(path.stem for path in (server / "nodes").glob("*.pub"))
    behind = [site for site in sites if new not in (known.get(site) or ()) and site not in without]
    if behind:
        raise ConfigError(
            f"{', '.join(behind)} have not joined with trust in the new authority ({new}) yet, and could not "
            f"connect after a switch. The running server tells them, and writes {server / KNOWN}: wait until "
            "their nodes have run for two minutes (if the server runs elsewhere, copy that file here). To "
            f"leave sites behind that come back later, with a new archive: --without {','.join(behind)}. "
            "Nothing was changed."
        )
