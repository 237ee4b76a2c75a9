"""The thin app: what a SuperLink hands to nodes for a run of fedtune, and how a node knows it.

Flower sends an app's code (a FAB, a zip archive) with each run. fedtune's holds one pyproject.toml that
names modules of the installed fedtune, and is the same, byte for byte, wherever a fedtune of one protocol
makes it. So a node compares hashes; whatever else arrives is never unpacked, and no code of it runs. It is
compared when it arrives (`AppAllowList`), for Flower's SuperNode would read its pyproject.toml next.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tomllib
import zipfile
from typing import Any

from fedtune.config.build import build
from fedtune.errors import FederationError
from fedtune.federation.protocol import PROTOCOL

__all__ = ["AppAllowList", "check_app", "thin_app"]

_LARGEST = 10_000  # bytes of a thin app of any version; deflate makes at most 1,032 times as much of them

_VERSION = f"{PROTOCOL}.0.0"  # of the thin app: apart from the program's
_PYPROJECT = """\
[project]
name = "fedtune-thin"
version = "{version}"
description = "Names the apps of the installed fedtune."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "fedtune.federation.server.app:app"
clientapp = "fedtune.federation.client.app:app"

[tool.flwr.app.config]
fedtune = ""
submitter = ""
"""


@functools.cache
def thin_app() -> tuple[bytes, str]:
    """(content, sha256) of this protocol's thin app."""
    from fedtune.deploy import flower

    content, _ = flower.build_fab_from_files({"pyproject.toml": _PYPROJECT.format(version=_VERSION).encode()})
    return content, hashlib.sha256(content).hexdigest()


def check_app(content: bytes) -> None:
    """Raises FederationError if `content` is any app but this protocol's thin one; runs nothing of it."""
    digest = hashlib.sha256(content).hexdigest()
    if digest == thin_app()[1]:
        return
    other = _version_of(content)
    if other is not None and other != _VERSION:
        raise FederationError(
            f"The run was submitted by a fedtune that speaks protocol {other.partition('.')[0]}, and this "
            f"node runs fedtune {build()}, which speaks protocol {PROTOCOL}. They must speak the same: "
            "upgrade whichever has the lower number (`fedtune --version` says it)."
        )
    raise FederationError(
        f"The server sent an app that is not fedtune's (sha256 {digest[:16]}, {len(content)} bytes). This "
        "node runs its own installed fedtune and nothing else; no code of that app was unpacked or run."
    )


class AppAllowList:
    """Which runs came with the thin app. Asked when an app arrives, and again for each message of its run."""

    def __init__(self) -> None:
        self._verdicts: dict[int, str] = {}  # by run: '' if it came with the thin app, else why not

    def admit(self, fab: Any, run: Any) -> Any:
        """The app that Flower may read for `run` (a Run of Flower's, changed if its app is refused).

        That is always this node's own thin app: an app that is any other is dropped here, unread, and
        `check` refuses the messages of its run.
        """
        from fedtune.deploy import flower

        content, digest = thin_app()
        try:
            check_app(fab.content)
            self._verdicts[run.run_id] = ""
        except FederationError as error:
            self._verdicts[run.run_id] = str(error)
            run.override_config = {}
        run.fab_hash = digest
        return flower.Fab(digest, content, {})

    def check(self, run_id: int) -> None:
        """Raises FederationError unless the run came with the thin app."""
        if reason := self._verdicts.get(run_id, "The run came without an app."):
            raise FederationError(reason)


def _version_of(content: bytes) -> str | None:
    """The version of a thin app of another fedtune; None if it is no such thing. Reads, and runs nothing."""
    if len(content) > _LARGEST:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sorted(archive.namelist()) != [".info/CONTENT", "pyproject.toml"]:
                return None
            with archive.open("pyproject.toml") as file:
                text = file.read(_LARGEST + 1)
        project = tomllib.loads(text.decode())["project"] if len(text) <= _LARGEST else {}
        name, version = project["name"], project["version"]
    except Exception:
        # Hostile bytes make parsers raise whatever they can raise; none of it makes this a thin app.
        return None
    known = name == "fedtune-thin" and isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,40}", version)
    return version if known else None
