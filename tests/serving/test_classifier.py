"""Batches hold every text once, no more tokens than allowed, and little padding; a model is tried first."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ModelError
from fedtune.serving import classifier
from fedtune.serving.bundle import PATHS, Bundle, write_sums
from fedtune.serving.classifier import Classifier, token_batches


@given(
    st.lists(st.integers(1, 64), max_size=60),
    st.sampled_from([64, 512, 2048]),
    st.sampled_from([0, 12, math.inf]),
)
def test_every_text_is_in_one_batch_within_its_limits(
    lengths: list[int], max_tokens: int, max_padding: float
) -> None:
    batches = list(token_batches(lengths, max_tokens, max_padding))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        of_batch = [lengths[place] for place in batch]
        whole = len(batch) * max(of_batch)
        assert whole <= max_tokens or len(batch) == 1
        assert whole - sum(of_batch) <= max_padding


@pytest.mark.parametrize(
    ("max_padding", "expected"),
    [(math.inf, [[1, 2, 0, 3]]), (12, [[1, 2], [0, 3]]), (0, [[1], [2], [0], [3]])],
)
def test_texts_of_unlike_lengths_are_apart(max_padding: float, expected: list[list[int]]) -> None:
    assert list(token_batches([10, 30, 24, 8], 512, max_padding)) == expected


# --- models that answer no question about these labels ---


def altered(exported: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """The exported folder with another ONNX graph, and sums that agree with it."""
    import onnx

    folder = Path(shutil.copytree(exported, target))
    path = folder / PATHS["onnx"]
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    write_sums(folder)
    return folder


def another_label_map(graph: Any) -> None:
    """The head of three labels."""
    from onnx import numpy_helper

    logits = next(node for node in graph.node if "logits" in node.output)
    for one in graph.initializer:
        if one.name in logits.input:
            value = numpy_helper.to_array(one)
            axis = value.ndim - 1 if value.shape[-1] == 2 else 0
            wider = np.concatenate([value, value.take([0], axis=axis)], axis=axis)
            one.CopyFrom(numpy_helper.from_array(wider, one.name))
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3


def another_task(graph: Any) -> None:
    """Something about every token, as taggers say it."""
    from onnx import TensorProto, helper

    hidden = next(node.output[0] for node in reversed(graph.node) if node.op_type == "LayerNormalization")
    graph.node.append(helper.make_node("Identity", [hidden], ["tags"]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("tags", TensorProto.FLOAT, None))


def damaged_weights(graph: Any) -> None:
    from onnx import numpy_helper

    for one in graph.initializer:
        value = numpy_helper.to_array(one)
        if value.ndim == 2 and value.dtype == np.float32:
            one.CopyFrom(numpy_helper.from_array(np.full_like(value, np.nan), one.name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_label_map, r"is no classifier of the 2 labels .* \[1, 3\] numbers"),
        (another_task, r"is no classifier of the 2 labels .* another\s+task"),
        (damaged_weights, "NaN or infinity"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_it_is_asked(
    exported: Path, tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    folder = altered(exported, tmp_path / "model", change)
    with pytest.raises(ModelError, match=words):
        Classifier.open(Bundle.open(folder), "onnx", threads=1)


def test_a_model_that_fails_is_refused_before_it_is_served(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(classifier, "onnx_forwards", lambda paths, *rest: [broken for _ in paths])
    with pytest.raises(ModelError, match="cannot be asked: a kernel is missing"):
        Classifier.open(Bundle.open(exported), "onnx")


@pytest.mark.slow
def test_onnxruntime_keeps_no_name_of_this_machine_to_report_by(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from fedtune.errors import ModelError\n"
        "from fedtune.serving.classifier import onnx_session\n"
        "try: onnx_session(b'', Path('none.onnx'), 1)\n"
        "except ModelError: print('asked')\n"
    )
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**ours, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "asked\n"
    # With its reports on it makes an id of the machine there, and asks for its maker's address.
    assert not (tmp_path / ".cache" / "Microsoft").exists()
