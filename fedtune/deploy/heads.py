"""The heads of the sites' books, as a server keeps them: heads.json, and heads.log for accepted restores.

Heads anchor each site's books outside of the site, against backups and copies. A site's ledger and audit
log name one another's heads (`federation.client.audit_log`), which shows nothing if both were restored
together from an older backup. So a node reports the head of its books when it joins and within a minute of
each change, in a request signed by its key. The server keeps the highest, and does not let in a node whose
head went back, or is another at the same place. A node first asks which head the server keeps; one whose
books do not go on from there (they went back and have grown since) says so, and is not let in either. A
restore that is meant is acknowledged by the operator (`fedtune server DIR --accept-restore SITE`): what the
site released since its backup is then counted by nobody but whoever reads `heads.log`.
"""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.config.files import lock_file, replace_whole
from fedtune.deploy.operators import ADMINISTRATOR
from fedtune.deploy.trail import Trail
from fedtune.errors import ConfigError
from fedtune.federation.client.audit_log import parts_of

__all__ = ["BookHeads"]


class BookHeads:
    """The highest head of each site, in a file of the server folder that survives it."""

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / "heads.json", threading.RLock()
        self._known: dict[str, dict[str, Any]] = {}
        self.reload()

    def reload(self) -> None:
        """Reads the file again: another process may have accepted a restore."""
        with self._lock:
            self._known = self._read()

    def kept(self, site: str) -> str | None:
        """The highest head that a site reported; None if it reported none yet."""
        head = self._known.get(site, {}).get("head")
        return head if isinstance(head, str) else None

    def refusal(self, site: str) -> str | None:
        """Why a site whose books went back is not let in; None for the others."""
        back = self._known.get(site, {}).get("back")
        if not isinstance(back, str):
            return None
        return (
            f"the books of site '{site}' went back: the server keeps head {self.kept(site)}, and the node "
            f"has {back}. Restore the newest copy of the site's whole folder state/. If there is none, and "
            "the site's owner and its privacy officer accept that what was released since is counted by "
            f"nobody, the operator acknowledges it with `fedtune server DIR --accept-restore {site}`"
        )

    def note(self, site: str, head: str, lost: bool = False) -> None:
        """Stores the head that a site reported, or that its books went back. Ignores what is no head.

        Args:
            site: the site's name.
            head: what it reported.
            lost: the site says itself that its books do not go on from the head that is kept, which a number
                that has grown since does not show.
        """
        try:
            new = parts_of(head)
        except ConfigError:
            return
        with self._changing() as known:
            kept = known.get(site, {}).get("head")
            back = kept is not None and (lost or _went_back(parts_of(kept), new))
            known[site] = {"head": kept, "back": head} if back else {"head": head, "back": None}

    def accept(self, site: str) -> tuple[str, str]:
        """Accepts that a site's books went back, and notes it in `heads.log`.

        Returns:
            (the head that was kept, the head that it goes on from).

        Raises:
            ConfigError: the site's books did not go back.
        """
        with self._changing() as known:
            entry = known.get(site, {})
            if not isinstance(entry.get("back"), str):
                raise ConfigError(
                    f"The books of site {site!r} did not go back, so there is nothing to accept."
                )
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            line = json.dumps({"time": now, "site": site, "kept": entry["head"], "accepted": entry["back"]})
            with self._path.with_suffix(".log").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            kept = f"kept {entry['head']}"
            Trail(self._path.parent).note("restore accepted", ADMINISTRATOR.name, site=site, reason=kept)
            known[site] = {"head": entry["back"], "back": None}
            return entry["head"], entry["back"]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The heads by site, written when the block ends; no other process changes them meanwhile."""
        with self._lock, lock_file(self._path.with_suffix(".lock")):
            known = self._read()
            before = json.dumps(known)
            yield known
            if json.dumps(known) != before:
                replace_whole(self._path, json.dumps(known).encode(), mode=0o600)
            self._known = known

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(known, dict) or not all(isinstance(one, dict) for one in known.values()):
                raise ValueError("it is no list of sites")
            for entry in known.values():
                parts_of(str(entry["head"]))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, ConfigError) as error:
            raise ConfigError(
                f"{self._path} cannot be read ({error}), and it says from where each site's books go on. "
                "Restore it from a backup; if there is none, move it away, and the sites tell their heads "
                "anew."
            ) from error
        return known


def _went_back(kept: tuple[int, str, int, str], new: tuple[int, str, int, str]) -> bool:
    """Whether one of two books ends earlier than it did, or has another entry at the same place."""
    pairs = ((kept[:2], new[:2]), (kept[2:], new[2:]))
    return any(now[0] < was[0] or (now[0] == was[0] and now[1] != was[1]) for was, now in pairs)
