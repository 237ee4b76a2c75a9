"""What is handed out: an archive for each site, one for operators; signed, and nothing in them is secret.

`archive.sig` in a site's archive has the hash of each other file, and the authority's signature over them. So
`fedtune node init` finds a file that was changed on the way, also one that names another server; and it
prints the fingerprint of the authority, which the site compares with the operator's by telephone, since
whoever changes everything can sign with an authority of their own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.config.files import replace_whole
from fedtune.deploy import certificates
from fedtune.deploy.authorities import authority_fingerprint, read_authorities
from fedtune.errors import ConfigError

__all__ = ["SEAL", "check_archive", "holds", "write_archive"]

SEAL = "archive.sig"
_PURPOSE = b"fedtune-archive:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def write_archive(path: Path, folder: str, files: Mapping[str, bytes], authority: Path) -> None:
    """Writes a zip archive with one folder, signed by the authority's key.

    Args:
        path: of the archive.
        folder: its name within.
        files: contents by name; `ca.crt` is among them.
        authority: the folder with `ca.key`.

    Raises:
        OSError: it cannot be written.
        ConfigError: the authority's key cannot be used.
    """
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    key = certificates.load_private_key(authority / "ca.key")
    signature = key.sign(_signed(digests), ec.ECDSA(hashes.SHA256()))
    sealed = json.dumps({"files": digests, "signature": base64.b64encode(signature).decode()}, indent=1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, SEAL: sealed.encode()}.items():
            archive.writestr(f"{folder}/{name}", content)
    replace_whole(path, buffer.getvalue())


def holds(path: Path, certificate: bytes) -> bool:
    """Whether this is an archive, whole, with a signature and this `ca.crt`; another is made again."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        of_authority = [name for name in names if name.endswith("/ca.crt")]
        signed = any(name.endswith(f"/{SEAL}") for name in names)
        return signed and [archive.read(name) for name in of_authority] == [certificate]


def check_archive(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Checks what was unpacked from a site's archive against its signature.

    Returns:
        (fingerprint of the authority, the files that are not as they were signed: a site edits its own).

    Raises:
        ConfigError: there is no signature, or it is not the authority's.
    """
    again = "Ask the federation's operator for the archive again, by another way, and compare by telephone."
    try:
        sealed = json.loads((folder / SEAL).read_text())
        digests = {str(name): str(digest) for name, digest in sealed["files"].items()}
        if not all(map(_NAME.fullmatch, digests)):  # shown beside fingerprints that people compare
            raise ValueError("a name that no archive has")
        signature = base64.b64decode(sealed["signature"], validate=True)
        key = read_authorities(folder / "ca.crt")[0].public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, _signed(digests), ec.ECDSA(hashes.SHA256()))
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is missing: what was unpacked is not all. {again}") from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        ConfigError,
        InvalidSignature,
    ) as error:
        raise ConfigError(
            f"What was unpacked in {folder} is not signed by the authority in its ca.crt: it was changed on "
            f"its way. {again}"
        ) from error
    changed = tuple(name for name, digest in sorted(digests.items()) if _digest(folder / name) != digest)
    if "ca.crt" in changed:
        raise ConfigError(f"{folder / 'ca.crt'} is not the one that was signed. {again}")
    return authority_fingerprint(folder / "ca.crt"), changed


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _signed(digests: Mapping[str, str]) -> bytes:
    return _PURPOSE + json.dumps(dict(sorted(digests.items()))).encode()
