"""An export of a run on pairs says what the run says of pairs; one of a site's own model says whose it is."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedtune.cli.app import main
from fedtune.errors import ConfigError, DataError, RecordError
from fedtune.export import export
from fedtune.runs.predict import load
from fedtune.serving.bundle import EXPORT_NAME, Bundle
from fedtune.serving.classifier import Classifier, segments
from fedtune.serving.evaluation import evaluate
from fedtune.serving.model import ExportedModel
from fedtune.serving.serve import serve
from tests.support import tiny_federation as tiny
from tests.support.cards import code_of, without_fedtune

PAIRS = [
    ("the film was good", "a sad day"),
    ("awful food", "happy"),
    ("so nice and fine", "the food was poor"),
]


@pytest.fixture(scope="module")
def pair_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts each; the label is whether both are of one mood."""
    folder, chance = tmp_path_factory.mktemp("pairs"), np.random.default_rng(3)
    for split, rows in (("train", 120), ("test", 40)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "second", "label", "site"])
            for row in range(rows):
                moods = chance.integers(0, 2, 2)
                texts = [
                    " ".join([*chance.choice(tiny.OTHER, 3), chance.choice(tiny.GOOD if mood else tiny.BAD)])
                    for mood in moods
                ]
                same = "same" if moods[0] == moods[1] else "other"
                writer.writerow([*texts, same, f"site-{row % 2}"])
    return folder


@pytest.fixture(scope="module")
def pair_run(world: dict[str, Path], pair_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedtune.runs.run import run

    folder = tmp_path_factory.mktemp("runs") / "pairs"
    config = tiny.make_config(
        world["model"], pair_data, output=str(folder), data__text_pair="second",
        data__labels=["other", "same"], train__learning_rate=0.3, federation__num_rounds=4,
    )  # fmt: skip
    run(tiny.private(config, epsilon=500.0), console=Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def of_pairs(pair_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.export(pair_run, tmp_path_factory.mktemp("export") / "model")


def said_of(run: Path) -> list[list[float]]:
    return [list(one.probabilities.values()) for one in load(run, device="cpu").predict(PAIRS)]


@pytest.mark.parametrize("name", ["hf", "onnx", "onnx-int8"])
def test_each_format_says_of_pairs_what_the_run_says(of_pairs: Path, pair_run: Path, name: str) -> None:
    model = Classifier.open(Bundle.open(of_pairs), name, threads=1)
    logits = model.logits(model.encode(PAIRS))
    said = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(said, said_of(pair_run), atol=0.05 if name == "onnx-int8" else 1e-5)


def test_the_second_text_is_another_segment(of_pairs: Path, pair_run: Path) -> None:
    """And would it be none, the model would say something else: the check above can fail."""
    bundle = Bundle.open(of_pairs)
    assert bundle.pairs and bundle.separator is not None
    model = Classifier.open(bundle, "onnx", threads=1)
    ids = np.array([model.encode(PAIRS[:1])[0]])
    (found,) = segments(ids, np.ones_like(ids), bundle.separator)
    assert found.tolist() == model.tokenizer.encode(*PAIRS[0]).type_ids
    from fedtune.serving.classifier import onnx_forward

    flat = onnx_forward(bundle.path("onnx"), 1)(ids, np.ones_like(ids))
    assert np.abs(flat - model.forward(ids, np.ones_like(ids))).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2], ids=["logits", "onnxruntime"])
def test_the_lines_of_the_card_ask_about_a_pair_without_fedtune(
    of_pairs: Path, pair_run: Path, tmp_path: Path, number: int
) -> None:
    page = of_pairs / "README.md"
    assert '{"text": "what a wonderful film", "text_pair": "a man is talking"}' in page.read_text()
    code = code_of(page)[number].replace('"what a wonderful film"', repr(PAIRS[0][0]))
    code = code.replace('"a man is talking"', repr(PAIRS[0][1]))
    printed = without_fedtune(code + "\nprint(logits.tolist())", tmp_path)
    (logits,) = np.array(eval(printed.splitlines()[-1]))
    said = np.exp(logits) / np.exp(logits).sum()
    # The last of them are in int8, as the card's are.
    np.testing.assert_allclose(said, said_of(pair_run)[0], atol=0.05 if number == 2 else 1e-5)


def test_pairs_are_evaluated_and_single_texts_are_refused(
    of_pairs: Path, exported: Path, pair_data: Path, tmp_path: Path
) -> None:
    found = evaluate(of_pairs, pair_data, ["data.text_pair=second"], "onnx")
    about = json.loads((of_pairs / EXPORT_NAME).read_text())
    assert found["confusion"] == about["quality"]["confusion"] and about["pairs"] is True
    with pytest.raises(ConfigError, match="data.text_pair=COLUMN"):
        evaluate(of_pairs, pair_data)
    with pytest.raises(ConfigError, match="leave data.text_pair out"):
        evaluate(exported, pair_data, ["data.text_pair=second"])
    model = ExportedModel(of_pairs)
    (one,) = model.predict(PAIRS[:1])
    assert (one.text, one.pair) == PAIRS[0] and one.label in ("other", "same")
    with pytest.raises(DataError, match="pairs of texts: give both"):
        model.predict(["one alone"])
    words = ["--input", pair_data / "test.csv", "--pair-column", "second", "--output", tmp_path / "said.csv"]
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in ("predict", of_pairs, *words)])
    assert left.value.code == 0
    with (tmp_path / "said.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 40
    with pytest.raises(ConfigError, match="trained on pairs of texts"):
        serve([str(of_pairs)], "127.0.0.1", 0)


def test_a_file_of_pairs_to_check_with_has_two_texts_a_line(pair_run: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("a good film\tan awful day\nhappy food\tit was fine\n")
    folder = export.export(pair_run, tmp_path / "model", ["hf"], texts=tmp_path / "pairs.txt")
    assert json.loads((folder / EXPORT_NAME).read_text())["check"]["num_texts"] == 2
    (tmp_path / "lines.txt").write_text("a good film\tan awful day\none alone\n")
    with pytest.raises(DataError, match=r"Line 2 of lines\.txt is no pair"):
        export.export(pair_run, tmp_path / "other", ["hf"], texts=tmp_path / "lines.txt")


# --- a site's own model --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_site_s_own_model_is_exported_and_its_card_says_whose_it_is(run_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    with pytest.raises(RecordError, match="no model of a site"):
        export.export(run, tmp_path / "model", ["hf"], site="site-1")
    own = shutil.copytree(run / "adapter", run / "personal" / "site-1")
    weights = load_file(own / "adapter_model.safetensors")
    head = next(name for name in weights if name.endswith("bias") and weights[name].numel() == 2)
    weights[head][0] += 1.5
    save_file(weights, own / "adapter_model.safetensors")
    folder = export.export(run, tmp_path / "model", ["hf", "onnx-int8"], site="site-1")
    model = Classifier.open(Bundle.open(folder), "hf")
    texts = ["the film was good", "so sad"]
    logits = model.logits(model.encode(texts))
    said = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mine, common = (
        [list(one.probabilities.values()) for one in load(run, device="cpu", site=site).predict(texts)]
        for site in ("site-1", None)
    )
    np.testing.assert_allclose(said, mine, atol=1e-5)
    assert np.abs(said - np.array(common)).max() > 5e-3
    about = json.loads((folder / EXPORT_NAME).read_text())
    assert about["site"] == "site-1" and about["check"]["num_texts"] == 10
    assert about["check"]["texts"] == "the part of site-1 in the run's public test split"
    page = (folder / "README.md").read_text()
    assert "This is the model of site-1 alone" in page and "for the site to decide" in page
    with pytest.raises(RecordError, match="no model of site 'site-9'"):
        export.export(run, tmp_path / "other", ["hf"], site="site-9")
