"""A server as `fedtune server` makes it, in a thread: Flower's SuperLink, TLS, keys, the door."""

from __future__ import annotations

import base64
import datetime
import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

from fedtune.deploy import certificates, server
from fedtune.deploy.admission import Admission, enrol
from fedtune.deploy.flower import FrequentCalls, superlink_app
from fedtune.deploy.join import PublishedBudgets
from fedtune.deploy.operators import Operators
from fedtune.deploy.progress import Progress
from fedtune.deploy.provision import provision, read_token
from fedtune.deploy.runs import Runs
from fedtune.deploy.trail import Trail
from tests.support.site_parts import settings

SITES = ["clinic-1", "clinic-2", "clinic-3"]


class Real:
    """A server as `fedtune server` makes it, in a thread."""

    def __init__(self, root: Path) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = listener.getsockname()[1]
        self.root, self.address = root, f"127.0.0.1:{self.port}"
        self.file = root / "federation.yaml"
        self.file.write_text(yaml.safe_dump({"name": "trial", "server": self.address, "sites": SITES}))
        provision(self.file, root / "out")
        self.folder = root / "out" / "server"
        self.keys = {}
        for site in SITES:
            self.keys[site] = certificates.make_node_key(root / f"{site}.key")
            enrol(self.folder, certificates.public_line(certificates.public_key_of(self.keys[site]), site))
        self.said: list[str] = []
        self.app = superlink_app(self.folder, "127.0.0.1", self.port)
        self.state = self.app.state.linkstate_factory.state()
        self.people = Operators(self.folder, read_token(self.folder))
        self.trail = Trail(self.folder)
        self.runs = Runs(self.state, self.folder, self.trail)
        self.admission = Admission(self.state, self.folder, self.said.append, self.people, self.trail)
        self.admission.update()
        self.board = PublishedBudgets(self.folder / "published.json")
        self.progress = Progress(self.folder / "progress", self.runs.by)
        self.gate = server.Gate(
            self.app, self.people, self.admission, self.board, self.runs, self.trail, self.progress,
            FrequentCalls(self.app),
        )  # fmt: skip
        self.uvicorn = server.behind_the_door(self.gate, self.folder, listener)
        self.config = self.uvicorn.config
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.05)

    def operator_folder(self, folder: Path) -> Path:
        """`folder` with what an operator has of this server: its address and its authority."""
        for name in ("server.yaml", "ca.crt"):
            (folder / name).write_bytes((self.folder / name).read_bytes())
        return folder

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(10)

    def signed(self, site: str) -> dict[str, str]:
        """The headers of a request that the key of a site signs, as Flower's SuperNode does."""
        key, now = self.keys[site], datetime.datetime.now(datetime.UTC).isoformat()
        signature = key.sign(now.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(certificates.public_key_of(key)).decode(),
            TIMESTAMP_HEADER: now,
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode(),
        }

    def site(self, name: str, **changes: Any) -> Any:
        return settings(
            self.root, site=name, server=self.address, ca=str(self.folder / "ca.crt"),
            key=str(self.root / f"{name}.key"), **changes,
        )  # fmt: skip

    def node_id(self, site: str) -> int:
        return next(int(one.node_id) for one in self.admission.nodes() if one.name == site)

    def request(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
        context = certificates.tls_context(self.folder / "ca.crt")
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=context)
        connection.putrequest(method, path)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, json.loads(body or b"{}")
