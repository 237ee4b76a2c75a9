"""A folder whose files are not those that were exported is refused before any of them is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.errors import ConfigError, ModelError
from fedtune.serving.bundle import Bundle, write_sums
from tests.support.golden import Golden


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "onnx").mkdir(parents=True)
    (made / "onnx" / "model.onnx").write_bytes(b"weights" * 100)
    about = {
        "schema": 1,
        "run": "r",
        "labels": ["no", "yes"],
        "max_length": 16,
        "pad_id": 0,
        "formats": {"onnx": {}},
    }
    (made / "export.json").write_text(json.dumps(about))
    for name in ("DATA.md", "README.md", "config.json", "statement.md", "tokenizer.json"):
        (made / name).write_text("{}")
    write_sums(made)
    return made


def test_what_was_exported_opens(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.labels == ("no", "yes") and bundle.max_length == 16
    assert bundle.chosen() == bundle.chosen("onnx") == "onnx"
    assert bundle.path("onnx").read_bytes() == b"weights" * 100
    (folder / ".DS_Store").touch()  # what a file manager leaves is nobody's weights
    Bundle.open(folder)


def test_one_changed_byte_is_found(folder: Path, golden: Golden) -> None:
    path = folder / "onnx" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[350] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError) as raised:
        Bundle.open(folder)
    golden(raised)


def test_a_file_that_was_cut_short_or_is_missing_is_found(folder: Path, golden: Golden) -> None:
    path = folder / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"onnx/model\.onnx was changed"):
        Bundle.open(folder)
    path.unlink()
    with pytest.raises(ModelError) as raised:
        Bundle.open(folder)
    golden(raised)


def test_a_description_that_no_sum_covers_is_not_believed(folder: Path) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.open() if "export.json" not in line))
    with pytest.raises(ModelError, match=r"export\.json was changed"):
        Bundle.open(folder)
    sums.unlink()
    with pytest.raises(ModelError, match="SHA256SUMS is missing"):
        Bundle.open(folder)


def test_a_list_of_sums_that_was_cut_short_lets_nothing_pass(folder: Path, golden: Golden) -> None:
    sums = folder / "SHA256SUMS"
    whole = sums.read_text()
    lines = whole.splitlines(keepends=True)
    for count in range(len(lines)):
        sums.write_text("".join(lines[:count]))
        with pytest.raises(ModelError):
            Bundle.open(folder)
    sums.write_text(whole.replace(next(line for line in lines if "model.onnx" in line), ""))
    (folder / "onnx" / "model.onnx").write_bytes(b"other weights")
    with pytest.raises(ModelError) as raised:
        Bundle.open(folder)
    golden(raised)


def test_what_is_no_export(folder: Path, tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(ModelError) as raised:
        Bundle.open(tmp_path)
    golden(raised)
    (tmp_path / "record.json").touch()
    with pytest.raises(ModelError) as raised:
        Bundle.open(tmp_path)
    golden(raised)
    about = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(about | {"schema": 2}))
    write_sums(folder)
    with pytest.raises(ModelError) as raised:
        Bundle.open(folder)
    golden(raised)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [1, 2]},
        {"labels": "ab"},
        {"max_length": "16"},
        {"pad_id": None},
        {"labels": []},
        {"formats": 1},
    ],
)
def test_a_description_of_another_kind_is_refused(folder: Path, change: dict[str, object]) -> None:
    about = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(about | change))
    write_sums(folder)
    with pytest.raises(ModelError, match="none that this fedtune reads"):
        Bundle.open(folder)


def test_a_format_that_is_not_there(folder: Path, golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        Bundle.open(folder).chosen("onnx-int8")
    golden(raised)
    about = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(about | {"formats": {"adapter": {}}}))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").touch()
    write_sums(folder)
    with pytest.raises(ConfigError) as raised:
        Bundle.open(folder).chosen()
    golden(raised)
