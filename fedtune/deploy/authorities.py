"""Which authorities a site trusts to vouch for the server, and how it learns of a new one.

A federation has one authority, and two for the time in which a new one takes the place of the former
(`fedtune.deploy.rotation`). The server tells each node that joins a **notice**: which authorities there are,
newest first, and the how-manieth notice this is; signed by an authority. A node takes up a notice only if

- the newest authority that it trusts has signed it, so that a former one, whose key may have got out since,
  names no other any more;
- its number is higher than that of any it took up, so that an old one that is told again is nothing;
- it is of this federation, and names one or two certificates of authorities that are valid now, the signer's
  among them.

What was learned stands in `state/authorities.pem` (a node may not write beside its `node.yaml`), written
whole or not at all. It counts for as long as `ca.crt` is the one from which it was learned: an administrator
who puts the `ca.crt` of a new archive in its place decides anew.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.config.files import replace_whole
from fedtune.deploy import certificates
from fedtune.errors import ConfigError, FederationError, ResourceError
from fedtune.federation.client.policy import SiteSettings

__all__ = [
    "NOTICE",
    "authority_fingerprint",
    "authority_fingerprints",
    "learn",
    "make_notice",
    "read_authorities",
    "trusted",
]

NOTICE = "authorities.json"  # in a server folder: what it tells
_LEARNED = "authorities.pem"
_PURPOSE = b"fedtune-authorities:"
_MOST = 2
_HEAD = re.compile(rb"notice (\d{1,9}) of the authority in the ca\.crt with SHA-256 ([0-9a-f]{64})")


def read_authorities(path: Path) -> list[x509.Certificate]:
    """The certificates in a file such as `ca.crt`, newest authority first.

    Raises:
        ConfigError: there is none, or one is no authority's as fedtune makes them.
    """
    try:
        return _authorities(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no certificate of an authority ({error}).") from error


def authority_fingerprint(path: Path) -> str:
    """A short name of the newest authority in a file such as `ca.crt`, to be compared on the telephone.

    Raises:
        ConfigError: it holds no certificate.
    """
    return authority_fingerprints(path)[0]


def authority_fingerprints(path: Path) -> list[str]:
    """A short name of each authority in a file, newest first. Raises as `authority_fingerprint` does."""
    return [certificates.fingerprint(certificates.pem(_key(one))) for one in read_authorities(path)]


def make_notice(federation: str, number: int, authorities: Sequence[bytes], signer: Path) -> bytes:
    """What a server tells of the authorities.

    Args:
        federation: its name.
        number: higher than that of each notice before.
        authorities: their certificates (PEM), newest first.
        signer: the folder with the key of the newest that each site trusts before this notice.

    Raises:
        ConfigError: the key cannot be used.
    """
    values = {
        "federation": federation,
        "number": number,
        "authorities": [one.decode() for one in authorities],
    }
    key = certificates.load_private_key(signer / "ca.key")
    signature = key.sign(_signed(values), ec.ECDSA(hashes.SHA256()))
    return json.dumps({**values, "signature": base64.b64encode(signature).decode()}).encode()


def trusted(site: SiteSettings) -> Path:
    """The file with the authorities that a site trusts: its `ca.crt`, or what it learned since.

    Raises:
        ConfigError: what it learned cannot be read; its `ca.crt` may name an authority that was retired.
    """
    learned = _learned_file(site)
    return learned if _number(learned, Path(site.ca)) is not None else Path(site.ca)


def learn(site: SiteSettings, notice: str) -> str | None:
    """Takes up a notice of the server's, durably; nothing where it tells what is known already.

    Args:
        site: the site's settings.
        notice: as the server told it.

    Returns:
        What is trusted now, in words; None if nothing is new.

    Raises:
        FederationError: it is not to be trusted; nothing was changed.
        ConfigError: the site's `ca.crt`, or what it learned before, cannot be read.
        ResourceError: it cannot be written down; nothing was changed.
    """
    before = read_authorities(trusted(site))
    number = _number(_learned_file(site), Path(site.ca)) or 0
    try:
        values = json.loads(notice)
        pems = [str(one).encode() for one in values["authorities"]]
        told = _authorities(b"".join(pems))
        new = values["number"]
        if type(new) is not int or not 0 < new < 10**9:
            raise ValueError("it has no number")
        if told == before:
            return None
        newest = before[0]
        if values["federation"] != site.federation or not 1 <= len(told) == len(pems) <= _MOST:
            raise ValueError("it is another federation's, or names too many")
        if new <= number or newest not in told:
            raise ValueError(f"its number is {new}, and {number} is known; or it leaves out who signs it")
        now = datetime.datetime.now(datetime.UTC)
        if not all(one.not_valid_before_utc <= now <= one.not_valid_after_utc for one in told):
            raise ValueError("a certificate in it has expired, or this machine's clock is off")
        signature = base64.b64decode(values["signature"], validate=True)
        _key(newest).verify(signature, _signed(values), ec.ECDSA(hashes.SHA256()))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        InvalidSignature,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
    ) as error:
        raise FederationError(
            f"The server {site.server} tells of authorities in a way that site '{site.site}' does not trust "
            f"({error or 'its signature is wrong'}). Nothing was changed. If the operator has another "
            "authority, ask them for a new archive, by another way, and put its ca.crt beside node.yaml."
        ) from error
    digest = hashlib.sha256(Path(site.ca).read_bytes()).hexdigest()
    head = f"notice {new} of the authority in the ca.crt with SHA-256 {digest}\n".encode()
    whole = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in told)
    try:
        learned = _learned_file(site)
        learned.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_whole(learned, head + whole, mode=0o600)
    except OSError as error:
        raise ResourceError(
            f"What the server tells of its authorities cannot be kept: {learned}: {error.strerror}. Without "
            "it this site cannot join any more when the server has changed to the new one."
        ) from error
    return " and ".join(authority_fingerprints(learned))


# --- inside ---------------------------------------------------------------------------------------------


def _learned_file(site: SiteSettings) -> Path:
    return Path(site.audit_log).with_name(_LEARNED)


def _number(learned: Path, ca: Path) -> int | None:
    """Of the last notice that was taken up; None if none was since `ca` is as it is. Raises ConfigError."""
    try:
        head, _, content = learned.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(learned, error.strerror or error) from error
    try:
        digest = hashlib.sha256(ca.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{ca} holds no certificate of an authority ({error}).") from error
    if (found := _HEAD.fullmatch(head)) is None:
        raise _unreadable(learned, "its first line is not fedtune's")
    if found[2].decode() != digest:
        return None
    try:
        _authorities(content)
    except ValueError as error:
        raise _unreadable(learned, error) from error
    return int(found[1])


def _unreadable(learned: Path, why: object) -> ConfigError:
    return ConfigError(
        f"{learned} cannot be read ({why}), and it says which authorities this site trusts now; its ca.crt "
        "may name one that was retired since. Restore the file from a backup of state/, or mend its mode. If "
        "there is no backup, ask the operator for a new archive, by another way, put its ca.crt and "
        "archive.sig beside node.yaml, and move this file away."
    )


def _authorities(content: bytes) -> list[x509.Certificate]:
    """Raises ValueError where one is not an authority's as fedtune makes them."""
    found = x509.load_pem_x509_certificates(content)
    for one in found:
        _key(one)
        try:
            signs = one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            signs = False
        if not signs:
            raise ValueError("a certificate that is no authority's")
    return found


def _key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("another kind of key than fedtune makes")
    return key


def _signed(values: Any) -> bytes:
    told = {name: values[name] for name in ("federation", "number", "authorities")}
    return _PURPOSE + json.dumps(told, sort_keys=True).encode()
