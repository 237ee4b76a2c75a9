"""What a person sees: epsilon never without what belongs to it, 80 columns, and no crash on odd input."""

from __future__ import annotations

import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.federation.events import RoundSummary
from fedtune.runs import display, summary
from fedtune.runs.display import Display

INFO = {
    "num_rounds": 3,
    "first_round": 1,
    "nodes": ["a", "b"],
    "trust": "local",
    "delta": 1e-5,
    "epsilon": 8.0,
}
NO_PRIVACY = INFO | {"trust": "none", "delta": None, "epsilon": None}
LONG = "did not answer in 600 s (federation.round_timeout), which is rather a long reason to be given here"


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, force_terminal=True, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rounds(view: Display, info: dict[str, Any], epsilons: tuple[float | None, ...] = (2.0, 4.0, 6.0)) -> None:
    view.working("loading")
    view.on_start(info)
    for number, epsilon in enumerate(epsilons, start=1):
        for node in info["nodes"]:
            view.on_client(node, "asked")
            view.on_client(node, "answered")
        view.on_round(RoundSummary(number, 3, 2.0, 0.5 + number / 10, 0.7, epsilon, 1000, 2_000_000))
    view.on_finish(None)
    view.close()


def live(view: Display) -> str:
    """The live part as it looks now."""
    console = plain()
    console.print(view._render())
    return text_of(console)


def test_without_a_terminal_there_is_one_line_a_round() -> None:
    console = plain()
    rounds(Display("the title", console=console), INFO)
    lines = text_of(console).splitlines()
    assert lines[0] == "the title"
    told = [line for line in lines if line.startswith("round")]
    assert len(told) == 3
    assert told[0].startswith("round 1/3:  accuracy 0.600  loss 0.700  epsilon 2.000 (delta 1.0e-05")
    assert "up 1.0 kB, down 2.0 MB" in told[0]
    assert "about 4.0 s left" in told[0] and "left" not in told[2]


@pytest.mark.parametrize("make", [plain, terminal])
def test_epsilon_has_delta_unit_and_adjacency_beside_it(make: Any) -> None:
    console = make()
    rounds(Display("title", unit="person", console=console), INFO)
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text_of(console))
    assert "epsilon" in output
    assert "delta 1.0e-05" in output and "add or remove one person" in output
    for line in output.splitlines():
        if re.search(r"epsilon \d", line):
            assert "delta" in line and "add or remove one person" in line


def test_without_privacy_no_epsilon_is_claimed() -> None:
    console = plain()
    rounds(Display("title", console=console), NO_PRIVACY, (None, None, None))
    assert "epsilon" not in text_of(console)
    assert "no privacy (trust none)" in text_of(console)


def test_the_live_part_shows_progress_and_fits_80_columns() -> None:
    view = Display("title", console=plain())
    view.on_start(INFO | {"nodes": ["a", "a-node-with-a-rather-long-name"]})
    assert "round 1 of 3" in live(view) and "left" not in live(view)
    view.on_round(RoundSummary(1, 3, 30.0, 0.5, 0.7, 2.5))
    view.on_client("a", "answered")
    view.on_client("a-node-with-a-rather-long-name", f"dropped: {LONG}")
    shown = live(view)
    assert "round 2 of 3" in shown and "about 1 min 00 s left" in shown
    assert "epsilon 2.50 of 8 (delta 1.0e-05, add or remove one record)" in shown
    assert re.search(r"a +answered", shown)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert len(shown.splitlines()) == 5  # nothing is folded


def test_why_a_run_waits_is_shown_live_and_else_told_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    console = plain()
    view = Display("", console=console)
    now = display.time.monotonic()
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    for reason in ("waits for a", "waits for b", ""):
        view.on_wait(reason)
    now += 61.0
    view.on_wait("waits for c")
    assert text_of(console).splitlines() == ["waits for a", "waits for c"]
    monkeypatch.undo()

    view = Display("", console=terminal())
    view.on_start(INFO)
    view.on_wait("waits for a")
    assert "waits for a" in live(view)
    view.on_wait("")
    assert "round 1 of 3" in live(view)
    view.close()


def test_a_notebook_has_one_output_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    printed: list[Any] = []

    class Handle:
        def update(self, page: str) -> None:
            shown.append(page)

    def show(content: Any, display_id: bool = False) -> Handle:
        printed.append(content)
        return Handle()

    notebook = types.SimpleNamespace(HTML=str, display=show)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=notebook))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    view = Display("title", console=Console(file=io.StringIO(), width=80, force_jupyter=True))
    view.on_start(INFO)
    view._live.refresh()  # type: ignore[union-attr]
    assert "round 1 of 3" in shown[-1] and "delta 1.0e-05, add or remove one record" in shown[-1]
    view.on_round(RoundSummary(1, 3, 2.0, 0.6, 0.7, 2.0))
    view.close()
    assert shown[-1] == "" and len(printed) > 2

    before = len(printed)
    quiet = Display("title", console=Console(file=io.StringIO(), quiet=True, force_jupyter=True))
    rounds(quiet, INFO)
    assert len(printed) == before


def test_half_a_round_moves_the_bar() -> None:
    def filled(view: Display) -> int:
        console = terminal()
        console.print(view._render())
        return text_of(console).count("━")

    view = Display("title", console=plain())
    view.on_start(INFO)
    view.on_client("a", "asked")
    before = filled(view)
    view.on_client("a", "answered")
    view.on_client("b", "answered")
    assert filled(view) >= before
    bar = next(item for item in _walk(view._render()) if isinstance(item, display.ProgressBar))
    assert bar.completed == 1.0 and bar.total == 3


def _walk(item: Any) -> list[Any]:
    found = [item]
    for part in getattr(item, "renderables", []):
        found += _walk(part)
    for column in getattr(item, "columns", []):
        found += list(column.cells)
    return found


def test_many_nodes_are_counted_and_not_listed() -> None:
    view = Display("title", console=plain())
    names = [f"node-{i:03d}" for i in range(100)]
    view.on_start(INFO | {"nodes": names})
    for name in names[:60]:
        view.on_client(name, "answered")
    view.on_client(names[60], f"dropped: {LONG}")
    shown = live(view)
    assert "60 answered" in shown and "1 dropped" in shown and "39 waiting" in shown
    assert "node-001" not in shown


@pytest.mark.parametrize("make", [plain, terminal])
def test_a_dropped_update_and_a_void_round_are_told(make: Any) -> None:
    console = make()
    view = Display("title", console=console)
    view.on_start(INFO)
    view.on_round(RoundSummary(1, 3, 1.0, None, None, None, dropped=[("b", LONG)], void=True))
    view.close()
    output = " ".join(text_of(console).split())
    assert f"b: {LONG}" in output
    assert "no update" in output


def test_a_resumed_run_says_where_it_goes_on() -> None:
    console = plain()
    view = Display("title", console=console)
    view.on_start(INFO | {"first_round": 3})
    assert "resumed after round 2 of 3" in text_of(console)
    assert "round 3 of 3" in live(view)


def test_closing_twice_or_never_opened_does_nothing() -> None:
    view = Display("title", console=terminal())
    view.close()
    view.working("loading")
    view.close()
    view.close()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (119.6, "2 min 00 s"),
        (3599.7, "1 h 00 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert summary.duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (312_345, "312 kB"),
        (999_999, "1.0 MB"),
    ],
)
def test_bytes(count: int, words: str) -> None:
    assert summary.human_bytes(count) == words
    assert summary.human_bytes(None) == "-"


# --- the table at the end ------------------------------------------------------------------------


def printed(record: dict[str, Any], folder: str = "outputs/x") -> str:
    console = plain()
    summary.summary(record, Path(folder), console)
    assert all(len(line) <= 80 or "fedtune" in line for line in text_of(console).splitlines())
    return " ".join(text_of(console).split())


def test_the_table_says_what_the_record_says(record: dict[str, Any]) -> None:
    record["metrics"]["per_site"]["site-1"]["accuracy"] = 0.1234
    record["cost"] |= {"energy_kwh": 0.0012, "energy": {"note": "estimate by codecarbon"}}
    text = printed(record)
    assert "site-1 10 12.3 %" in text
    assert "1.20 Wh (estimate by codecarbon)" in text
    assert "prices 'cloud_cpu' of 2026-01-01" in text
    assert "fedtune statement outputs/x" in text


def test_how_it_was_trained_is_said_with_the_precision(record: dict[str, Any]) -> None:
    record["federation"]["recipe"] = "head, 3 rounds"
    for given, precision, words in (
        ("auto", "bf16", "training head, 3 rounds; computed in bf16 privacy"),
        (
            "auto",
            "fp32",
            "training head, 3 rounds; computed in fp32, for bf16 is slow on this machine privacy",
        ),
        ("fp32", "fp32", "training head, 3 rounds; computed in fp32 privacy"),
        ("auto", None, "training head, 3 rounds privacy"),  # a record of before
    ):
        record["config"]["train"]["precision"] = given
        record["run"]["hardware"]["precision"] = precision
        assert words in printed(record)
    record["run"]["hardware"]["precision"], record["run"]["engine"] = "bf16", "deployment"
    assert "computed in" not in printed(record)  # each site chooses its own


def test_who_submitted_is_not_sent_to_ledgers_that_lie_with_the_sites(record: dict[str, Any]) -> None:
    assert "fedtune budget show" in printed(record)
    record["run"]["engine"] = "deployment"
    assert "fedtune budget show" not in printed(record)


def test_a_folder_with_a_blank_is_quoted(record: dict[str, Any]) -> None:
    assert "fedtune statement 'my runs/x'" in printed(record, "my runs/x")


def test_other_uses_of_the_data_are_told(record: dict[str, Any]) -> None:
    assert "over all uses" not in printed(record)
    # no more releases of this very shard; what was used before was cut otherwise
    record["privacy"]["ledger"][1] |= {"epsilon": 23.456}
    assert "over all uses of the same data, earlier runs included: epsilon 23.456 at delta" in printed(record)
    record["privacy"]["ledger"][1] |= {"unit": "record"}
    assert re.search(r"epsilon 23\.456 at delta \S+ for one record", printed(record))
    record["privacy"]["ledger"][2] |= {"releases": 9, "epsilon": None}
    assert "one was without noise" in printed(record)


def test_names_in_brackets_are_no_markup(record: dict[str, Any]) -> None:
    record["metrics"]["per_site"]["[red]site"] = {"accuracy": 0.5, "num_records": 3}
    record["federation"]["dropped"] = [{"node": "n", "round": 1, "reason": "it is float32[6]"}]
    text = printed(record, "out[b]")
    assert "[red]site 3 50.0 %" in text and "float32[6]" in text and "out[b]/record.json" in text
    console = plain()
    view = Display("data [b] with [/b]", console=console)
    view.on_start(INFO)
    view.on_round(RoundSummary(1, 3, 1.0, dropped=[("n", "it is float32[6]")]))
    assert "float32[6]" in text_of(console) and "data [b] with [/b]" in text_of(console)


def test_an_epsilon_that_is_not_known_is_not_called_none(record: dict[str, Any]) -> None:
    record["privacy"]["epsilon"] = None
    assert "epsilon unknown at delta" in printed(record)


def test_without_privacy_it_says_so(record: dict[str, Any]) -> None:
    record["privacy"] |= {"epsilon": None, "trust": "none"}
    assert "epsilon is infinite" in printed(record)


def test_what_another_node_may_learn_is_shown(record: dict[str, Any]) -> None:
    record["privacy"] |= {"trust": "distributed", "epsilon": 2.0, "epsilon_towards_nodes": 2.75}
    assert "trust distributed; towards another node 2.750" in " ".join(printed(record).split())
    record["privacy"] |= {"epsilon_towards_nodes": 2.0, "epsilon_towards_server": 1.5}
    shown = " ".join(printed(record).split())
    assert "epsilon 2.000" in shown and "towards the server alone 1.500" in shown and "node 2" not in shown


def test_reproducible_noise_is_shown(record: dict[str, Any]) -> None:
    record["privacy"]["reproducible_noise"] = True
    assert "no guarantee" in printed(record)


def test_unknown_costs_are_called_unknown(record: dict[str, Any]) -> None:
    record["cost"]["money"] |= {"energy": None, "total": None}
    text = printed(record)
    assert "unknown USD" in text and "energy unknown" in text
    record["cost"]["money"] = None
    assert "not priced" in printed(record)


def test_dropped_updates_and_notes_are_shown(record: dict[str, Any]) -> None:
    record["federation"]["dropped"] = [{"node": f"n{i}", "round": i, "reason": "late"} for i in range(5)]
    record["federation"]["ended_early"] = "it ended early"
    record["privacy"]["cautions"] = ["a caution"]
    text = printed(record)
    assert "n2 in round 2 (late); and 2 more" in text
    assert "it ended early" in text and "a caution" in text


@pytest.mark.parametrize("brief", [False, True])
def test_long_work_without_a_terminal_says_how_far_it_is(
    brief: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    console = plain()
    view = Display("a run", console=console, brief=brief)
    for done in range(1000, 3001, 100):  # one call a second; 1,000 were there before
        view.counting("frozen layers", done, 3000)
        now += 1.0
    view.close()
    lines = [line for line in text_of(console).splitlines() if line.startswith("frozen")]
    assert lines == [
        "frozen layers: 1,000 of 3,000 texts (33 %)",
        "frozen layers: 2,500 of 3,000 texts (83 %), about 5.0 s left",
    ]


def test_long_work_on_a_terminal_leaves_no_lines() -> None:
    view = Display("a run", console=terminal())
    view.counting("frozen layers", 7, 3000)
    assert "frozen layers: 7 of 3,000 texts" in live(view)
    assert view.console.is_terminal and "(0 %)" not in text_of(view.console)
    view.close()


@pytest.mark.parametrize("make", [plain, terminal])
def test_who_refuses_is_told_at_once_and_for_good(make: Any) -> None:
    console = make()
    view = Display("title", console=console)
    view.working("asking the nodes")
    view.on_client("clinic-2", "refused: 6 rounds are more than the permitted 5")
    view.on_client("clinic-3", "dropped: its budget does not allow it")
    assert "clinic-2 refused: 6 rounds are more than the permitted 5" in text_of(console)
    assert "clinic-3 dropped: its budget does not allow it" in text_of(console)
    for number in range(20):
        view.on_client(f"other-{number}", "refused: no")
    view.close()
    told = text_of(console)
    assert told.count("refused: no") == display._SHOWN_NODES - 2
    assert told.count("more nodes refuse or fail") == 1


def test_a_refusal_within_a_round_stands_in_the_line_of_the_round_alone() -> None:
    console = plain()
    view = Display("title", console=console)
    view.on_start(INFO)
    view.on_client("a", "asked")
    view.on_client("a", "refused: its budget is spent")
    assert "its budget" not in text_of(console)
    view.on_round(RoundSummary(1, 3, 1.0, dropped=[("a", "its budget is spent")]))
    assert text_of(console).count("its budget is spent") == 1
