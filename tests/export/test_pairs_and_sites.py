"""An export of a run on pairs says what the run says of pairs; one of a site's own model says whose it is."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from rich.console import Console

from fedtune.cli.app import main
from fedtune.errors import ConfigError, DataError, RecordError
from fedtune.export import export
from fedtune.runs.predict import load
from fedtune.serving.app import Served, make_app
from fedtune.serving.bundle import EXPORT_NAME, Bundle
from fedtune.serving.classifier import Classifier, segments
from fedtune.serving.evaluation import evaluate
from fedtune.serving.model import ExportedModel
from fedtune.serving.questions import Limits
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


def test_a_file_of_pairs_to_check_with_has_two_texts_a_line(pair_run: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("a good film\tan awful day\nhappy food\tit was fine\n")
    folder = export.export(pair_run, tmp_path / "model", ["hf"], texts=tmp_path / "pairs.txt")
    assert json.loads((folder / EXPORT_NAME).read_text())["check"]["num_texts"] == 2
    (tmp_path / "lines.txt").write_text("a good film\tan awful day\none alone\n")
    with pytest.raises(DataError, match=r"Line 2 of lines\.txt is no pair"):
        export.export(pair_run, tmp_path / "other", ["hf"], texts=tmp_path / "lines.txt")


# --- a service of pairs --------------------------------------------------------------------------


def served(folder: Path) -> Served:
    bundle = Bundle.open(folder)
    return Served(bundle, Classifier.open(bundle, "onnx", threads=1), "onnx")


@pytest.fixture(scope="module")
def client(of_pairs: Path) -> Iterator[TestClient]:
    with TestClient(make_app({"mood": served(of_pairs)})) as opened:
        yield opened


def test_a_service_says_of_pairs_what_the_run_says(client: TestClient, pair_run: Path) -> None:
    found = client.post("/predict", json={"pairs": PAIRS}).json()["predictions"]
    said = said_of(pair_run)
    np.testing.assert_allclose([list(one["probabilities"].values()) for one in found], said, atol=1e-5)
    first, second = PAIRS[0]
    (alone,) = client.post("/predict", json={"text": first, "text_pair": second}).json()["predictions"]
    assert list(alone["probabilities"].values()) == pytest.approx(said[0], abs=1e-5)
    (turned,) = client.post("/predict", json={"text": second, "text_pair": first}).json()["predictions"]
    assert abs(turned["probability"] - alone["probability"]) > 1e-4  # which is which matters
    assert client.get("/models").json()["models"][0]["pairs"] is True


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": "one"}, '"text" and "text_pair"'),
        ({"texts": ["one"]}, '"pairs"'),
        ({"pairs": [["one"]]}, "pairs.0: "),
        ({"pairs": [["one", "two", "three"]]}, "pairs.0: "),
        ({"pairs": [["one", 2]]}, "pairs.0.1: "),
        ({"pairs": []}, "no text"),
        ({"pairs": [["one", " "]]}, "Text 2 of 2 is empty"),
        ({"pairs": [["one", "a" * 20_001]]}, "20001 characters"),
        ({"pairs": [["one", "two"]] * 257}, "257 pairs; a request may have 256"),
        ({"text_pair": "two"}, "one of the two"),
        ({"texts": ["one"], "text_pair": "two"}, 'beside "text"'),
        ({"text": "one", "pairs": [["one", "two"]]}, "one of the two"),
    ],
)
def test_what_is_no_question_about_pairs(client: TestClient, body: dict[str, Any], words: str) -> None:
    response = client.post("/predict", json=body)
    assert response.status_code == 422 and words in response.json()["detail"]


def test_a_model_of_single_texts_beside_it_refuses_pairs_and_the_page_says_which(
    of_pairs: Path, exported: Path
) -> None:
    with TestClient(make_app({"mood": served(of_pairs), "film": served(exported)})) as client:
        refused = client.post("/predict", json={"pairs": PAIRS, "model": "film"})
        assert refused.status_code == 422 and "takes single texts" in refused.json()["detail"]
        assert client.post("/predict", json={"text": "good", "model": "film"}).status_code == 200
        paths = client.get("/openapi.json").json()["paths"]

    def forms(path: str) -> list[tuple[set[str], list[str]]]:
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return [(set(one["required"]), one["properties"]["model"]["enum"]) for one in schema["oneOf"]]

    assert forms("/explain") == [({"text", "model"}, ["film"]), ({"text", "text_pair", "model"}, ["mood"])]
    assert forms("/predict")[2:] == [({"texts", "model"}, ["film"]), ({"pairs", "model"}, ["mood"])]


def test_an_explanation_leaves_out_words_of_both_texts(client: TestClient, of_pairs: Path) -> None:
    first, second = "Good food,  an awful film\U0001f600", "a sad day"
    found = client.post("/explain", json={"text": first, "text_pair": second}).json()
    for text, words, read in ((first, "words", "read"), (second, "pair_words", "pair_read")):
        spans = [text[one["start"] : one["end"]] for one in found[words]]
        assert "".join(spans) == "".join(text.split()) and found[read] == len(text)

    def odds(pair: tuple[str, str]) -> float:
        (one,) = client.post("/predict", json={"pairs": [pair]}).json()["predictions"]
        probability = one["probabilities"][found["label"]]
        return float(np.log(probability / (1 - probability)))

    whole = odds((first, second))
    for one in found["pair_words"]:
        without = second[: one["start"]] + " " + second[one["end"] :]
        assert one["weight"] == pytest.approx(whole - odds((first, without)), abs=2e-3)
    for one in found["words"]:
        without = first[: one["start"]] + " " + first[one["end"] :]
        assert one["weight"] == pytest.approx(whole - odds((without, second)), abs=2e-3)
    with TestClient(make_app({"mood": served(of_pairs)}, Limits(parts=4))) as other:
        short = other.post("/explain", json={"text": "good " * 300, "text_pair": second}).json()
    assert len(short["words"]) == 3 and len(short["pair_words"]) == 1  # no part is of both


# --- smaller models of pairs ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_pairs_is_compressed_and_says_of_pairs_what_its_card_says(
    pair_run: Path, pair_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.compress import compress as module

    monkeypatch.setattr(module, "memory_of", lambda *rest: 1)
    words = [
        "steps=[prune,distill,quantize]", "prune.units=0.25", "prune.heads=0", "distill.layers=1",
        "transfer.augment=1", "transfer.epochs=1", "transfer.batch=8",
    ]  # fmt: skip
    folder = module.compress(pair_run, words, tmp_path / "small")
    about = json.loads((folder / module.RECORD_NAME).read_text())
    assert about["texts"]["num_learn"] == 20 and about["texts"]["num_measured"] == 20
    # What was measured is the run's own model on pairs, with their segments.
    said = evaluate(folder, pair_data, ["data.text_pair=second"], "onnx")
    assert said["num_records"] == 40
    hf, onnx = (Classifier.open(Bundle.open(folder), name, threads=1) for name in ("hf", "onnx"))
    ids = hf.encode(PAIRS)
    np.testing.assert_allclose(hf.logits(ids), onnx.logits(ids), atol=1e-4)
    bundle = Bundle.open(folder)
    assert bundle.pairs and bundle.separator == Bundle.open(folder).about["separator"] is not None
    assert about["original"]["accuracy"] == pytest.approx(measured_by_the_run(pair_run, 0.5))
    (tmp_path / "lines.txt").write_text("one alone\n" * 9)
    with pytest.raises(DataError, match=r"Line 1 of lines\.txt is no pair"):
        module.compress(pair_run, [f"texts={tmp_path / 'lines.txt'}"], tmp_path / "other")


def measured_by_the_run(run: Path, share: float) -> float:
    """How right the run's own model is on what a compression measures on."""
    from fedtune.compress.texts import texts_for
    from fedtune.runs import record

    texts = texts_for(record.read(run), None, share, 0)
    model = load(run, device="cpu")
    assert texts.labels is not None and isinstance(texts.measure[0], tuple)
    found = [model.labels.index(str(one.label)) for one in model.predict(texts.measure)]
    return float(np.mean(np.array(found) == texts.labels))


@pytest.mark.slow
def test_private_pairs_are_not_learnt_from(pair_run: Path, pair_data: Path, tmp_path: Path) -> None:
    from fedtune.compress.compress import compress

    rows = list(csv.DictReader((pair_data / "train.csv").open()))[:12]
    (tmp_path / "own.txt").write_text("".join(f"{one['text']}\tsome other\n" for one in rows))
    with pytest.raises(DataError, match="private training texts of this run"):
        compress(pair_run, [f"texts={tmp_path / 'own.txt'}"], tmp_path / "small")


def test_altered_pairs_stay_pairs() -> None:
    from fedtune.compress.texts import altered

    made = altered(PAIRS, 5, "[MASK]", 0)
    assert len(made) == 15 and all(isinstance(one, tuple) and all(one) for one in made)
    assert {word for one in made for word in one[1].split()} - {"[MASK]"} <= {
        word for pair in PAIRS for text in pair for word in text.split()
    }


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
