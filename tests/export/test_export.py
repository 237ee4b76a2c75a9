"""An exported folder says what the run says, without fedtune, and tells nothing that is not published."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from fedtune.errors import ConfigError, DataError, ModelError, RecordError
from fedtune.export import card, checks, export
from fedtune.privacy.publication import one_line
from fedtune.runs import record as records
from fedtune.runs.predict import load
from fedtune.serving.bundle import EXPORT_NAME, FORMATS, PATHS, Bundle
from fedtune.serving.classifier import Classifier
from tests.support.cards import code_of, without_fedtune
from tests.support.golden import Golden
from tests.support.synthetic import make_record

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["the film was good", "an awful day", "so very happy and nice food was it a film", "sad"]


@pytest.fixture
def record(run_dir: Path) -> dict[str, Any]:
    return records.read(run_dir)


@pytest.fixture
def about(exported: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((exported / EXPORT_NAME).read_text())
    return loaded


def labels_of(folder: Path) -> list[str]:
    return [one.label for one in load(folder, device="cpu").predict(TEXTS)]


def test_the_folder_is_whole_and_its_sums_are_those_of_sha256sum(exported: Path) -> None:
    for name in (
        "README.md",
        "DATA.md",
        "statement.md",
        "config.json",
        "tokenizer.json",
        *(PATHS[name] for name in FORMATS),
    ):
        assert (exported / name).is_file(), name
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=exported, capture_output=True, text=True)
    assert done.returncode == 0
    there = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert {line.split(":")[0] for line in done.stdout.splitlines()} == there - {"SHA256SUMS"}
    assert Bundle.open(exported).labels == ("negative", "positive")
    assert all(path.stat().st_mode & 0o044 for path in exported.rglob("*") if path.is_file())
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]  # nothing left beside


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2], ids=["pipeline", "logits", "onnxruntime"])
def test_the_lines_of_the_card_give_the_runs_labels_without_fedtune(
    exported: Path, run_dir: Path, tmp_path: Path, number: int
) -> None:
    printed = without_fedtune(code_of(exported / "README.md", TEXTS)[number], tmp_path)
    said = eval(printed)
    labels = [one["label"] for one in said] if number == 0 else said
    # A run's noise may give all of them one label: the scores tell models apart whatever it is.
    assert labels == labels_of(run_dir)
    if number == 0:
        scores = [max(p.probabilities.values()) for p in load(run_dir, device="cpu").predict(TEXTS)]
        assert [one["score"] for one in said] == pytest.approx(scores, abs=1e-4)


@pytest.mark.slow
def test_the_lines_of_the_adapters_card_load_it_onto_its_base(
    exported: Path, run_dir: Path, world: dict[str, Path], tmp_path: Path
) -> None:
    (code,) = code_of(exported / "adapter" / "README.md", TEXTS)
    assert 'base = "..."  # the folder of model' in code
    tokens = Bundle.open(exported)
    ids = Classifier.open(tokens, "hf").encode(TEXTS[:1])
    code = code.replace('"..."', repr(str(world["model"]))) + (
        f"\nimport torch\nwith torch.inference_mode():\n"
        f"    print(model(input_ids=torch.tensor({ids})).logits.softmax(-1).tolist())"
    )
    ((_, positive),) = eval(without_fedtune(code, tmp_path))
    (said,) = load(run_dir, device="cpu").predict(TEXTS[:1])
    assert positive == pytest.approx(said.probabilities["positive"], abs=1e-5)


@pytest.mark.parametrize("name", ["hf", "onnx", "onnx-int8"])
def test_each_format_says_what_the_run_says(exported: Path, run_dir: Path, name: str) -> None:
    model = Classifier.open(Bundle.open(exported), name, threads=1)
    texts = [*TEXTS, "film " * 40]  # longer than the model reads
    logits = model.logits(model.encode(texts))
    said = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [list(one.probabilities.values()) for one in load(run_dir, device="cpu").predict(texts)]
    np.testing.assert_allclose(said, expected, atol=0.05 if name == "onnx-int8" else 1e-5)


def test_the_checks_figures_are_those_of_the_formats(
    about: dict[str, Any], exported: Path, run_dir: Path
) -> None:
    made = records.read(run_dir)
    assert about["check"]["texts"] == "the run's public test split" and about["check"]["num_texts"] == 40
    assert list(about["formats"]) == list(FORMATS)
    for name, one in about["formats"].items():
        assert one["bytes"] == (exported / PATHS[name]).stat().st_size
        # In int8 a few of the 40 texts may change sides: the run's noise is drawn anew each time.
        few = 0.1 if name == "onnx-int8" else 1e-9
        assert one["labels_equal"] >= 1 - few
        assert one["accuracy"] == pytest.approx(made["metrics"]["accuracy"], abs=few)
    assert about["formats"]["hf"]["largest_difference"] < 1e-4
    assert 1e-6 < about["formats"]["onnx-int8"]["largest_difference"] < 0.5
    assert about["quality"]["accuracy"] == pytest.approx(made["metrics"]["accuracy"])
    assert about["base"] == {
        "name": "model", "hub": False, "package": None, "revision": None, "quantization": "none"
    }  # fmt: skip


def test_the_cards_say_what_was_promised_and_how_right_it_is(exported: Path, run_dir: Path) -> None:
    made = records.read(run_dir)
    page, data = (exported / "README.md").read_text(), (exported / "DATA.md").read_text()
    assert (
        f"**Epsilon {made['privacy']['epsilon']:.4g} at delta {made['privacy']['delta']:.3g}; unit: record"
        in page
    )
    assert "adjacency: add or remove one record" in page and "trust model: local" in page
    assert f"accuracy **{made['metrics']['accuracy']:.1%}**" in page
    for name in ("negative", "positive", "site-0", "site-3"):
        assert re.search(rf"^\| {name} \| ", page, re.MULTILINE), name
    head = page.split("---")[1]
    assert 'library_name: "transformers"' in head and "base_model" not in head  # it is no hub's
    assert "private" in data and "| site-1 | " in data
    assert (exported / "statement.md").read_text().startswith("# Privacy statement")


def test_a_data_card_claims_no_more_than_is_so() -> None:
    """Of a run without noise nothing was noised, and persons were compared only where they are known."""
    without = make_record(epsilon=None, public=False)
    assert "without noise" in card.data_card(without) and "charged" not in card.data_card(without)
    private = make_record(public=False)
    private["data"]["labels_declared"] = True
    assert "computed from them but what was noised and charged." in card.data_card(private)
    private["data"]["labels_declared"] = False
    assert "noised and charged and the names of the labels." in card.data_card(private)
    assert "declared public" not in card.data_card(private)
    start = {"texts": 1200, "digest": "ab" * 32}
    begun = {**private, "data": {**private["data"], "public_start": start}}
    assert "1,200 labelled texts that whoever started the run declared public" in card.data_card(begun)
    known = make_record()
    known["data"]["test_records"], known["metrics"]["evaluation"] = 40, {"data": "public"}
    assert "40 public records that share no person with the training data" in card.data_card(known)
    for where, changed in (
        ("config", {"data": known["config"]["data"] | {"unit": None, "source": "files"}}),
        ("run", {"engine": "deployment"}),
    ):
        other = known | {where: known[where] | changed}
        assert "40 public records (persons were not compared)" in card.data_card(other)


HOSTILE = [
    "a\n\n---\n# License\n<script>alert(1)</script>",
    "[here](https://example.org) | `c` \u2028--- \x85\x7f \ud800",
    '"\nimport os; os.abort()\n#',
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_obeys_no_name(record: dict[str, Any], about: dict[str, Any], name: str) -> None:
    """Of labels, sites, nodes, data and base: whoever named them wrote no part of the card."""

    def pages() -> list[str]:
        return [card.model_card(record, about), card.data_card(record), card.adapter_card(about)]

    before = pages()
    record["data"] |= {"name": name, "labels": [name, "b"], "declared_sizes": {name: 3, "c": 4}}
    record["config"]["data"] |= {"source": "hub"}
    record["metrics"]["per_site"] = {name: {"accuracy": 0.5, "num_records": 2}}
    about["labels"] = [name, "b"]
    about["base"] |= {"name": name, "hub": len(name) % 2 == 0, "revision": name}
    about["quality"]["per_site"] = dict.fromkeys([name, *"ab"], about["quality"]["per_site"]["site-0"])
    about["quality"]["per_class"] = dict.fromkeys([name, "b"], about["quality"]["per_class"]["positive"])
    for page, was in zip(pages(), before, strict=True):
        page.encode()
        kinds, kinds_before = (
            [
                child.type
                for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
                for child in (token, *(token.children or []))
                if re.search("link|html|heading|image|hr|fence|table", child.type)
            ]
            for text in (page.partition("\n---\n")[2] or page, was.partition("\n---\n")[2] or was)
        )
        assert kinds == kinds_before
        for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
            assert "os.abort" not in {ast.unparse(node) for node in ast.walk(ast.parse(code))}
    head = yaml.safe_load(pages()[0].split("\n---\n")[0])
    assert set(head) >= {"license", "model-index"} and head["license"] == "unknown"
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == one_line(name)


def test_nothing_of_this_machine_is_in_it(exported: Path, run_dir: Path, world: dict[str, Path]) -> None:
    paths = [
        str(path) for path in (ROOT, exported.parent, run_dir, world["model"], world["data"], sys.prefix)
    ]
    for file in exported.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert [path for path in paths if path.encode() in content] == [], file


def test_what_the_record_keeps_for_the_owner_is_not_exported(
    run_dir: Path, tmp_path: Path, copied: Callable[[], Path]
) -> None:
    """Even where somebody put it into record.json by hand."""
    run = copied()
    made = json.loads((run / "record.json").read_text())
    assert made["privacy"]["data_public"] is False
    made["run"]["seconds"] = made["cost"]["seconds"] = 987654.25
    made["data"]["notes"] = ["record 17 is by Anna"]
    made["federation"]["unusable"] = ["site-1 sent 987654.25"]
    (run / "record.json").write_text(json.dumps(made))
    folder = export.export(run, tmp_path / "model", ["hf"])
    for file in folder.rglob("*"):
        if file.suffix in (".md", ".json", ".svg"):
            assert not re.search(r"987654|987,654|Anna", file.read_text()), file


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Callable[[], Path]:
    return lambda: Path(shutil.copytree(run_dir, tmp_path / "run"))


@pytest.mark.slow
def test_a_format_alone_has_what_it_needs(run_dir: Path, tmp_path: Path) -> None:
    folder = export.export(run_dir, tmp_path / "model", ["onnx-int8"])
    assert not (folder / PATHS["onnx"]).exists() and not (folder / PATHS["hf"]).exists()
    bundle = Bundle.open(folder)
    assert bundle.chosen() == "onnx-int8"
    model = Classifier.open(bundle)
    assert model.logits(model.encode(TEXTS)).shape == (4, 2)
    with pytest.raises(ConfigError, match="--format hf"):
        bundle.chosen("hf")


def test_a_model_that_says_something_else_is_not_exported(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.models import standalone

    def wrong(adapter: Path, window: Any, merged: Any = standalone.merged) -> Any:
        model = merged(adapter, window)
        model.classifier.bias += torch.tensor([0.5, 0.0])
        return model

    monkeypatch.setattr(standalone, "merged", wrong)
    with pytest.raises(ModelError) as raised:
        export.export(run_dir, tmp_path / "model", ["hf"])
    # How many labels that changes follows from the run's noise, so these words are in no golden file.
    assert re.search(r"a logit differs by 0\.5 where 0\.001 .* Nothing was exported", str(raised.value))
    assert list(tmp_path.iterdir()) == []


def test_an_int8_model_that_loses_labels_says_so(about: dict[str, Any], record: dict[str, Any]) -> None:
    warning = "less than the 99% that are asked for"
    about["formats"]["onnx-int8"]["labels_equal"] = 0.99
    assert warning not in card.model_card(record, about)
    about["formats"]["onnx-int8"]["labels_equal"] = 0.98
    assert warning in card.model_card(record, about)


def test_texts_to_check_with(record: dict[str, Any], tmp_path: Path) -> None:
    vocabulary = {"[PAD]": 0, "good": 1, "bad": 2, "##ly": 3}
    public = checks.check_texts_of(record, None, vocabulary)
    assert public.labels is not None and len(public.texts) == 40
    (tmp_path / "texts").write_text("one\n\n two\n")
    given = checks.check_texts_of(record, tmp_path / "texts", vocabulary)
    assert given.texts == ("one", " two") and given.labels is None
    # A test split that nobody declared public is not looked at.
    record["config"]["data"]["test_public"] = False
    record["config"]["federation"]["evaluation"] = "none"
    made_up = checks.check_texts_of(record, None, vocabulary)
    words = {word for text in made_up.texts for word in text.split()}
    assert made_up.labels is None and words == {"good", "bad"}
    assert "no public test split" in made_up.source
    record["config"]["federation"]["evaluation"] = "public"
    record["config"]["data"] |= {"test_public": True, "path": str(tmp_path / "gone")}
    unread = checks.check_texts_of(record, None, vocabulary)
    assert unread.texts == made_up.texts and "cannot be read here (DataError)" in unread.source


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"caf\xe9\n"])
def test_a_file_without_texts_is_refused(record: dict[str, Any], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "texts").write_bytes(content)
    with pytest.raises(DataError):
        checks.check_texts_of(record, tmp_path / "texts", {"good": 1})


def test_what_cannot_be_exported(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    golden: Golden,
    copied: Callable[[], Path],
) -> None:
    with pytest.raises(ConfigError) as raised:
        export.export(run_dir, tmp_path / "model", ["hf", "gguf"])
    golden(raised)
    with pytest.raises(ConfigError, match="takes one or more of"):
        export.export(run_dir, tmp_path / "model", [])
    with pytest.raises(RecordError):
        export.export(tmp_path, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError) as raised:
        export.export(run_dir, tmp_path / "full")
    golden(raised)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find_spec(name, *rest)
    )
    with pytest.raises(ConfigError) as raised:
        export.export(run_dir, tmp_path / "model")
    golden(raised)
    assert not (tmp_path / "model").exists()


def test_the_door_has_every_field(
    exported: Path, about: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from fedtune.privacy.publication import publish

    passed, kept = publish("export", about, public_data=False)
    assert passed == about and kept == {} and not caplog.records
