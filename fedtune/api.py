"""The Python API: `fedtune.run`, `sweep`, `load` and `epsilon`, which the command line calls too.

Settings are written as on the command line (`"privacy.epsilon=4"`), or given as a whole `Config`. Errors are
`FedtuneError`s, one paragraph each. Everything heavy is imported by the function that needs it.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.quiet import quiet_libraries, silence
from fedtune.config.schema import Config
from fedtune.errors import ConfigError, FedtuneError, PrivacyError, RecordError
from fedtune.runs.predict import Model, Prediction, load
from fedtune.runs.record import Result

if TYPE_CHECKING:
    from fedtune.config.launch import Job
    from fedtune.federation.events import StopRule
    from fedtune.report.frame import Frontier

__all__ = [
    "Model",
    "Prediction",
    "Result",
    "SweepResult",
    "describe",
    "epsilon",
    "keep_private",
    "load",
    "run",
    "sweep",
]

_PRIVATE_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # it would keep lines of a sweep back that look alike
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "0",
}


def run(
    *settings: str | Config,
    output: str | Path | None = None,
    progress: bool = True,
    config_dirs: Sequence[Path] = (),
) -> Result:
    """Simulates a federation on this machine: trains, accounts, evaluates, and writes a run folder.

    Args:
        settings: overrides as `fedtune run` takes them, or one `Config`; none: the defaults.
        output: the run folder; None: `outputs/DATE/TIME`, or as `hydra.run.dir=FOLDER` says.
        progress: show rounds, epsilon so far and a summary; live on a terminal and in a notebook.
        config_dirs: folders with pages of your own (`FOLDER/data/mine.yaml` is `data=mine`).

    Returns:
        The finished run. Its record, adapter and statement lie in `result.path`.

    Raises:
        ConfigError: a setting is unknown or has a value that is not allowed; nothing was run.
        FedtuneError: any other of its kinds, with what happened and the way out.
        KeyboardInterrupt: Ctrl-C, or a notebook's stop button. The checkpoint is kept, and the text says how
            to go on (`fedtune.run("resume=FOLDER")`).

    ```
    >>> result = fedtune.run("privacy.epsilon=4", "adapter=lora", progress=False)
    >>> result.epsilon <= 4 and result.delta < 1
    True
    >>> result.record["privacy"]["trust"]
    'local'

    ```
    """
    whole = [setting for setting in settings if isinstance(setting, Config)]
    if whole:
        if len(settings) > 1:
            raise ConfigError(
                "fedtune.run takes either overrides or one Config, not both: a Config is complete."
            )
        return _run_config(whole[0], output, progress)
    return _run_overrides([str(setting) for setting in settings], output, progress, config_dirs)


def _run_config(config: Config, output: str | Path | None, progress: bool) -> Result:
    from fedtune.config.convert import from_dict, to_dict

    config = from_dict(to_dict(config))  # one that was made by hand has not been checked
    if output is not None:
        config = replace(config, output=str(output))
    return _start(config, progress)


def _run_overrides(
    words: list[str], output: str | Path | None, progress: bool, config_dirs: Sequence[Path]
) -> Result:
    from fedtune.config.launch import is_sweep, launch

    if options := [word for word in words if word.startswith("sweep.")]:
        raise ConfigError(f"{options[0]} is an option of a sweep: add -m and a setting with several values.")
    if is_sweep(words):
        raise ConfigError(f"{' '.join(words)} asks for a sweep: use fedtune.sweep({{}}, ...).")
    results: list[Result] = []

    def task(job: Job) -> None:
        results.append(_start(job.config, progress))

    def on_failure(job: Job | None, error: Exception) -> str:
        raise error

    launch(_placed(words, "hydra.run.dir", output), task, on_failure=on_failure, extra_dirs=config_dirs)
    return results[0]


def _start(config: Config, progress: bool) -> Result:
    from rich.console import Console

    from fedtune.runs import run

    keep_private()
    quiet_libraries()
    console = None if progress else Console(quiet=True)
    return Result(run.run(config, console=console).parent)


@dataclass(frozen=True)
class SweepResult:
    """A sweep. `SweepResult(path)` opens one that was made earlier, here or elsewhere.

    Attributes:
        path: the folder of the sweep.
        failures: what each failed run said, by its number. The same lies in its folder, `failure.json`.
        partial: of finished runs that went on without a site, who took no part, by number.
    """

    path: Path
    failures: Mapping[int, str] = field(default_factory=dict)
    partial: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def runs(self) -> list[Result]:
        """The finished runs, in the order of their numbers."""
        from fedtune.runs.record import RECORD_NAME

        folders = [path.parent for path in self.path.glob(f"*/{RECORD_NAME}") if path.parent.name.isdecimal()]
        return [Result(folder) for folder in sorted(folders, key=lambda folder: int(folder.name))]

    def frontier(self, *prices: str) -> Frontier:
        """Accuracy, epsilon and cost of every configuration, as a pandas frame that draws itself.

        Args:
            prices: price the runs by another book: `pricing=NAME`, `pricing.PRICE=NUMBER`.

        Returns:
            One row a configuration; `.plot()` draws accuracy against epsilon.

        Raises:
            RecordError: no run of the sweep is finished.
            ConfigError: the prices mean nothing.
        """
        from fedtune.report.frame import Frontier
        from fedtune.report.frontier import compare

        return Frontier.of(compare([self.path], prices))

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"SweepResult({str(self.path)!r}: {len(self.runs)} finished{failed})"

    def _repr_html_(self) -> str:
        try:
            return self.frontier()._repr_html_()
        except RecordError as error:
            import html

            return f"<p>{html.escape(str(error))}</p>"


def sweep(
    grid: Mapping[str, Any],
    *overrides: str,
    output: str | Path | None = None,
    progress: bool = True,
    config_dirs: Sequence[Path] = (),
    debug: bool = False,
) -> SweepResult:
    """Runs every combination of the values in `grid`, one after another; a failed run does not end the sweep.

    Says before the first run how many there are and what they spend of privacy together. A sweep that was
    interrupted goes on with `fedtune.sweep({}, "sweep.resume=FOLDER")`.

    Args:
        grid: setting -> values to try. A text is taken as `fedtune run -m` takes it: one value, or for a
            search (`"sweep=optuna"` among the overrides) an interval, `"interval(0.001, 0.1)"`.
        overrides: settings that all runs share, and options of the sweep (`sweep.trials=20`).
        output: the folder of the sweep; None: `multirun/DATE/TIME`.
        progress: say one line a run, and show the run under way.
        config_dirs: folders with pages of your own.
        debug: let an error that fedtune did not foresee pass, instead of noting it as a failed run.

    Returns:
        The sweep: its runs, its failures and its frontier.

    Raises:
        ConfigError: a setting is unknown, or has no values; nothing was run.
        CheckpointError: there is no sweep to resume in that folder.
        KeyboardInterrupt: Ctrl-C; what was finished is kept, and the text says how to go on.

    ```
    >>> trials = fedtune.sweep({"privacy.epsilon": [1, 8], "seed": range(2)}, progress=False)
    >>> len(trials.runs), len(trials.frontier())
    (4, 2)

    ```
    """
    if not isinstance(grid, Mapping):
        raise ConfigError(
            f"The grid of a sweep is a mapping of settings to the values to try, not {grid!r}: "
            "fedtune.sweep({'privacy.epsilon': [1, 8]}), or fedtune.sweep({}, 'privacy.epsilon=1,8')."
        )
    from fedtune.sweeps.sweep import run_sweep

    keep_private()
    words = _placed([*_grid_words(grid), *overrides], "hydra.sweep.dir", output)

    def start(config: Config, title: str, stop_rule: StopRule | None, alone: bool) -> Path:
        from rich.console import Console

        from fedtune.runs import run
        from fedtune.runs.display import Display

        if not alone:
            keep_private()  # one process of several
            if not debug:
                silence()
        quiet = not (alone and progress)
        console = Console(highlight=False, quiet=quiet, force_terminal=None if alone else False)
        view = Display(title, unit=config.privacy.unit, brief=True, console=console)
        return run.run(config, view=view, stop_rule=stop_rule)

    def failed(error: Exception) -> str:
        if debug and not isinstance(error, FedtuneError):
            raise error
        return describe(error)

    outcome = run_sweep(
        words,
        start,
        describe=failed,
        say=_say if progress else _say_nothing,
        warn=_warn if progress else _say_nothing,
        extra_dirs=config_dirs,
    )
    assert outcome.folder is not None  # it has one unless it raised
    failures = {failure.number: failure.message for failure in outcome.failures}
    return SweepResult(outcome.folder, failures, outcome.partial)


def _grid_words(grid: Mapping[str, Any]) -> list[str]:
    """The grid as `fedtune run -m` takes it. Raises `ConfigError` for an axis without values."""
    from fedtune.config.convert import value_text

    words = []
    for name, values in grid.items():
        if isinstance(values, str):
            words.append(f"{name}={values}")
            continue
        listed = list(values) if isinstance(values, Iterable) else [values]
        if not listed:
            raise ConfigError(f"{name} has no values to try. Give one or more, or leave it out of the grid.")
        words.append(f"{name}={','.join(value_text(value) for value in listed)}")
    return words


def _placed(words: Sequence[str], name: str, folder: str | Path | None) -> list[str]:
    """`words`, with the folder that the caller chose. Raises `ConfigError` if it is chosen twice."""
    from fedtune.config.convert import value_text

    if folder is None:
        return list(words)
    for word in words:
        if word.startswith((f"{name}=", "resume=", "sweep.resume=")):
            raise ConfigError(f"output={str(folder)!r} and {word} both name the folder. Keep one of them.")
    return [*words, f"{name}={value_text(Path(folder))}"]


def epsilon(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon of DP-SGD: what `steps` Poisson-sampled Gaussian steps release together.

    It is read off the privacy loss distribution of the composed steps (Koskela et al. 2020; Doroshenko et al.
    2022), under which adding or removing one unit changes the probability of any outcome S by

        P[S] <= exp(epsilon) Q[S] + delta   and   Q[S] <= exp(epsilon) P[S] + delta

    Guarantee: everything approximate is rounded so that the result is an upper bound. It holds for steps that
    were fixed before the first of them, not for a schedule that was chosen by looking at results.

    Args:
        noise_multiplier: standard deviation of the noise over the clipping norm; above 0.
        sample_rate: probability that one unit takes part in a step, in (0, 1].
        steps: number of steps over the whole run, 1 or more.
        delta: in (0, 1).

    Returns:
        The upper bound; `math.inf` if no finite epsilon has this delta.

    Raises:
        PrivacyError: a value is not a number, not finite, or out of its range.

    ```
    >>> round(fedtune.epsilon(noise_multiplier=0.8, sample_rate=0.1, steps=48, delta=1e-5), 2)
    7.93

    ```
    """
    for name, value in (
        ("noise_multiplier", noise_multiplier),
        ("sample_rate", sample_rate),
        ("delta", delta),
    ):
        _check_number(name, value)
    _check_number("steps", steps, whole=True)
    if noise_multiplier <= 0:
        raise PrivacyError(
            f"noise_multiplier must be above 0, not {noise_multiplier}: without noise there is no epsilon."
        )
    if not 0 < sample_rate <= 1:
        raise PrivacyError(f"sample_rate is a probability in (0, 1], not {sample_rate}.")
    if steps < 1:
        raise PrivacyError(f"steps must be 1 or more, not {steps}.")
    if not 0 < delta < 1:
        raise PrivacyError(f"delta must lie strictly between 0 and 1, not {delta}.")
    from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms

    term = Term(float(sample_rate), float(noise_multiplier))
    return epsilon_of_terms({term: int(steps)}, float(delta))


def _check_number(name: str, value: Any, *, whole: bool = False) -> None:
    """Raises `PrivacyError` unless `value` is a finite number; a bool does not count as one."""
    kind = numbers.Integral if whole else numbers.Real
    finite = False
    if not isinstance(value, bool) and isinstance(value, kind):
        with suppress(OverflowError):  # an int that no float holds
            finite = math.isfinite(value)
    if not finite:
        raise PrivacyError(f"{name} must be a {'whole' if whole else 'finite'} number, not {value!r}.")


def describe(error: BaseException) -> str:
    """`error` in one paragraph, beginning with its kind."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, FedtuneError):
        return f"{name}: {text}"
    if isinstance(error, (OSError, MemoryError)):
        return f"{name}: {text or 'out of memory'} (--debug shows where)."
    return (
        f"{name}: {text.rstrip('.')}. This is not an error that fedtune foresaw, so it is a bug: run the "
        "same command with --debug for the traceback."
    )


def keep_private() -> None:
    """Keeps libraries from calling home, unless the user's environment says that they may."""
    for name, value in _PRIVATE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _say(line: str) -> None:
    print(line, flush=True)


def _warn(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    pass
