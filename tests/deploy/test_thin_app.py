"""An app from the server that is anything but the thin one: refused before any of it is unpacked or run."""

from __future__ import annotations

import dataclasses
import io
import re
import socket
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedtune.config.build import build
from fedtune.deploy import channel, flower
from fedtune.deploy import thin_app as thin
from fedtune.deploy.leaving import Leaving
from fedtune.deploy.message_loop import MessageHandler
from fedtune.deploy.node import guard
from fedtune.deploy.node_metrics import NodeActivity
from fedtune.deploy.thin_app import AppAllowList, check_app, thin_app
from fedtune.errors import FederationError
from fedtune.federation.client.audit_log import AuditLog
from fedtune.federation.flower import empty_run, serialize, task_identity
from fedtune.federation.protocol import PROTOCOL
from tests.support.golden import Golden
from tests.support.site_parts import settings


def repacked(changes: dict[str, str | None], kind: int = zipfile.ZIP_STORED) -> bytes:
    """The thin app with files added, replaced or (None) taken out."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(thin_app()[0])) as old, zipfile.ZipFile(made, "w", kind) as new:
        files: dict[str, Any] = {name: old.read(name) for name in old.namelist()}
        for name, text in {**files, **changes}.items():
            if text is not None:
                new.writestr(name, text)
    return made.getvalue()


def pyproject(*replacements: tuple[str, str]) -> str:
    with zipfile.ZipFile(io.BytesIO(thin_app()[0])) as archive:
        text = archive.read("pyproject.toml").decode()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


def link(name: str, target: str) -> bytes:
    """The thin app with a symbolic link in it."""
    made = io.BytesIO(thin_app()[0])
    with zipfile.ZipFile(made, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, target)
    return made.getvalue()


def bomb(size: int) -> bytes:
    """An archive of the thin app's names whose pyproject.toml says 100 bytes and unpacks to `size`."""
    content = bytearray(repacked({"pyproject.toml": "#" * size}, zipfile.ZIP_DEFLATED))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = content.find(signature)
        while at >= 0:
            if struct.unpack_from("<I", content, at + offset)[0] == size:
                struct.pack_into("<I", content, at + offset, 100)
            at = content.find(signature, at + 4)
    return bytes(content)


def doubled() -> bytes:
    """Two files of one name, of which another reader may take the other."""
    made = io.BytesIO(thin_app()[0])
    with zipfile.ZipFile(made, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("pyproject.toml", pyproject(("fedtune.federation.client.app:app", "os:system")))
    return made.getvalue()


EVIL = "import pathlib; pathlib.Path('/tmp/fedtune-evil').touch()"
ATTACKS: dict[str, Callable[[], bytes]] = {
    "an extra module": lambda: repacked({"evil.py": EVIL}),
    "a module that shadows fedtune": lambda: repacked({"fedtune/federation/client/app.py": EVIL}),
    "a start-up file": lambda: repacked({"sitecustomize.py": EVIL}),
    "another component": lambda: repacked(
        {"pyproject.toml": pyproject(("fedtune.federation.client.app:app", "os:system"))}
    ),
    "dependencies": lambda: repacked(
        {"pyproject.toml": pyproject(("dependencies = []", 'dependencies = ["evil @ file:///tmp/evil"]'))}
    ),
    "another default of the run config": lambda: repacked(
        {"pyproject.toml": pyproject(('fedtune = ""', 'fedtune = "{}"'))}
    ),
    "a file beside it on a way up": lambda: repacked({"../../evil.py": EVIL}),
    "an absolute path": lambda: repacked({"/tmp/fedtune-evil.py": EVIL}),
    "a symbolic link": lambda: link("conf", "/etc"),
    "a link in the place of a file": lambda: link("pyproject.toml ", "/etc/passwd"),
    "the same name twice": doubled,
    "bytes after the archive": lambda: thin_app()[0] + b"#!/bin/sh\n",
    "bytes before the archive": lambda: b"#!/bin/sh\n" + thin_app()[0],
    "the same files packed in another way": lambda: repacked({}, zipfile.ZIP_DEFLATED),
    "a missing list of contents": lambda: repacked({".info/CONTENT": None}),
    "a zip bomb": lambda: repacked({"pyproject.toml": "#" * 50_000_000}, zipfile.ZIP_DEFLATED),
    "a zip bomb that lies of its size": lambda: bomb(5_000_000),
    "nothing": lambda: b"",
    "noise": lambda: b"PK\x03\x04" + bytes(range(256)) * 4,
    "deep nesting": lambda: repacked({"pyproject.toml": "x = " + "[" * 9_000}),
    "a version with orders in it": lambda: repacked(
        {"pyproject.toml": '[project]\nname = "fedtune-thin"\nversion = "9; rm -rf ~"\n'}
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused(name: str) -> None:
    with pytest.raises(FederationError, match=r"not fedtune's.*no code of that app was unpacked or run"):
        check_app(ATTACKS[name]())
    assert not Path("/tmp/fedtune-evil").exists()


def test_a_bomb_is_not_unpacked_to_look_for_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = zipfile.ZipExtFile.read

    def counted(self: Any, n: int | None = -1) -> bytes:
        data = original(self, n)
        read.append(len(data))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    small = bomb(5_000_000)
    assert len(small) < 10_000, "small enough to be looked into"
    for content in (small, ATTACKS["a zip bomb"]()):
        with pytest.raises(FederationError):
            check_app(content)
    assert sum(read) <= thin._LARGEST + 1


def test_the_thin_app_is_the_same_wherever_it_is_made() -> None:
    content, _ = thin_app()
    thin_app.cache_clear()
    assert thin_app()[0] == content
    check_app(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]


def test_another_protocol_is_refused_with_both_named() -> None:
    other = repacked({"pyproject.toml": '[project]\nname = "fedtune-thin"\nversion = "9.0.0"\n'})
    with pytest.raises(FederationError) as raised:
        check_app(other)
    both = f"speaks protocol 9, and this node runs fedtune {build()}, which speaks protocol {PROTOCOL}"
    assert both in str(raised.value)


class Ears:
    """The worker, as far as these tests need it: it must hear nothing."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def ask(
        self, message: bytes, context: bytes, header: dict[str, Any], beat: Any, awaited: float, give_up: Any
    ) -> list[bytes]:
        self.heard.append(message)
        from fedtune.federation.flower import deserialize

        with task_identity(header["run"]):
            reply = Message(RecordDict(), reply_to=deserialize(message))
        return [serialize(reply), context]


class Delivery:
    """A message of a run with an app, delivered by Flower's own code to a node in this process."""

    def __init__(
        self,
        root: Path,
        app: bytes,
        override: dict[str, Any] | None = None,
        content: RecordDict | None = None,
    ) -> None:
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

        self.store = ObjectStoreFactory().store()
        self.state = InMemoryNodeState(self.store)
        self.state.set_node_id(7)
        self.worker, self.site = Ears(), settings(root)
        self.log = AuditLog(Path(self.site.audit_log))
        self.apps = AppAllowList()
        self.leaving = Leaving(60.0, print)
        self.activity = NodeActivity()
        self.answers = MessageHandler(
            self.state,
            self.store,
            self.site,
            self.worker,  # type: ignore[arg-type]
            self.apps,
            self.leaving,
            self.activity,
        )
        with task_identity(5):
            message = Message(content or RecordDict(), 7, "query.hello")
        message.metadata.__dict__["_message_id"] = message.object_id
        self.message = message
        self.contents = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        run = dataclasses.replace(
            empty_run(5), fab_hash="of-the-server", override_config=override or {"fedtune": "{}"}
        )
        import hashlib

        fab = Fab(hashlib.sha256(app).hexdigest(), app, {})
        self.connection = (
            7, lambda: (message, get_object_tree(message)), None, lambda run_id: run,
            lambda fab_hash, run_id: fab, lambda run_id, name: self.contents[name], None,
            lambda run_id, name: None,
        )  # fmt: skip

    def guarded(self) -> Any:
        """The connection behind the node's own checks."""
        return guard(self.connection, self.apps, self.log, self.activity)  # type: ignore[arg-type]

    def deliver(self) -> Message:
        """The node's answer."""
        from flwr.supernode.start_client_internal import _pull_and_store_message

        _, receive, _, get_run, get_fab, pull, _, confirm = self.guarded()
        came = _pull_and_store_message(
            state=self.state, object_store=self.store, node_config={"site": "{}"}, receive=receive,
            get_run=get_run, get_fab=get_fab, pull_object=pull, confirm_message_received=confirm,
            trusted_entities=None,
        )  # fmt: skip
        assert came == 5
        assert self.answers()
        (reply,) = self.state.get_messages_legacy(is_reply=True)
        return reply


def test_the_right_app_reaches_the_worker(tmp_path: Path) -> None:
    delivery = Delivery(tmp_path, thin_app()[0])
    assert not delivery.deliver().has_error()
    assert len(delivery.worker.heard) == 1


def test_a_message_that_comes_to_a_node_which_leaves_is_given_back(tmp_path: Path) -> None:
    delivery = Delivery(tmp_path, thin_app()[0])
    delivery.leaving._at = 0.0
    reply = delivery.deliver()
    assert reply.has_error() and "is leaving" in str(reply.error.reason)
    assert "nothing was charged" in str(reply.error.reason)
    assert delivery.worker.heard == []
    (entry,) = delivery.log.entries()
    assert entry["event"] == "refused"


@pytest.mark.parametrize("name", ["an extra module", "another component", "a zip bomb", "noise"])
def test_flower_never_reads_a_foreign_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Flower reads an app's pyproject.toml when a run's first message comes: it must be given ours."""
    from flwr.supernode import start_client_internal as flower

    read: list[bytes] = []
    original = flower.get_fused_config_from_fab

    def watched(content: Any, run: Any) -> Any:
        read.append(content)
        return original(content, run)

    monkeypatch.setattr(flower, "get_fused_config_from_fab", watched)
    modules = set(sys.modules)
    delivery = Delivery(tmp_path, ATTACKS[name](), {"anything": "else"})
    reply = delivery.deliver()
    assert read == [thin_app()[0]]
    assert reply.has_error() and "not fedtune's" in str(reply.error.reason)
    assert delivery.worker.heard == []
    (entry,) = delivery.log.entries()
    assert entry["event"] == "refused" and "not fedtune's" in entry["reason"]
    assert "evil" not in set(sys.modules) - modules


def test_a_run_whose_app_never_came_is_refused(golden: Golden) -> None:
    with pytest.raises(FederationError) as raised:
        AppAllowList().check(5)
    golden(raised)


def test_a_message_that_cannot_be_read_is_answered(tmp_path: Path) -> None:
    """Flower's SuperNode takes no other message before this one has its answer."""
    delivery = Delivery(tmp_path, thin_app()[0])
    delivery.state.store_message = lambda message: _spoil(delivery, message)  # type: ignore[method-assign]
    reply = delivery.deliver()
    assert reply.has_error() and "Site 'clinic-1'" in str(reply.error.reason)
    assert delivery.worker.heard == [] and delivery.log.entries()[0]["event"] == "refused"


def _spoil(delivery: Delivery, message: Message) -> str:
    """Stores the message, and takes one of its parts away once it has come."""
    stored = type(delivery.state).store_message(delivery.state, message)
    if not message.metadata.reply_to_message_id:
        delivery.store.get = lambda name: b"garbage"  # type: ignore[method-assign]
    assert stored is not None
    return stored


def test_a_message_that_is_too_large_is_given_up_while_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    monkeypatch.setattr(channel, "MAX_MESSAGE", 10)
    delivery = Delivery(tmp_path, thin_app()[0])
    _, receive, _, _, _, pull, _, _ = delivery.guarded()
    receive()
    with pytest.raises(FederationError) as raised:
        pull(5, delivery.message.metadata.message_id)
    assert "10" in str(raised.value)
    golden(raised)
    assert "more than 10 bytes" in delivery.log.entries()[0]["reason"]


@pytest.mark.parametrize("folded", ["an array", "a record"])
def test_a_message_that_is_small_on_its_way_and_large_here_is_refused_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folded: str
) -> None:
    """On its way each part comes once: one that is named 300 times took 2.6 GB, and the worker."""
    monkeypatch.setattr(channel, "MAX_MESSAGE", 100_000)
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 4_000)
    array, one = Array(np.zeros(200_000, np.uint8)), Array(np.zeros(4_000, np.uint8))
    names = {"one": array} if folded == "an array" else {str(number): one for number in range(50)}
    delivery = Delivery(tmp_path, thin_app()[0], content=RecordDict({"more": ArrayRecord(names)}))
    assert sum(map(len, delivery.contents.values())) < 20_000
    inflated: list[str] = []
    monkeypatch.setattr(flower, "inflate_object_from_contents", lambda name, *_: inflated.append(name))
    reply = delivery.deliver()
    found = re.search(r"would have 2\d\d,\d{3} bytes.*nothing was charged", str(reply.error.reason))
    assert found and delivery.worker.heard == inflated == []
    assert "would have" in delivery.log.entries()[0]["reason"]


def test_a_large_message_that_is_allowed_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_MESSAGE", 210_000)
    content = RecordDict({"more": ArrayRecord({"one": Array(np.zeros(200_000, np.uint8))})})
    delivery = Delivery(tmp_path, thin_app()[0], content=content)
    assert not delivery.deliver().has_error() and len(delivery.worker.heard) == 1


def test_a_frame_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever receives it would end, and take a release that is charged with it."""
    monkeypatch.setattr(channel, "MAX_FRAME", 10)
    here, there = socket.socketpair()
    with here, there:
        with pytest.raises(FederationError, match="11 bytes is not sent: at most 10"):
            channel.send(here, {}, [b"12345", b"678901"])
        channel.send(here, {}, [b"1234567890"])
        assert channel.receive(there) == ({}, [b"1234567890"])


def test_a_full_disk_does_not_keep_the_server_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.federation.client.log_files.os.write", full)
    reply = Delivery(tmp_path, ATTACKS["noise"]()).deliver()
    assert reply.has_error() and "ResourceError" in str(reply.error.reason)
    assert "audit log cannot be written (No space left on device)" in caplog.text  # the site's own log
