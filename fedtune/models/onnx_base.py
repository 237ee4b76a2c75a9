"""Several ONNX models that differ in a few constants as one: their common base, and what is each one's own.

Adapters over one base, merged and exported one by one, are files with the same graph, most constants of which
are the same to the last bit: all of them but the head's for `head`, all but those of the adapted layers for
LoRA. `share` makes one model of such files, in which the constants that differ are inputs: asked with the
constants of one file, it answers as that file does, and the base is in memory once.

Does not do: graphs that differ (another base, a pruned or distilled model): those are no one model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

__all__ = ["Constants", "share"]

Constants = dict[str, NDArray[Any]]


def share(paths: Sequence[Path]) -> tuple[bytes, list[Constants]] | None:
    """The common base of the ONNX files `paths` as an ONNX model, and of each file its own constants by name.

    Returns:
        None: there is no common base, for the graphs differ.

    Raises:
        ImportError: onnx is not installed.
    """
    from onnx import helper

    seen = [_read(path) for path in paths]
    graph, sums = seen[0]
    if any(other != graph or _shapes(each) != _shapes(sums) for other, each in seen[1:]):
        return None
    own = [name for name, one in sums.items() if any(each[name] != one for _, each in seen[1:])]
    base, constants = _apart(paths[0], own)
    base.graph.input.extend(
        helper.make_tensor_value_info(name, kind, dims)
        for name, (kind, dims, _) in sums.items()
        if name in constants
    )
    return base.SerializeToString(), [constants, *(_apart(path, own)[1] for path in paths[1:])]


_Sums = dict[str, tuple[int, tuple[int, ...], bytes]]  # by name: type, shape, hash of the numbers


def _read(path: Path) -> tuple[list[bytes], _Sums]:
    """The graph in `path` without its constants, and what is to be compared of those: one file at a time."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    graph = model.graph
    parts = (*graph.node, *graph.input, *graph.output, *model.opset_import)
    sums = {
        one.name: (
            one.data_type,
            tuple(one.dims),
            hashlib.sha256(numpy_helper.to_array(one).tobytes()).digest(),
        )
        for one in graph.initializer
    }
    return [part.SerializeToString(deterministic=True) for part in parts], sums


def _shapes(sums: _Sums) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {name: one[:2] for name, one in sums.items()}


def _apart(path: Path, own: Sequence[str]) -> tuple[Any, Constants]:
    """The model in `path` without the constants `own`, and these."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    every = list(model.graph.initializer)
    constants = {one.name: numpy_helper.to_array(one).copy() for one in every if one.name in own}
    kept = [one for one in every if one.name not in own]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model, constants
