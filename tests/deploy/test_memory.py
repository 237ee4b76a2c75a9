"""Memory that a process gives back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CHILD = """
import ctypes, json, sys
import numpy as np, psutil
from fedtune.deploy.memory import WORKER_BLOCK, give_memory_back

if sys.argv[1] == "gives":
    give_memory_back(WORKER_BLOCK)
np.ones(2 * 10**7, np.int8)  # raises the C library's own threshold to this size
held = psutil.Process().memory_info().rss
blocks, stays = [], []
for _ in range(30):
    blocks.append(np.ones(WORKER_BLOCK + 10**6, np.int8))
    stays.append(np.ones(10**5, np.int8))  # above it in the heap, whose end alone goes back
blocks.clear()
print(json.dumps((psutil.Process().memory_info().rss - held) / 10**6))
"""


def megabytes_kept(which: str) -> float:
    done = subprocess.run([sys.executable, "-c", CHILD, which], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_blocks_go_back_to_the_system() -> None:
    assert megabytes_kept("keeps") > 100  # else this test holds nothing
    assert megabytes_kept("gives") < 20
