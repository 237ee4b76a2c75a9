"""Whatever people bring is read or refused in one paragraph: never a traceback, an exit status of 70, a hang.

A short search in every session, the same each time; `scripts/fuzz` runs a long one that draws anew and keeps
what it found beside the tests' cache. What was found once stands here as an example.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

from fedtune.config.convert import settings as known_settings
from fedtune.config.loader import load
from fedtune.config.pages import GROUPS
from fedtune.config.schema import DataConfig, ModelConfig
from fedtune.data.sources.load import load_corpus
from fedtune.errors import ConfigError, FedtuneError
from fedtune.models.encoder import _tokenizer, load_encoder

LONG = int(os.environ.get("FEDTUNE_FUZZ", "0"))


def search(share: float = 1.0) -> Callable[[Any], Any]:
    """How many inputs are drawn: of a long search so many, of a session's a few."""
    kept = DirectoryBasedExampleDatabase(Path(os.environ.get("FEDTUNE_FUZZ_SEEDS", ".fuzz")))
    return settings(
        max_examples=max(1, int((LONG or 80) * share)),
        derandomize=not LONG,
        database=kept if LONG else None,
        deadline=20_000 if LONG else None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# --- files ---------------------------------------------------------------------------------------------

ODD = [
    "",
    " ",
    '"',
    '""',
    "'",
    ",",
    ";",
    "\t",
    "\n",
    "\r",
    "\x00",
    "\ufeff",
    "\u2028",
    "\x85",
    "\ud83d",
    "é",
    "e\u0301",
    "否定",
    "²",
    "①",
    "٣",
    "--1",
    "1.0",
    "1e999",
    "-0",
    "nan",
    "NaN",
    "null",
    "None",
    "true",
    "[SEP]",
    "[]",
    "{}",
    "9" * 4400,
    "sep=;",
    "=1+1",
    "\\N",
    "😀",
    "a" * 300,
]
cells = st.one_of(
    st.sampled_from(ODD), st.text(max_size=12), st.sampled_from(["good film", "bad day", "yes", "no"])
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), cells),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(cells, inner, max_size=3)),
    max_leaves=4,
)


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A table as some program may have written it, damaged or not."""
    by = draw(st.sampled_from([",", ";", "\t", "|"]))
    header = draw(
        st.sampled_from([["text", "label"], [" text ", "label", "site"], ["label", "text", "text"], ["x"]])
    )
    rows = draw(st.lists(st.lists(cells, min_size=1, max_size=4), max_size=8))
    if draw(st.booleans()):
        rows += [[f"text {i}", "yes" if i % 2 else "no", "s"][: len(header)] for i in range(12)]
    quote = draw(st.booleans())
    lines = [by.join(f'"{c}"' if quote else c for c in row) for row in [header, *rows]]
    text = draw(st.sampled_from(["", "\ufeff", "sep=;\n"])) + draw(
        st.sampled_from(["\n", "\r\n", "\r"])
    ).join(lines)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-16-le", "utf-32"]))
    return _damaged(draw, text.encode(encoding, "surrogatepass"))


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """JSON lines, or an array, with anything in them."""
    names = st.sampled_from(["text", "label", " label", "site", "other"])
    records = draw(st.lists(st.dictionaries(names, json_values, max_size=4), max_size=8))
    if draw(st.booleans()):
        records += [
            {"text": f"text {i}", "label": draw(json_values) if i == 3 else "ab"[i % 2]} for i in range(12)
        ]
    as_array = draw(st.booleans())
    text = json.dumps(records) if as_array else "\n".join(map(json.dumps, records))
    return _damaged(draw, text.encode("utf-8", "surrogatepass"))


def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    how = draw(st.sampled_from(["not", "not", "cut", "bytes", "gzip", "gzip cut"]))
    if how == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if how == "bytes":
        at = draw(st.integers(0, len(content)))
        return content[:at] + draw(st.binary(max_size=8)) + content[at:]
    if how.startswith("gzip"):
        packed = gzip.compress(content, mtime=0)
        return packed[:-12] if how == "gzip cut" else packed
    return content


@search()
@given(
    name=st.sampled_from(
        ["train.csv", "train.tsv", "train.jsonl", "train.json", "train.csv.gz", "train.parquet"]
    ),
    content=st.one_of(tables(), objects(), st.binary(max_size=60)),
    labels=st.sampled_from([None, ["yes", "no"], ["a", "b", "A"], ["1", "2²"]]),
    site=st.sampled_from([None, "site"]),
)
@example(name="train.jsonl", content=b'{"text": ' + b"9" * 5000 + b"}", labels=None, site=None)
@example(name="train.csv", content="text,label\na,2²\nb,1\n".encode(), labels=None, site=None)
@example(name="train.csv", content=b'{"text": ' + b"9" * 5000 + b"}", labels=None, site=None)
@example(name="train.csv", content=b"PK\x03\x04xl/workbook", labels=None, site=None)
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, labels: Any, site: str | None
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz-files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(content)
    config = DataConfig(source="files", path=str(folder), name="mine", labels=labels, site=site)
    try:
        corpus, _ = load_corpus(config, 0, testing=False)
    except FedtuneError as error:
        text = str(error)
        assert text.strip() and len(text) < 2000 + len(str(folder))
        return
    assert corpus.num_records and len(corpus.label_names) >= 2
    for text in (
        *corpus.texts,
        *corpus.label_names,
        *([] if corpus.sites is None else map(str, corpus.sites)),
    ):
        text.encode()
    assert corpus.fingerprint() and len(corpus.marks) == corpus.num_records


# --- settings ------------------------------------------------------------------------------------------

VALUES = [
    "1",
    "0",
    "-1",
    "1e30",
    "1e-30",
    "nan",
    "inf",
    "null",
    "true",
    "yes",
    "[a,b]",
    "[très,ça]",
    "[C#,C++]",
    "[]",
    "[a,[b]]",
    "{a: 1}",
    "${seed}",
    "${",
    "'a",
    '"',
    "a=b",
    "²",
    "9" * 5000,
    "auto",
    "none",
    "a,b",
    "range(1,3)",
    "choice(a,b)",
    "glob(*)",
    "interval(0,1)",
    "\\",
    "$(x)",
    "../..",
    "~",
    "caf\udce9",
    "\x00",
    "a b",
    "",
]
NAMES = [
    *known_settings(),
    *GROUPS,
    "lr",
    "train.lr",
    "train",
    "hydra.run.dir",
    "hydra",
    "a.b",
    "",
    "²",
    "data.labels",
]


@search()
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "", "", "+", "++", "~"]),
            st.sampled_from(NAMES),
            st.sampled_from(["=", "=", "=", "", "=="]),
            st.one_of(st.sampled_from(VALUES), st.text(max_size=10)),
        ).map("".join),
        min_size=1,
        max_size=3,
    )
)
def test_any_setting_is_taken_or_refused(words: list[str]) -> None:
    with suppress(FedtuneError):
        load(words)


# --- model folders -------------------------------------------------------------------------------------

FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
KEYS = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "is_decoder",
    "pad_token_id",
    "auto_map",
    "dtype",
    "quantization_config",
    "layer_norm_eps",
    "position_embedding_type",
]
WORTH: list[Any] = [
    None,
    0,
    1,
    -1,
    7,
    64,
    10**12,
    0.5,
    "",
    "bert",
    "roberta",
    "own",
    [],
    {},
    {"a": "b"},
    True,
    "gelu",
]


@search(0.25)
@given(
    st.sampled_from(FILES),
    st.sampled_from(["remove", "empty", "cut", "flip", "pointer", "setting", "prefix", "drop"]),
    st.sampled_from(KEYS),
    st.sampled_from(WORTH),
    st.integers(0, 2**16),
)
@example("config.json", "setting", "vocab_size", 10**12, 0)
@example("config.json", "setting", "num_hidden_layers", 10**12, 0)
@example("config.json", "setting", "model_type", "own", 0)
def test_any_model_folder_is_loaded_or_refused(
    tiny_model: Path, name: str, how: str, key: str, value: Any, seed: int
) -> None:
    folder = tiny_model.parent / "spoilt"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_model, folder)
    spoil(folder, name, how, key, value, random.Random(seed))
    _tokenizer.cache_clear()
    try:
        stack = load_encoder(ModelConfig(name=str(folder), quantization="none"), torch.device("cpu"))
    except FedtuneError as error:
        text = str(error)
        assert "\n" not in text
        for unsafe in ("trust_remote_code", "weights_only", "ignore_mismatched", "allow_pickle"):
            assert unsafe not in text
        return
    assert all(bool(torch.isfinite(one).all()) for one in stack.parameters())


def spoil(folder: Path, name: str, how: str, key: str, value: Any, chance: random.Random) -> None:
    """Damages one thing of a model folder."""
    path = folder / name
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif how == "flip":
        at = chance.randrange(min(len(content), 4000))
        path.write_bytes(content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :])
    elif how == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    elif how == "setting":
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    else:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        if how == "prefix":
            weights = {
                chance.choice(["module.", "a.b.", "bert."]) + one: held for one, held in weights.items()
            }
        else:
            weights.pop(chance.choice(sorted(weights)))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_federation import make_model

    return make_model(tmp_path_factory.mktemp("fuzz") / "model")


def test_settings_are_refused_as_settings() -> None:
    with pytest.raises(ConfigError):
        load(["train.learning_rate=" + "9" * 5000])
