"""What a run ran on: library versions, commit of the code, hardware. Read once, at the start of a run.

Versions are read from the installed metadata, so that nothing is imported for them. The commit is that of
fedtune's code (`fedtune.config.build`), not of the folder that the user stands in.
"""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from fedtune import __version__
from fedtune.config.build import commit

__all__ = ["commit", "hardware", "versions"]

_LIBRARIES = (
    "bitsandbytes",
    "codecarbon",
    "datasets",
    "dp-accounting",
    "flwr",
    "flwr-datasets",
    "hydra-core",
    "numpy",
    "opacus",
    "peft",
    "ray",
    "torch",
    "transformers",
)


def versions() -> dict[str, str]:
    """Versions of Python, fedtune and the libraries that are installed, by name."""
    return {"python": platform.python_version(), "fedtune": __version__, **_installed()}


@functools.cache
def _installed() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str = "cpu", precision: str | None = None) -> dict[str, Any]:
    """Processor, cores, memory, system, and the accelerator if `device` is one; `precision`: what products
    run in there, if that is known."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "accelerator": None,
        "precision": precision,
    }
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    """The model, which neither `platform` nor psutil tell on Linux."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
