"""Keys, certificates and TLS: one authority, one server certificate, one key pair a site.

The authority signs the server's certificate, and nodes trust no other authority. Nodes are known by their
public keys (elliptic curve P-384), of which the private half is made at the site and stays there. So nothing
that is sent to a site is secret, and revoking a node is forgetting its key.

Secrets are written whole or not at all, with mode 0600, and refused where they are empty, torn, or readable
by others. `check_server` opens a TLS connection before Flower does, because Flower would not say in words
what is wrong with a server.

Connections go through the HTTP proxy that the environment names (HTTPS_PROXY, NO_PROXY), by CONNECT, as
those of Flower's clients do: a proxy passes on what it cannot read, and the server's certificate is checked
as ever.
"""

from __future__ import annotations

import base64
import datetime
import http.client
import ipaddress
import ssl
import stat
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.config.files import create_whole, replace_whole
from fedtune.errors import ConfigError, FederationError, ResourceError

__all__ = [
    "check_authority",
    "check_server",
    "check_server_certificate",
    "expiry_warning",
    "fingerprint",
    "https_connection",
    "is_issued_by",
    "load_private_key",
    "make_authority",
    "make_node_key",
    "make_server_certificate",
    "parse_address",
    "pem",
    "public_key_of",
    "public_line",
    "read_public_line",
    "read_secret",
    "tls_context",
    "wait_for_server",
    "write_secret",
]

AUTHORITY_DAYS = 3650
_EARLY = datetime.timedelta(minutes=5)  # a site's clock may be a little behind
_LOG_EVERY = 60.0  # seconds between two lines about a server that does not answer
_WARN_DAYS = 30
_FULL = ("TLSV1_ALERT_INTERNAL_ERROR", "SSLV3_ALERT_INTERNAL_ERROR")  # what `door.FULL_ALERT` is read as


def write_secret(path: Path, content: bytes) -> None:
    """Writes `content` to a new file that only its owner may read, whole or not at all; replaces none."""
    try:
        create_whole(path, content, mode=0o600)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists already and is not replaced, for what it opens could then never be opened again. "
            "Move it away first if you mean it."
        ) from error
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.") from error


def read_secret(path: Path, missing: str) -> bytes:
    """The content of a secret file.

    Raises:
        ConfigError: it is missing (with the message `missing`) or empty, or others may read it.
        ResourceError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ConfigError(missing) from error
    except OSError as error:
        raise ResourceError(f"The secret {path} cannot be read: {error.strerror}.") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{path} is secret and may be read by others (mode {stat.S_IMODE(mode):04o}), so it may be "
            f"known to them. Run `chmod 600 {path}`, and make a new one if it may have been copied."
        )
    if not content.strip():
        raise ConfigError(
            f"{path} is empty (a full disk, perhaps), and an empty secret opens nothing and protects "
            "nothing. Restore it from a backup; or remove it, and make it again as it was made."
        )
    return content


def make_authority(folder: Path, name: str) -> None:
    """Writes `ca.key` and `ca.crt` of a new authority into `folder`."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedtune {name} authority"[:64])])
    certificate = (
        _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    # The secret last: where it is, everything is.
    replace_whole(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
    write_secret(folder / "ca.key", _private_bytes(key))


def check_authority(folder: Path) -> None:
    """Raises ConfigError unless `folder` holds an authority's certificate and the key that belongs to it."""
    out = (
        f"Restore both from a backup. Only if no site has joined yet, remove {folder}, and `fedtune "
        "provision` makes another authority, which no site of before trusts."
    )
    key = load_private_key(
        folder / "ca.key",
        f"The key of the authority that the sites trust, {folder / 'ca.key'}, is missing. {out}",
    )
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"The certificate {folder / 'ca.crt'} cannot be read ({error}). {out}") from error
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"{folder / 'ca.crt'} and {folder / 'ca.key'} do not belong together. {out}")


def make_server_certificate(authority: Path, folder: Path, names: Sequence[str], days: int) -> None:
    """Writes `server.key` and `server.crt`, for `names` (hosts and addresses), into `folder`.

    Both are replaced where they exist: renewing a certificate is calling this again.
    """
    ca_key = load_private_key(authority / "ca.key")
    ca = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    certificate = (
        _builder(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )
    replace_whole(folder / "server.key", _private_bytes(key), mode=0o600)
    replace_whole(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def check_server_certificate(folder: Path) -> int:
    """Days for which the server's certificate is still valid. Raises ConfigError if it is not."""
    again = "Make a new one with `fedtune provision FEDERATION.yaml -o DIR --renew`."
    try:
        authorities = x509.load_pem_x509_certificates((folder / "ca.crt").read_bytes())
        mine = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error.filename} is missing: {folder} is no server folder. Make one with `fedtune provision`."
        ) from error
    except ValueError as error:
        raise ConfigError(f"A certificate in {folder} cannot be read ({error}). {again}") from error
    if not any(_issued_by(mine, one) for one in authorities):
        raise ConfigError(
            f"The certificate {folder / 'server.crt'} was not signed by the authority in "
            f"{folder / 'ca.crt'}, so no node would trust it. {again}"
        )
    now = datetime.datetime.now(datetime.UTC)
    if now > mine.not_valid_after_utc:
        raise ConfigError(
            f"The server's certificate {folder / 'server.crt'} expired on "
            f"{mine.not_valid_after_utc:%Y-%m-%d}, and no node accepts it. {again}"
        )
    if now < mine.not_valid_before_utc:
        raise ConfigError(
            f"The server's certificate is valid from {mine.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, and "
            f"this machine's clock says {now:%Y-%m-%d %H:%M}. Set the clock."
        )
    return int((mine.not_valid_after_utc - now).days)


def is_issued_by(certificate: Path, authority: Path) -> bool:
    """Whether an authority (its `ca.crt`) has signed a certificate; False where either cannot be read."""
    try:
        both = [x509.load_pem_x509_certificate(path.read_bytes()) for path in (certificate, authority)]
    except (OSError, ValueError):
        return False
    return _issued_by(*both)


def make_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Makes a site's private key and writes it to `path`, mode 0600. Raises ConfigError if there is one."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(path, _private_bytes(key))
    return key


def load_private_key(path: Path, missing: str | None = None) -> ec.EllipticCurvePrivateKey:
    """The key in `path`. Raises ConfigError if it is missing (`missing` says so), torn, no such key, or
    readable by others."""
    content = read_secret(
        path,
        missing
        or f"There is no private key {path}. A site makes its own with `fedtune node init --config "
        "node.yaml`.",
    )
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no private key in PEM format without a password, or only a part of one. Restore it "
            "from a backup; or move it away, and make a new one as this one was made."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no elliptic curve key. Make one with `fedtune node init`.")
    return key


def public_key_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half in PEM, as Flower's SuperLink keeps it."""
    return pem(key.public_key())


def public_line(public_key: bytes, site: str) -> str:
    """A public key (PEM) as one line of OpenSSH's format, with the site's name as its comment."""
    key = serialization.load_pem_public_key(public_key)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return f"{line.decode()} {site}"


def read_public_line(line: str) -> tuple[bytes, str]:
    """(public key in PEM, site's name) of what `public_line` made. Raises ConfigError for anything else."""
    words = line.split()
    shown = f"{line.strip()[:60]!r}"
    if len(words) != 3:
        raise ConfigError(
            f"{shown} is no enrolment line: it should have three words, 'ecdsa-sha2-nistp384 KEY SITE', as "
            "`fedtune node init` prints them."
        )
    try:
        key = serialization.load_ssh_public_key(" ".join(words[:2]).encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{shown} holds no public key. Copy the whole line that `fedtune node init` prints."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{shown} is no elliptic curve key. Use the line that `fedtune node init` prints.")
    return pem(key), words[2]


def fingerprint(public_key: bytes) -> str:
    """A short name of a public key (PEM) that two people can compare on the telephone."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public_key)
    text = digest.finalize().hex()[:24]
    return " ".join(text[i : i + 4] for i in range(0, len(text), 4))


def parse_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is no address; give HOST:PORT, such as 'fed.example.org:9443'.")
    return host.strip("[]"), int(port)


def tls_context(authority: Path) -> ssl.SSLContext:
    """Trusts servers of this one authority. Raises ConfigError for a file that cannot be read."""
    try:
        return ssl.create_default_context(cafile=str(authority))
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no authority certificate {authority}; it came with the site's archive."
        ) from error
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{authority} holds no certificate; take ca.crt from the site's archive again."
        ) from error


def https_connection(address: str, authority: Path, timeout: float) -> http.client.HTTPSConnection:
    """A connection to the server at `address`, not opened yet, perhaps through a proxy.

    Raises:
        ConfigError: the authority's certificate cannot be read, or the environment names a proxy of another
            kind.
    """
    host, port = parse_address(address)
    context, proxy = tls_context(authority), _proxy_for(host, port)
    if proxy is None:
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    parts = urlsplit(proxy)
    if parts.scheme != "http" or parts.hostname is None:
        raise ConfigError(
            f"HTTPS_PROXY names {_shown_proxy(proxy)}, and fedtune connects through proxies of the form "
            f"http://HOST:PORT. Change it, or add {host} to NO_PROXY."
        )
    headers = {}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user).decode()}"
    connection = http.client.HTTPSConnection(
        parts.hostname, parts.port or 80, timeout=timeout, context=context
    )
    connection.set_tunnel(host, port, headers)
    return connection


def _proxy_for(host: str, port: int) -> str | None:
    """The proxy that the environment names for a server, as httpx reads it; None for a direct connection."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(f"{host}:{port}"):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _shown_proxy(proxy: str) -> str:
    """Without user and password."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def expiry_warning(days: float) -> str | None:
    """A warning about a server's certificate that is valid for `days` more; None if that is long enough."""
    if days >= _WARN_DAYS:
        return None
    return (
        f"the server's certificate expires in {max(0, int(days))} days, and then no site can join; its "
        "operator renews it with `fedtune provision FEDERATION.yaml -o DIR --renew`"
    )


def check_server(address: str, authority: Path, timeout: float = 10.0) -> float:
    """Opens a TLS connection and closes it. Returns the days for which the server's certificate is valid.

    Raises:
        ConfigError: the authority's certificate cannot be read.
        FederationError: the server is not to be trusted, or speaks no TLS; trying again would not help.
        ResourceError: the server does not answer, or its certificate has expired.
    """
    connection = https_connection(address, authority, timeout)
    try:
        connection.connect()
        ends = (connection.sock.getpeercert() or {}).get("notAfter", "")
        return (ssl.cert_time_to_seconds(str(ends)) - time.time()) / 86_400
    except ssl.SSLCertVerificationError as error:
        passes = "expired" in error.verify_message or "not yet valid" in error.verify_message
        kind = ResourceError if passes else FederationError  # a renewal or a clock that is set right mends it
        raise kind(_untrusted(address, authority, error)) from error
    except ssl.SSLError as error:
        if error.reason in _FULL:
            raise ResourceError(
                f"The server {address} is full: it has as many connections as it can hold. It lets others in "
                "when some have ended; its operator can give it more (LimitNOFILE of its unit)."
            ) from error
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            raise ResourceError(
                f"The server {address} closed the connection before it had said who it is: it is ending, or "
                "has more to do than it can."
            ) from error
        raise FederationError(
            f"Whatever answers at {address} does not speak TLS ({error.reason or 'no reason given'}), so "
            "nothing was sent to it. Check host and port; a fedtune server always speaks TLS."
        ) from error
    except OSError as error:
        proxy = _proxy_for(*parse_address(address))
        way = "" if proxy is None else f" through the proxy {_shown_proxy(proxy)} (HTTPS_PROXY)"
        raise ResourceError(
            f"The server {address} does not answer{way} ({error.strerror or error})."
        ) from error
    finally:
        connection.close()


def wait_for_server(address: str, authority: Path, say: Callable[[str], None]) -> float:
    """`check_server`, repeated while the server may come back; logs every minute that it has not."""
    pause, logged_at = 1.0, -_LOG_EVERY
    while True:
        try:
            return check_server(address, authority)
        except ResourceError as error:
            if time.monotonic() - logged_at >= _LOG_EVERY:
                say(f"{error} Trying again.")
                logged_at = time.monotonic()
            time.sleep(pause)
            pause = min(30.0, 2 * pause)


# --- inside ---------------------------------------------------------------------------------------


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _EARLY)
        .not_valid_after(end)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key in PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _untrusted(address: str, authority: Path, error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message
    if "expired" in reason:
        return (
            f"The certificate of the server {address} has expired, so it is not trusted. Its operator makes "
            "a new one with `fedtune provision FEDERATION.yaml -o DIR --renew`; if it is new, check this "
            "machine's clock."
        )
    if "not yet valid" in reason:
        return f"The certificate of the server {address} is not valid yet: check this machine's clock."
    if "mismatch" in reason or "doesn't match" in reason:
        return (
            f"The certificate of the server {address} is for another name ({reason}). Use the address in the "
            "federation file, or add this one to its certificate_names and renew."
        )
    return (
        f"The server {address} is not the one that the authority in {authority} vouches for ({reason}). "
        "Nothing was sent to it. Use the ca.crt of this federation; if it is that one, somebody else answers "
        "at this address."
    )
