"""The server's database, which is Flower's (nodes, runs, messages on their way): whether it is whole."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from fedtune.errors import ResourceError

__all__ = ["NAME", "check_database"]

NAME = "superlink.sqlite"


def check_database(folder: Path) -> None:
    """Checks the database in a server folder, before Flower opens it; none is fine, for Flower makes one.

    Raises:
        ResourceError: it is damaged, or cannot be read or written; with the way out.
    """
    path = folder / NAME
    if not os.access(folder, os.W_OK):  # also where its file system is read-only, whoever asks
        raise ResourceError(
            f"The server folder {folder} cannot be written, and {NAME}, the trail and what is on its way are "
            "kept there. Give this user permission, or mount its file system for writing."
        )
    if not path.exists():
        return
    try:
        address = f"{path.absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:  # its folder may not be written, the disk is full
        raise ResourceError(f"The server's database {path} cannot be opened ({error}).") from error
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise ResourceError(
            f"The server's database {path} is damaged ({' '.join(str(found).split())}). It holds nodes, runs "
            "and messages on their way, and nothing that cannot be had again: charges are in the sites' "
            f"ledgers, keys in nodes/ and revoked/, heads in heads.json. Move {NAME}* away and start the "
            "server again: it makes a new one, and the enrolled sites join by themselves. A run that was "
            "going on goes on from its folder: `fedtune submit DIR resume=RUN_DIR`."
        )
