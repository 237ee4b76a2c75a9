"""Predictions are those of the saved adapter, and a folder that cannot predict says why."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedtune.cli.app import main
from fedtune.compress.compress import compress
from fedtune.config.schema import DataConfig
from fedtune.data.sources.load import load_corpus
from fedtune.errors import DataError, ModelError, RecordError
from fedtune.export.export import export
from fedtune.runs import record as records
from fedtune.runs.predict import _CHUNK, Model, Prediction, answers, load, read_texts, show
from fedtune.runs.run import run
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier, probabilities
from tests.support import tiny_federation as tiny
from tests.support.golden import Golden


def predict(folder: Path, texts: list[str]) -> list[Prediction]:
    return load(folder, device="cpu").predict(texts)


TEXTS = ["the film was good", "an awful day", "so very happy and nice food was it a film", "sad"]


def test_a_text_has_a_label_and_probabilities_that_sum_to_one(finished: tuple[Path, str]) -> None:
    found = predict(finished[0], TEXTS)
    assert [one.text for one in found] == TEXTS
    for one in found:
        assert sum(one.probabilities.values()) == pytest.approx(1.0, abs=1e-6)
        assert one.label == max(one.probabilities, key=one.probabilities.__getitem__)
        assert one.probability == one.probabilities[one.label]
    json.dumps([asdict(one) for one in found])


@pytest.mark.slow
def test_long_texts_are_seen_in_windows_as_in_the_run(
    world: dict[str, Path], fedtune_home: Path, tmp_path: Path
) -> None:
    """And so does an exported model; what would see the first of them alone is not made."""
    config = tiny.make_config(world["model"], world["data"], output=str(tmp_path))
    config.data.max_length, config.data.long_text, config.data.max_windows = 5, "window", 3
    run(config, console=Console(file=io.StringIO()))
    made, model = records.read(tmp_path), load(tmp_path, device="cpu")
    _, test = load_corpus(config.data, config.seed)
    found = model.predict(test.texts)
    right = np.mean([one.label == test.label_names[y] for one, y in zip(found, test.labels, strict=True)])
    assert right == pytest.approx(made["metrics"]["accuracy"])
    beginnings = [" ".join(text.split()[:3]) for text in test.texts]
    assert all(len(text.split()) <= 9 for text in test.texts)
    differ = [
        abs(one.probabilities["positive"] - cut.probabilities["positive"]) > 1e-4
        for one, cut in zip(found, model.predict(beginnings), strict=True)
    ]
    long = np.array([len(text.split()) > 3 for text in test.texts])
    assert not np.array(differ)[~long].any() and np.array(differ)[long].mean() > 0.5
    with pytest.raises(
        DataError, match=rf"3 windows of 5 tokens .*: fedtune export {tmp_path} --format hf\. "
    ):
        export(tmp_path)
    with pytest.raises(
        DataError, match=rf"3 windows of 5 tokens .*: fedtune export {tmp_path} --format hf\. "
    ):
        compress(tmp_path, ["compress=int8"])
    bundle = Bundle.open(export(tmp_path, formats=["hf", "adapter"]))
    classifier = Classifier.open(bundle)
    longer = [*test.texts, "good film " * 20]
    said = probabilities(classifier.logits(classifier.encode(longer)))[
        :, list(bundle.labels).index("positive")
    ]
    expected = [one.probabilities["positive"] for one in model.predict(longer)]
    np.testing.assert_allclose(said, expected, atol=1e-5)
    card = (bundle.folder / "README.md").read_text(encoding="utf-8")
    assert "cut to 11 tokens" in card and "longer than 5 tokens into windows" in card
    assert "3 windows of 5 tokens" in (bundle.folder / "DATA.md").read_text(encoding="utf-8")


def test_they_do_not_depend_on_what_else_is_asked(finished: tuple[Path, str]) -> None:
    together = predict(finished[0], TEXTS * 20)
    for number, text in enumerate(TEXTS):
        (alone,) = predict(finished[0], [text])
        assert together[number].probability == pytest.approx(alone.probability, abs=1e-5)


def test_they_are_those_of_the_run_itself(finished: tuple[Path, str]) -> None:
    """The accuracy that the record claims, from the saved folder and the test texts."""
    from fedtune.config.loader import read_config

    folder = finished[0]
    config, made = read_config(folder), records.read(folder)
    _, test = load_corpus(config.data, config.seed)
    found = predict(folder, test.texts)
    right = np.mean([one.label == test.label_names[y] for one, y in zip(found, test.labels, strict=True)])
    assert right == pytest.approx(made["metrics"]["accuracy"])
    chosen = [one.probabilities[test.label_names[y]] for one, y in zip(found, test.labels, strict=True)]
    assert -np.mean(np.log(chosen)) == pytest.approx(made["metrics"]["loss"], abs=1e-4)


def test_a_record_file_will_do_for_its_folder(finished: tuple[Path, str]) -> None:
    assert predict(finished[0] / "record.json", TEXTS[:1]) == predict(finished[0], TEXTS[:1])


@pytest.mark.parametrize("damage", ["cut short", "empty", "no JSON", "of another shape"])
def test_a_damaged_adapter_is_refused_and_resuming_the_run_mends_it(
    finished: tuple[Path, str], tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    weights, about = folder / "adapter" / "adapter_model.safetensors", folder / "adapter" / "fedtune.json"
    if damage == "no JSON":
        (folder / "adapter" / "adapter_config.json").write_text("{")
    elif damage == "of another shape":
        about.write_text(about.read_text().replace('"negative"', '"negative", "neither"'))
    else:
        weights.write_bytes(weights.read_bytes()[: 0 if damage == "empty" else -100])
    with pytest.raises(ModelError, match="holds no adapter that fits its base") as raised:
        predict(folder, TEXTS)
    if damage == "cut short":
        way_out = str(raised.value).partition("anew: ")[2]
        monkeypatch.setattr(sys, "argv", way_out.split())
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0 and len(predict(folder, TEXTS)) == len(TEXTS)


def test_a_moved_folder_still_predicts(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "moved")
    assert predict(tmp_path / "moved", TEXTS) == predict(finished[0], TEXTS)


@pytest.mark.parametrize("texts", [[], [""], ["fine", "  \n"]])
def test_no_text_is_refused(finished: tuple[Path, str], texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"text"):
        predict(finished[0], texts)


def test_a_pair_is_no_text_of_a_model_of_single_texts(finished: tuple[Path, str]) -> None:
    with pytest.raises(DataError, match=r"Text 1 is a pair"):
        load(finished[0], device="cpu").predict([("good", "bad")])


def test_what_is_no_text_is_refused_by_its_number(finished: tuple[Path, str]) -> None:
    with pytest.raises(DataError, match=r"Text 2 of 2 is 3"):
        load(finished[0], device="cpu").predict(["fine", 3])  # type: ignore[list-item]


def test_one_text_is_no_list_of_texts(finished: tuple[Path, str]) -> None:
    with pytest.raises(DataError, match=r"predict\(\[text\]\)"):
        load(finished[0], device="cpu").predict("what a film")


@pytest.mark.slow
def test_pairs_are_asked_as_they_were_trained_on(
    world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for split, count in (("train", 120), ("test", 24)):
        rows = [
            {"premise": "the film was good", "claim": word, "label": label}
            for word, label in [("a happy day", "yes"), ("an awful day", "no")] * (count // 2)
        ]
        data.mkdir(exist_ok=True)
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny.make_config(
        world["model"], data, output=str(tmp_path / "run"), partition__name="iid", federation__nodes=2,
        data__site=None, data__text="premise", data__text_pair="claim", data__labels=["no", "yes"],
        federation__num_rounds=12, train__learning_rate=0.3,
    )  # fmt: skip
    run(config, console=Console(quiet=True))
    with pytest.raises(SystemExit) as left:
        main(
            [
                "predict",
                str(tmp_path / "run"),
                "--input",
                str(data / "test.jsonl"),
                "--output",
                str(tmp_path / "out.csv"),
            ]
        )
    assert left.value.code == 0 and "24 answers in" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert list(rows[0]) == ["premise", "claim", "label", "probability"] and len(rows) == 24
    # The second text alone tells: as its own segment and after the first, as in training.
    assert [row["label"] for row in rows[:2]] == ["yes", "no"] and rows[0]["claim"] == "a happy day"
    model = load(tmp_path / "run", device="cpu")
    (one,) = model.predict([("the film was good", "an awful day")])
    assert one.pair == "an awful day" and f"{one.probability:.6f}" == rows[1]["probability"]
    with pytest.raises(DataError, match=r"text 2 is a single one"):
        model.predict([("a", "b"), "c"])


def test_a_model_of_pairs_does_not_judge_one_text(
    finished: tuple[Path, str], tmp_path: Path, golden: Golden
) -> None:
    shutil.copytree(finished[0], tmp_path / "pairs")
    written = json.loads((tmp_path / "pairs" / "record.json").read_text())
    written["config"]["data"]["text_pair"] = "hypothesis"
    (tmp_path / "pairs" / "record.json").write_text(json.dumps(written))
    with pytest.raises(DataError) as raised:
        predict(tmp_path / "pairs", TEXTS)
    assert "data.text_pair=hypothesis" in str(raised.value)
    golden(raised)


def test_folders_that_cannot_predict_say_why(
    finished: tuple[Path, str], tmp_path: Path, golden: Golden
) -> None:
    with pytest.raises(RecordError) as raised:
        predict(tmp_path / "nowhere", TEXTS)
    golden(raised)
    with pytest.raises(RecordError) as raised:
        predict(tmp_path, TEXTS)
    golden(raised)
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(RecordError) as raised:
        predict(folder, TEXTS)
    golden(raised)
    (folder / "record.json").unlink()
    with pytest.raises(RecordError) as raised:
        predict(folder, TEXTS)
    golden(raised)


def shown(predictions: list[Prediction]) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    show(predictions, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_has_a_line_a_text() -> None:
    one = Prediction("a [b]day[/b]", "p", 0.75, {"n": 0.25, "p": 0.75})
    text = shown([one, one])
    assert len(text.splitlines()) == 3
    assert "0.750" in text and "a [b]day[/b]" in text  # what looks like markup is text


def test_with_many_labels_the_next_best_are_shown() -> None:
    probabilities = {"a": 0.1, "b": 0.6, "c": 0.2, "d": 0.05, "e": 0.05}
    text = shown([Prediction("t", "b", 0.6, probabilities)])
    assert "c 0.200, a 0.100" in text and "0.050" not in text


def test_labels_and_texts_of_any_length_fit() -> None:
    one = Prediction("word " * 80, "l" * 50, 1.0, {"l" * 50: 1.0, "n": 0.0})
    assert all(len(line) <= 80 for line in shown([one]).splitlines())


def test_a_text_that_was_not_utf8_is_named(tmp_path: Path) -> None:
    model = Model(tmp_path, ["no", "yes"], None, None, DataConfig())
    with pytest.raises(DataError, match="Text 2 of 2 is not UTF-8"):
        model.predict(["good", "b\udcffd"])


def test_each_line_has_an_answer_whatever_is_in_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    given = (
        b'good\n\n  \r\na\x85b\xe2\x80\xa8c\x0bd\xffe\n[SEP] bad\x00\r\n"quoted,\n' + b"x" * 5000 + b"\nlast"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    with pytest.raises(SystemExit) as left:
        main(["predict", str(run_dir), "-", "--json"])
    assert left.value.code == 0
    answers = json.loads(capsysbinary.readouterr().out)
    assert len(answers) == 8
    assert [answer["label"] is None for answer in answers] == [False, True, True, *[False] * 5]
    assert answers[3]["text"] == "a\ufffdb\u2028c\x0bd\ufffde"


def test_what_a_pipe_of_windows_sends_is_lines_too(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("good\r\nsad\r\n".encode("utf-16"))))
    with pytest.raises(SystemExit):
        main(["predict", str(run_dir), "-", "--json"])
    assert [one["text"] for one in json.loads(capsys.readouterr().out)] == ["good", "sad"]


def test_the_table_stays_a_table_whatever_is_in_a_text() -> None:
    text = shown([Prediction("a\nb\x1b[31m\u2028c", "x", 0.5, {"x": 0.5}), Prediction("", None, None, {})])
    assert len(text.splitlines()) == 3 and "\x1b" not in text


def test_a_file_is_answered_with_a_file_row_by_row(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text('note;who\n"good; film";a\n;b\nsad day;c\n')
    words = ["predict", str(run_dir), "--input", str(tmp_path / "new.csv")]
    with pytest.raises(SystemExit) as left:
        main([*words, "--column", "note", "--output", str(tmp_path / "out.csv")])
    assert left.value.code == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["note", "label", "probability"]
    assert [row[0] for row in rows[1:]] == ["good; film", "", "sad day"]
    assert rows[2][1:] == ["", ""] and rows[1][1] in ("negative", "positive")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("new.jsonl", '{"text": 1}\n{"text": [2]}\n', "holds no text: its values are int and list"),
        ("new.txt", "good\n", "--input is .*new.txt, whose ending is not known"),
        ("new.csv", "", "is empty"),
        ("new.csv", "text\ngood\n", "which --input reads, and would replace it"),
        ("", "", "which is a folder"),
    ],
)
def test_a_file_that_cannot_be_asked_about_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, words: str
) -> None:
    path, output = tmp_path / name, tmp_path / "out.csv"
    if name:
        path.write_text(content)
    if content.startswith("text"):
        output = path
    with pytest.raises(SystemExit) as left:
        main(["predict", str(run_dir), "--input", str(path), "--output", str(output)])
    assert left.value.code in (1, 2) and re.search(words, " ".join(capsys.readouterr().err.split()))
    assert not output.exists() or output.read_text() == content


def test_a_column_that_a_file_lacks_is_named_with_those_it_has(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("note,who\ngood,a\n")
    with pytest.raises(SystemExit) as left:
        main(["predict", str(run_dir), "--input", str(tmp_path / "new.csv")])
    assert left.value.code == 1
    assert "has no column 'text'; its columns are: 'note', 'who'" in capsys.readouterr().err


def test_what_was_misspelt_is_answered_with_what_works_as_typed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "visits.csv").write_text("Nr,Die Notiz\n1,a good film\n2,bad\n")

    def typed(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["predict", *words])
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out + said.err

    def proposed(*words: str) -> list[str]:
        status, said = typed(*words)
        assert status in (1, 2) and "Did you mean " in said, said
        return shlex.split(said.split("Did you mean ")[1].strip().removesuffix("?"))

    monkeypatch.chdir(run_dir.parent)
    (folder,) = proposed(run_dir.name.upper() + "s", "x")
    assert folder == run_dir.name and typed(folder, "x")[0] == 0
    monkeypatch.chdir(tmp_path)
    (file,) = proposed(str(run_dir), "--input", "visit.csv", "--column", "Die Notiz")
    assert file == "visits.csv"
    named = proposed(str(run_dir), "--input", file, "--column", "die notitz")
    assert named == ["--column", "Die Notiz"]
    assert typed(str(run_dir), "--input", file, *named, "--output", "y.csv")[0] == 0
    assert (tmp_path / "y.csv").read_text().splitlines()[0] == "Die Notiz,label,probability"
    # Answers are CSV, whatever the name of their file would make of them; and no option is ignored.
    status, said = typed(str(run_dir), "--input", file, *named, "--output", "x/answers.json.gz")
    assert status == 2 and "Give --output x/answers.csv." in said and not (tmp_path / "x").exists()
    status, said = typed(str(run_dir), "a film", "--column", "text")
    assert status == 2 and "--column names a column of a file" in said


def test_a_run_answers_without_the_libraries_that_train(run_dir: Path) -> None:
    """Their imports took most of the time that a prediction takes."""
    code = (
        "import sys\n"
        "from fedtune.cli.app import main\n"
        "try:\n"
        f"    main(['predict', {str(run_dir)!r}, 'the film was good', '--json'])\n"
        "except SystemExit as left:\n"
        "    print(left.code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, *modules = done.stderr.split()
    heavy = {"transformers", "peft", "flwr", "opacus", "datasets", "accelerate", "pandas", "sklearn", "scipy"}
    assert status == "0" and "torch" in modules and not heavy & set(modules)
    (one,) = json.loads(done.stdout)
    (wanted,) = predict(run_dir, ["the film was good"])
    assert one["label"] == wanted.label and one["probability"] == pytest.approx(wanted.probability, abs=1e-6)


LAST = {"csv": b"a,b,c,d\n", "jsonl": b"{\n", "tsv": b"a\tb\tc\td\n", "csv.gz": b""}


@pytest.mark.parametrize("ending", [*LAST, "parquet"])
def test_a_file_is_answered_as_it_is_read(run_dir: Path, tmp_path: Path, ending: str) -> None:
    """What is wrong with its end is met after the answers to its beginning, and leaves no file."""
    path, rows = tmp_path / f"new.{ending}", 3 * _CHUNK
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"text": [f"good {i}" for i in range(rows)], "who": ["a"] * rows})
        pq.write_table(table, path, row_group_size=_CHUNK, compression="none", use_dictionary=False)
        start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
        content = bytearray(path.read_bytes())
        content[start : start + 40] = b"\xff" * 40
    elif ending == "jsonl":
        content = b"".join(b'{"text": "good %d", "who": "a"}\n' % i for i in range(rows)) + LAST[ending]
    else:
        by = "\t" if ending == "tsv" else ","
        table = [f"good {i}{by}{hashlib.sha256(bytes(i)).hexdigest()}\n" for i in range(rows)]
        content = f"text{by}who\n{''.join(table)}".encode() + LAST[ending]
        content = gzip.compress(content)[:-20] if ending == "csv.gz" else content
    path.write_bytes(content)
    said = list[int]()
    found = answers(load(run_dir, device="cpu"), read_texts(path, "text"), said.append)
    assert [one.text for one in itertools.islice(found, _CHUNK)] == [f"good {i}" for i in range(_CHUNK)]
    with pytest.raises(DataError):
        list(found)
    assert said[0] == _CHUNK
    with pytest.raises(SystemExit) as left:
        main(
            ["predict", str(run_dir), "--input", str(path), "--output", str(tmp_path / "out" / "answers.csv")]
        )
    assert left.value.code == 1 and not list((tmp_path / "out").iterdir())
