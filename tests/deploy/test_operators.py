"""Named operators: what each may, that it is gone when it is taken back, and that the trail tells it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.cli.app import main
from fedtune.deploy import certificates, join, server, submit
from fedtune.deploy import operators as people
from fedtune.deploy import trail as trails
from fedtune.deploy.admission import Admission, check_fingerprint
from fedtune.deploy.client import Server, status
from fedtune.deploy.following import follow_run
from fedtune.deploy.operator_key import operator_line
from fedtune.deploy.progress import report_of_rounds
from fedtune.deploy.runs import Runs
from fedtune.deploy.submit import submitted_run
from fedtune.deploy.trail import Trail
from fedtune.errors import ConfigError, FederationError, ResourceError
from tests.support.real_superlink import Real
from tests.support.server_parts import rounds


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    made = Real(tmp_path_factory.mktemp("real"))
    yield made
    made.close()


@pytest.fixture
def alice(real: Real, tmp_path: Path) -> Path:
    """The folder of an operator whom no server knows yet."""
    return real.operator_folder(tmp_path)


def let_in(real: Real, folder: Path, name: str, *rights: str) -> Server:
    line, _, _ = operator_line(folder, name)
    people.add(real.folder, line, rights)
    real.people.reload()
    return Server.of(folder)


def events(real: Real) -> list[tuple[str, str, str]]:
    entries = [json.loads(line) for line in (real.folder / "trail.jsonl").read_text().splitlines()]
    return [(entry["event"], entry["who"], entry["result"]) for entry in entries]


def test_an_operator_may_what_they_have_the_right_to_and_no_more(real: Real, alice: Path) -> None:
    with pytest.raises(FederationError, match="does not know the key"):
        status(_made(alice))
    reader = let_in(real, alice, "alice", "read")
    assert status(alice).address == real.address
    with pytest.raises(FederationError, match="Operator alice has no right to stop"):
        reader.stop("1", now=False)
    with (
        pytest.raises(FederationError, match="Operator alice has no right to submit"),
        submitted_run(reader, "{}", alice / "run", None),
    ):
        pytest.fail("it started")
    with pytest.raises(FederationError, match="no right to enrol"):
        reader.ask(server.ENROL_PATH, "POST", {server.REVOKE_HEADER: "clinic-1"})
    refusals = [one for one in events(real) if one[0] == "refused" and one[1] == "alice"]
    assert refusals and all(one[2] == "403" for one in refusals)


def _made(folder: Path) -> Path:
    operator_line(folder, "alice")
    return folder


def test_a_right_that_is_taken_back_is_gone_without_a_restart(real: Real, alice: Path) -> None:
    let_in(real, alice, "bob", "read")
    assert status(alice).runs is not None
    people.revoke(real.folder, "bob")
    real.admission.update()  # as every two seconds
    with pytest.raises(FederationError, match="does not know the key"):
        status(alice)
    line, _, new = operator_line(alice, "bob")
    assert not new
    with pytest.raises(ConfigError, match="was revoked, and stays so"):
        people.add(real.folder, line, ["read"])
    with pytest.raises(ConfigError, match="no operator 'bob'"):
        people.revoke(real.folder, "bob")
    assert ("operator revoked", "operator", "done") in events(real)


def test_the_others_keep_their_rights_when_one_is_broken_or_revoked(real: Real, alice: Path) -> None:
    let_in(real, alice, "carol", "read")
    (real.folder / "operators" / "dave.yaml").write_text("key: nonsense\n")
    real.admission.update()
    assert any("dave.yaml cannot be used" in line for line in real.said)
    assert status(alice).address == real.address
    (real.folder / "operators" / "dave.yaml").unlink()


@pytest.mark.parametrize(
    ("rights", "said"), [([], "none"), (["fly"], "'fly'"), (["read", "Submit"], "'Submit'")]
)
def test_a_right_that_there_is_not_is_refused(real: Real, alice: Path, rights: list[str], said: str) -> None:
    line, _, _ = operator_line(alice, "erin")
    with pytest.raises(ConfigError, match=f"rights are submit, stop, enrol, read.*{said}"):
        people.add(real.folder, line, rights)
    assert not (real.folder / "operators" / "erin.yaml").exists()


def test_a_run_is_its_operators_who_may_stop_it(real: Real, alice: Path) -> None:
    mine = let_in(real, alice, "frank", "submit", "read")
    with submitted_run(mine, "{}", alice / "run", None):
        number = (alice / "run" / "checkpoint" / submit.NOTE).read_text()
        assert mine.runs()["runs"][number]["by"] == "frank"
        assert submit._asked_to_stop(mine, alice / "run") is None
        mine.stop(number, now=False)
        assert submit._asked_to_stop(mine, alice / "run") == "Stopped after this round by frank"
        other = Server.of(real.folder)
        assert other.runs()["runs"][number]["stop"] == "frank"
    real.runs.update()
    assert number not in mine.runs()["runs"]
    with pytest.raises(ConfigError, match="No run .* goes on here"):
        other.stop(number, now=False)
    told = events(real)
    for event in (("run started", "frank", "done"), ("run stopped", "frank", "after its round")):
        assert event in told
    assert ("run ended", "frank", "completed") in told


def test_a_run_that_is_stopped_now_ends_and_its_submit_says_by_whom(real: Real, alice: Path) -> None:
    mine = let_in(real, alice, "grace", "submit", "read")

    def asks_on() -> None:
        with submitted_run(mine, "{}", alice / "run", None) as (grid, _):
            number = submit.run_number_in(alice / "run" / "checkpoint" / submit.NOTE)
            assert number is not None
            Server.of(real.folder).stop(number, now=True)
            list(grid.get_node_ids())

    with pytest.raises(submit.RunLost):
        asks_on()
    assert submit._stopped_by(mine, alice / "run") == "operator"


def test_a_site_is_let_in_by_an_operator_with_the_right(real: Real, alice: Path) -> None:
    registrar = let_in(real, alice, "heidi", "enrol")
    key = certificates.make_node_key(alice / "node.key")
    line = certificates.public_line(certificates.public_key_of(key), "clinic-3")
    done = registrar.ask(server.ENROL_PATH, "POST", {server.ENROL_HEADER: line})
    assert done["enrolled"] == "clinic-3"
    with pytest.raises(ConfigError, match="the federation's sites are"):
        registrar.ask(server.ENROL_PATH, "POST", {server.ENROL_HEADER: line.replace("clinic-3", "other")})
    assert ("site enrolled", "heidi", "done") in events(real)


def test_who_knocks_without_an_enrolled_key_stands_in_the_trail(real: Real, tmp_path: Path) -> None:
    key = certificates.make_node_key(tmp_path / "stranger.key")
    (real.folder / "trail.jsonl").unlink()
    real.trail._refusals.clear()
    with pytest.raises(FederationError, match="is not enrolled"):
        join.check_in(real.site("clinic-1"), key, pytest.fail)
    join.check_in(real.site("clinic-2"), real.keys["clinic-2"], pytest.fail)
    assert events(real) == [("refused", "?", "403")]


# --- the turn ----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class State:
    """Flower's LinkState, as far as the queue asks it."""

    def __init__(self) -> None:
        self.unfinished: dict[int, str] = {}
        self.stopped: list[int] = []

    def get_run_info(self, *, statuses: Any = None, run_ids: Any = None) -> list[Any]:
        chosen = self.unfinished if run_ids is None else dict.fromkeys(run_ids, "finished")
        return [
            SimpleNamespace(run_id=run, status=SimpleNamespace(status=status, sub_status="completed"))
            for run, status in chosen.items()
        ]

    def stop_run(self, run: int) -> None:
        self.stopped.append(run)
        self.unfinished.pop(run, None)


def queue(tmp_path: Path, most: int = 2) -> tuple[Runs, State, Clock]:
    state, clock = State(), Clock()
    return Runs(state, tmp_path, Trail(tmp_path), most, clock), state, clock


def begin(runs: Runs, state: State, ticket: str, operator: str, run: int) -> None:
    assert runs.turn(ticket, operator) is None
    runs.started(ticket, operator, run)
    state.unfinished[run] = "running"
    assert runs.may_take(ticket) and not runs.may_take("another")
    runs.taken(999)  # what a submit that was killed had left
    assert not runs.may_take("another")
    runs.taken(run)


def test_as_many_runs_go_on_as_may_and_the_next_is_of_whoever_has_fewest(tmp_path: Path) -> None:
    runs, state, clock = queue(tmp_path)
    begin(runs, state, "a1", "alice", 1)
    begin(runs, state, "a2", "alice", 2)
    for number, (ticket, operator) in enumerate([("a3", "alice"), ("a4", "alice"), ("b1", "bob")]):
        clock.now += 1
        assert runs.turn(ticket, operator) == {"running": 2, "before": number if operator == "alice" else 0}
    del state.unfinished[1]  # it is seen when the next one asks
    assert runs.turn("a3", "alice") == {"running": 1, "before": 1}  # bob has none that goes on
    begin(runs, state, "b1", "bob", 3)
    del state.unfinished[2]
    runs.update()
    begin(runs, state, "a3", "alice", 4)
    assert runs.listed()["waiting"] == ["alice"]


def test_one_starts_at_a_time_and_who_asks_no_more_waits_no_more(tmp_path: Path) -> None:
    runs, _, clock = queue(tmp_path, most=5)
    assert runs.turn("a", "alice") is None
    assert runs.turn("b", "bob") is not None and not runs.may_take("b")
    clock.now += 19  # alice's submit was killed
    assert runs.turn("b", "bob") is not None  # she may still start
    clock.now += 2
    assert runs.turn("b", "bob") is None
    assert runs.listed()["waiting"] == ["bob"]


def test_runs_and_who_started_them_survive_a_restart_and_orphans_are_ended(tmp_path: Path) -> None:
    runs, state, clock = queue(tmp_path)
    begin(runs, state, "a", "alice", 7)
    runs.stop(7, "bob", now=False)
    state.unfinished[8] = "pending"
    again = Runs(state, tmp_path, Trail(tmp_path), 2, clock)
    assert again.listed()["runs"]["7"]["by"] == "alice" and again.listed()["runs"]["7"]["stop"] == "bob"
    assert again.by(8) == "?"
    again.update()
    assert state.stopped == []
    clock.now += 21
    again.update()
    assert state.stopped == [8]


def test_the_queue_does_not_grow_without_end_and_nobody_fills_it_for_others(tmp_path: Path) -> None:
    runs, state, _ = queue(tmp_path, most=1)
    begin(runs, state, "first", "alice", 1)
    for number in range(500):
        assert runs.turn(f"t{number}", "mallory") is not None
    assert runs.turn("b", "bob") == {"running": 1, "before": 20}
    assert runs.listed()["waiting"] == ["mallory"] * 20 + ["bob"]


def test_who_has_a_turn_and_starts_nothing_goes_to_the_end(tmp_path: Path) -> None:
    runs, _, clock = queue(tmp_path, most=5)
    assert runs.turn("m", "mallory") is None
    for _ in range(7):  # each time Flower refuses what is started so
        clock.now += 3
        assert runs.turn("b", "bob") is None or clock.now < 21
        runs.turn("m", "mallory")
    assert runs.may_take("b")


# --- the trail and the fingerprint -------------------------------------------------------------------


def test_a_trail_that_was_cut_at_its_end_shows_against_a_head_that_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trail, path = Trail(tmp_path), tmp_path / "trail.jsonl"
    for number in range(4):
        trail.note("run started", "alice", run=str(number))
    head, whole = trail.head(), path.read_text()
    trail.note("run ended", "alice", run="3")

    def shown(kept: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["server", str(tmp_path), "--trail", "--against", kept])
        said = capsys.readouterr()
        return int(str(left.value.code or 0)), " ".join((said.out + said.err).split())

    assert trail.against(head) is None and shown(head)[0] == 0
    path.write_text("".join(line + "\n" for line in whole.splitlines()[:3]))
    assert Trail(tmp_path).text()[1]  # it looks whole
    status, said = shown(head)
    assert status == 1 and "it has 3 lines, and the head that was kept names line 4" in said
    for _ in range(2):  # and has grown again since
        Trail(tmp_path).note("run started", "mallory", run="9")
    assert "has another line there" in str(Trail(tmp_path).against(head))
    for no_head in ("", "4", f"x-{head}", head[:-1]):
        status, said = shown(no_head)
        assert status == 2 and "is no head of a trail" in said


def test_an_operator_remembers_the_highest_head_and_is_told_when_it_goes_back(
    real: Real, alice: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    let_in(real, alice, "ivy", "read")
    first = status(alice)
    assert first.warnings == () and first.trail == (alice / "trail-head").read_text().strip()
    real.trail.note("run started", "ivy", run="1")
    assert status(alice).warnings == () and status(real.folder).warnings == ()
    assert not (real.folder / "trail-head").exists()
    path = real.folder / "trail.jsonl"
    whole = path.read_text()
    path.write_text("".join(line + "\n" for line in whole.splitlines()[:-1]))
    (warning,) = status(alice).warnings
    assert "the server's trail went back" in warning
    with pytest.raises(SystemExit):
        main(["status", str(alice)])
    assert "Warning: the server's trail went back" in capsys.readouterr().out
    path.write_text(whole)
    assert status(alice).warnings == ()


def test_a_run_is_followed_from_another_machine_by_who_may_read(
    real: Real, alice: Path, tmp_path: Path
) -> None:
    reader = let_in(real, alice, "judy", "read")
    writer = Server.of(real.folder)
    shown: list[str] = []
    with submitted_run(writer, "{}", tmp_path / "run", None):
        number = str(submit.run_number_in(tmp_path / "run" / "checkpoint" / submit.NOTE))
        first, second = rounds(number=2, done=2)
        pauses: list[float] = []

        def goes_on(seconds: float) -> None:
            """What happens while who follows waits."""
            pauses.append(seconds)
            if len(pauses) == 1:
                assert len(shown) == 1 and shown[0].startswith("round 1/2:  accuracy")
                assert writer.report(report_of_rounds(number, [second]))
            elif len(pauses) == 2:
                assert len(shown) == 2 and "\x1b" not in shown[1]
                assert writer.report({"run": number, "statement": "# Statement\n\x1b[2Jepsilon 1"})
                writer.stop(number, now=True)

        assert writer.report(report_of_rounds(number, [first]))
        assert follow_run(reader, number, shown.append, goes_on) is False
    assert shown[2:] == ["# Statement\n?[2Jepsilon 1", f"run {number} of operator: stopped"]
    with pytest.raises(ConfigError, match="knows no such run"):
        follow_run(reader, "12345", shown.append)
    with pytest.raises(ConfigError, match="knows no such run"):
        follow_run(reader, "9" * 20, shown.append)
    stranger = let_in(real, alice, "judy", "submit")
    with pytest.raises(FederationError, match="no right to read"):
        follow_run(stranger, number, shown.append)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 7}, {"rounds": [7]}, {"rounds": [{}]}, {"rounds": None}, {"accuracy": "1\x1b[2J"},
        {"round": "1"}, {"round": 1.5}, {"accuracy": [1]}, {"dropped": 3}, {"dropped": [["a"]]},
        {"updates": "x"}, {"updates": float("inf")}, {"loss": float("nan")}, {"num_rounds": None},
        {"dropped": [{}]},
    ],
)  # fmt: skip
def test_who_follows_a_server_that_tells_what_is_no_round_is_told_so(
    real: Real, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    (first,) = report_of_rounds("7", rounds(number=1, done=1))["rounds"]
    about = {"ended": False, "statement": "", "state": "running", "by": "bob"}
    told = {**about, "rounds": [{**first, **change}]} if "rounds" not in change else {**about, **change}
    monkeypatch.setattr(Server, "ask", lambda *args, **options: told)
    with pytest.raises(FederationError, match="is it of the same version"):
        follow_run(Server.of(real.folder), "7", pytest.fail, pytest.fail)
    for left_out in ("rounds", "ended", "statement"):
        told = {name: value for name, value in {**about, "rounds": []}.items() if name != left_out}
        with pytest.raises(FederationError, match="is it of the same version"):
            follow_run(Server.of(real.folder), "7", pytest.fail, pytest.fail)


def test_what_a_server_tells_of_a_run_moves_no_cursor(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = report_of_rounds("7", rounds(number=1, done=1))["rounds"]
    told = {
        "rounds": [{**first, "dropped": [["a\x1b[2J", "b\r\nc"]]}], "ended": True, "state": "comp\x1b[1m",
        "by": "bob\x9b2J", "statement": "one\x1b[2J\ntwo\r",
    }  # fmt: skip
    monkeypatch.setattr(Server, "ask", lambda *args, **options: told)
    shown: list[str] = []
    follow_run(Server.of(real.folder), "7", shown.append, lambda seconds: None)
    assert len(shown) == 3 and all(part.isprintable() for line in shown for part in line.split("\n"))
    assert shown[1] == "one?[2J\ntwo"


def test_who_follows_waits_for_a_server_that_is_away(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(
        [ResourceError("The server does not answer."), ResourceError("The server does not answer."),
         {"rounds": [], "ended": True, "statement": "s", "state": "completed", "by": "bob"}]
    )  # fmt: skip

    def ask(*args: Any, **options: Any) -> Any:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(Server, "ask", ask)
    shown: list[str] = []
    assert follow_run(Server.of(real.folder), "7", shown.append, lambda seconds: None)
    assert shown == [
        "The server does not answer. Asking again until it does.",
        "s",
        "run 7 of bob: completed",
    ]


def test_a_flood_of_refusals_is_a_line_a_minute_and_a_changed_trail_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(trails.time, "monotonic", clock)
    trail = Trail(tmp_path)
    for _ in range(1000):
        trail.refused("?", "10.0.0.1", "/x\x1b[31m", 401, "no")
    clock.now += 61
    trail.refused("?", "10.0.0.1", "/x", 401, "no")
    trail.note("run started", "alice", run="7")
    text, whole = trail.text()
    assert whole and text.count("refused") == 2 and "times 1000" in text and "run 7" in text
    assert "\x1b" not in text
    lines = (tmp_path / "trail.jsonl").read_text().splitlines()
    (tmp_path / "trail.jsonl").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    text, whole = Trail(tmp_path).text()
    assert not whole and "was changed or damaged" in text


def test_a_flood_from_many_addresses_has_few_lines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(trails.time, "monotonic", clock)
    trail = Trail(tmp_path)
    for number in range(3000):
        trail.refused("?", f"2001:db8::{number:x}", "/x", 403, "no")
    assert len((tmp_path / "trail.jsonl").read_text().splitlines()) == 60
    clock.now += 61
    trail.refused("?", "10.0.0.1", "/x", 403, "no")
    text, whole = trail.text()
    assert whole and "many" in text and "times 2940" in text and text.count("10.0.0.1") == 1


def test_a_site_that_comes_and_goes_and_says_new_things_does_not_fill_the_trail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(trails.time, "monotonic", clock)
    trail = Trail(tmp_path)
    admission = Admission(None, tmp_path, print, trail=trail)
    for number in range(100):
        admission.note_trust("mallory", [f"{number:032x}"])
        admission._note_joins({"mallory"} if number % 2 else set())
    admission._note_joins({"mallory", "clinic-1"})
    trail.note("run started", "mallory", run="7")
    lines = (tmp_path / "trail.jsonl").read_text().splitlines()
    assert len(lines) == 60 + 2  # of mallory's; and clinic-1 and the run
    clock.now += 3601
    admission._note_joins(set())
    text, whole = trail.text(last=3)
    assert whole and "times 139" in text and text.count("site left") == 2


def test_a_trail_that_cannot_be_written_is_said_once_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    trail = Trail(tmp_path, said.append)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    trail.note("run started", "alice")
    trail.note("run started", "alice")
    assert len(said) == 1 and "cannot be written" in said[0]


def test_a_site_is_let_in_only_by_the_fingerprint_that_it_told(
    real: Real, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = certificates.public_key_of(certificates.make_node_key(tmp_path / "new.key"))
    line, shown = certificates.public_line(key, "clinic-2"), certificates.fingerprint(key)
    before = (real.folder / "nodes" / "clinic-2.pub").read_text()

    def enrol(*more: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["server", str(real.folder), "--enrol", line, *more])
        return int(str(left.value.code))

    assert enrol() == 2 and "fingerprint" in capsys.readouterr().err
    assert enrol("--fingerprint", "0" * 24) == 2 and "it is another key" in capsys.readouterr().err
    assert (real.folder / "nodes" / "clinic-2.pub").read_text() == before
    assert enrol("--fingerprint", shown.upper()) == 0
    assert (real.folder / "nodes" / "clinic-2.pub").read_text() == line + "\n"
    check_fingerprint(line, shown.replace(" ", ""))
