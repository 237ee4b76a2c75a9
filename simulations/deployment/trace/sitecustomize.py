"""Writes down when the functions named below begin and end, in every process that finds this file first.

Only with FEDTUNE_TRACE=FILE in the environment, and this folder at the head of PYTHONPATH: the studies' way
to take a round apart without a line of it in the product. One JSON object a call: name, process, begin and
end (seconds of the machine's clock), and whether the call returned something.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
from typing import Any

WATCHED = {
    "flwr.superlink.grid.http_grid": ("HttpGrid.push_messages", "HttpGrid.pull_messages"),
    "flwr.supernode.start_client_internal": ("_pull_and_store_message", "_push_messages"),
    "fedtune.deploy.worker_process": ("WorkerProcess.ask",),
    "fedtune.deploy.worker": ("answer",),
    "fedtune.federation.client.release": ("reserve_release",),
    "fedtune.federation.server.checkpoint": ("RunState.save",),
    "fedtune.federation.resources": ("RunResources.evaluate",),
    "fedtune.training.local": ("train_locally",),
}
_lock = threading.Lock()


def _watch(name: str, function: Any, file: str) -> Any:
    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        begin, result = time.time(), None
        try:
            result = function(*args, **kwargs)
            return result
        finally:
            size = len(result) if isinstance(result, (list, tuple)) else None
            line = {"name": name, "pid": os.getpid(), "begin": begin, "end": time.time(), "size": size}
            line["something"] = result is not None
            with _lock, open(file, "a") as log:  # noqa: PTH123
                log.write(json.dumps(line) + "\n")

    return watched


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, name: str, file: str) -> None:
        self._loader, self._name, self._file = loader, name, file

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        for path in WATCHED[self._name]:
            *owner, last = path.split(".")
            holder = getattr(module, owner[0]) if owner else module
            setattr(holder, last, _watch(path, getattr(holder, last), self._file))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, file: str) -> None:
        self._file, self._busy = file, set[str]()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WATCHED or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, name, self._file)
        return spec


if _file := os.environ.get("FEDTUNE_TRACE"):
    sys.meta_path.insert(0, _Finder(_file))
