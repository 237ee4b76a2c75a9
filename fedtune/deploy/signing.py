"""Requests that are signed by a key: who sent it, and when, in three headers; the private key never travels.

A signature is over a purpose, the time and a text, so that what was signed for one purpose is nothing for
another. Whoever reads it decides how old it may be.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.deploy.certificates import pem

__all__ = ["AHEAD", "BEHIND", "KEY", "SIGNATURE", "TIME", "sign", "signed_by"]

KEY = "x-fedtune-key"
TIME = "x-fedtune-time"
SIGNATURE = "x-fedtune-signature"
# Flower's server accepts a signature from the future up to 5 s, and from the past up to 305 s.
AHEAD = 5.0
BEHIND = 305.0


def sign(
    key: ec.EllipticCurvePrivateKey, purpose: bytes, text: bytes, now: datetime.datetime
) -> dict[str, str]:
    """The three headers of a request, or of what is kept with a run."""
    stamp = now.isoformat()
    public = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signature = key.sign(_signed(purpose, stamp.encode(), text), ec.ECDSA(hashes.SHA256()))
    return {
        KEY: base64.b64encode(public).decode(),
        TIME: stamp,
        SIGNATURE: base64.b64encode(signature).decode(),
    }


def signed_by(headers: Mapping[str, bytes], purpose: bytes, text: bytes) -> tuple[bytes, datetime.datetime]:
    """(public key (PEM), when it signed) of what `sign` made.

    Raises:
        ValueError: something is missing, malformed, or not signed by that key.
    """
    try:
        key = serialization.load_der_public_key(base64.b64decode(headers[KEY], validate=True))
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("another kind of key")
        signature = base64.b64decode(headers[SIGNATURE], validate=True)
        key.verify(signature, _signed(purpose, headers[TIME], text), ec.ECDSA(hashes.SHA256()))
        when = datetime.datetime.fromisoformat(headers[TIME].decode())
        if when.tzinfo is None:
            raise ValueError("a time without its zone")
    except (KeyError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from error
    return pem(key), when


def _signed(purpose: bytes, stamp: bytes, text: bytes) -> bytes:
    return b"\n".join((purpose, stamp, text))
