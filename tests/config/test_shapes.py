"""The reader of JSON files: it lets pass what jsonschema lets pass; what it refuses is said by name."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.shapes import ShapeError, parse_as, problem_in, read_as, schema_of
from fedtune.errors import RecordError
from fedtune.runs import record as records
from tests.support.synthetic import make_record

WORTH = st.sampled_from(
    [None, True, False, 0, 1, -1, 2.5, 0.001, -3.5, "", "two", [], [1], ["a"], {}, {"a": 1}, 10**30]
)


def places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    return [where, *(place for name, one in inner for place in places(one, (*where, name)))]


RECORD = make_record(left_out={"movies": "no"})
PLACES = [place for place in places(RECORD) if place and place[0] not in ("config", "schema")]


@given(st.sampled_from(PLACES), WORTH, st.booleans())
def test_what_passes_is_what_the_schema_lets_pass(place: tuple[Any, ...], value: Any, gone: bool) -> None:
    spoilt = copy.deepcopy(RECORD)
    spot: Any = spoilt
    for name in place[:-1]:
        spot = spot[name]
    if gone and isinstance(spot, dict):
        del spot[place[-1]]
    else:
        spot[place[-1]] = value
    valid = jsonschema.Draft202012Validator(schema_of("record")).is_valid(spoilt)
    assert (problem_in("record", spoilt) is None) == valid


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"error": 3}', "error is 3, and should be a text"),
        ('{"error": null}', "error is null"),
        ('{"error": true}', "error is true"),
        ("{}", "it lacks error"),
        ("[]", "it is [], and should be an object"),
        ('{"error": "a", "more": NaN}', "more is nan, and should be a finite number"),
        ('{"error": "a", "more": [1e999]}', "more[0] is inf"),
        ('{"error": "a", "more": {"x": 1' + "0" * 400 + "}}", "more.x is 1000"),
        ('{"error": "\\ud800"}', "error is '\\\\ud800', and should be text"),
        ('{"\\ud800": 1, "error": "a"}', "should be text"),
        ('{"error": ' + "9" * 5000 + "}", "it is damaged"),
        ("[" * 100_000, "it is"),
        ('{"error": "a"', "half-written or damaged"),
    ],
)
def test_what_is_wrong_is_said_in_a_clause(text: str, words: str) -> None:
    with pytest.raises(ShapeError) as raised:
        parse_as("failure", text)
    assert words in str(raised.value) and len(str(raised.value)) < 200


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ShapeError, match="not UTF-8 at byte 0"):
        read_as("failure", tmp_path / "failure.json")


def test_every_record_that_was_published_is_read() -> None:
    root = Path(__file__).parents[2]
    listed = subprocess.run(
        ["git", "ls-files", "simulations"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.split()
    found = [json.loads((root / name).read_text()) for name in listed if name.endswith(".json")]
    made = [
        one for one in found if isinstance(one, dict) and {"run", "privacy", "metrics", "cost"} <= set(one)
    ]
    for one in made:
        records.validate(one)
    assert len(made) > 200 or not listed, "an archive has no list of files"


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("privacy", "per_node", 0, "epsilon"), "two", "privacy.per_node[0].epsilon is 'two'"),
        (("privacy", "delta"), 2.0, "privacy.delta is 2.0, and should be 0 or more and 1 at most"),
        (("privacy", "steps"), 10**12, "1e+09 at most"),
        (("metrics", "by_round"), [{"round": 1}], "metrics.by_round[0] lacks seconds"),
        (("federation", "left_out"), [3], "federation.left_out[0] is 3"),
        (("config", "data", "max_length"), "64", "config.data.max_length is '64'"),
        (("config", "train", "local_steps"), True, "config.train.local_steps is True"),
    ],
)
def test_a_record_with_a_broken_inner_field_is_refused_by_its_name(
    place: tuple[Any, ...], value: Any, words: str
) -> None:
    made = json.loads(json.dumps(make_record()))
    spot: Any = made
    for name in place[:-1]:
        spot = spot[name]
    spot[place[-1]] = value
    with pytest.raises(RecordError) as raised:
        records.validate(made, "x/record.json")
    assert words in str(raised.value) and "resume" in str(raised.value)
