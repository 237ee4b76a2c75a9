"""Keys of clients: who may ask, by a file that holds no key.

A line of the file is `NAME sha256:HEX`, the hash of a key that `fedtune key` drew and showed once: whoever
reads the file cannot ask with it. Keys have 256 random bits, so that a plain hash suffices: there is nothing
to guess, and no salt or slow hash is needed as for passwords that people choose. A line that is taken out of
the file shuts its client out within a second, without a restart; a file that cannot be read any more shuts
out everybody.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.config.files import save
from fedtune.errors import ConfigError

__all__ = ["Keys", "make_key"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE = re.compile(rf"({_NAME.pattern}) sha256:([0-9a-f]{{64}})")
_PREFIX = "ft_"  # a key is known for one where it turns up in a log or a repository
_LOOK_EVERY = 1.0  # seconds between two looks at the file
_log = logging.getLogger("fedtune.serve")


@dataclass
class Keys:
    """The clients of one file of keys.

    Attributes:
        path: the file.
    """

    path: Path
    _names: dict[str, str] = field(default_factory=dict, repr=False)  # by hash
    _seen: tuple[int, int, int] | None = None
    _looked: float = 0.0

    @classmethod
    def open(cls, path: Path) -> Keys:
        """The keys in the file `path`.

        Raises:
            ConfigError: there is no such file, or a line of it is none.
        """
        keys = cls(path, _read(path))
        keys._seen, keys._looked = _state(path), time.monotonic()
        return keys

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None: nobody's."""
        self._look()
        # The hash of what was sent is looked up, so the time that it takes tells nothing about any key.
        return self._names.get(_hash(key))

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        state = _state(self.path)
        if state == self._seen and state is not None:
            return
        self._seen = state
        try:
            self._names = _read(self.path)
        except ConfigError:
            self._names = {}
            _log.error("the file of keys cannot be read: nobody is let in")


def make_key(path: Path, name: str) -> str:
    """Draws a key for the client `name`, adds its hash to the file `path`, and returns the key.

    Raises:
        ConfigError: the name is none, or is taken; or the file is no file of keys.
        ResourceError: the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name of a client: give up to 64 letters, digits, dots, dashes or underscores, "
            "the first a letter or a digit."
        )
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and name in _read(path).values():
        raise ConfigError(
            f"{path} has a key of {name!r} already, which nobody can show again. Take another name, or "
            "delete that line first: its key is then worth nothing."
        )
    key = _PREFIX + secrets.token_urlsafe(32)
    end = "" if not before or before.endswith("\n") else "\n"
    save(path, f"{before}{end}{name} sha256:{_hash(key)}\n".encode(), mode=0o600)
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> dict[str, str]:
    """Names by hash."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a file of keys ({type(error).__name__}). Make one: "
            f"fedtune key NAME --keys {path}"
        ) from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ConfigError(
                f"Line {number} of {path} is no line of a key: NAME sha256:HEX, as 'fedtune key NAME --keys "
                f"{path}' writes it. Delete it, or put a # before it."
            )
        names[found[2]] = found[1]
    if not names:
        raise ConfigError(f"{path} has no key, so nobody could ask. Make one: fedtune key NAME --keys {path}")
    return names
