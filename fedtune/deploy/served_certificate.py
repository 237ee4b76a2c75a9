"""The certificate that a running server shows: a renewed one is used without a restart."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedtune.deploy import certificates
from fedtune.deploy.certificates import expiry_warning
from fedtune.errors import ConfigError

__all__ = ["ServedCertificate", "check_pair", "keep_certificate"]

_log = logging.getLogger("fedtune.server")
_SYNC_SECONDS = 2.0
_WARN_SECONDS = 86_400.0


def check_pair(folder: Path) -> None:
    """Raises ConfigError if a server folder's certificate and key do not belong together."""
    try:
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trial.load_cert_chain(folder / "server.crt", folder / "server.key", password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{folder / 'server.crt'} and {folder / 'server.key'} do not belong together "
            f"({error.reason or error}). Put both there as they were made, or make new ones with `fedtune "
            "provision FEDERATION.yaml -o DIR --renew`."
        ) from error


class ServedCertificate:
    """The server's certificate as it is on disk, and in the TLS context that serves."""

    def __init__(self, folder: Path, context: ssl.SSLContext | None) -> None:
        self._folder, self._context = folder, context
        self._served = self._on_disk()
        self._unfit: tuple[tuple[bytes, bytes], int] | None = None  # what does not fit, and how often seen

    def _on_disk(self) -> tuple[bytes, bytes]:
        return tuple((self._folder / name).read_bytes() for name in ("server.crt", "server.key"))  # type: ignore[return-value]

    def renew(self) -> bool:
        """Uses a new certificate, if there is one, for whoever connects from now on. True if there was.

        Raises:
            ConfigError: once, for a certificate and a key that do not belong together; the former one stays
                in use.
        """
        if self._context is None or (now := self._on_disk()) == self._served:
            return False
        try:
            # Not in the context that serves: a certificate without its key leaves it with no key at all.
            check_pair(self._folder)
        except ConfigError as error:
            seen = self._unfit[1] + 1 if self._unfit is not None and self._unfit[0] == now else 1
            self._unfit = (now, seen)
            # They are written one after the other: at the first look the second may be on its way.
            if seen == 2:
                raise ConfigError(f"{error} Until then the former certificate stays in use.") from error
            return False
        if self._on_disk() != now:
            return False  # it was written meanwhile; the next call uses it
        self._context.load_cert_chain(self._folder / "server.crt", self._folder / "server.key")
        self._served = now
        return True

    def days(self) -> int:
        """Until it expires."""
        return certificates.check_server_certificate(self._folder)


def keep_certificate(
    certificate: ServedCertificate, ending: threading.Event, say: Callable[[str], None]
) -> None:
    """Uses a renewed certificate, and warns once a day that one is needed, until `ending` is set."""
    warned = time.monotonic()
    while not ending.wait(_SYNC_SECONDS):
        try:
            if certificate.renew():
                say(f"uses the renewed certificate, good for {certificate.days()} days")
            if time.monotonic() - warned > _WARN_SECONDS:
                warned = time.monotonic()
                if warning := expiry_warning(certificate.days()):
                    say(warning)
        except ConfigError as error:
            say(str(error))
        except OSError as error:  # key and certificate are written one after the other
            _log.debug("the certificate is not whole yet: %s", error)
