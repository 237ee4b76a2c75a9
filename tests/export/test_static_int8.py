"""Static int8: ranges of public texts alone, the model's labels, and nothing that looks for a range."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import ConfigError, DataError
from fedtune.export import export
from fedtune.models.onnx_files import write_int8_static
from fedtune.serving.bundle import EXPORT_NAME, PATHS, Bundle
from fedtune.serving.calibration import product_ranges
from fedtune.serving.classifier import Classifier, onnx_forward
from tests.support.tiny_federation import BAD, GOOD, OTHER

NAME = "onnx-int8-static"


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that are in no split of the made-up data: their words are, so that ranges fit."""
    path = tmp_path_factory.mktemp("public") / "public.txt"
    chance = np.random.default_rng(5)
    words = [*GOOD, *BAD, *OTHER]
    path.write_text("".join(" ".join(chance.choice(words, 9)) + "\n" for _ in range(200)))
    return path


@pytest.fixture(scope="module")
def static(run_dir: Path, public: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.export(
        run_dir, tmp_path_factory.mktemp("static") / "model", ["onnx", NAME], calibrate=public
    )


def test_it_says_what_the_model_says_and_the_card_tells_of_the_texts(static: Path) -> None:
    about = json.loads((static / EXPORT_NAME).read_text())
    figures = about["formats"][NAME]
    assert figures["labels_equal"] >= 0.9 and 1e-6 < figures["largest_difference"] < 0.5
    assert figures["calibrated_on"] == "200 of public.txt, which was named as public"
    assert figures["bytes"] < about["formats"]["onnx"]["bytes"]
    page = (static / "README.md").read_text()
    assert "fixed ranges, taken from 200 of public.txt" in page and "model_int8_static.onnx" in page
    assert Bundle.open(static).chosen() == NAME


def test_nothing_in_the_file_looks_for_a_range(static: Path) -> None:
    import onnx

    operators = {node.op_type for node in onnx.load(static / PATHS[NAME]).graph.node}
    assert "QuantizeLinear" in operators and "MatMulInteger" in operators
    assert not {"ReduceMax", "ReduceMin"} & operators


def test_a_text_gets_what_it_gets_alone(static: Path) -> None:
    model = Classifier.open(Bundle.open(static), NAME, threads=1)
    texts = ["the film was good", "an awful day and a sad film it was so very", "nice"]
    together = model.logits(model.encode(texts))
    alone = np.concatenate([model.logits(model.encode([text])) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_other_ranges_are_another_model(static: Path, tmp_path: Path) -> None:
    """So the calibration is used, and what agreed above could have disagreed."""
    plain = static / PATHS["onnx"]
    model = Classifier.open(Bundle.open(static), "onnx", threads=1)
    ids = model.encode(["the film was good", "an awful day", "so sad"])
    original = model.logits(ids)
    ranges = product_ranges(plain, ids, model.pad_id, threads=1)
    narrow = {name: (least / 20, largest / 20) for name, (least, largest) in ranges.items()}
    off = []
    for place, some in enumerate((ranges, narrow)):
        path = tmp_path / f"{place}.onnx"
        write_int8_static(plain, path, some)
        found = Classifier(model.labels, model.tokenizer, onnx_forward(path, 1), model.pad_id).logits(ids)
        off.append(float(np.abs(found - original).max()))
    assert off[0] < 0.1 < off[1]


def test_padding_does_not_enter_the_ranges(static: Path) -> None:
    plain = static / PATHS["onnx"]
    model = Classifier.open(Bundle.open(static), "onnx", threads=1)
    short, long = model.encode(["good", "an awful day and a sad film it was"])
    both = product_ranges(plain, [short, long], model.pad_id, threads=1)
    one, other = (product_ranges(plain, [ids], model.pad_id, threads=1) for ids in (short, long))
    for name, (least, largest) in both.items():
        np.testing.assert_allclose(least, np.minimum(one[name][0], other[name][0]), atol=1e-5)
        np.testing.assert_allclose(largest, np.maximum(one[name][1], other[name][1]), atol=1e-5)


def test_private_texts_are_refused_and_nothing_is_written(
    run_dir: Path, world: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "model"
    with pytest.raises(ConfigError, match=r"have to be public.*--calibrate\s+FILE"):
        export.export(run_dir, target, [NAME])
    with (world["data"] / "train.csv").open() as file:
        own = next(csv.DictReader(file))["text"]
    (tmp_path / "mixed.txt").write_text(f"a good day\n{own.upper()}\n")
    with pytest.raises(DataError, match=r"1 of the texts in the 2 lines of mixed\.txt are private"):
        export.export(run_dir, target, [NAME], calibrate=tmp_path / "mixed.txt")
    with pytest.raises(ConfigError, match="add onnx-int8-static"):
        export.export(run_dir, target, ["onnx"], calibrate=tmp_path / "mixed.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        export.export(run_dir, target, [NAME], calibrate=tmp_path / "empty.txt")
    assert not target.exists()


def test_public_training_texts_need_no_file(run_dir: Path, tmp_path: Path) -> None:
    """As a record of data that its owner declared public says."""
    from fedtune.export.checks import calibration_texts
    from fedtune.runs import record as records

    made = records.read(Path(shutil.copytree(run_dir, tmp_path / "run")))
    made["privacy"]["data_public"] = True
    texts, where = calibration_texts(made, None)
    assert len(texts) == 120 and where == "120 of the run's training texts, which are public"
