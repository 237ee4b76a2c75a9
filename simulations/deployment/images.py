"""What is in the images of deploy/, once they are built, and what a container of them may do.

    docker build -f deploy/Dockerfile -t fedtune .
    docker build -f deploy/serving/Dockerfile -t fedtune-serve .
    python simulations/deployment/images.py

Writes `records/images.json`: sizes beside that of the base image, user, health check, every file of every
layer that looks like a key, a ledger, a history or a cache, and what a container with a read-only root and
without capabilities can and cannot do.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BASE, IMAGES = "python:3.11-slim", ("fedtune", "fedtune-serve")
# Of certificates only those of the public authorities, which Python and Debian bring.
UNWANTED = re.compile(r"(^|/)\.git(/|$)|\.key$|\.sqlite|operator\.token$|local\.json$|\.pem$|(^|/)\.cache/")
PUBLIC = re.compile(r"(^|/)certifi/cacert\.pem$|^etc/ssl/certs/|^usr/lib/ssl/cert\.pem$")
HARDENED = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true", "--tmpfs", "/tmp"]
TRIED = (
    "import json, os, importlib.util as u\n"
    "def writes(path):\n"
    "    try: open(path, 'w').close()\n"
    "    except OSError: return False\n"
    "    return True\n"
    "status = dict(line.split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)\n"
    "print(json.dumps({'uid': os.getuid(), 'capabilities': status['CapBnd'].strip(),\n"
    "    'no_new_privileges': status['NoNewPrivs'].strip() == '1',\n"
    "    'torch': u.find_spec('torch') is not None,\n"
    "    'writes': [path for path in ('/x', '/opt/fedtune/x', '/etc/x', '/tmp/x') if writes(path)]}))\n"
)


def docker(*words: str) -> str:
    """What Docker says."""
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout


def unwanted(image: str) -> list[str]:
    """Files of its layers that nobody should find there."""
    found = set[str]()
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "image.tar"
        docker("save", "-o", str(archive), image)
        with tarfile.open(archive) as whole:
            (manifest,) = json.load(whole.extractfile("manifest.json"))  # type: ignore[arg-type]
            for name in manifest["Layers"]:
                with tarfile.open(fileobj=whole.extractfile(name)) as layer:
                    found |= {one.name.removeprefix("./") for one in layer if one.isfile()}
    return sorted(name for name in found if UNWANTED.search(name) and not PUBLIC.search(name))


def about(image: str) -> dict[str, Any]:
    """One image."""
    (inspected,) = json.loads(docker("image", "inspect", image))
    (base,) = json.loads(docker("image", "inspect", BASE))
    settings = inspected["Config"]
    layers, below = inspected["RootFS"]["Layers"], base["RootFS"]["Layers"]
    tried = docker("run", "--rm", *HARDENED, "--entrypoint", "python", image, "-c", TRIED)
    return {
        "size_mb": round(inspected["Size"] / 1e6),
        "over_the_base_mb": round((inspected["Size"] - base["Size"]) / 1e6),
        "layers_over_the_base": len(layers) - len(below),
        "on_the_base": layers[: len(below)] == below,
        "user": settings["User"],
        "stop_signal": settings.get("StopSignal"),
        "health": settings["Healthcheck"]["Test"][:1],
        "version": docker("run", "--rm", *HARDENED, "--entrypoint", "fedtune", image, "--version").strip(),
        "unwanted": unwanted(image),
        "a_hardened_container": json.loads(tried),
    }


def main() -> None:
    record = {
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "docker": docker("version", "--format", "{{.Server.Version}}").strip(),
        "base": BASE,
        "base_mb": round(json.loads(docker("image", "inspect", BASE))[0]["Size"] / 1e6),
        "images": {image: about(image) for image in IMAGES},
    }
    (HERE / "records" / "images.json").write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
