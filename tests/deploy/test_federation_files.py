"""Image, Compose file and Kubernetes manifests of server and node: what is in them, and what they may do.

Docker and Kubernetes do not run in the tests: `simulations/deployment/images.py` asks Docker. Dockerfiles and
`.dockerignore` are read by its rules (`tests.support.images`), manifests are held to schemas of Kubernetes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.monitoring.endpoint import PORT, parse_listen
from tests.deploy.test_units import assert_is_a_command
from tests.support.images import instructions, sent

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
IGNORED = (ROOT / ".dockerignore").read_text()
IMAGES = [DEPLOY / "Dockerfile", DEPLOY / "serving" / "Dockerfile"]
SIDES = ["server", "node"]
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
USER = "10001"


# --- what an image is built from ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".git/objects/pack/x.pack", "fedtune/.git/HEAD", ".venv/bin/python", ".github/x.yml",
        ".hypothesis/x", "tests/support/golden.py", "simulations/LOG.md", "outputs/1/local.json",
        "DIR/server/server.key", "DIR/server/operator.token", "DIR/authority/ca.key", "clinic-1/node.key",
        "clinic-1/state/ledger.sqlite", "clinic-1/state/audit.jsonl", "data/train.csv", "train.csv",
        "fedtune/deploy/node.key", "fedtune/deploy/operator.token", "fedtune/x.pem", "conf/ledger.sqlite-wal",
        "fedtune/__pycache__/api.cpython-311.pyc", "fedtune/deploy/__pycache__/x.pyc", "fedtune/.env",
        "conf/.secrets/token", "deploy/compose.yaml", "deploy/clinic/node.key", "dist/fedtune.whl",
        "deploy/serving/keys.txt", "docs/architecture.md",
    ],
)  # fmt: skip
def test_no_history_key_ledger_data_or_cache_reaches_an_image(path: str) -> None:
    assert not sent(path, IGNORED)


def test_all_that_the_wheel_is_made_of_does() -> None:
    folders = ("fedtune", "conf", "hydra_plugins")
    made = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    made += [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt")]
    made += [ROOT / "hatch_build.py"]  # without it, pip cannot build the package
    names = [str(path.relative_to(ROOT)) for path in made if "__pycache__" not in path.parts]
    assert len(names) > 300 and [name for name in names if not sent(name, IGNORED)] == []


def test_dockers_rules() -> None:
    """Cases of Docker's own tests of its patterns."""
    for path, ignored, goes in (
        ("a/b", "a", False), ("a/b", "*\n!a", True), ("a/.b", "*\n!a\n**/.*", False), ("a", "**/a", False),
        ("x/a", "**/a", False), ("x/y/a", "*/a", True), ("x/a", "*/a", False), ("xa", "**/a", True),
        ("a.key", "*.key", False), ("x/a.key", "*.key", True), ("x/a.key", "**/*.key", False),
        ("a", "# a\n", True), ("a", "a\n!a", True), ("a", "!a\na", False), ("a.pyc", "**/*.py[cod]", False),
    ):  # fmt: skip
        assert sent(path, ignored) is goes, (path, ignored)


# --- the image ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.parent.name)
def test_the_image_holds_what_was_installed_and_runs_as_nobody_special(path: Path) -> None:
    lines = instructions(path.read_text())
    last = max(number for number, (name, _) in enumerate(lines) if name == "FROM")
    made, final = lines[:last], lines[last + 1 :]
    names = [name for name, _ in final]
    assert ("COPY", ". /src") in made
    assert [words for name, words in final if name in ("COPY", "ADD")] == [
        "--from=build /opt/fedtune /opt/fedtune"
    ]
    assert [words for name, words in final if name == "USER"] == [USER]
    assert names.index("USER") < names.index("ENTRYPOINT") and "RUN" not in names[names.index("USER") :]
    assert "ADD" not in [name for name, _ in lines]
    health = json.loads(dict(final)["HEALTHCHECK"].split("CMD", 1)[1])
    assert health[:2] == ["python", "-c"] and "/healthz" in health[2]
    compile(health[2], "healthcheck", "exec")
    assert json.loads(dict(final)["ENTRYPOINT"])[0] == "fedtune"
    assert dict(final)["STOPSIGNAL"] == "SIGTERM"
    for name, words in lines:
        assert name != "ARG" and not (name == "ENV" and any(w in words.upper() for w in ("TOKEN", "SECRET")))
        if "pip install" in words:
            assert words.count("pip install") == words.count("--no-cache-dir")


def test_the_images_that_were_built_hold_no_more_and_may_do_no_more() -> None:
    record = json.loads((ROOT / "simulations" / "deployment" / "records" / "images.json").read_text())
    roots = "grpc/_cython/_credentials/roots.pem"  # public authorities
    for name, torch in (("fedtune", True), ("fedtune-serve", False)):
        made = record["images"][name]
        assert made["user"] == USER and made["on_the_base"] and made["layers_over_the_base"] == 2
        assert all(path.endswith(roots) for path in made["unwanted"])
        assert made["a_hardened_container"] == {
            "uid": int(USER),
            "capabilities": "0" * 16,
            "no_new_privileges": True,
            "torch": torch,
            "writes": ["/tmp/x"],
        }
    served, whole = (record["images"][name]["size_mb"] for name in ("fedtune-serve", "fedtune"))
    page = " ".join((ROOT / "docs" / "service.md").read_text(encoding="utf-8").split())
    assert f"An image for serving has {served / 1000:.2f} GB" in page
    assert f"nodes {whole / 1000:.1f} GB" in page and f"base was {record['base_mb'] / 1000:.2f} GB" in page


@pytest.mark.slow
def test_the_healthcheck_fails_while_nothing_answers(tmp_path: Path) -> None:
    from fedtune.monitoring.endpoint import endpoint, watched

    words = json.loads(dict(instructions(IMAGES[0].read_text()))["HEALTHCHECK"].split("CMD", 1)[1])
    assert f":{PORT}/healthz" in words[2]
    lives = [True]
    with endpoint("0", watched(lambda: b"", lambda: lives[0], lambda: True)) as address:
        code = words[2].replace(f"127.0.0.1:{PORT}", address)
        run = [sys.executable, "-c", code]
        assert subprocess.run(run, capture_output=True, check=False).returncode == 0
        lives[0] = False
        assert subprocess.run(run, capture_output=True, check=False).returncode != 0


# --- Compose --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_compose_gives_a_container_no_more_than_it_needs(side: str) -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"][side]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(IMAGES[0])
    assert_is_a_command(side, [str(word) for word in service["command"]])
    assert parse_listen(service["command"][service["command"].index("--monitor") + 1]) == ("127.0.0.1", PORT)
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service
    assert service["user"].split(":")[0] == USER
    assert service["security_opt"] == ["no-new-privileges:true"] and service["tmpfs"]
    assert service["mem_limit"] and service["pids_limit"] and service["ulimits"]["nofile"]
    assert int(service["stop_grace_period"].removesuffix("s")) >= 60  # Docker's own are 10
    assert service["logging"]["options"]["max-size"]
    places = {
        one.split(":")[-2 if one.endswith(":ro") else -1]: one.endswith(":ro") for one in service["volumes"]
    }
    named = {one.split(":")[0] for one in service["volumes"] if one.startswith("fedtune-")}
    assert named <= set(compose["volumes"])
    if side == "node":
        # It reads node.yaml and cannot change it; what it writes is state/ and caches.
        assert places == {
            "/federation": True,
            "/federation/state": False,
            "/data": True,
            "/var/lib/fedtune": False,
        }
        assert "ports" not in service
    else:
        assert not any(str(PORT) in str(port) for port in service["ports"])


# --- Kubernetes -----------------------------------------------------------------------------------------


def documents() -> list[tuple[Path, dict[str, Any]]]:
    return [(path, one) for path in MANIFESTS for one in yaml.safe_load_all(path.read_text())]


def manifest(side: str, kind: str) -> dict[str, Any]:
    (found,) = [one for path, one in documents() if path.parent.name == side and one["kind"] == kind]
    return found


@pytest.mark.parametrize("path", [path for path in MANIFESTS if path.name != "kustomization.yaml"], ids=str)
def test_a_manifest_is_one(path: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.33", strict=True)


@pytest.mark.parametrize("side", SIDES)
def test_kustomize_takes_every_manifest_and_names_the_image(side: str) -> None:
    folder = DEPLOY / "kubernetes" / side
    made = manifest(side, "Kustomization")
    assert set(made) == {"apiVersion", "kind", "resources", "images"}
    assert sorted(made["resources"]) == sorted(
        path.name for path in folder.iterdir() if path.name != "kustomization.yaml"
    )
    pod = manifest(side, "StatefulSet")["spec"]["template"]["spec"]
    used = {one["image"] for one in pod["containers"] + pod["initContainers"]}
    assert used == {one["name"] for one in made["images"]}


@pytest.mark.parametrize("side", SIDES)
def test_a_pod_has_no_more_than_it_needs(side: str) -> None:
    about = manifest(side, "StatefulSet")["spec"]
    pod = about["template"]["spec"]
    assert about["replicas"] == 1 and not pod["automountServiceAccountToken"]
    assert pod["securityContext"]["runAsNonRoot"] and str(pod["securityContext"]["runAsUser"]) == USER
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    volumes = {one["name"] for one in pod["volumes"]}
    volumes |= {one["metadata"]["name"] for one in about["volumeClaimTemplates"]}
    mounted: set[str] = set()
    for container in pod["containers"] + pod["initContainers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        mounted |= {one["name"] for one in container["volumeMounts"]}
    assert mounted == volumes
    (container,) = pod["containers"]
    assert_is_a_command(side, [str(word) for word in container["args"]])
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert parse_listen(container["args"][container["args"].index("--monitor") + 1])[1] == ports["monitor"]
    assert about["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(ports["monitor"])
    for probe, path in (
        ("startupProbe", "/healthz"),
        ("livenessProbe", "/healthz"),
        ("readinessProbe", "/readyz"),
    ):
        assert container[probe]["httpGet"] == {"path": path, "port": "monitor"}


@pytest.mark.parametrize("side", SIDES)
def test_who_reaches_a_pod_and_whom_it_reaches(side: str) -> None:
    labels = manifest(side, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    policy = manifest(side, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    for rule in policy["ingress"]:
        names = [port["port"] for port in rule["ports"]]
        assert names == ["monitor"] if "from" in rule else names == ["tls"] and side == "server"
    if side == "server":
        assert policy["egress"] == [] and manifest(side, "Service")["spec"]["selector"] == labels
        assert [port["targetPort"] for port in manifest(side, "Service")["spec"]["ports"]] == ["tls"]
    else:
        assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 9443}


def test_a_node_in_kubernetes_reads_its_file_and_key_and_writes_its_state() -> None:
    (container,) = manifest("node", "StatefulSet")["spec"]["template"]["spec"]["containers"]
    writable = {one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")}
    assert writable == {"/state", "/var/lib/fedtune", "/tmp"}
    file = Path(container["args"][container["args"].index("--config") + 1])
    read = {one["mountPath"] for one in container["volumeMounts"] if one.get("readOnly")}
    assert str(file.parent) in read
