"""What a sweep that searches is told before it begins: which settings it may choose, and from what.

Written in Hydra's own syntax, on the command line or in `hydra.sweeper.params` of a page:

    train.learning_rate=tag(log,interval(0.001,0.1))   any number between, by its logarithm
    privacy.epsilon=interval(1,8)                      any number between
    federation.num_rounds=range(4,21,4)                4, 8, 12, 16, 20
    adapter=head,lora                                  one of these, or adapter=glob(*)

Whether an interval holds whole numbers or any is known from the setting, not from how its ends are written.
Does not do: choose (`fedtune.sweeps.search`), or launch (`hydra_plugins/fedtune_sweepers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from fedtune.config.convert import check_value, settings, unknown_setting
from fedtune.config.pages import GROUPS
from fedtune.config.schema import Config
from fedtune.errors import ConfigError

__all__ = ["Axis", "Searcher", "Space", "space_of"]


@dataclass(frozen=True)
class Axis:
    """One setting that is searched.

    Attributes:
        choices: its values as they are written on the command line; empty for a number between two.
        low, high: the ends, both possible.
        whole: only whole numbers.
        step: distance of the values; None: any.
        log: even by the logarithm.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    step: float | None = None
    log: bool = False

    def __str__(self) -> str:
        if self.choices:
            return f"{self.name}={','.join(self.choices)}"
        text = f"{self.low:g} to {self.high:g}"
        if self.step is not None and not (self.whole and self.step == 1):
            text += f" by {self.step:g}"
        return f"{self.name}={text}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Space:
    """All that a search is told.

    Attributes:
        folder: of the sweep.
        fixed: overrides that every run has.
        options: the sweeper's settings, as its page and the command line give them.
        base: the configuration without the settings that are searched; None if it does not stand alone.
        workers: runs that the launcher makes side by side.
    """

    folder: Path
    axes: tuple[Axis, ...]
    fixed: tuple[str, ...]
    options: Mapping[str, Any]
    base: Config | None
    workers: int


class Searcher(Protocol):
    """Who chooses the runs of a search."""

    def ask(self, most: int) -> list[tuple[int, list[str]]]:
        """The next runs, at most so many: number and overrides of each. Empty: the search is over."""

    def tell(self, number: int) -> None:
        """The run has ended; what came of it lies in its folder."""


def space_of(overrides: Iterable[Override]) -> tuple[tuple[Axis, ...], tuple[str, ...]]:
    """Axes, and overrides without a choice. A setting that is given twice takes the later one.

    Raises:
        ConfigError: an interval of something that is no number, with its ends wrong, or nothing to search.
    """
    found: dict[str, Axis | str] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            found[key] = f"{key}={override.get_value_element_as_str()}"
            continue
        axis = _axis(override)
        found[key] = f"{key}={axis.choices[0]}" if len(axis.choices) == 1 else axis
    axes = tuple(one for one in found.values() if isinstance(one, Axis))
    if not axes:
        raise ConfigError(
            "There is nothing to search: every setting has one value. Give at least one several values or an "
            "interval, for instance 'train.learning_rate=tag(log,interval(0.001,0.1))'."
        )
    return axes, tuple(one for one in found.values() if isinstance(one, str))


def _axis(override: Override) -> Axis:
    name, value = override.get_key_element(), override.value()
    if name not in settings() and name not in GROUPS:
        raise unknown_setting(name, [*settings(), *GROUPS])
    if isinstance(value, IntervalSweep):
        return _interval(name, value, override.input_line or name)
    texts = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if isinstance(value, RangeSweep) and not value.shuffle and len(texts) > 1:
        numbers = [float(text) for text in texts]
        whole = settings()[name].kind is int if name in settings() else False
        if numbers[1] > numbers[0]:
            return Axis(name, (), numbers[0], numbers[-1], whole, numbers[1] - numbers[0])
    if not texts:
        raise ConfigError(f"{override.input_line or name} holds no value.")
    return Axis(name, texts)


def _interval(name: str, value: IntervalSweep, text: str) -> Axis:
    setting = settings().get(name)
    if setting is None or setting.kind not in (int, float):
        raise ConfigError(
            f"{text}: {name} is no number, so it has no interval. Give its values, with commas."
        )
    low, high = value.start, value.end
    for end in (low, high):
        # Hydra writes both ends alike, whole or not.
        whole_end = setting.kind is int and end is not None and float(end).is_integer()
        check_value(name, int(end) if whole_end and end is not None else end)
    if low is None or high is None or not low < high:
        raise ConfigError(f"{text}: an interval begins below its end.")
    log, whole = "log" in value.tags, setting.kind is int
    if log and low <= 0:
        raise ConfigError(f"{text}: an interval by the logarithm begins above 0.")
    # By the logarithm optuna knows no steps but those of whole numbers.
    return Axis(name, (), float(low), float(high), whole, 1.0 if whole and not log else None, log)
