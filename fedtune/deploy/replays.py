"""A request that an operator signed counts once: who recorded it cannot send it again.

A signature is good for `signing.BEHIND` seconds, since clocks differ. The server remembers what came in that
time, by key and time of signing, in bounded memory: of more than `MOST` requests the oldest are forgotten,
and with them whatever was signed before them counts no more. What came before the server began it does not
remember, so a request that was signed before that is not taken either, and whoever's clock is behind asks
again until it has passed (HTTP status 503). Clocks may be a few seconds ahead, too: then the server notes, in
a file, until when requests that it took may have been signed.
"""

from __future__ import annotations

import datetime
import threading
from collections import OrderedDict
from pathlib import Path

from fedtune.config.files import replace_whole
from fedtune.deploy import signing
from fedtune.errors import ResourceError

__all__ = ["MOST", "Replays"]

MOST = 100_000  # requests that are remembered: some 300 a second


class Replays:
    """Which signed requests a server took lately.

    Args:
        folder: of the server's operators.
        most: how many are remembered.
    """

    def __init__(self, folder: Path, most: int = MOST) -> None:
        self._path, self._most, self._lock = folder / "signed-until", most, threading.Lock()
        self._seen: OrderedDict[tuple[bytes, datetime.datetime], datetime.datetime] = OrderedDict()
        self._until = self._kept()
        self._floor = max(_now(), self._until)

    def is_first(self, key: bytes, when: datetime.datetime) -> bool:
        """Whether this request, signed by `key` at `when` and young enough, came for the first time.

        Raises:
            ResourceError: that is not known, for it was signed before what is remembered.
        """
        now = _now()
        with self._lock:
            if (self._floor - now).total_seconds() > signing.AHEAD:
                self._floor = now  # this machine's clock was set back: it begins anew
            if when <= self._floor:
                seconds = (self._floor - when).total_seconds()
                raise ResourceError(
                    f"This was signed {seconds:.0f} s before what the server remembers, by the clock of "
                    "whoever signed it, and might have come before. Ask again when that has passed, or set "
                    "that clock."
                )
            while self._seen and (now - next(iter(self._seen.values()))).total_seconds() > _WINDOW:
                self._seen.popitem(last=False)
            if (key, when) in self._seen:
                return False
            if when > now and when > self._until:
                self._keep(now + datetime.timedelta(seconds=signing.AHEAD))
            if len(self._seen) >= self._most:
                (_, oldest), _ = self._seen.popitem(last=False)
                self._floor = max(self._floor, oldest)
            self._seen[key, when] = now
        return True

    def _keep(self, until: datetime.datetime) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            replace_whole(self._path, until.isoformat().encode())
        except OSError as error:
            raise ResourceError(
                f"The server cannot note that it took a request of a clock that is ahead ({error.strerror})."
            ) from error
        self._until = until

    def _kept(self) -> datetime.datetime:
        try:
            return datetime.datetime.fromisoformat(self._path.read_text()).astimezone(datetime.UTC)
        except FileNotFoundError:
            return datetime.datetime.min.replace(tzinfo=datetime.UTC)
        except (OSError, ValueError):
            return _now() + datetime.timedelta(seconds=signing.AHEAD)  # the most that it can have said


_WINDOW = signing.BEHIND + signing.AHEAD


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
