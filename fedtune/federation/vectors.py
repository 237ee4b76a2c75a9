"""One flat float32 vector in a message: written and read as Flower does it, by `numpy.save` and `numpy.load`.

Both spend more on their header than on the numbers of a small head, and a federation of thousands of nodes
does it four times for each in every round. The header of float32 [P] follows from P, so it is made and
compared as bytes; whatever has another one goes through numpy.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from fedtune.errors import FederationError

__all__ = ["array_record", "read_vector"]

_NUMPY = "numpy.ndarray"  # how Flower says that `numpy.save` wrote the bytes


@functools.lru_cache(maxsize=8)
def _header(size: int) -> bytes:
    """What `numpy.save` writes before the numbers of float32 [size]."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (size,)})
    return file.getvalue()


def array_record(name: str, vector: np.ndarray) -> ArrayRecord:
    """`vector` as the one array `name`, float32 [P]."""
    numbers = np.ascontiguousarray(vector.ravel(), dtype="<f4")
    data = _header(numbers.size) + numbers.tobytes()
    return ArrayRecord({name: Array("float32", numbers.shape, _NUMPY, data)})


def read_vector(content: RecordDict, name: str, what: str) -> np.ndarray:
    """The flat float32 array in the ArrayRecord `name`; a copy of the received bytes.

    Raises:
        FederationError: there is no such array, or it is anything else; it says `what` it is.
    """
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or list(record) != [name]:
        raise FederationError(f"{what} has no array {name!r} (it has {sorted(content)}).")
    array = record[name]
    # A header that lies about its size must not make this process allocate it: look at the bytes first.
    if array.dtype != "float32" or len(array.shape) != 1 or len(array.data) > 4 * array.shape[0] + 1024:
        raise FederationError(
            f"{what}: {name} is {array.dtype}{list(array.shape)}, and should be float32[P]."
        )
    header, known = _header(array.shape[0]), array.stype == _NUMPY
    if known and array.data.startswith(header) and len(array.data) == len(header) + 4 * array.shape[0]:
        return np.frombuffer(array.data, dtype="<f4", offset=len(header)).astype(np.float32)
    try:
        vector = array.numpy()
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise FederationError(f"{what}: {name} cannot be decoded ({type(error).__name__}).") from error
    if vector.dtype != np.float32 or vector.shape != tuple(array.shape):
        raise FederationError(
            f"{what}: {name} says float32{list(array.shape)} and is {vector.dtype}{list(vector.shape)}."
        )
    return vector
