"""One site of the tiny federation, in this process: what the tests here attack."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from fedtune.deploy import worker
from fedtune.federation.client.audit_log import AuditLog
from fedtune.federation.client.policy import SiteSettings
from fedtune.federation.flower import deserialize, serialize, task_identity
from fedtune.federation.messages import VERSION, RoundRequest
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support import tiny_federation
from tests.support.plans import changed

SIZE = 80


def settings(root: Path, model: str = "m", **changes: Any) -> SiteSettings:
    """A site's settings with everything below `root`; `changes` are top-level ones, mappings are merged."""
    values: dict[str, Any] = {
        "federation": "trial", "site": "clinic-1", "server": "127.0.0.1:9",
        "ca": str(root / "ca.crt"), "key": str(root / "node.key"),
        "data": {"name": "made-up", "declared_size": SIZE, "path": str(root / "data" / "train.csv")},
        "ledger": str(root / "state" / "ledger.sqlite"), "audit_log": str(root / "state" / "audit.jsonl"),
        "budget_epsilon": 50, "budget_delta": 1e-3,
        "permit": {"trust": ["local"], "models": [model], "max_local_steps": 5, "max_sample_rate": 0.5},
        "limits": {"threads": 1},
    }  # fmt: skip
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return SiteSettings.from_dict(values, "node.yaml")


class Site:
    """A site whose worker runs in this process, spoken to as its node would speak to it."""

    def __init__(self, root: Path, model: Path, **changes: Any) -> None:
        tiny_federation.make_data(root / "data", SIZE)
        self.root = root
        self.settings = settings(root, str(model), **changes)
        from fedtune.deploy.site import open_ledger

        open_ledger(self.settings, setting=True)
        self.config = tiny_federation.private(tiny_federation.make_config(model, root / "public"))
        self.config.data.site, self.config.engine.name = None, "deployment"
        self.config.federation.num_rounds = 3
        self.state = RecordDict()

    def plan(self, **changes: Any) -> PrivacyPlan:
        return changed(make_plan(self.config, [SIZE]), **changes)

    def start(self) -> np.ndarray:
        """The adapter that a run begins with."""
        from fedtune.federation.resources import run_resources

        return run_resources(self.settings.own(self.config)).initial()

    def send(self, content: RecordDict, kind: str = "train", config: Config | None = None) -> Message:
        """The worker's answer to a message; what the node remembers of the run is kept."""
        from flwr.common.serde import context_from_proto, context_to_proto
        from flwr.proto.message_pb2 import Context as ProtoContext

        context = Context(
            run_id=1,
            node_id=7,
            node_config={"site": self.settings.to_json()},
            state=self.state,
            # Half a surrogate pair travels as JSON's escape for it, or not at all.
            run_config={"fedtune": to_json(config or self.config).replace("\ud800", r"\ud800")},
        )
        with task_identity(1):
            message = Message(content, 7, kind)
            header = {"task": 1, "run": 1, "node": 7}
            sent = context_to_proto(context).SerializeToString()
            data = worker.answer(serialize(message), sent, header, self.settings)
        proto = ProtoContext()
        proto.ParseFromString(data[1])
        self.state = context_from_proto(proto).state
        return deserialize(data[0])

    def ask(
        self, round: int = 1, attempt: int = 1, plan: PrivacyPlan | None = None, run: str = "r"
    ) -> dict[str, Any]:
        """The reply's record; `update` in it says whether there was one."""
        adapter = np.zeros(1, dtype=np.float32) if plan is not None else self.start()
        answer = self.send(RoundRequest(run, round, attempt, plan or self.plan(), adapter).to_records())
        if answer.has_error():
            return {"error": answer.error.reason, "refused": "", "update": False}
        record = answer.content["reply"]
        assert isinstance(record, ConfigRecord)
        return {**record, "update": isinstance(answer.content.get("update"), ArrayRecord)}

    def charged(self) -> int:
        return len(PrivacyLedger.open(Path(self.settings.ledger)).releases())

    def log(self) -> list[dict[str, Any]]:
        return AuditLog(Path(self.settings.audit_log)).entries()


def raw_request(plan: str, adapter: np.ndarray | None = None, **changes: Any) -> RecordDict:
    """A request as a server that obeys no rule may send it."""
    from flwr.app import Array

    values: dict[str, Any] = {
        "version": VERSION,
        "run": "r",
        "round": 1,
        "attempt": 1,
        "plan": plan,
        **changes,
    }
    array = np.zeros(3, dtype=np.float32) if adapter is None else adapter
    return RecordDict({"adapter": ArrayRecord({"adapter": Array(array)}), "request": ConfigRecord(values)})


def with_values(plan: PrivacyPlan, **changes: Any) -> str:
    """A plan as JSON with values that no plan of fedtune's would have."""
    return json.dumps({**plan.to_json(), **changes})


class Node:
    """One of Flower's NodeInfos."""

    def __init__(self, name: str, public_key: bytes, status: str = "registered") -> None:
        self.name, self.public_key, self.status = name, public_key, status


def names(nodes: Iterable[Node]) -> list[str]:
    return [node.name for node in nodes]
