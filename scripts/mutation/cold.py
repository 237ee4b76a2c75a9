"""Mutants of code that runs at import: a process that has imported the libraries, but nothing of ours.

It reads one JSON request a line, `{"path", "module", "mutant", "tests", "seconds"}`, forks a child that
imports the module with that mutant in it and runs the tests, and answers with a line `{"failed": ...}`, empty
for none.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from scripts.mutation.operators import mutants_of

__all__ = ["ColdServer", "import_libraries"]

_LIBRARIES = (
    "numpy", "scipy.stats", "scipy.special", "scipy.optimize", "torch", "transformers", "peft",
    "opacus.grad_sample", "opacus.accountants", "flwr.server", "flwr.clientapp", "flwr.serverapp",
    "datasets", "dp_accounting", "dp_accounting.rdp", "dp_accounting.pld.privacy_loss_distribution",
    "omegaconf", "hydra", "hypothesis", "pytest", "cryptography", "multiprocessing", "sqlite3",
)  # fmt: skip


def import_libraries() -> None:
    """So that no child pays for it."""
    for name in _LIBRARIES:
        importlib.import_module(name)


class ColdServer:
    """The process, from the side of the one who asks. Starts at the first request."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> str:
        """The test that killed the mutant, or why it could not run; "" if it survived."""
        if self._process is None:
            command = [sys.executable, "-m", "scripts.mutation.cold"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return str(json.loads(process.stdout.readline())["failed"])

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, mutant: str) -> None:
        super().__init__(name, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(Path(self.path).read_text(encoding="utf-8"))
        next(m for m in mutants_of(tree, fullname) if m.name == self._mutant).apply()
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class _Finder:
    def __init__(self, name: str, path: str, mutant: str) -> None:
        self._name, self._path, self._mutant = name, path, mutant

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        loader = _Loader(name, self._path, self._mutant)
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


class _First:
    """A pytest plugin: keeps the name of the first test that fails."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def _child(request: dict[str, Any], answer: int, folder: str) -> None:
    import pytest

    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    sys.meta_path.insert(0, _Finder(request["module"], request["path"], request["mutant"]))
    first = _First()
    options = [
        "-x",
        "-q",
        "-s",
        "-m",
        "",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        f"--basetemp={folder}/pytest",
    ]
    status = int(pytest.main([*options, *request["tests"]], plugins=[first]))
    if status == 4 and not first.failed:
        # A test's name may hold the number that was changed: then it is not found, which proves nothing.
        files = sorted({name.partition("::")[0] for name in request["tests"]})
        status = int(pytest.main([*options, *files], plugins=[first]))
    failed = first.failed or ("" if status == 0 else f"(pytest ended with {status})")
    os.write(answer, failed.encode())


def _serve(request: dict[str, Any]) -> str:
    folder = tempfile.mkdtemp(prefix="mutant-")
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        status = 9
        try:
            _child(request, write, folder)
            status = 0
        except BaseException as error:
            os.write(write, f"(import) {type(error).__name__}".encode())
        finally:
            os._exit(status)
    os.close(write)
    deadline, late = time.monotonic() + request["seconds"], False
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline and not late:
            os.killpg(pid, signal.SIGKILL)
            late = True
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    said = b""
    while part := os.read(read, 1 << 16):
        said += part
    os.close(read)
    shutil.rmtree(folder, ignore_errors=True)
    return "(timeout)" if late else said.decode() or ("(crash)" if ended[1] else "")


def main() -> None:
    """Serves until the input ends."""
    os.environ.pop("FEDTUNE_TEST_CACHE", None)
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import_libraries()
    for line in sys.stdin:
        print(json.dumps({"failed": _serve(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
