"""Is the server there, and is it the right one? Asked before Flower is, which would not say it in words."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from fedtune.deploy.provision import parse_address
from fedtune.errors import ConfigError, FederationError, ResourceError

__all__ = ["check_server", "expiry_warning", "tls_context", "wait_for_server"]

_SAY_EVERY = 60.0  # seconds between two lines about a server that does not answer
_WARN_DAYS = 30


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


def expiry_warning(days: float) -> str | None:
    """What to say of a server's certificate that is good for `days` more; None if that is long."""
    if days >= _WARN_DAYS:
        return None
    return (
        f"the server's certificate expires in {max(0, int(days))} days, and then no site can join; its "
        "operator renews it with `fedtune provision FEDERATION.yaml -o DIR --renew`"
    )


def check_server(address: str, authority: Path, timeout: float = 10.0) -> float:
    """Opens a TLS connection and closes it; days for which the server's certificate is still good.

    Raises ConfigError for an authority that cannot be read, FederationError for a server that is not to be
    trusted or speaks no TLS (asking again would not help), ResourceError for one that does not answer.
    """
    host, port = parse_address(address)
    context = tls_context(authority)
    try:
        with (
            socket.create_connection((host, port), timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            ends = (connection.getpeercert() or {}).get("notAfter", "")
            return (ssl.cert_time_to_seconds(str(ends)) - time.time()) / 86_400
    except ssl.SSLCertVerificationError as error:
        raise FederationError(_untrusted(address, authority, error)) from error
    except ssl.SSLError as error:
        raise FederationError(
            f"Whatever answers at {address} does not speak TLS ({error.reason or 'no reason given'}), "
            f"so nothing was "
            "sent to it. Check host and port; a fedtune server always speaks TLS."
        ) from error
    except OSError as error:
        raise ResourceError(f"The server {address} does not answer ({error.strerror or error}).") from error


def wait_for_server(address: str, authority: Path, say: Callable[[str], None]) -> float:
    """`check_server`, once the server is there: tries again for ever, and says so once a minute."""
    pause, said = 1.0, -_SAY_EVERY
    while True:
        try:
            return check_server(address, authority)
        except ResourceError as error:
            if time.monotonic() - said >= _SAY_EVERY:
                say(f"{error} Trying again until it does.")
                said = time.monotonic()
            time.sleep(pause)
            pause = min(30.0, 2 * pause)


def _untrusted(address: str, authority: Path, error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message
    if "expired" in reason:
        return (
            f"The certificate of the server {address} has expired, so it is not trusted. Its operator "
            f"makes a new one "
            "with `fedtune provision FEDERATION.yaml -o DIR --renew`; if it is new, check this "
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
        f"Nothing was "
        "sent to it. Use the ca.crt of this federation; if it is that one, somebody else answers at "
        "this address."
    )
