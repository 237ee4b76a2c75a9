"""`fedtune server`: Flower's SuperLink with TLS, node keys and a database, for one federation.

It relays messages between the process that submits a run (`submit`, which is the ServerApp) and the nodes,
and runs nobody's code: there is no executor for apps in it. Nodes are let in by their enrolled keys
(`admission`: a file that appears enrols, one that is missing or broken suspends, within seconds; only
`--revoke` revokes). What is open to whom is said by `gate`. The database keeps nodes, runs and messages over
a crash. A certificate that was renewed is taken up without a restart.

Uses Flower's internals (checked with 1.41): `create_app` and its lifespan, which `flower-superlink` uses.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.deploy import certificates
from fedtune.deploy.admission import Admission
from fedtune.deploy.gate import Gate
from fedtune.deploy.provision import Federation, parse_address, read_token
from fedtune.deploy.published import Board
from fedtune.deploy.reach import expiry_warning
from fedtune.errors import ConfigError, ResourceError

__all__ = ["run_server"]

_log = logging.getLogger("fedtune.server")
_SYNC_SECONDS = 2.0
_WARN_SECONDS = 86_400.0
_BUSY_MILLISECONDS = "60000"


def run_server(folder: Path, say: Callable[[str], None], host: str | None = None) -> None:
    """Serves until it is told to end (Ctrl-C, SIGTERM).

    Raises ConfigError for a folder, key or certificate that is wrong, ResourceError if the port is taken.
    """
    federation = Federation.read(folder / "server.yaml")
    named, port = parse_address(federation.server)
    host = host or ("127.0.0.1" if named in ("127.0.0.1", "localhost") else "0.0.0.0")
    days = certificates.check_server_certificate(folder)
    certificates.load_private_key(folder / "server.key")
    check_pair(folder)
    if warning := expiry_warning(days):
        say(warning)
    token = read_token(folder)
    _check_port(host, port)
    app = _application(folder, host, port)
    admission = Admission(app.state.linkstate_factory.state(), folder, say)
    admitted = admission.look()
    ending = threading.Event()
    import uvicorn

    config = uvicorn.Config(
        Gate(app, token, admission, Board(folder / "published.json")),
        host=host,
        port=port,
        ssl_keyfile=str(folder / "server.key"),
        ssl_certfile=str(folder / "server.crt"),
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=3,
    )
    config.load()
    threading.Thread(target=admission.keep, args=(ending,), daemon=True).start()
    renewed = (_Certificate(folder, config.ssl), ending, say)
    threading.Thread(target=_keep_certificate, args=renewed, daemon=True).start()
    say(
        f"federation {federation.name} on {host}:{port} (sites reach it as {federation.server}); "
        f"{admitted} sites enrolled"
    )
    try:
        uvicorn.Server(config).run()
    finally:
        ending.set()
    say("the server has ended; its database keeps nodes and runs")


def _application(folder: Path, host: str, port: int) -> Any:
    """Flower's SuperLink as an ASGI application, with the folder's database."""
    from flwr.common.constant import TRANSPORT_TYPE_GRPC_RERE
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import SQLITE_PRAGMAS
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    from fedtune.federation.flower import quiet

    quiet()
    # Flower waits 5 s for its database, which twenty nodes that ask at once on two cores outlast. Of two
    # settings of one name the later one holds.
    setattr(sql_mixin, "SQLITE_PRAGMAS", (*SQLITE_PRAGMAS, ("busy_timeout", _BUSY_MILLISECONDS)))  # noqa: B010
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=host,
        port=port,
        insecure=False,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(folder / "ca.crt"),
        ssl_certfile=str(folder / "server.crt"),
        ssl_keyfile=str(folder / "server.key"),
        database=str(folder.absolute() / "superlink.sqlite"),
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"Port {port} on {host} cannot be used ({error.strerror}): is another server of this "
                f"federation "
                "running? End it, or change the address in the federation file and provision again."
            ) from error


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


class _Certificate:
    """The server's certificate as it is on disk, and in the TLS context that serves."""

    def __init__(self, folder: Path, context: ssl.SSLContext | None) -> None:
        self._folder, self._context = folder, context
        self._served = self._on_disk()
        self._unfit: tuple[tuple[bytes, bytes], int] | None = None  # what does not fit, and how often seen

    def _on_disk(self) -> tuple[bytes, bytes]:
        return tuple((self._folder / name).read_bytes() for name in ("server.crt", "server.key"))  # type: ignore[return-value]

    def renew(self) -> bool:
        """Takes up a new one if there is: whoever connects from now on sees it.

        Raises ConfigError, once, for a certificate and a key that do not belong together; the one before is
        served on.
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
                raise ConfigError(f"{error} Until then the certificate of before is served on.") from error
            return False
        if self._on_disk() != now:
            return False  # it was written meanwhile; the next look takes it up
        self._context.load_cert_chain(self._folder / "server.crt", self._folder / "server.key")
        self._served = now
        return True

    def days(self) -> int:
        """Until it expires."""
        return certificates.check_server_certificate(self._folder)


def _keep_certificate(certificate: _Certificate, ending: threading.Event, say: Callable[[str], None]) -> None:
    """Takes up a renewed certificate, and says once a day that one is needed."""
    warned = time.monotonic()
    while not ending.wait(_SYNC_SECONDS):
        try:
            if certificate.renew():
                say(f"took up the renewed certificate, good for {certificate.days()} days")
            if time.monotonic() - warned > _WARN_SECONDS:
                warned = time.monotonic()
                if warning := expiry_warning(certificate.days()):
                    say(warning)
        except ConfigError as error:
            say(str(error))
        except OSError as error:  # key and certificate are written one after the other
            _log.debug("the certificate is not whole yet: %s", error)
