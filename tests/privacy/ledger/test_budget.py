"""What a budget file may say, and whose word counts: each rule from both sides."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import LedgerError, PrivacyError
from fedtune.privacy.ledger.budget import (
    Budgets,
    PrivacyBudget,
    budgets_in_force,
    budgets_of,
    read_budgets,
    strictest,
    write_budgets,
)
from tests.support.golden import Golden

ONE = {"epsilon": 3.0, "delta": 1e-5}
BUDGET = PrivacyBudget(3.0, 1e-5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clinic.budget.json"


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf")])
def test_numbers_of_a_budget_are_finite_numbers(value: Any) -> None:
    with pytest.raises(PrivacyError, match=r"^A budget's epsilon must be a finite number"):
        PrivacyBudget(value, 0.1)
    with pytest.raises(PrivacyError, match=r"^A budget's delta must be a finite number"):
        PrivacyBudget(1.0, value)


def test_limits_of_a_budget() -> None:
    assert PrivacyBudget(5e-324, 5e-324).unit is None
    assert PrivacyBudget(1, 0.9999).epsilon == 1
    assert PrivacyBudget(1.5, 0.1).delta == 0.1
    for epsilon in (0.0, -1.0, 0):
        with pytest.raises(PrivacyError, match="epsilon must be above 0"):
            PrivacyBudget(epsilon, 0.1)
    for delta in (0.0, 1.0, -0.1, 1.5, 1):
        with pytest.raises(PrivacyError, match="strictly between 0 and 1"):
            PrivacyBudget(1.0, delta)
    for unit in ("record", "person", "client"):
        assert PrivacyBudget(1.0, 0.1, unit).to_json() == {"epsilon": 1.0, "delta": 0.1, "unit": unit}
    assert BUDGET.to_json() == ONE
    for unit in ("house", ""):
        with pytest.raises(PrivacyError, match=rf"one of record, person, client, not '{unit}'"):
            PrivacyBudget(1.0, 0.1, unit)


def test_budgets_of_names_from_the_strictest() -> None:
    a, b, c = PrivacyBudget(2.0, 1e-5), PrivacyBudget(2.0, 1e-6), PrivacyBudget(1.0, 1e-4)
    budgets = Budgets(a, {"b": b, "c": c})
    assert budgets.of({"b", "c", "x", "y"}) == [c, b, a]
    assert budgets.of({"b"}) == [b]
    assert budgets.of(set()) == []
    assert Budgets(None, {"b": b}).of({"b", "x"}) == [b]


def test_rows_replace_the_rows_before_them() -> None:
    rows: list[dict[str, Any]] = [
        {"dataset": None, **ONE},
        {"dataset": "x", "epsilon": 1.0, "delta": 1e-6, "unit": "person"},
        {"dataset": None, "epsilon": 2.0, "delta": 1e-4},
    ]
    assert budgets_of(rows) == Budgets(PrivacyBudget(2.0, 1e-4), {"x": PrivacyBudget(1.0, 1e-6, "person")})
    assert budgets_of(rows[1:2]) == Budgets(None, {"x": PrivacyBudget(1.0, 1e-6, "person")})
    assert budgets_of([]) == Budgets(None, {})


def test_the_file_that_is_written(path: Path) -> None:
    path = path.parent / "a" / "b" / path.name
    budgets = Budgets(BUDGET, {"z": PrivacyBudget(1.0, 1e-6, "person"), "a": PrivacyBudget(2.0, 1e-4)})
    write_budgets(path, budgets)
    assert path.read_text() == (
        '{\n  "version": 1,\n  "default": {\n    "epsilon": 3.0,\n    "delta": 1e-05\n  },\n'
        '  "datasets": {\n    "a": {\n      "epsilon": 2.0,\n      "delta": 0.0001\n    },\n'
        '    "z": {\n      "epsilon": 1.0,\n      "delta": 1e-06,\n      "unit": "person"\n    }\n  }\n}\n'
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert read_budgets(path) == budgets
    write_budgets(path, Budgets(None, {}))
    assert json.loads(path.read_text()) == {"version": 1, "default": None, "datasets": {}}
    assert read_budgets(path) == Budgets(None, {})


def test_a_file_that_cannot_be_written_leaves_the_old_budget(path: Path, golden: Golden) -> None:
    path.write_text("")
    with pytest.raises(LedgerError) as raised:
        write_budgets(path / "below", Budgets(None, {}))
    golden(raised)


def test_the_least_that_a_file_says(path: Path) -> None:
    assert read_budgets(path) is None
    assert read_budgets(written(path, {"version": 1})) == Budgets(None, {})
    assert read_budgets(written(path, {"version": 1, "default": ONE})) == Budgets(BUDGET, {})
    assert read_budgets(
        written(path, {"version": 1, "datasets": {"x": {**ONE, "unit": "person"}}})
    ) == Budgets(None, {"x": PrivacyBudget(3.0, 1e-5, "person")})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], r"\(it must be an object with the keys version, default and datasets\)"),
        (["version"], "it must be an object"),
        ({"version": 1, "other": 2}, "it must be an object"),
        ({}, "its version is None, not 1"),
        ({"version": 2}, "its version is 2, not 1"),
        ({"version": 0}, "its version is 0, not 1"),
        ({"version": True}, "its version is True, not 1"),
        ({"version": 1, "datasets": []}, "`datasets` must be an object"),
        ({"version": 1, "default": []}, "a budget is an object"),
        ({"version": 1, "default": ["epsilon", "delta"]}, "a budget is an object"),
        ({"version": 1, "default": {**ONE, "x": 1}}, "a budget is an object"),
        ({"version": 1, "datasets": {"x": {**ONE, "x": 1}}}, "a budget is an object"),
        ({"version": 1, "default": {"epsilon": 1.0}}, "'delta'"),
        ({"version": 1, "default": {**ONE, "epsilon": -1.0}}, "epsilon must be above 0"),
        ('{"version": 1, "default": {"epsilon": Infinity, "delta": 1e-5}}', "Infinity is no number"),
        ('{"version": NaN}', "NaN is no number"),
        ("{", "Expecting property name"),
    ],
)
def test_a_file_that_is_no_budget(path: Path, content: Any, why: str) -> None:
    written(path, content)
    with pytest.raises(LedgerError, match=f"cannot be used.*{why}.*No release is made"):
        read_budgets(path)
    assert read_budgets(path, anew=True) is None  # about to be replaced


@pytest.mark.parametrize("anew", [False, True])
def test_a_file_that_cannot_be_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool, golden: Golden
) -> None:
    below = written(path, "{}") / "below"
    with pytest.raises(LedgerError) as raised:
        read_budgets(below, anew=anew)
    golden(raised)

    def fails(*_: Any, **__: Any) -> str:
        raise OSError("the disk is broken")

    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(LedgerError) as raised:
        read_budgets(path, anew=anew)
    golden(raised)


def test_a_file_that_everybody_may_write_is_none(path: Path, golden: Golden) -> None:
    written(path, {"version": 1}).chmod(0o664)
    assert read_budgets(path) == Budgets(None, {})
    path.chmod(0o602)
    for anew in (False, True):
        with pytest.raises(LedgerError) as raised:
            read_budgets(path, anew=anew)
        golden(raised)


IN_FORCE: list[tuple[bool, str, bool, str]] = [
    # whether there is a file, what the ledger has heard, whether there must be one; what is refused
    (True, "the same", True, ""),
    (True, "the same", False, ""),
    (True, "another", False, "does not say what was set last"),
    (True, "another", True, "does not say what was set last"),
    (True, "", False, ""),
    (True, "", True, "never heard of a budget"),
    (False, "the same", False, "is missing, but a budget was set before"),
    (False, "the same", True, "is missing, but a budget was set before"),
    (False, "", False, ""),
    (False, "", True, "There is no budget file"),
]


@pytest.mark.parametrize(("is_there", "heard", "required", "refused"), IN_FORCE)
def test_which_budgets_are_in_force(
    path: Path, is_there: bool, heard: str, required: bool, refused: str
) -> None:
    budgets = Budgets(BUDGET, {})
    if is_there:
        write_budgets(path, budgets)
    said = {"the same": budgets, "another": Budgets(None, {"x": BUDGET}), "": None}[heard]

    def ask() -> Budgets:
        return budgets_in_force(path, Path("clinic.sqlite"), said=said, required=required)

    if refused:
        with pytest.raises(LedgerError, match=refused):
            ask()
    else:
        assert ask() == (budgets if is_there else Budgets(None, {}))


@pytest.mark.parametrize("turned", [lambda a, b: (a, b), lambda a, b: (b, a)])
def test_the_strictest_of_two_files(turned: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    a = Budgets(
        PrivacyBudget(3.0, 1e-5, "person"),
        {"x": PrivacyBudget(1.0, 1e-4, "client"), "z": PrivacyBudget(9.0, 0.1)},
    )
    b = Budgets(None, {"y": PrivacyBudget(5.0, 1e-6, "record"), "x": PrivacyBudget(2.0, 1e-6, "person")})
    both = strictest(*turned(a, b))
    assert both == Budgets(
        PrivacyBudget(3.0, 1e-5, "person"),
        {
            "x": PrivacyBudget(1.0, 1e-6, "client"),
            "y": PrivacyBudget(3.0, 1e-6, "person"),
            "z": PrivacyBudget(9.0, 0.1),
        },
    )
    assert list(both.datasets) == ["x", "y", "z"]
    assert strictest(Budgets(None, {}), Budgets(None, {})) == Budgets(None, {})
    names = [f"data {i:02}" for i in range(12)]
    assert list(strictest(Budgets(None, dict.fromkeys(names[::-1], BUDGET)), a).datasets) == [
        *names,
        "x",
        "z",
    ]
