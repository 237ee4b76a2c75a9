"""Arrays kept on disk so that the next process need not make them again: token ids, partitions.

One .npy file an array: int32 [2 + k], a format number, the CRC-32 of the rest, and the rest. One file, so
that a rename puts it into place whole: several processes may write the same array at once, and the last one
wins with equal bytes. A file that does not hold what it should is taken for missing, with a warning. A
cache that cannot be written (read-only, full disk) costs time at the next start and nothing else, so
that is a warning too, and the run goes on in memory.

Files are readable by their owner only: what is made from private texts is as private as they are.
"""

from __future__ import annotations

import io
import warnings
import zlib
from pathlib import Path

import numpy as np

from fedtune.config.files import replace_whole
from fedtune.data.corpus import Int32Array

__all__ = ["load_array", "store_array", "warn_unusable"]

FORMAT = 1
HEADER = 2


def load_array(path: Path) -> Int32Array | None:
    """The array in `path`, mapped and read-only; None if it is not there or, with a warning, damaged."""
    if not path.exists():
        return None
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        if stored.dtype != np.int32 or stored.ndim != 1 or len(stored) < HEADER or stored[0] != FORMAT:
            raise ValueError("not a file of this version")
        if stored[1] != _checksum(stored[HEADER:]):
            raise ValueError("checksum differs")
    except (OSError, ValueError, EOFError) as error:
        warn_unusable(path, str(error))
        return None
    return stored[HEADER:]


def warn_unusable(path: Path, why: str) -> None:
    """Warns that the cached file at `path` is not what it should be."""
    warnings.warn(f"The cached file {path} is unusable ({why}); it is built anew.", stacklevel=4)


def store_array(path: Path, array: Int32Array) -> bool:
    """Stores `array` (int32 [k]) at `path`; False, with a warning, if that is not possible."""
    header = np.array([FORMAT, _checksum(array)], dtype=np.int32)
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([header, array]), allow_pickle=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, buffer.getvalue(), mode=0o600)
    except OSError as error:
        warnings.warn(
            f"The cache file {path} cannot be written ({error}); the run goes on, and the next one does the"
            " work again. Free some space, or let FEDTUNE_HOME name a folder that can be written.",
            stacklevel=4,
        )
        return False
    return True


def _checksum(array: Int32Array) -> int:
    # As a signed number, to fit among the int32.
    return int(np.uint32(zlib.crc32(np.ascontiguousarray(array).tobytes())).astype(np.int32))
