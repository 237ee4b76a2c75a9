"""The flat vector of a message: the bytes that Flower and numpy write, however they are made."""

from __future__ import annotations

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from fedtune.errors import FederationError
from fedtune.federation import vectors
from fedtune.federation.vectors import array_record, read_vector


def of(array: Array) -> RecordDict:
    return RecordDict({"v": ArrayRecord({"v": array})})


@pytest.mark.parametrize("size", [0, 1, 9, 10, 770, 99_999, 100_000])
def test_a_vector_travels_as_flower_writes_it(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = np.random.default_rng(size).normal(size=size).astype(np.float32)
    record = array_record("v", vector)
    assert record["v"] == Array(vector)
    monkeypatch.setattr(Array, "numpy", lambda self: pytest.fail("the header is known"))
    back = read_vector(RecordDict({"v": record}), "v", "It")
    assert back.dtype == np.float32 and back.flags.writeable
    np.testing.assert_array_equal(back, vector)


def test_another_header_is_read_by_numpy() -> None:
    vector = np.arange(5, dtype=np.float32)
    file = io.BytesIO()
    np.lib.format.write_array(file, vector, version=(2, 0))
    array = Array("float32", (5,), "numpy.ndarray", file.getvalue())
    assert not array.data.startswith(vectors._header(5))
    np.testing.assert_array_equal(read_vector(of(array), "v", "It"), vector)


@pytest.mark.parametrize(
    ("shape", "data", "why"),
    [
        ((5,), vectors._header(5) + bytes(16), "cannot be decoded"),  # a number short
        ((4,), vectors._header(5) + bytes(20), "says float32\\[4\\] and is float32\\[5\\]"),
        ((10**9,), vectors._header(10**9) + bytes(20), "cannot be decoded"),
        ((2, 2), vectors._header(4) + bytes(16), "should be float32"),
    ],
)
def test_a_header_that_lies_is_refused(shape: tuple[int, ...], data: bytes, why: str) -> None:
    with pytest.raises(FederationError, match=why):
        read_vector(of(Array("float32", shape, "numpy.ndarray", data)), "v", "It")
