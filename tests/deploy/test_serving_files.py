"""What is in deploy/serving agrees with Kubernetes' schemas, the service, and what the image installs.

No image is built and no cluster is asked: the manifests are held to the schemas of the API, offline; Compose
and Dockerfile, for which there is none here, to what the service needs of them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fedtune.serving.serve import GRACE
from tests.support.images import sent

kubernetes_validate = pytest.importorskip("kubernetes_validate")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "serving"
MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yaml"))
VERSION = "1.33"  # of Kubernetes
REQUIRED = [
    line for line in (FOLDER / "requirements.txt").read_text().splitlines() if not line.startswith("#")
]


def manifest(kind: str) -> dict[str, Any]:
    (found,) = [one for path in MANIFESTS if (one := yaml.safe_load(path.read_text()))["kind"] == kind]
    return dict(found)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_one(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_the_schemas_find_mistakes() -> None:
    for change in ({"minReplica": 2}, {"maxReplicas": "many"}):
        wrong = manifest("HorizontalPodAutoscaler")
        wrong["spec"] |= change
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_manifests_agree_with_one_another_and_with_the_service() -> None:
    pods = manifest("Deployment")["spec"]["template"]
    labels, (container,) = pods["metadata"]["labels"], pods["spec"]["containers"]
    assert manifest("Service")["spec"]["selector"] == labels
    for kind, name in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert manifest(kind)["spec"][name]["matchLabels"] == labels
    assert manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == "fedtune-serve"
    rule = yaml.safe_load(manifest("ConfigMap")["data"]["config.yaml"])["rules"][0]
    (metric,) = manifest("HorizontalPodAutoscaler")["spec"]["metrics"]
    asked = metric["pods"]["metric"]["name"]
    assert asked == rule["name"]["as"] and rule["seriesQuery"].startswith(asked)
    assert f'"{asked}"' in (ROOT / "fedtune" / "serving" / "metrics.py").read_text()
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pods["spec"]["terminationGracePeriodSeconds"] >= GRACE + wait
    assert (
        container["securityContext"]["readOnlyRootFilesystem"]
        and pods["spec"]["securityContext"]["runAsNonRoot"]
    )
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pods["spec"]["volumes"]}


def test_compose_and_dockerfile_agree_with_the_service() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    service = compose["services"]["model"]
    assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).samefile(
        FOLDER / "Dockerfile"
    )
    assert int(service["stop_grace_period"].removesuffix("s")) > GRACE
    assert (
        service["read_only"]
        and service["cap_drop"] == ["ALL"]
        and set(service["secrets"]) == set(compose["secrets"])
    )
    assert service["ports"][0].startswith("127.0.0.1:")  # it has no TLS
    lines = (FOLDER / "Dockerfile").read_text()
    for line in ("USER 10001", "EXPOSE 8000", "HEALTHCHECK", "STOPSIGNAL SIGTERM"):
        assert re.search(rf"^{line}", lines, re.MULTILINE), line
    copied = set(re.findall(r"/src/(\S+)", lines))
    assert copied == {"constraints.txt", "deploy/serving/requirements.txt"}
    ignored = (ROOT / ".dockerignore").read_text()
    assert all(sent(name, ignored) for name in copied)


@pytest.mark.slow
def test_what_the_image_installs_is_pinned_and_is_enough(exported: Path) -> None:
    pins = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").open()}
    assert [name for name in REQUIRED if name not in pins] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=]", text)[0] for text in project["dependencies"]}
    named = {"pyyaml": "yaml", "hydra-core": "hydra"}
    absent = [named.get(name, name.replace("-", "_")) for name in declared - set(REQUIRED)] + ["onnx"]
    assert {"torch", "transformers", "flwr", "hydra", "yaml"} <= set(absent)
    program = (
        f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
        "from fedtune.cli.app import main\nmain(sys.argv[1:])"
    )
    # Its own PYTHONPATH comes first, so that this checkout is what runs.
    server = subprocess.Popen(
        [sys.executable, "-c", program, "serve", str(exported), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        address = re.search(r"http://\S+/predict", line)
        assert address is not None, line or server.communicate()[1]
        assert httpx.post(address[0], json={"text": "good"}, timeout=30).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.communicate()
