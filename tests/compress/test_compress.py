"""A compressed folder is one that can be used, says what was done, and its figures are those of its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.compress import compress as module
from fedtune.compress.compress import RECORD_NAME, compress
from fedtune.compress.texts import altered, texts_for, texts_of_file
from fedtune.compress.transfer import Inputs, Teacher, learn
from fedtune.config.compression import Transfer
from fedtune.errors import ConfigError, DataError, FedtuneError, ModelError, RecordError
from fedtune.export import checks
from fedtune.models.encoder import load_pretrained
from fedtune.models.standalone import load_merged
from fedtune.models.surgery import Kept, anatomy, cut
from fedtune.runs import record as records
from fedtune.serving.bundle import PATHS, Bundle
from fedtune.serving.classifier import Classifier
from fedtune.serving.evaluation import evaluate
from tests.support.golden import Golden

# Little to learn, for the model and the texts are tiny.
QUICK = ("transfer.augment=1", "transfer.epochs=2", "transfer.batch=8")


@pytest.fixture(autouse=True)
def no_process_for_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that import torch take seconds; one test has them."""
    monkeypatch.setattr(module, "memory_of", lambda *rest: 1)


@pytest.fixture(scope="module")
def student(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "memory_of", lambda *rest: 1)
        words = ["distill.layers=1", "quantize=[int8,int8-weights,nf4]", *QUICK]
        return compress(run_dir, words, tmp_path_factory.mktemp("compressed") / "student")


@pytest.fixture
def about(student: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((student / RECORD_NAME).read_text())
    return loaded


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Callable[[], Path]:
    return lambda: Path(shutil.copytree(run_dir, tmp_path / "run"))


@pytest.mark.slow
def test_the_folder_is_whole_and_evaluated_as_it_says(
    student: Path, about: dict[str, Any], world: dict[str, Path]
) -> None:
    bundle = Bundle.open(student)
    assert set(bundle.about["formats"]) == {"hf", "onnx", "onnx-int8", "onnx-int8-weights", "onnx-nf4"}
    assert anatomy(load_merged(student)).layers == 1
    for name, one in about["formats"].items():
        assert one["bytes"] == (student / PATHS[name]).stat().st_size
        assert one["ratio"] > 0 and one["low"] <= one["ratio"] <= one["high"]
        found = evaluate(student, world["data"], ["data.site=site"], name)
        assert found["num_records"] == 40  # of which half were learnt from


def test_figures_are_of_the_texts_that_nothing_was_learnt_from(
    student: Path, about: dict[str, Any], run_dir: Path
) -> None:
    texts = texts_for(records.read(run_dir), None, 0.5, 0)
    assert texts.labels is not None and not set(texts.learn) & set(texts.measure)
    assert (about["texts"]["num_learn"], about["texts"]["num_measured"]) == (
        len(texts.learn),
        len(texts.measure),
    )
    for name, one in about["formats"].items():
        model = Classifier.open(Bundle.open(student), name, threads=1)
        right = model.logits(model.encode(texts.measure)).argmax(1) == texts.labels
        assert one["accuracy"] == pytest.approx(right.mean())
        assert one["difference"] == pytest.approx(right.mean() - about["original"]["accuracy"])
    assert about["steps"][0]["accuracy"] == about["formats"]["hf"]["accuracy"]
    assert about["steps"][0]["layers"] == 1 and about["original"]["layers"] == 2
    assert about["steps"][0]["bytes"] < about["original"]["bytes"] and about["steps"][0]["loss"] > 0


def test_weights_alone_in_integers_are_smaller_and_say_nearly_the_same(student: Path) -> None:
    bundle = Bundle.open(student)
    ids = [[2, 5, 12, 13, 3], [2, 9, 16, 3], [2, 20, 21, 22, 11, 3]]
    logits = {name: Classifier.open(bundle, name, 1).logits(ids) for name in bundle.about["formats"]}
    assert np.abs(logits["onnx-int8-weights"] - logits["onnx"]).max() < 0.05 * np.abs(logits["onnx"]).max()
    assert 0 < np.abs(logits["onnx-nf4"] - logits["onnx"]).max() < 0.5 * np.abs(logits["onnx"]).max()
    sizes = {name: one["bytes"] for name, one in bundle.about["formats"].items()}
    assert sizes["onnx-int8-weights"] < sizes["onnx"]


def test_the_card_says_what_was_done_and_why_it_costs_no_privacy(
    student: Path, about: dict[str, Any]
) -> None:
    page = (student / "README.md").read_text()
    made = page[page.index("## How it was made smaller") : page.index("## How right it is")]
    assert "Distilled: a student of 1 of 2 layers (1)." in made and "post-processing" in made
    assert "| `onnx-int8` | " in made and f"{about['formats']['onnx-int8']['accuracy']:.1%}" in made
    assert "No label of them was looked at" in made
    assert page.count("## How right it is") == 1


@pytest.mark.slow
def test_a_pruned_model_is_smaller_and_runs_without_fedtune(run_dir: Path, tmp_path: Path) -> None:
    from tests.export.test_export import TEXTS
    from tests.support.cards import code_of, without_fedtune

    words = [
        "compress=pruned",
        "prune.heads=0.25",
        "prune.units=0.5",
        "prune.layers=1",
        "steps=[prune]",
        *QUICK,
    ]
    folder = compress(run_dir, words, tmp_path / "pruned")
    now = anatomy(load_merged(folder))
    assert (now.layers, now.heads, now.units) == (1, (2,), (32,)) or now.heads == (1,)
    said = eval(without_fedtune(code_of(folder / "README.md", TEXTS)[1], tmp_path))
    model = Classifier.open(Bundle.open(folder), "onnx", 1)
    logits = model.logits(model.encode(TEXTS))
    assert said == [model.labels[i] for i in logits.argmax(1)]


@pytest.mark.slow
def test_half_of_the_weights_are_zero_and_stay_so(run_dir: Path, tmp_path: Path) -> None:
    folder = compress(run_dir, ["compress=sparse", *QUICK], tmp_path / "sparse")
    model = load_merged(folder)
    weights = torch.cat(
        [p.flatten() for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2]
    )
    assert float((weights == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    about = json.loads((folder / RECORD_NAME).read_text())
    assert about["steps"][0]["loss"] > 0 and "50%" in about["steps"][0]["what"]


@pytest.mark.slow
def test_a_base_becomes_a_smaller_one_that_a_run_trains_on(world: dict[str, Path], tmp_path: Path) -> None:
    from rich.console import Console

    from fedtune.runs.run import run
    from tests.support import tiny_federation as tiny

    texts = tmp_path / "public.txt"
    texts.write_text("\n".join(f"the film was {word} and so {i}" for i, word in enumerate(tiny.GOOD * 20)))
    words = ["distill.layers=1", f"texts={texts}", *QUICK]
    folder = compress(str(world["model"]), words, tmp_path / "base")
    about = json.loads((folder / RECORD_NAME).read_text())
    assert about["run"] is None and about["privacy"] is None and about["base"]["name"] == "model"
    assert 0.5 < about["steps"][0]["cosine"] <= 1 and about["original"]["cosine"] == pytest.approx(
        1, abs=1e-4
    )
    assert str(tmp_path) not in (folder / RECORD_NAME).read_text() + (folder / "README.md").read_text()
    config = tiny.make_config(folder, world["data"], output=str(tmp_path / "run"), federation__num_rounds=1)
    run(config, console=Console(quiet=True))
    assert (tmp_path / "run" / "record.json").is_file()


@pytest.mark.slow
def test_a_smaller_encoder_learns(run_dir: Path, world: dict[str, Path], tmp_path: Path) -> None:
    base = load_pretrained(module.ModelConfig(name=str(world["model"])))
    small = cut(base, Kept.all_of([0], anatomy(base)))
    shutil.copytree(world["model"], tmp_path / "small")
    small.save_pretrained(tmp_path / "small")
    words = ["steps=[distill]", "distill.layers=null", f"distill.student={tmp_path / 'small'}", *QUICK]
    folder = compress(run_dir, words, tmp_path / "made")
    about = json.loads((folder / RECORD_NAME).read_text())
    assert about["settings"]["distill"]["student"] == "small" and about["steps"][0]["layers"] == 1


@pytest.mark.slow
def test_what_a_student_learns_is_what_the_teacher_says(run_dir: Path) -> None:
    from fedtune.models.standalone import merged

    teacher = merged(run_dir / "adapter")
    ids = [[2, 5 + i % 18, 7 + i % 15, 3] for i in range(40)]
    small = cut(teacher, Kept.all_of([0], anatomy(teacher)))
    told = Teacher.ask(teacher, ids, [1], Inputs(0), lambda done, whole: None)
    quick = Transfer(epochs=1, learning_rate=3e-3, batch=8)
    many = Transfer(epochs=12, learning_rate=3e-3, batch=8)
    first = learn(small, told, [0], quick, 0, Inputs(0), lambda done, whole: None)
    last = learn(small, told, [0], many, 0, Inputs(0), lambda done, whole: None)
    assert last < 0.6 * first
    frozen = {name for name, p in teacher.named_parameters() if "embeddings." in name}
    assert all(torch.equal(small.state_dict()[name], teacher.state_dict()[name]) for name in frozen)


def test_altered_copies_are_other_texts_of_the_same_words() -> None:
    texts = ["a film that was so good", "never again this awful day", "one"]
    made = altered(texts, 20, "[MASK]", 0)
    assert len(made) == 60 and made == altered(texts, 20, "[MASK]", 0) != altered(texts, 20, "[MASK]", 1)
    words = {word for text in texts for word in text.split()} | {"[MASK]"}
    assert {word for text in made for word in text.split()} == words and all(made)
    parts = sum(len(text.split()) < 6 for text in made[:20])
    assert 0 < parts < 15 and sum("[MASK]" in text for text in made) > 5


# --- what is refused ---


@pytest.mark.parametrize(
    "words",
    [
        ["compress=studnet"],
        ["distil.layers=2"],
        ["distill.layers"],
        ["distill.layers=2", "distill.layers=3"],
        ["steps=[]"],
        ["steps=[quantize,distill]"],
        ["steps=[distill,distill]"],
        ["steps=[distil]"],
        ["quantize=[]"],
        ["compress=pruned", "prune.units=1"],
        ["compress=pruned", "prune.units=0", "prune.heads=0"],
        ["compress=pruned", "prune.weights=0.5"],
        ["compress=sparse", "prune.weights=1"],
        ["compress=sparse", "steps=[prune,distill]", "distill.layers=1"],
        ["compress=pruned", "steps=[prune,distill]", "distill.student=embedded:minilm"],
        ["distill.student=embedded:minilm"],
        ["distill.layers=null", "distill.student=embedded:minilm", "transfer.epochs=0"],
        ["transfer.learning_rate=nan"],
    ],
    ids=" ".join,
)
def test_settings_that_make_no_sense(words: list[str], run_dir: Path, tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        compress(run_dir, words, tmp_path / "made")
    golden(raised)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["distill.layers=2"],
        ["compress=pruned", "prune.layers=2"],
        ["distill.layers=null", "distill.student=MODEL"],
        ["transfer.learning_rate=0.9", "transfer.epochs=30", "distill.layers=1", "transfer.augment=40"],
    ],
    ids=["as many layers", "every layer", "as large a student", "no number"],
)
def test_what_the_model_does_not_allow(
    words: list[str], run_dir: Path, world: dict[str, Path], tmp_path: Path, golden: Golden,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if "no number" in request.node.callspec.id:
        from fedtune.compress import transfer

        monkeypatch.setattr(transfer, "_loss", lambda *rest: torch.tensor(float("nan")))
    words = [word.replace("MODEL", str(world["model"])) for word in words]
    with pytest.raises(ModelError) as raised:
        compress(run_dir, words, tmp_path / "made")
    golden(raised)
    assert list(tmp_path.iterdir()) == []


def test_a_student_of_other_labels_or_words(
    run_dir: Path, world: dict[str, Path], tmp_path: Path, golden: Golden
) -> None:
    other = Path(shutil.copytree(world["model"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    named = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "spam", "1": "ham"}}
    (other / "config.json").write_text(json.dumps(config | named))
    with pytest.raises(ModelError) as raised:
        compress(run_dir, ["distill.layers=null", f"distill.student={other}", *QUICK], tmp_path / "made")
    golden(raised)
    (other / "config.json").write_text(json.dumps(config))
    tokens = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokens.replace('"film"', '"movie"'))
    with pytest.raises(ModelError) as raised:
        compress(run_dir, ["distill.layers=null", f"distill.student={other}", *QUICK], tmp_path / "made")
    golden(raised)


def test_private_texts_are_refused_and_public_ones_are_told(
    run_dir: Path, world: dict[str, Path], tmp_path: Path, golden: Golden
) -> None:
    lines = (world["data"] / "train.csv").read_text().splitlines()[1:]
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "\n".join([*(line.split(",")[0].upper() for line in lines[:30]), *["some thing new"] * 9])
    )
    record = records.read(run_dir)
    with pytest.raises(DataError) as raised:
        texts_for(record, str(texts), 0.5, 0)
    golden(raised)
    record["privacy"]["data_public"] = True
    found = texts_for(record, str(texts), 0.5, 0)
    assert "which its owner declared public" in found.notes[0] and len(found.learn) == 39
    record["config"]["data"]["path"] = str(tmp_path)
    with pytest.raises(DataError):  # nor can the test split be read
        texts_for(record, str(texts), 0.5, 0)


def test_measured_texts_are_not_learnt_from(run_dir: Path, tmp_path: Path) -> None:
    public = checks.public_test_split(records.read(run_dir))
    assert public is not None
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([*public.texts, *(f"a new one {i}" for i in range(10))]))
    found = texts_for(records.read(run_dir), str(texts), 0.5, 0)
    assert len(found.learn) == 10 and found.measure == public.texts
    assert "40 of the 50 texts" in found.notes[0]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"caf\xe9\n", b"a\0b\n" * 20, b"one\ntwo\n"])
def test_files_that_are_no_texts(
    content: bytes | None, run_dir: Path, tmp_path: Path, golden: Golden
) -> None:
    texts = tmp_path / "texts.txt"
    if content is not None:
        texts.write_bytes(content)
    with pytest.raises(FedtuneError) as raised:
        compress(run_dir, [f"texts={texts}"], tmp_path / "made")
    golden(raised)
    assert not (tmp_path / "made").exists()


def test_runs_and_bases_that_cannot_be_compressed(
    run_dir: Path, exported: Path, world: dict[str, Path], tmp_path: Path, golden: Golden,
    copied: Callable[[], Path],
) -> None:  # fmt: skip
    run = copied()
    (run / "record.json").unlink()
    with pytest.raises(RecordError) as raised:  # it ended early
        compress(run)
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        compress(exported)
    golden(raised)
    for words in (["compress=int8"], []):
        with pytest.raises(ConfigError) as raised:
            compress(str(world["model"]), words)
        golden(raised)
    with pytest.raises(ConfigError) as raised:
        compress(str(world["model"]), [], tmp_path / "made")
    golden(raised)
    with pytest.raises(ModelError, match="no such folder"):
        compress("./nowhere", [f"texts={__file__}"], tmp_path / "made")
    made = records.read(run_dir)
    made["config"]["data"]["test_public"] = False
    made["config"]["federation"]["evaluation"] = "none"
    with pytest.raises(DataError) as raised:
        texts_for(made, None, 0.5, 0)
    golden(raised)


def test_a_model_of_nan_is_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    from fedtune.models import standalone

    def broken(adapter: Path, merged: Any = standalone.merged) -> Any:
        model = merged(adapter)
        model.classifier.bias.fill_(float("nan"))
        return model

    monkeypatch.setattr(standalone, "merged", broken)
    with pytest.raises(ModelError) as raised:
        compress(run_dir, [], tmp_path / "made")
    golden(raised)


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*rest: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "speeds", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(run_dir, ["distill.layers=1", *QUICK], tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_tenth_of_a_file_is_measured_on(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("\n".join(f"text {i}" for i in range(200)))
    found = texts_of_file(str(tmp_path / "texts"), 0)
    assert (len(found.learn), len(found.measure)) == (180, 20) and not set(found.learn) & set(found.measure)


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(student: Path) -> None:
    from fedtune.compress.measure import memory_of

    ids = [[2, 5, 12, 13, 3]] * 4
    small = memory_of(student / PATHS["onnx-int8"], ids, Inputs(0), 2, 1)
    large = memory_of(student, ids, Inputs(0), 2, 1)
    assert small is not None and large is not None and 1e7 < small < large  # torch alone is larger
