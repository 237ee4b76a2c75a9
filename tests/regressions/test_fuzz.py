"""Whatever people bring is read or refused in one paragraph: never a traceback, an exit status of 70, a hang.

A short search in every session, the same each time; `scripts/fuzz` runs a long one that draws anew and keeps
what it found beside the tests' cache. What was found once stands here as an example.
"""

from __future__ import annotations

import datetime
import functools
import gzip
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from rich.console import Console

import fedtune
from fedtune.config.convert import settings as known_settings
from fedtune.config.files import state_dir
from fedtune.config.loader import load
from fedtune.config.pages import GROUPS
from fedtune.config.schema import DataConfig, ModelConfig
from fedtune.data.sources.load import load_corpus
from fedtune.errors import ConfigError, FedtuneError, RecordError
from fedtune.export.card import data_card
from fedtune.models.classifier import load_saved
from fedtune.models.encoder import _tokenizer, load_encoder
from fedtune.models.plain import load_plain
from fedtune.privacy.ledger.simulation import ledgers_in
from fedtune.privacy.statement.facts import statement_picture
from fedtune.report.constraints import Constraints, plan
from fedtune.report.frontier import compare
from fedtune.report.page import page_data
from fedtune.runs import audit as audits
from fedtune.runs import record as records
from fedtune.runs import summary
from fedtune.runs.predict import read_texts
from fedtune.sweeps.options import read_sweep
from fedtune.sweeps.progress import SweepProgress
from tests.support.tiny_federation import make_data, make_model

LONG = int(os.environ.get("FEDTUNE_FUZZ", "0"))


def search(share: float, short: int) -> Callable[[Any], Any]:
    """How many inputs are drawn: of a long search this share, of a session's so many."""
    kept = DirectoryBasedExampleDatabase(Path(os.environ.get("FEDTUNE_FUZZ_SEEDS", ".fuzz")))
    return settings(
        max_examples=max(1, round(LONG * share)) if LONG else short,
        derandomize=not LONG,
        database=kept if LONG else None,
        deadline=120_000 if LONG else None,
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


_text = st.one_of(st.none(), cells.map(lambda cell: cell.encode("utf-8", "replace").decode()))
_moments = st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2200, 1, 1))
ARROW: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.string(), _text),
    (pa.large_string(), _text),
    (pa.dictionary(pa.int32(), pa.string()), _text),
    (pa.binary(), st.binary(max_size=6)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.float64(), st.floats()),
    (pa.bool_(), st.booleans()),
    (pa.null(), st.none()),
    (pa.date32(), st.dates()),
    (pa.timestamp("ns"), _moments),
    (pa.timestamp("us", "Europe/Zurich"), _moments),
    (pa.duration("s"), st.integers(-(2**40), 2**40)),
    (pa.decimal128(9, 2), st.sampled_from([Decimal("1.00"), Decimal("-0.10"), None])),
    (pa.list_(pa.string()), st.one_of(st.none(), st.lists(_text, max_size=3))),
    (pa.struct([("a", pa.string())]), st.fixed_dictionaries({"a": _text})),
]


@st.composite
def columns_of_parquet(draw: st.DrawFn) -> bytes:
    """A Parquet file with columns of any type, perhaps twice of one name, damaged or not."""
    names = draw(
        st.sampled_from(
            [["text", "label"], [" text ", "label", "site"], ["text", "text", "label"], ["label"], [""]]
        )
    )
    count = draw(st.integers(0, 14))
    columns = []
    for name in names:
        plain = name.strip() in ("text", "label") and draw(st.booleans())
        kind, values = (pa.string(), st.none()) if plain else draw(st.sampled_from(ARROW))
        made = [f"{name}{i % 2}" if plain else draw(values) for i in range(count)]
        columns.append(pa.array(made, kind))
    file = io.BytesIO()
    # Without its own schema a reader sees what other programs write.
    pq.write_table(
        pa.table(columns, names),
        file,
        row_group_size=draw(st.sampled_from([1, 5, 100])),
        compression=draw(st.sampled_from(["none", "snappy", "zstd"])),
        store_schema=draw(st.booleans()),
        use_dictionary=draw(st.booleans()),
    )
    return _damaged(draw, file.getvalue())


def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    how = draw(st.sampled_from(["not", "not", "cut", "bytes", "flip", "gzip", "gzip cut"]))
    if how == "flip" and content:
        at = draw(st.integers(0, len(content) - 1))
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if how == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if how == "bytes":
        at = draw(st.integers(0, len(content)))
        return content[:at] + draw(st.binary(max_size=8)) + content[at:]
    if how.startswith("gzip"):
        packed = gzip.compress(content, mtime=0)
        return packed[:-12] if how == "gzip cut" else packed
    return content


@search(0.3, 80)
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
    _read_or_refused(tmp_path_factory.getbasetemp() / "fuzz-files", name, content, labels, site)


@search(0.2, 80)
@given(
    content=columns_of_parquet(),
    labels=st.sampled_from([None, None, ["label0", "label1"], ["0", "1"]]),
    site=st.sampled_from([None, "site"]),
)
def test_any_parquet_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, labels: Any, site: str | None
) -> None:
    _read_or_refused(tmp_path_factory.getbasetemp() / "fuzz-parquet", "train.parquet", content, labels, site)


def _read_or_refused(folder: Path, name: str, content: bytes, labels: Any, site: str | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(content)
    config = DataConfig(source="files", path=str(folder), name="mine", labels=labels, site=site)
    asked = None
    with suppress(FedtuneError):
        asked = list(read_texts(folder / name, "text"))
    try:
        corpus, _ = load_corpus(config, 0, testing=False)
    except FedtuneError as error:
        text = str(error)
        assert text.strip() and len(text) < 2000 + len(str(folder))
        return
    assert corpus.num_records and len(corpus.label_names) >= 2
    assert asked is not None and len(asked) >= corpus.num_records  # each row of such a file has an answer
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


@search(0.2, 80)
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


# --- runs ----------------------------------------------------------------------------------------------

ASKED = [
    "data.test_split=missing", "data.declared_size=0", "data.declared_size=1000000", "data.labels=[positive]",
    "data.labels=[a,b]", "data.text=site", "data.label=text", "data.label=missing", "data.unit=site",
    "data.max_length=1", "data.max_length=4000", "data.train_split=test", "partition=dirichlet",
    "partition=iid", "federation.nodes=1", "federation.nodes=3", "federation.nodes=500",
    "federation.min_updates=9", "federation.min_updates=4", "federation.cohort_size=1",
    "federation.cohort_size=9", "federation.num_rounds=1", "federation.num_rounds=2",
    "federation.evaluation=private", "federation.evaluation=none", "federation.evaluation_epsilon=0.01",
    "privacy.epsilon=1e-9", "privacy.epsilon=0.5", "privacy.epsilon=1e6", "privacy.delta=0.9",
    "privacy.delta=1e-300", "privacy.trust=distributed", "privacy.trust=central", "privacy.trust=none",
    "privacy.noise_multiplier=0.001", "privacy.unit=person", "privacy.unit=client",
    "train.sample_rate=1", "train.sample_rate=1e-9", "train.local_steps=7", "train.micro_batch_tokens=1",
    "train.learning_rate=1e30", "train.personalize=head", "train.head_rounds=9", "adapter=head",
    "adapter.rank=1000", "model.name=missing", "model.quantization=int8", "device=cuda", "engine.name=ray9",
    "pricing.currency=x",
]  # fmt: skip


@search(0.01, 1)
@given(
    asked=st.lists(st.sampled_from(ASKED), min_size=1, max_size=3, unique_by=lambda w: w.partition("=")[0])
)
@example(asked=["federation.min_updates=9"])
@example(asked=["data.label=text"])
def test_a_refused_run_has_charged_nobody(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, asked: list[str]
) -> None:
    """A run ends with a model, or in words; where it never came to a round, no ledger holds a release."""
    root = tmp_path_factory.getbasetemp() / "fuzz-runs"
    shutil.rmtree(root, ignore_errors=True)
    data, home = make_data(root / "data"), root / "home"
    (home / "state").mkdir(mode=0o700, parents=True)
    (home / "cache").symlink_to(Path(os.environ["FEDTUNE_HOME"]) / "cache", target_is_directory=True)
    words = [
        "data=files", f"data.path={data}", "data.site=site", "data.labels=[negative,positive]",
        "data.test_split=test", "data.test_public=true", "data.declared_size=120", "data.max_length=16",
        "partition=natural", f"model.name={tiny_model}", "model.quantization=none", "adapter=lora",
        "adapter.rank=2", "train.precision=fp32", "train.local_steps=1", "train.sample_rate=0.3",
        "federation.num_rounds=1", "federation.round_timeout=60", "device=cpu",
    ]  # fmt: skip
    names = {word.partition("=")[0] for word in asked}
    kept = [word for word in words if word.partition("=")[0] not in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_HOME", str(home))
        refusal = _refusal(lambda: fedtune.run(*kept, *asked, output=root / "run", progress=False))
        charged = sum(sum(one.state().releases.values()) for one in ledgers_in(state_dir() / "ledgers"))
    assert refusal is None or (refusal.strip() and "\n" not in refusal)
    # What a round released before it failed is charged, and left a checkpoint after round 0.
    began = any((root / "run" / "checkpoint").glob("round-00000[1-9].ckpt"))
    # A step that is too large is known when it was made: its round is charged, and that is said.
    said = refusal is not None and "The round is charged" in refusal
    assert refusal is None or began or said or not charged, f"charged for nothing: {refusal}"


def _refusal(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except FedtuneError as error:
        return str(error)
    return None


# --- records and what lies beside them -----------------------------------------------------------------

INNER = st.one_of(
    st.sampled_from(
        [None, True, 0, 1, -1, 0.5, 1e300, 10**30, "", "two", "\ud800", [], [1], ["a"], {}, {"a": 1}, [[]]]
    ),
    json_values,
)


def _places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [where, *(place for name, one in inner for place in _places(one, (*where, name)))]


def _spoil_at(value: Any, place: tuple[Any, ...], worth: Any, gone: bool) -> Any:
    if not place:
        return worth
    spot = value
    for name in place[:-1]:
        spot = spot[name]
    if gone:
        del spot[place[-1]]
    else:
        spot[place[-1]] = worth
    return value


def _readers(folder: Path, name: str) -> list[Callable[[], Any]]:
    """What reads the file `name` of a run folder, or of the sweep above it."""
    if name == "fedtune.json":
        return [lambda: load_saved(folder / "adapter", "cpu"), lambda: load_plain(folder / "adapter", "cpu")]
    if name == "sweep.json":
        return [lambda: read_sweep(folder.parent), lambda: SweepProgress(folder.parent, 1, {}).refresh()]
    made = functools.partial(records.whole, folder)
    return [
        lambda: fedtune.Result(folder).statement,
        lambda: repr(fedtune.Result(folder)) + fedtune.Result(folder)._repr_html_(),
        lambda: statement_picture(records.read(folder)),
        lambda: summary.summary(made(), folder, Console(file=io.StringIO())),
        lambda: page_data(compare([folder], local=True)),
        lambda: page_data(compare([folder], ["pricing=edge"])),
        lambda: plan([folder], [], Constraints(accuracy=0.5, epsilon=2.0)),
        lambda: SweepProgress(folder.parent, 1, {}).refresh(),
        lambda: SweepProgress(folder.parent, 1, {}).line("1", "a", made(), before=False),
        lambda: audits.plan_of(records.read(folder)),
        lambda: data_card(records.read(folder)),
    ]


@search(0.15, 20)
@given(
    st.sampled_from(["record.json", "record.json", "local.json", "sweep.json", "fedtune.json"]),
    st.integers(0, 2**16),
    INNER,
    st.booleans(),
)
@example(name="record.json", at=1, worth={"9" * 3000: 1}, gone=False)  # its schema
def test_any_inner_field_is_read_or_refused(
    finished: tuple[Path, str],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    at: int,
    worth: Any,
    gone: bool,
) -> None:
    sweep = tmp_path_factory.getbasetemp() / "fuzz-records"
    folder = sweep / "0"
    shutil.rmtree(sweep, ignore_errors=True)
    shutil.copytree(finished[0], folder)
    jobs = {
        "schema": 1,
        "overrides": ["seed=1"],
        "jobs": [["seed=1"]],
        "private_selection": {"mean": 3, "shape": 1},
    }
    (sweep / "sweep.json").write_text(json.dumps(jobs))
    path = {"sweep.json": sweep / name, "fedtune.json": folder / "adapter" / name}.get(name, folder / name)
    value = json.loads(path.read_text())
    places = _places(value)
    path.write_text(json.dumps(_spoil_at(value, places[at % len(places)], worth, gone)))
    readers = _readers(folder, name)
    # Of the many of a record every third, another one each time: one of them accounts anew.
    for read in readers if len(readers) < 3 else readers[at % 3 :: 3]:
        refusal = _refusal(read)
        assert refusal is None or (refusal.strip() and len(refusal) < 1500 + 8 * len(str(folder)))


@pytest.mark.parametrize("where", ["privacy", "privacy.per_node[0]"])
def test_an_epsilon_without_a_delta_is_no_promise(record: dict[str, Any], tmp_path: Path, where: str) -> None:
    part = record["privacy"] if where == "privacy" else record["privacy"]["per_node"][0]
    part["delta"] = None
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(RecordError, match="there is no " + re.escape(where) + r"\.delta that it belongs to"):
        records.read(tmp_path)


@pytest.mark.parametrize("where", ["privacy", "evaluation"])
def test_a_unit_that_nobody_knows_protects_nobody(record: dict[str, Any], tmp_path: Path, where: str) -> None:
    """Found by the search: the picture of the statement met it first, and ended in a KeyError."""
    part = record["privacy"]
    if where == "evaluation":
        part["evaluation"] = {
            "mechanism": "gaussian",
            "share": 0.2,
            "answers": 1,
            "noise_multiplier": 1.0,
            "epsilon": 1.0,
        }
        part = part["evaluation"]
    part["unit"] = ""
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(RecordError, match="unit.* 'record' or 'person' or 'client'"):
        records.read(tmp_path)


@pytest.mark.parametrize("name", ["name", "labels"])
def test_a_record_says_what_was_trained_on(record: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Found by the search: the data card ended in a KeyError."""
    del record["data"][name]
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(RecordError, match=name):
        records.read(tmp_path)


def test_amounts_and_counts_that_a_record_lacks_are_unknown(record: dict[str, Any], tmp_path: Path) -> None:
    del record["cost"]["money"]["compute"]
    for row in record["metrics"]["per_site"].values():
        del row["num_records"], row["accuracy"]
    console = Console(file=io.StringIO(), width=120)
    summary.summary(record, tmp_path, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "compute unknown" in said and any(
        line.split() == ["site-0", "-", "-"] for line in said.splitlines()
    )


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


@search(0.14, 20)
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
    return make_model(tmp_path_factory.mktemp("fuzz") / "model")


@pytest.mark.parametrize(
    "word", ["train.learning_rate=" + "9" * 5000, "adapter=1", "~adapter=1", "privacy=2.5", "train={a: 1}"]
)
def test_settings_are_refused_as_settings(word: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load([word])
    assert len(str(raised.value)) < 1000
