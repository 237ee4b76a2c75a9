"""The server's audit trail: who did what, when, and with what result.

`trail.jsonl` in the server folder: one JSON object a line, each with the hash of the line before it (as a
node's audit log, `fedtune.federation.client.audit_log`), so that a line which was changed, moved or taken
out shows. It has enrolments and revocations, runs that were started, stopped and ended, joins and leaves of
sites, restores that were accepted, and what was refused (401, 403, 429). Refusals of one kind from one
address are counted, and written once a minute, and so are all that come from more addresses than a minute
has lines for: a flood of them must not fill the disk. For the same reason an enrolled site has some lines an
hour for what it does itself, as joins and leaves, and what is more is counted. It holds no text, no label and
no number of a site's data.

A trail that was cut at its end looks whole. Against that its head is kept elsewhere: by whoever files what
`fedtune server DIR --trail` prints (`--against HEAD`), by each operator, whose `fedtune status` remembers the
highest that the server told and says when it goes back (`seen_head`), and by Prometheus
(`fedtune_server_trail_lines`).
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.config.files import replace_whole
from fedtune.errors import ConfigError, ResourceError
from fedtune.federation.client.audit_log import AuditLog

__all__ = ["Trail", "seen_head"]

_SECONDS = 60.0  # between two lines of one kind of refusal
_KINDS = 1000  # of refusals that are counted apart, at most
_LINES = 60  # about refusals in a minute
_SITE_SECONDS, _SITE_LINES = 3600.0, 60  # lines in an hour about what one site does itself
_SHORT = 24  # hex digits of a head's hash
_HEAD = re.compile(rf"([0-9]{{1,18}})-([0-9a-f]{{{_SHORT}}})")
_SEEN = "trail-head"  # in an operator's folder
_SHOWN = ("run", "site", "address", "path", "times", "fingerprint", "rights", "reason")


class Trail:
    """The trail of one server folder.

    Args:
        folder: of the server.
        say: told once if it cannot be written; the server goes on.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self._log, self._say = AuditLog(folder / "trail.jsonl"), say
        self._lock, self._failed = threading.Lock(), False
        self._refusals: dict[tuple[str, ...], list[float]] = {}  # [when it was last written, times since]
        self._minute, self._lines, self._untold = -math.inf, 0, 0  # since when, lines since, refusals since
        self._sites: dict[str, tuple[float, int]] = {}  # since when, and how often, a site did something

    def note(self, event: str, who: str, result: str = "done", **values: Any) -> None:
        """Adds a line, durably."""
        try:
            self._log.append(event, who=_short(who), result=result, **values)
            self._failed = False
        except ResourceError as error:
            if not self._failed:
                self._say(f"the audit trail {self._log.path} cannot be written: {error.__cause__ or error}")
            self._failed = True

    def by_site(self, event: str, site: str, **values: Any) -> None:
        """Notes what a site did by itself, and did not have to ask for: it may do so again and again."""
        now = time.monotonic()
        with self._lock:
            since, times = self._sites.get(site, (now, 0))
            untold = 0
            if now - since >= _SITE_SECONDS:
                untold, since, times = max(0, times - _SITE_LINES), now, 0
            self._sites[site] = (since, times + 1)
        if untold:
            self.note(
                "site changes",
                site,
                "many",
                site=site,
                times=untold,
                reason="more than an hour has lines for",
            )
        if times < _SITE_LINES:
            self.note(event, site, site=site, **values)

    def refused(self, who: str, address: str, path: str, status: int, reason: str) -> None:
        """Notes what was refused: the first time at once, then how often in each minute."""
        kind, now = (address, str(status), who), time.monotonic()
        with self._lock:
            if kind not in self._refusals and len(self._refusals) >= _KINDS:
                self._refusals.clear()
            last, times = self._refusals.get(kind, (now - _SECONDS, 0))
            untold = 0
            if now - self._minute >= _SECONDS:
                untold, self._minute, self._lines, self._untold = self._untold, now, 0, 0
            due = now - last >= _SECONDS
            if due and self._lines >= _LINES:
                self._untold += 1
                return
            self._lines += due
            self._refusals[kind] = [now, 0] if due else [last, times + 1]
        if untold:
            self.note("refused", "?", "many", reason="from more addresses than are told apart", times=untold)
        if due:
            self.note(
                "refused", who, str(status), address=address, path=_short(path), reason=reason,
                times=int(times) + 1,
            )  # fmt: skip

    def head(self) -> str:
        """Number and hash of the last line. Raises LedgerError if the trail cannot be read."""
        head = self._log.head()
        return f"{head.number}-{head.hash[:_SHORT]}"

    def against(self, head: str) -> str | None:
        """What the trail lacks of a head that was kept elsewhere; None if it goes on from it.

        Raises:
            ConfigError: it is no head.
            LedgerError: the trail cannot be read.
        """
        number, short = _parts(head)
        hashes = self._log.hashes()
        if number and (number > len(hashes) or hashes[number - 1][:_SHORT] != short):
            how = f"has {len(hashes)} lines" if number > len(hashes) else "has another line there"
            return f"it {how}, and the head that was kept names line {number}: it was cut or written anew"
        return None

    def text(self, last: int | None = None) -> tuple[str, bool]:
        """(the trail for a person, whether it is whole).

        Args:
            last: only so many lines; None: all.

        Raises:
            LedgerError: it cannot be read.
        """
        entries, problems = self._log.entries(), self._log.verify()
        shown = entries if last is None else entries[-last:]
        lines = [_line(entry) for entry in shown]
        if problems:
            lines += [f"the trail was changed or damaged: {problem}" for problem in problems[:5]]
        else:
            lines.append(f"{len(entries)} lines, and the chain is whole; head {self.head()}")
        return "\n".join(lines), not problems


def seen_head(folder: Path, head: str) -> str | None:
    """Keeps the highest head that a server told, in an operator's folder.

    Args:
        folder: the operator's.
        head: as the server told it now.

    Returns:
        What is wrong with it, if the trail went back; the head that is kept stays then.
    """
    path = folder / _SEEN
    try:
        kept = path.read_text().strip()
        was, now = _parts(kept), _parts(head)
        if now[0] < was[0] or (now[0] == was[0] and now[1] != was[1]):
            return (
                f"the server's trail went back: its head was {kept}, and now is {head}. It was cut or "
                "written anew, or the server was restored from a backup; ask its administrator. If that is "
                f"explained, remove {path}"
            )
    except FileNotFoundError:
        pass
    except (OSError, ConfigError) as error:
        return f"{path} cannot be read ({error}), so nobody knows whether the server's trail went back"
    try:
        replace_whole(path, f"{head}\n".encode())
    except OSError as error:
        return f"{path} cannot be written ({error.strerror}), so the head of the server's trail is not kept"
    return None


def _parts(head: str) -> tuple[int, str]:
    if (found := _HEAD.fullmatch(head.strip())) is None:
        raise ConfigError(
            f"{head[:80]!r} is no head of a trail; `fedtune server DIR --trail` prints one, as '17-7f3a...'."
        )
    return int(found[1]), found[2]


def _line(entry: dict[str, Any]) -> str:
    parts = [f"{name} {entry[name]}" for name in _SHOWN if entry.get(name) not in (None, "", 1)]
    words = [str(entry.get(name, "")) for name in ("time", "event", "who", "result")]
    text = f"{words[0][:19]}  {words[1]:<14} {words[2]:<20} {words[3]:<8} {'; '.join(parts)}".rstrip()
    return "".join(character if character.isprintable() else "?" for character in text)


def _short(text: str) -> str:
    return text[:100]
