"""The cryptography that secure aggregation stands on, each piece with what it guarantees.

Primitives come from the `cryptography` package (OpenSSL): X25519 key agreement, HKDF-SHA256, ChaCha20 as the
stream that masks, ChaCha20-Poly1305 for what nodes send one another through the server. Written here are
only Shamir's secret sharing, in a prime field, and the encoding of what keys are derived from. All secrets
come from the operating system.

Domain separation: every key and every commitment is derived with `label(purpose, ...)`, an encoding that no
two lists of fields share, and callers pass run, round, attempt and both names: nothing that was made for
one place can be used in another.

Not covered: timing (Python's big integers are not constant-time) and memory (keys are not wiped).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = [
    "KEY_BYTES",
    "PRIME",
    "SHARE_BYTES",
    "agree",
    "combine_shares",
    "commit",
    "label",
    "mask_stream",
    "new_key_pair",
    "open_sealed",
    "public_key",
    "same",
    "seal",
    "split_secret",
]

KEY_BYTES = 32
PRIME = 2**256 + 297  # the smallest prime above every 32-byte secret
SHARE_BYTES = 33
_NONCE = bytes(12)  # constant: every sealing key seals one message


def label(purpose: str, *fields: str | int | bytes) -> bytes:
    """An unambiguous encoding of what a key or commitment is for; each field with its type and length."""
    parts = [b"fedtune secure aggregation v1"]
    for field in (purpose, *fields):
        kind, raw = (
            (b"b", field)
            if isinstance(field, bytes)
            else (type(field).__name__[:1].encode(), str(field).encode())
        )
        parts.append(kind + len(raw).to_bytes(4, "big") + raw)
    return b"".join(parts)


def new_key_pair() -> tuple[bytes, bytes]:
    """A fresh X25519 key pair, (private, public), 32 bytes each."""
    private = X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


def public_key(private: bytes) -> bytes:
    """The public half of an X25519 private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, info: bytes) -> bytes:
    """The 32-byte key that both ends of a pair derive (X25519, then HKDF-SHA256 with `info`).

    Raises:
        ValueError: `public` is not 32 bytes or is of small order, which would make the key known to all.
    """
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(shared)


def mask_stream(key: bytes, size: int) -> npt.NDArray[np.uint32]:
    """`size` numbers of ChaCha20's key stream, uint32 [size]: to whoever lacks the key, uniform modulo 2^32.

    One key, one stream: the counter and nonce start at zero, so a key is used for one mask and no more.
    """
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * size)), dtype="<u4")


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Encrypts and authenticates `plaintext` together with `associated`. Use a key once: the nonce is
    constant.
    """
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, associated)


def open_sealed(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """What `seal` encrypted.

    Raises:
        ValueError: a bit of it, or of `associated`, was changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, associated)
    except InvalidTag:
        raise ValueError("the message was not sealed with this key for this place") from None


def commit(value: bytes, *place: str | int | bytes) -> bytes:
    """A hash that fixes `value`. Hides it too where it has 256 bits of entropy, as keys, seeds and shares
    have.
    """
    return hashlib.sha256(label("commitment", *place, value)).digest()


def same(first: bytes, second: bytes) -> bool:
    """Whether two byte strings are equal, in constant time."""
    return hmac.compare_digest(first, second)


def split_secret(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Shamir's shares of a 32-byte secret, one a point, 33 bytes each.

    Guarantee: any `threshold` of them give the secret, and fewer are uniform and independent of it.

    Raises:
        ValueError: the secret is not 32 bytes, points are not distinct and in 1 ... 2^32, or the threshold is
            not in 1 ... len(points).
    """
    if len(secret) != KEY_BYTES:
        raise ValueError(f"a secret has {KEY_BYTES} bytes, not {len(secret)}")
    if len(set(points)) != len(points) or not all(0 < point <= 2**32 for point in points):
        raise ValueError("points must be distinct and in 1 ... 2^32")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"a threshold of {threshold} does not fit {len(points)} shares")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    shares = []
    for point in points:
        value = 0
        for coefficient in coefficients:  # Horner, highest power first; the secret is the constant term
            value = (value + coefficient) * point % PRIME
        shares.append(((value + int.from_bytes(secret, "big")) % PRIME).to_bytes(SHARE_BYTES, "big"))
    return shares


def combine_shares(shares: dict[int, bytes]) -> bytes:
    """The secret that at least `threshold` shares, by point, determine (Lagrange's interpolation at 0).

    Shares of different secrets, or too few, give another secret: check the result against a commitment.

    Raises:
        ValueError: a share is malformed, or the result is no 32-byte secret.
    """
    values = {}
    for point, share in shares.items():
        value = int.from_bytes(share, "big")
        if len(share) != SHARE_BYTES or value >= PRIME:
            raise ValueError("a share is not a number of the field")
        values[point] = value
    total = 0
    for point, value in values.items():
        above, below = 1, 1
        for other in values:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        total = (total + value * above * pow(below, -1, PRIME)) % PRIME
    if total >= 2**256:
        raise ValueError("the shares do not belong together")
    return total.to_bytes(KEY_BYTES, "big")
