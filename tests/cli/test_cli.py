"""The command line: what it prints, what it refuses, how it leaves. What it calls is replaced by fakes."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import app as cli
from fedtune.cli.results import folders_and_prices
from fedtune.config import Config
from fedtune.errors import BudgetExhausted, RecordError

COMMANDS = ("run", "statement", "predict", "export", "evaluate", "serve", "report", "plan", "budget", "audit")
RECORD = {
    "run": {"seconds": 2.0},
    "metrics": {"accuracy": 0.75},
    "privacy": {"epsilon": 2.0, "delta": 1e-5, "adjacency": "add or remove one record"},
    "cost": {"money": None},
    "federation": {"left_out": []},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """fake('fedtune.runs.run', run=...) puts functions where the command will import them from."""

    def put(name: str, **contents: Any) -> None:
        module = types.ModuleType(name)
        for key, value in contents.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
        package, _, last = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)

    return put


@pytest.fixture
def runs(fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """`fedtune run` then notes the configuration and trains nothing."""
    seen: list[Config] = []

    def run(config: Config, **_: Any) -> Path:
        seen.append(config)
        if config.seed == 666:
            raise BudgetExhausted("node 'a' refuses round 1: it would raise epsilon from 1 to 2.")
        if config.seed == 667:
            raise ZeroDivisionError("division by zero")
        if config.seed == 668:
            raise KeyboardInterrupt("Interrupted. Go on with: fedtune run resume=here")
        return Path(config.output or "") / "record.json"

    fake("fedtune.runs.run", run=run)
    # In place: a module that imported it before, in another test, sees this one too.
    monkeypatch.setattr("fedtune.runs.record.read", lambda path: RECORD)
    return seen


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert isinstance(left.value.code, int)
    return left.value.code


def one_paragraph(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1, text
    return text


# --- help ----------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, fedtune.cli.app\n"
        "try: fedtune.cli.app.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'hydra', 'flwr', 'transformers', 'pydantic', 'pandas')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n│ {command} " in text
    assert "Examples:" in text and "fedtune run privacy.epsilon=2" in text


@pytest.mark.slow
def test_h_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-h"], ["run", "-h"], ["budget", "show", "-h"]):
        assert call(*words) == 0
        assert f"Usage: fedtune {' '.join(words[:-1])}".strip() in capsys.readouterr().out


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    assert "Examples:" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"fedtune {command}" in capsys.readouterr().out.split("Examples:", 1)[1]


def test_run_help_lists_groups_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "--help") == 0
    text = capsys.readouterr().out
    for word in (
        "bert_tiny",
        "ffa_lora",
        "privacy.epsilon=8",
        "train.sample_rate",
        "hydra.run.dir",
        "sweep.private_selection=true",
        "resume",
    ):
        assert word in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from fedtune import __version__

    assert call("--version") == 0
    said = capsys.readouterr().out
    assert re.fullmatch(rf"fedtune {re.escape(__version__)}(\+[0-9a-f]{{12}})?, protocol [0-9]+\n", said)


# --- run -----------------------------------------------------------------------------------------


def test_run(runs: list[Config], tmp_path: Path) -> None:
    assert call("run", "privacy.epsilon=2", "adapter=ffa_lora", "hydra.run.dir=here") == 0
    (config,) = runs
    assert (config.privacy.epsilon, config.adapter.name) == (2.0, "ffa_lora")
    assert config.output == str(tmp_path / "here")


def test_a_run_without_a_site_is_partial(
    runs: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {**RECORD, "federation": {"left_out": [{"node": "east", "reason": "it refused"}]}}
    monkeypatch.setattr("fedtune.runs.record.read", lambda path: without)
    assert call("run") == 3
    assert one_paragraph(capsys) == "Partial (exit status 3): east took no part.\n"


def test_a_run_leaves_the_warnings_of_fedtune_on(runs: list[Config]) -> None:
    """Hydra's `disabled` logging switches off every logger that exists, and with it 'the display failed'."""
    logger = logging.getLogger("fedtune.federation.events")
    assert call("run", "hydra.run.dir=here") == 0
    assert not logger.disabled and logger.propagate and logger.isEnabledFor(logging.WARNING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "seed=1,2", "device=cpu"),
        ("seed=1,2", "-m", "device=cpu"),
        ("seed=1,2", "device=cpu", "--multirun"),
    ],
)
def test_sweep(arguments: tuple[str, ...], runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", *arguments) == 0
    assert [config.seed for config in runs] == [1, 2]
    assert "seed=2" in capsys.readouterr().out


@pytest.mark.slow
def test_failed_run_of_a_sweep(runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "-m", "seed=1,666,2") == 1
    assert [config.seed for config in runs] == [1, 666, 2], "the others still run"
    errors = capsys.readouterr().err
    assert "BudgetExhausted" in errors and "seed=666" in errors
    assert "1 of the sweep's runs failed (run 2; " in errors and "/1)" in errors
    assert call("run", "-m", "seed=666", "privacy.epsilon=1,2") == 1
    assert "2 of the sweep's runs failed (run 1, 2; " in (said := capsys.readouterr().err)
    assert "none finished" in said


def test_show_config(runs: list[Config], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import yaml

    from fedtune.config.convert import from_dict
    from fedtune.config.loader import load

    assert call("run", "--show-config", "privacy.epsilon=3") == 0
    assert from_dict(yaml.safe_load(capsys.readouterr().out)) == load(["privacy.epsilon=3"])
    assert runs == [] and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_hydras_name_for_it(runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "--show-config", "seed=3") == 0
    shown = capsys.readouterr().out
    assert call("run", "--cfg", "job", "seed=3") == 0
    assert capsys.readouterr().out == shown and runs == []


def test_a_page_of_the_users_own(runs: list[Config], tmp_path: Path) -> None:
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "long.yaml").write_text("local_steps: 50\n")
    assert call("run", "--config-dir", "mine", "train=long") == 0
    assert runs[0].train.local_steps == 50


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "epsilon=2"), "privacy.epsilon"),
        (("run", "privacy.epsilon=-1"), "above 0"),
        (("run", "model=nope"), "bert_base"),
        (("run", "--epsilon", "2"), "--epsilon"),
        (("run", "stray"), "name=value"),
        (("rnu",), "Did you mean 'run'? See 'fedtune --help'."),
        (("budget", "shw"), "Did you mean 'show'? See 'fedtune budget --help'."),
        (("run", "--cfg", "hydra"), "--cfg job"),
        (("budget", "set", "--epsilon", "1", "--delta", "1e-5", "--unit", "house"), "'person'"),
        (("statement",), "RUN_DIR"),
        (("predict", "x"), "TEXT"),
        (("statement", "x", "--yaml"), "--yaml"),
        (("budget",), "ACTION"),
        (("budget", "set", "--epsilon", "two", "--delta", "1e-5"), "two"),
        (("--wat",), "--wat"),
        (("run", "sweep.resum=x", "-m"), "sweep.resume"),
        (("run", "sweep.private_selection=true"), "add -m"),
        (("report",), "DIR"),
        (("report", "pricing=edge"), "No folder"),
        (("report", "here", "--wat"), "--wat"),
        (("plan", "here"), "--accuracy"),
        (("plan", "here", "--accuracy", "80"), "0.8 for 80 percent"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert words in one_paragraph(capsys)


def test_error_is_one_paragraph_with_its_kind(runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "seed=666") == 1
    assert one_paragraph(capsys).startswith("BudgetExhausted: node 'a' refuses round 1")


def test_bug_says_how_to_see_more(runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "seed=667") == 70
    text = one_paragraph(capsys)
    assert text.startswith("ZeroDivisionError: division by zero") and "--debug" in text


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback(runs: list[Config], place: int) -> None:
    arguments = ["run", "seed=667"]
    arguments.insert(place, "--debug")
    with pytest.raises(ZeroDivisionError):
        cli.main(arguments)


def test_full_disk_is_no_bug(fake: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config, **_: Any) -> Path:
        raise OSError(28, "No space left on device", "/x")

    fake("fedtune.runs.run", run=run)
    assert call("run") == 1
    assert "No space left" in one_paragraph(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("run", "seed=668"), ("run", "-m", "seed=668,1")])
def test_interrupt_says_how_to_go_on(
    arguments: tuple[str, ...], runs: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 130
    assert len(runs) == 1, "Ctrl-C ends a sweep, not one run of it"
    assert "resume=here" in one_paragraph(capsys)


def test_sigterm_is_as_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch system's time limit ends a run so that it says how to go on."""

    def dispatch(given: list[str], debug: bool) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_dispatch", dispatch)
    try:
        assert call("run") == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "Interrupted" in one_paragraph(capsys)


@pytest.mark.slow
def test_closed_pipe() -> None:
    """`fedtune run --help | head -1` ends quietly."""
    done = subprocess.run(
        f"{sys.executable} -m fedtune.cli.app run --help | head -2; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout.strip().startswith("Usage: fedtune run")
    assert done.stderr == ""
    assert done.returncode in (0, cli.BROKEN_PIPE)  # 0: all was written before head left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "closed", "status"),
    [
        ("--version", ">&-", 0),
        ("run --help", ">&- 2>&-", 0),
        ("run privacy.epsilon=x", "2>&-", cli.USAGE),
    ],
)
def test_closed_streams(words: str, closed: str, status: int) -> None:
    """What the shell closed is written to nowhere; the exit status is the same."""
    command = f"{sys.executable} -m fedtune.cli.app {words} {closed}"
    done = subprocess.run(command, shell=True, executable="/bin/bash", capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout == done.stderr == ""


def test_a_closed_input_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after `<&-`
    cli._prepare_streams()
    with sys.stdin as opened:
        assert opened.read() == ""


# --- statement, predict, budget ------------------------------------------------------------------


@pytest.fixture
def finished(fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> dict[str, Any]:
        if path.name == "missing":
            raise RecordError("missing has no record.json.")
        return {"epsilon": 2.0}

    monkeypatch.setattr("fedtune.runs.record.read", read)
    fake(
        "fedtune.privacy.statement.facts",
        statement_json=lambda record: {"unit": "record", **record},
        statement_markdown=lambda record, image: f"# Statement\n\nepsilon {record['epsilon']}\n",
    )


@pytest.mark.usefixtures("finished")
def test_statement(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("statement", "run") == 0
    assert capsys.readouterr().out == "# Statement\n\nepsilon 2.0\n"
    assert call("statement", "run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"unit": "record", "epsilon": 2.0}


@pytest.mark.usefixtures("finished")
def test_statement_of_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("statement", "missing") == 1
    assert one_paragraph(capsys).startswith("RecordError: ")


def test_predict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from fedtune.runs.predict import Prediction

    class Model:
        def predict(self, texts: list[str]) -> list[Prediction]:
            return [Prediction(text, "positive", 0.9, {"positive": 0.9}) for text in texts]

    def show(predictions: list[Prediction]) -> None:
        for prediction in predictions:
            print(prediction.label, prediction.text)

    sites: list[str | None] = []

    def load(path: Path, site: str | None) -> Model:
        sites.append(site)
        return Model()

    monkeypatch.setattr("fedtune.api.load", load)
    monkeypatch.setattr("fedtune.runs.predict.show", show)
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\n\nthree\n"))
    assert call("predict", "run", "one", "-") == 0
    assert capsys.readouterr().out == "positive one\npositive two\nNone \npositive three\n"
    assert call("predict", "run", "é", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == "é"
    assert call("predict", "run", "--site", "movies", "so so") == 0
    assert sites == [None, None, "movies"]


def test_budget_of_an_empty_home(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("budget", "show", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_budget_set_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--dataset", "d", "--epsilon", "3", "--delta", "1e-5")
    assert call("budget", "set", "--node", "a", *given) == 1
    refused = one_paragraph(capsys)
    assert "Node 'a' has no ledger of its own" in refused and "'--node simulation' sets it there" in refused
    assert call("budget", "set", "--node", "simulation", *given) == 0
    capsys.readouterr()
    assert call("budget", "show", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert {"dataset", "fingerprint", "epsilon", "delta", "budget_epsilon", "releases"} <= set(entry)
    assert (entry["dataset"], entry["budget_epsilon"], entry["releases"]) == ("d", 3.0, 0)
    assert call("budget", "verify") == 0


def test_a_budget_below_what_is_spent_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    from fedtune.config.files import state_dir
    from fedtune.privacy.ledger.simulation import simulation_ledger
    from tests.support.plans import local_plan

    (state_dir() / "ledgers").mkdir(exist_ok=True)
    simulation_ledger(state_dir() / "ledgers").reserve(
        dataset="visits", fingerprint="f", node="a", run="r", round=1, plan=local_plan()
    )
    assert call("budget", "set", "--epsilon", "0.01", "--delta", "1e-5") == 0
    said = capsys.readouterr().out
    assert "Warning: 'visits' has spent epsilon " in said and "more than its budget of 0.01" in said
    # The number beside it is that of the budget which holds, and not of the one that was just set.
    assert call("budget", "set", "--dataset", "visits", "--epsilon", "0.02", "--delta", "1e-5") == 0
    assert call("budget", "set", "--epsilon", "500", "--delta", "1e-5") == 0
    assert "more than its budget of 0.02" in capsys.readouterr().out.splitlines()[-1]
    assert call("budget", "set", "--dataset", "visits", "--epsilon", "500", "--delta", "1e-5") == 0
    capsys.readouterr()
    assert call("budget", "set", "--epsilon", "500", "--delta", "1e-5") == 0
    assert "Warning" not in capsys.readouterr().out


def test_budget_that_means_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("budget", "set", "--node", "a", "--epsilon", "-3", "--delta", "1e-5") == 1
    assert "epsilon" in one_paragraph(capsys)


# --- report, plan --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("a", "b", "pricing=edge", "--output", "c"),
        ("a", "--output", "c", "b", "pricing=edge"),
        ("--output", "c", "pricing=edge", "a", "b"),
    ],
)
def test_report(
    words: tuple[str, ...], fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def report(folders: list[Path], prices: list[str], output: Path | None, *, local: bool) -> Any:
        seen.append((folders, prices, output, local))
        return types.SimpleNamespace(text="what to choose", page="1", picture="2", csv="3", parquet="4")

    fake("fedtune.report.page", write_report=report)
    assert call("report", *words) == 0
    assert call("report", *words, "--local") == 0
    expected = ([Path("a"), Path("b")], ["pricing=edge"], Path("c"))
    assert seen == [(*expected, False), (*expected, True)]
    assert capsys.readouterr().out == 2 * "what to choose\n\n1\n2\n3\n4\n"


def test_report_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("report", str(tmp_path)) == 1
    assert "no record.json below" in one_paragraph(capsys)


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "lr=2").mkdir()
    assert folders_and_prices(["lr=2", "pricing=edge"]) == ([Path("lr=2")], ["pricing=edge"])


# --- completion ----------------------------------------------------------------------------------


def completed(*words: str, shell: str = "bash") -> list[str]:
    """What a shell is offered for the last of `words`."""
    environment = {"_FEDTUNE_COMPLETE": f"complete_{shell}", "COMP_WORDS": " ".join(("fedtune", *words))}
    done = subprocess.run(
        [sys.executable, "-m", "fedtune"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment, "COMP_CWORD": str(len(words))},
    )
    return done.stdout.split()


@pytest.mark.slow
def test_the_shell_is_offered_commands_and_settings() -> None:
    assert completed("pre") == ["predict"]
    assert completed("run", "privacy.eps") == ["privacy.epsilon="]
    assert completed("submit", "DIR", "adap")[0] == "adapter="
    # Bash ends words at '='.
    assert completed("run", "adapter", "=") == completed("run", "adapter", "=", "")
    assert completed("run", "adapter", "=", "lo") == ["lora"]
    assert set(completed("run", "seed=1", "data.public", "=", "")) == {"true", "false"}


def test_values_of_closed_sets_are_offered() -> None:
    import click

    from fedtune.cli.run_command import complete_setting

    context: Any = click.Context(click.Command("run"))
    assert complete_setting(context, "adapter=") == [
        f"adapter={name}" for name in ("auto", "bitfit", "ffa_lora", "head", "lora")
    ]
    assert "privacy.unit=person" in complete_setting(context, "privacy.unit=p")
    assert complete_setting(context, "privacy.epsilon=") == []
    assert complete_setting(context, "nonsense=") == []


def test_completion_can_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert "--install-completion" in out and "--show-completion" in out
