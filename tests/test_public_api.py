"""What `import fedtune` offers: these names and no others, documented, typed, with true examples."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fedtune
from fedtune.errors import PrivacyError
from tests.support import tiny_federation

NAMES = [
    "Config",
    "FedtuneError",
    "Frontier",
    "Model",
    "Prediction",
    "PrivacyPlan",
    "Result",
    "SweepResult",
    "__version__",
    "epsilon",
    "load",
    "run",
    "sweep",
]
FUNCTIONS = [name for name in NAMES if name.islower() and not name.startswith("_")]
CLASSES = [name for name in NAMES if name[0].isupper()]
METHODS = [  # of the classes that the API returns
    f"{name}.{method}"
    for name in ("Frontier", "Model", "Result", "SweepResult")
    for method, value in vars(getattr(fedtune, name)).items()
    if not method.startswith("_") and inspect.isfunction(value)
]


def get(name: str) -> Any:
    value: Any = fedtune
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_the_public_names_are_these() -> None:
    assert sorted(fedtune.__all__) == sorted(NAMES) == sorted(set(fedtune.__all__))
    assert dir(fedtune) == sorted(NAMES)


def test_no_other_name_is_found() -> None:
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = fedtune.runn  # type: ignore[attr-defined]


def test_import_loads_the_errors_and_nothing_else() -> None:
    code = "import sys, fedtune; print(sorted(m for m in sys.modules if m.startswith('fedtune')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['fedtune', 'fedtune.errors']"


def test_the_functions_cost_little_before_they_are_called() -> None:
    heavy = ("torch", "hydra", "flwr", "transformers", "pandas", "matplotlib", "rich")
    code = f"import sys, fedtune; fedtune.run; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_a_function_says_what_it_takes_returns_and_raises(name: str) -> None:
    function = get(name)
    docstring = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    parameters = [parameter for parameter in signature.parameters if parameter != "self"]
    for section in (["Args:"] if parameters else []) + ["Returns:", "Raises:"]:
        assert f"\n{section}\n" in docstring, f"{name} lacks {section}"
    for parameter in parameters:
        assert f"\n    {parameter}: " in docstring, f"{name} does not say what {parameter} is"
    assert function.__module__.startswith("fedtune.")


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_types_can_be_resolved(name: str) -> None:
    known = {public: getattr(fedtune, public) for public in fedtune.__all__}
    from matplotlib.axes import Axes

    hints = typing.get_type_hints(get(name), localns={**known, "Axes": Axes})
    parameters = [parameter for parameter in inspect.signature(get(name)).parameters if parameter != "self"]
    assert {"return", *parameters} == set(hints)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_documented_with_its_attributes(name: str) -> None:
    value = get(name)
    docstring = inspect.getdoc(value) or ""
    assert value.__module__.startswith("fedtune.") and docstring
    if name in ("Model", "Prediction", "Result", "SweepResult"):
        assert "Attributes:" in docstring
        fields = [one.name for one in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        for attribute in fields:
            assert f"\n    {attribute}: " in docstring
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and attribute not in fields:
                assert getattr(member, "__doc__", None), f"{name}.{attribute} has no docstring"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FUNCTIONS, "Model"])
def test_the_examples_in_the_docstrings_are_true(
    name: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    value = get(name)
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(value, name, module=False, globs={"fedtune": tiny})  # type: ignore[arg-type]
    if not test.examples:
        pytest.fail(f"{name} has no example")
    problems: list[str] = []
    doctest.DocTestRunner().run(test, out=problems.append)
    assert not problems, "".join(problems)


@pytest.fixture
def tiny(tmp_path: Path) -> SimpleNamespace:
    """The package, but its runs are of the tiny federation, so that examples run in seconds."""
    tiny_federation.one_thread()
    model = tiny_federation.make_model(tmp_path / "model")
    data = tiny_federation.make_data(tmp_path / "data")
    words = [
        *(f"model.name={model}", "model.quantization=none", "federation.num_rounds=2", "device=cpu"),
        *("data=files", f"data.path={data}", "data.name=made-up", "data.labels=[negative,positive]"),
        *("data.site=site", "data.test_split=test", "data.test_public=true", "data.declared_size=120"),
        *("data.max_length=16", "train.local_steps=2", "train.sample_rate=0.3"),
    ]
    return SimpleNamespace(
        run=lambda *settings, **options: fedtune.run(*settings, *words, **options),
        sweep=lambda grid, *overrides, **options: fedtune.sweep(grid, *overrides, *words, **options),
        load=fedtune.load,
        epsilon=fedtune.epsilon,
    )


# --- run, load -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Result:
    folder = tmp_path_factory.mktemp("api")
    tiny_federation.one_thread()
    config = tiny_federation.make_config(
        tiny_federation.make_model(folder / "model"), tiny_federation.make_data(folder / "data")
    )
    before = dataclasses.asdict(config)
    made = fedtune.run(tiny_federation.private(config), output=folder / "run", progress=False)
    assert dataclasses.asdict(config) == before | {"privacy": dataclasses.asdict(config.privacy)}
    return made


def test_a_result_is_what_its_record_says(result: fedtune.Result) -> None:
    privacy = result.record["privacy"]
    assert result.path.name == "run" and (result.path / "record.json").is_file()
    assert (result.epsilon, result.delta) == (privacy["epsilon"], privacy["delta"])
    assert 0 < (result.epsilon or 0) <= 8
    assert (result.unit, result.adjacency) == ("record", "add or remove one record")
    assert result.accuracy == result.record["metrics"]["accuracy"]
    assert result.statement == (result.path / "statement.md").read_text()
    assert (result.adapter / "adapter_config.json").is_file()
    assert result == fedtune.Result(result.path) == fedtune.Result(result.path / "record.json")


def test_a_result_never_shows_epsilon_alone(result: fedtune.Result) -> None:
    for text in (repr(result), result._repr_html_()):
        assert f"epsilon {result.epsilon:.3f} at delta {result.delta:.2e}, add or remove one record" in text
    assert "\n" not in repr(result)
    page = result._repr_html_()
    for name in ("accuracy", "privacy", "time", "cost"):
        assert f">{name}</th>" in page
    assert f"{100 * (result.accuracy or 0):.1f} %" in page


def test_what_a_record_says_is_no_markup(result: fedtune.Result, tmp_path: Path) -> None:
    import json

    record = json.loads((result.path / "record.json").read_text())
    record["federation"]["ended_early"] = "<script>alert(1)</script>"
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert "<script>" not in fedtune.Result(tmp_path)._repr_html_()


def test_a_record_of_another_name_is_itself_and_not_the_one_beside_it(
    result: fedtune.Result, tmp_path: Path
) -> None:
    import json

    for name, run in (("record.json", "0" * 16), ("seed1.json", "1" * 16)):
        record = {**result.record, "run": {**result.record["run"], "id": run}}
        (tmp_path / name).write_text(json.dumps(record))
    found = fedtune.Result(tmp_path / "seed1.json")
    assert found.record["run"]["id"] == "1" * 16 and "1" * 16 in found.statement
    assert fedtune.Result(tmp_path).record["run"]["id"] == "0" * 16
    (tmp_path / "record.json").unlink()
    assert fedtune.Result(tmp_path / "seed1.json").epsilon == result.epsilon


@pytest.mark.parametrize("path", [None, 3, ["outputs"]])
@pytest.mark.parametrize("opens", [fedtune.load, fedtune.Result])
def test_what_names_no_run(opens: Any, path: Any) -> None:
    with pytest.raises(fedtune.FedtuneError, match=r"names no run.*folder"):
        opens(path)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    nothing = fedtune.Result(tmp_path / "nowhere")
    assert nothing.path == tmp_path / "nowhere" and "no finished run" in repr(nothing)
    assert "finished run" in nothing._repr_html_()
    with pytest.raises(fedtune.FedtuneError):
        _ = nothing.epsilon


@pytest.mark.slow
def test_progress_is_shown_unless_it_is_not_wanted(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.run("privacy=none", output=tmp_path / "loud")
    assert "round 2/2" in capsys.readouterr().out
    tiny.run("privacy=none", output=tmp_path / "quiet", progress=False)
    assert capsys.readouterr().out == ""


def test_a_config_is_checked_and_complete(result: fedtune.Result) -> None:
    wrong = fedtune.Config(seed="one")  # type: ignore[arg-type]
    with pytest.raises(fedtune.FedtuneError, match="seed"):
        fedtune.run(wrong)
    with pytest.raises(fedtune.FedtuneError, match="not both"):
        fedtune.run(fedtune.Config(), "seed=1")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("privacy.epsilonn=1",), "privacy.epsilon"),
        (("seed=1,2",), "several values"),
        (("sweep=optuna",), "fedtune.sweep"),
        (("sweep.trials=3",), "option of a sweep"),
        (("hydra.run.dir=x",), "both name the folder"),
        (("resume=x",), "both name the folder"),
    ],
)
def test_overrides_that_mean_nothing(words: tuple[str, ...], match: str, tmp_path: Path) -> None:
    with pytest.raises(fedtune.FedtuneError, match=match):
        fedtune.run(*words, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.runs.display import Display

    def stop(self: Display, summary: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "on_round", stop)
        with pytest.raises(KeyboardInterrupt, match="resume="):
            tiny.run("privacy=none", output=tmp_path / "run", progress=False)
    made = fedtune.run(f"resume={tmp_path / 'run'}", progress=False)
    assert made.path == tmp_path / "run" and made.record["run"]["attempt"] == 2


# --- sweep ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> fedtune.SweepResult:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_federation.one_thread()
    model, data = tiny_federation.make_model(folder / "model"), tiny_federation.make_data(folder / "data")
    words = (
        *(f"model.name={model}", "model.quantization=none", "federation.num_rounds=1", "device=cpu"),
        *("data=files", f"data.path={data}", "data.labels=[negative,positive]", "data.test_split=test"),
        *("data.test_public=true", "data.declared_size=120", "data.max_length=16", "privacy.delta=1e-4"),
        "data.site=site",
    )
    grid = {"privacy.trust": ["none", "local"], "seed": range(2)}
    return fedtune.sweep(grid, *words, output=folder / "sweep", progress=False)


def test_a_sweep_has_its_runs_and_its_frontier(trials: fedtune.SweepResult) -> None:
    assert [run.path.name for run in trials.runs] == ["0", "1", "2", "3"]
    assert not trials.failures and "4 finished" in repr(trials)
    frontier = trials.frontier()
    assert isinstance(frontier, fedtune.Frontier) and len(frontier) == 2
    private, bare = frontier.iloc[0], frontier.iloc[1]
    assert private["epsilon"] == pytest.approx(max(run.epsilon or 0 for run in trials.runs))
    assert (private["delta"], private["unit"], private["runs"]) == (1e-4, "record", 2)
    assert bare["epsilon"] == float("inf") and not bare["private"]
    assert frontier[frontier["epsilon"] < 100]["accuracy"].iloc[0] == private["accuracy"]


def test_a_frontier_shows_and_draws_itself(trials: fedtune.SweepResult) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    frontier = trials.frontier()
    page = frontier._repr_html_()
    for word in ("epsilon", "delta", "1.00e-04", "add or remove one record", "no privacy", "infinite"):
        assert word in page, word
    text = str(frontier)
    for word in ("epsilon", "1.00e-04", "add or remove one record", "no privacy", "infinite"):
        assert word in text, word
    assert len(text.splitlines()) < 12 and "_error" not in text
    assert "accuracy_error" in str(frontier[["accuracy", "accuracy_error"]]), "a part of it is a plain frame"
    axes = frontier.plot()
    assert "delta 0.0001, add or remove one record" in axes.get_xlabel()
    assert frontier.plot(axes) is axes
    with pytest.raises(fedtune.FedtuneError, match="no group"):
        frontier.plot(group="other")
    assert trials._repr_html_() == page


@pytest.mark.slow
def test_a_sweep_is_resumed_and_opened(trials: fedtune.SweepResult) -> None:
    again = fedtune.sweep({}, f"sweep.resume={trials.path}", progress=False)
    assert again.path == trials.path and len(again.runs) == 4
    assert len(fedtune.SweepResult(trials.path).frontier("pricing.device_hour=0.5")) == 2


def test_an_empty_sweep_has_no_frontier(tmp_path: Path) -> None:
    assert fedtune.SweepResult(tmp_path).runs == []
    assert "no record.json" in fedtune.SweepResult(tmp_path)._repr_html_()


@pytest.mark.slow
def test_a_failed_run_does_not_end_a_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedtune.runs import run as runs

    def fail(config: fedtune.Config, **_: Any) -> Path:
        raise ZeroDivisionError("division by zero") if config.seed else fedtune.FedtuneError("no more")

    monkeypatch.setattr(runs, "run", fail)
    made = fedtune.sweep({"seed": [0, 1]}, output=tmp_path / "a")
    assert made.failures[0] == "FedtuneError: no more" and made.failures[1].startswith("ZeroDivisionError")
    told = capsys.readouterr()
    assert "2 runs in" in told.out and "no more" in told.err
    with pytest.raises(ZeroDivisionError):
        fedtune.sweep({"seed": [0, 1]}, output=tmp_path / "b", debug=True)


@pytest.mark.parametrize(
    ("grid", "match"),
    [
        ({"seed": []}, "no values"),
        ({"sed": [1, 2]}, "seed"),
        ({"seed": ["a"]}, "seed"),
        *[(wrong, r"mapping.*fedtune\.sweep\(\{") for wrong in (3, None, "seed=1,2", ["seed"])],
    ],
)
def test_a_grid_that_means_nothing(grid: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(fedtune.FedtuneError, match=match):
        fedtune.sweep(grid, output=tmp_path / "sweep")


# --- epsilon -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate", "steps", "delta"),
    [(0.8, 0.1, 48, 1e-5), (1.0, 1.0, 1, 1e-5), (2.0, 0.01, 1000, 1e-6)],
)
def test_epsilon_is_an_upper_bound_close_to_another_accountant(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    step = dp_accounting.GaussianDpEvent(noise_multiplier)
    other = PLDAccountant(value_discretization_interval=1e-4)
    other.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, step) if sample_rate < 1 else step, steps)
    expected = other.get_epsilon(delta)
    found = fedtune.epsilon(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps, delta=delta
    )
    assert found == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", ["noise_multiplier", "sample_rate", "steps", "delta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None, 0, -1])
def test_epsilon_of_what_means_nothing(name: str, value: Any) -> None:
    good: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(fedtune.FedtuneError, match=name):
        fedtune.epsilon(**good | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 10**400),
        ("sample_rate", 10**400),
        ("noise_multiplier", 10**400),
        ("noise_multiplier", 1e-300),
        ("noise_multiplier", 1e300),
    ],
)
def test_epsilon_of_what_no_float_can_compute(name: str, value: Any) -> None:
    good: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(PrivacyError, match=name):
        fedtune.epsilon(**good | {name: value})


def test_epsilon_takes_numbers_of_numpy() -> None:
    import numpy as np

    values = {"noise_multiplier": np.float32(1.0), "sample_rate": np.float64(0.5), "steps": np.int64(3)}
    plain = fedtune.epsilon(noise_multiplier=1.0, sample_rate=0.5, steps=3, delta=1e-5)
    assert fedtune.epsilon(**values, delta=1e-5) == plain


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedtune", "rnu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "'fedtune --help'" in done.stderr and "'run'" in done.stderr
