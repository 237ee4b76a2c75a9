"""The secret with which a node's ledger keys records and persons: 32 bytes from the operating system.

It lies beside the ledger (`ledger.sqlite` has `ledger.key`), readable by its owner only. It is written whole
or not at all, and a file that is short, empty, all zero (what a power cut may leave) or readable by others
is refused, never replaced: under another secret every record would look new, and what was spent would be
forgotten. For the same reason the ledger keeps a value that only this secret gives (`check_of`), and refuses
another one. A backup is of the folder, which has both.
"""

from __future__ import annotations

import hmac
import secrets
import stat
from pathlib import Path

from fedtune.config.files import create_whole
from fedtune.errors import LedgerError

__all__ = ["check_of", "check_secret", "make_secret", "read_secret"]

_BYTES = 32


def check_of(secret: bytes) -> str:
    """What a ledger keeps to know this secret again; says nothing about it."""
    return hmac.digest(secret, b"fedtune ledger|", "sha256").hex()[:32]


def read_secret(path: Path) -> bytes | None:
    """The secret in `path`, None if there is no such file. Raises `LedgerError` if it cannot be used."""
    try:
        mode = path.stat().st_mode
        secret = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(
            f"The ledger's secret {path} cannot be read ({error}). No release is made."
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LedgerError(
            f"The ledger's secret {path} can be read by other users of this machine (mode "
            f"{stat.S_IMODE(mode):o}), who could then test which records this node holds. No release is "
            f"made. Run: chmod 600 {path}"
        )
    if len(secret) != _BYTES or not any(secret):
        what = f"has {len(secret)} bytes" if len(secret) != _BYTES else "holds nothing but zeros"
        raise LedgerError(
            f"The ledger's secret {path} {what} instead of {_BYTES} random ones: it was torn. No release is "
            f"made, for without it no record that was released before is known again. {_way_out(path)}"
        )
    return secret


def make_secret(path: Path) -> bytes:
    """Writes a new secret to `path`, where there must be none. Raises `LedgerError` if it cannot."""
    secret = secrets.token_bytes(_BYTES)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_whole(path, secret)
    except OSError as error:
        raise LedgerError(
            f"The ledger's secret {path} cannot be written ({error}). Nothing was released."
        ) from error
    return secret


def check_secret(path: Path, secret: bytes | None, check: str) -> bytes:
    """`secret` if it is the one that gave `check`. Raises `LedgerError` if it is missing or another."""
    if secret is None:
        raise LedgerError(
            f"The ledger's secret {path} is missing, and without it no record that was released before is "
            f"known again. No release is made. {_way_out(path)}"
        )
    if not hmac.compare_digest(check_of(secret), check):
        raise LedgerError(
            f"The ledger's secret {path} is not the one that its ledger was written with, so no record that "
            f"was released before would be known again. No release is made. {_way_out(path)}"
        )
    return secret


def _way_out(path: Path) -> str:
    ledger = path.with_suffix(".sqlite")
    return (
        "Restore it from a backup of its folder. Without one, what each record has spent cannot be told any "
        "more: do not use this data again. If its owner accepts in writing that the earlier spending, which "
        f"{ledger} lists, counts no more, move all files {ledger.stem}.* of that folder away."
    )
