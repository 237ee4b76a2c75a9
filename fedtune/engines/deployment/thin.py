"""The thin app: what a SuperLink hands to nodes for a run of fedtune, and how a node knows it.

Flower sends an app's code (a FAB, a zip archive) with each run. fedtune's holds one pyproject.toml that
names modules of the installed fedtune, and is the same, byte for byte, wherever one version of fedtune
makes it. So a node compares hashes; whatever else arrives is never unpacked, and no code of it runs.
"""

from __future__ import annotations

import functools
import hashlib
import io
import tomllib
import zipfile

from fedtune import __version__
from fedtune.errors import FederationError

__all__ = ["check_app", "thin_app"]

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
serverapp = "fedtune.federation.server_app:app"
clientapp = "fedtune.federation.client_app:app"

[tool.flwr.app.config]
fedtune = ""
"""


@functools.cache
def thin_app() -> tuple[bytes, str]:
    """(content, sha256) of this version's thin app."""
    from flwr.cli.build import build_fab_from_files

    content, _ = build_fab_from_files({"pyproject.toml": _PYPROJECT.format(version=__version__).encode()})
    return content, hashlib.sha256(content).hexdigest()


def check_app(content: bytes) -> None:
    """Raises FederationError if `content` is any app but this version's thin one; runs nothing of it."""
    digest = hashlib.sha256(content).hexdigest()
    if digest == thin_app()[1]:
        return
    other = _version_of(content)
    if other is not None and other != __version__:
        raise FederationError(
            f"The server runs fedtune {other}, and this node fedtune {__version__}. They must be the "
            f"same: install "
            f"`fedtune=={other}` here, or {__version__} there."
        )
    raise FederationError(
        f"The server sent an app that is not fedtune's (sha256 {digest[:16]}). This node runs its own "
        f"installed "
        "fedtune and nothing else; no code of that app was unpacked or run."
    )


def _version_of(content: bytes) -> str | None:
    """The version of a thin app of another fedtune; None if it is no such thing. Reads, and runs nothing."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sorted(archive.namelist()) != [".info/CONTENT", "pyproject.toml"]:
                return None
            if archive.getinfo("pyproject.toml").file_size > 10_000:
                return None
            project = tomllib.loads(archive.read("pyproject.toml").decode())["project"]
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError):
        return None
    if not isinstance(project, dict) or project.get("name") != "fedtune-thin":
        return None
    return str(project.get("version"))[:40]
