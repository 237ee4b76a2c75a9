"""An operator's own side: the key by which a server knows them, in a folder with the server's address.

DIR/server.yaml, ca.crt     as in the server folder, or in the archive that `fedtune provision` makes
DIR/operator.key            made here by `fedtune operator`; it stays here
"""

from __future__ import annotations

import datetime
import threading
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.deploy import certificates, signing
from fedtune.deploy.operators import PURPOSE, audience
from fedtune.deploy.provision import Federation, check_word, read_token

__all__ = ["OPERATOR_KEY", "OperatorKey", "credential_in", "operator_line"]

OPERATOR_KEY = "operator.key"


@dataclass(frozen=True)
class OperatorKey:
    """The private key of an operator, which signs each of their requests, for one server (`audience`)."""

    key: ec.EllipticCurvePrivateKey
    audience: bytes

    def headers(self) -> dict[str, str]:
        """Of one request, now: a server takes no two that were signed at the same time."""
        return signing.sign(self.key, PURPOSE, self.audience, _next_time())


_last = datetime.datetime.min.replace(tzinfo=datetime.UTC)
_lock = threading.Lock()


def _next_time() -> datetime.datetime:
    """Now, and later than what it returned before."""
    global _last
    with _lock:
        _last = max(datetime.datetime.now(datetime.UTC), _last + datetime.timedelta(microseconds=1))
        return _last


def credential_in(folder: Path) -> OperatorKey | str:
    """The operator's key in a folder if there is one, else the operator's token.

    Raises:
        ConfigError: there is neither, or it cannot be used.
    """
    path = folder / OPERATOR_KEY
    if not path.exists():
        return read_token(folder)
    return OperatorKey(certificates.load_private_key(path), audience(folder))


def operator_line(folder: Path, name: str) -> tuple[str, str, bool]:
    """An operator's public key: (line to send, fingerprint, whether the key was made now).

    Args:
        folder: describes a server; the private key is made in it if there is none.
        name: the operator's.

    Raises:
        ConfigError: the folder describes no server, its key cannot be used, or `name` is no name.
    """
    check_word(name)
    Federation.read(folder / "server.yaml")
    path = folder / OPERATOR_KEY
    new = not path.exists()
    key = certificates.make_node_key(path) if new else certificates.load_private_key(path)
    public = certificates.public_key_of(key)
    return certificates.public_line(public, name), certificates.fingerprint(public), new
