"""Overrides from the command line, checked before Hydra sees them.

Hydra lets `+key=value` add a key that nothing reads, and says of a misspelt key only that it is 'not in
struct'. Here every override must name a setting of the schema, a group of `conf/`, or something of Hydra's
own; each value of a sweep is checked too, so that job 7 of 8 does not die of a typing error in the night.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from fedtune.config.convert import check_value, nearest, settings, unknown_setting
from fedtune.config.pages import GROUPS, conf_dir, group_options
from fedtune.errors import ConfigError

__all__ = ["CheckedOverrides", "asks_for_sweep", "check_overrides", "named_settings"]


# Launchers of a sweep: what must be installed for each, and the command that brings it. hydra-ray-launcher
# asks for boto3 and cloudpickle below 3, which its AWS launcher alone uses and which joblib 1.6 does not fit.
_SUBMITIT = ("hydra_plugins.hydra_submitit_launcher", "pip install 'fedtune[submitit]'")
_LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "pip install 'fedtune[parallel]'"),
    "ray": (
        "hydra_plugins.hydra_ray_launcher",
        "pip install 'fedtune[ray]', then pip install --no-deps hydra-ray-launcher",
    ),
    "submitit_local": _SUBMITIT,
    "submitit_slurm": _SUBMITIT,
}
# hydra.sweeper.NAME: of any sweep, and of a search.
_SWEEPER = ("params", "max_batch_size", "trials", "objectives", "sampler", "pruner")


@dataclass(frozen=True)
class CheckedOverrides:
    """Overrides as Hydra may take them, and what of them the loader must know."""

    arguments: tuple[str, ...]
    keys: frozenset[str]  # settings and groups that were named, without Hydra's own
    resume: str | None  # the folder of resume=FOLDER
    sweeps: bool  # a sweep was asked for, by -m or by sweep=NAME


def check_overrides(
    overrides: Sequence[str], *, multirun: bool = False, extra_dirs: Sequence[Path] = ()
) -> CheckedOverrides:
    """Raises `ConfigError`, one paragraph, for the first override that cannot be meant."""
    parser = OverridesParser.create()
    arguments: list[str] = []
    keys: set[str] = set()
    hydras: list[str] = []
    resume: str | None = None
    multirun = multirun or any(asks_for_sweep(text) for text in overrides)
    for text in overrides:
        override = _parse(parser, text)
        key = override.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            hydras.append(key)
            _check_launcher(key, override)
            _check_sweeper(key, overrides)
            arguments.append(override.input_line or text)
            continue
        _refuse_odd_forms(override, text)
        if key in keys:
            raise ConfigError(
                f"{key} is given twice ({text!r} is the second). Keep one of them.", setting=key
            )
        keys.add(key)
        sweeping = bool(override.is_sweep_override())
        if sweeping and not multirun:
            known = settings().get(key)
            one = (
                f"for a list of them put it in brackets: '{key}=[{text.partition('=')[2]}]'"
                if known is not None and known.kind is list
                else f"for one value that has commas in it, quote it: '{key}=\"...\"'"
            )
            raise ConfigError(
                f"{text} gives several values. To run once for each of them use 'fedtune run -m {text}'; "
                f"{one}."
            )
        for value in _values(override):
            _check_one(key, value, extra_dirs)
        if not sweeping and key in GROUPS and override.value() is None:
            continue  # experiment=null, sweep=null: what the defaults say, in a form that Hydra refuses
        # '+experiment=smoke' is how Hydra's own examples write it: the group is in the defaults here.
        arguments.append((override.input_line or text).lstrip("+"))
        if key == "resume" and not sweeping and override.value() is not None:
            resume = str(_plain(override))
    if resume is not None:
        others = sorted(keys - {"resume"}) + hydras
        if others or multirun:
            named = ", ".join(others) if others else "-m"
            raise ConfigError(
                f"resume={resume} goes on with the configuration saved there, so {named} cannot be given "
                "with it. Leave it out to resume, or start a new run."
            )
    return CheckedOverrides(tuple(arguments), frozenset(keys), resume, multirun)


def _check_launcher(key: str, override: Override) -> None:
    """A launcher that is known and not installed has a package that brings it."""
    if key != "hydra/launcher" or override.is_sweep_override():
        return
    name = str(override.value())
    needed, command = _LAUNCHERS.get(name, ("hydra", ""))
    if not _installed(needed):
        raise ConfigError(f"hydra/launcher={name} needs a package that is not installed: {command}.")


def _check_sweeper(key: str, overrides: Sequence[str]) -> None:
    """The options of fedtune's two sweepers are known; one that the user brings has options of its own."""
    if not key.startswith("hydra.sweeper.") or any("hydra/sweeper=" in text for text in overrides):
        return
    name = key.split(".")[2]
    if name not in _SWEEPER:
        guess = nearest(name, _SWEEPER)
        hint = f" Did you mean {guess}?" if guess else ""
        raise ConfigError(
            f"The sweeper has no option {name!r}.{hint} There are: {', '.join(_SWEEPER[:2])}; and for a "
            f"search (sweep=optuna) {', '.join(_SWEEPER[2:])}."
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def named_settings(overrides: Sequence[str]) -> frozenset[str]:
    """Settings and groups that overrides name, which were checked before (those of one job of a sweep)."""
    parser = OverridesParser.create()
    return frozenset(parser.parse_override(text).key_or_group for text in overrides)


def _parse(parser: OverridesParser, text: str) -> Override:
    key, equals, raw = text.partition("=")
    if not equals and not text.startswith("~"):
        guess = nearest(text, [*settings(), *GROUPS])
        hint = f" Did you mean '{guess}=...'?" if guess else ""
        raise ConfigError(f"{text!r} is no setting: settings are written name=value.{hint}")
    setting = settings().get(key.lstrip("+"))
    listed = _listed(raw) if setting is not None and setting.kind is list else None
    if listed is not None and not any(mark in raw.strip()[1:-1] for mark in "[]{}'\"\\"):
        return _of_texts(parser, key, listed)
    try:
        override: Override = parser.parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:  # of an int that is too long
        if listed is not None:
            return _of_texts(parser, key, listed)  # [l'été,hiver]: the quote belongs to the word
        if setting is not None and setting.kind in (int, float, bool):
            check_value(key.lstrip("+"), raw)  # says what is allowed
        if setting is None or setting.kind is not str:
            shown = text if len(text) <= 200 else f"{text[:200]}..."
            raise ConfigError(
                f"{shown!r} cannot be read. Quote a value that has special characters: '{key[:200]}=\"...\"'."
            ) from error
        return parser.parse_override(f"{key}={_quoted(raw)}")
    is_text = setting is not None and setting.kind is str
    if is_text and not override.is_sweep_override() and type(override.value()) in (int, float):
        # A commit such as 1e5 or a column called 007 is a text, whatever it looks like.
        return parser.parse_override(f"{key}={_quoted(raw)}")
    return override


def asks_for_sweep(text: str) -> bool:
    """Does this one override make a sweep of the command?"""
    key, _, value = text.lstrip("+").partition("=")
    if key == "experiment":
        return value in _sweeping_experiments()
    return (key == "sweep" and value not in ("", "null")) or (key == "hydra.mode" and value == "MULTIRUN")


@functools.cache
def _sweeping_experiments() -> frozenset[str]:
    """Pages of `conf/experiment/` that are sweeps: they say so in `hydra.mode`."""
    found = set()
    for name in group_options("experiment"):
        page = yaml.safe_load((conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
        if ((page or {}).get("hydra") or {}).get("mode") == "MULTIRUN":
            found.add(name)
    return frozenset(found)


def _refuse_odd_forms(override: Override, text: str) -> None:
    key = override.key_or_group
    if key == "output":
        raise ConfigError(
            f"{text!r}: the run folder is chosen by hydra.run.dir=FOLDER (sweeps: hydra.sweep.dir)."
        )
    if override.is_delete():
        if key in GROUPS:
            way = f"Choose another option of the group: {', '.join(group_options(key))}."
        else:
            way = f"Give it another value, for instance '{key}=null'."
        raise ConfigError(f"{text!r} would remove a setting, but a configuration is always complete. {way}")
    if override.package is not None:
        raise ConfigError(f"{text!r} names a package with '@', which fedtune does not use. Leave it out.")
    if key in GROUPS or key in settings():
        return
    branch = [name for name in settings() if name.startswith(key + ".")]
    if branch:
        raise ConfigError(f"{key} is no single setting. Settings below it: {', '.join(branch)}.", setting=key)
    raise unknown_setting(key, [*settings(), *GROUPS])


def _check_one(key: str, value: Any, extra_dirs: Sequence[Path]) -> None:
    if key in GROUPS:
        options = group_options(key, extra_dirs)
        if value is None and key in ("experiment", "sweep"):
            return
        for name in value if isinstance(value, list) else [value]:
            if str(name) not in options:
                guess = nearest(str(name), options)
                hint = f" Did you mean {key}={guess}?" if guess else ""
                raise ConfigError(f"There is no {key}={name}.{hint} There are: {', '.join(options)}.")
        return
    if isinstance(value, str) and "${" in value:
        return  # an interpolation: checked when it is resolved
    check_value(key, value)


def _values(override: Override) -> list[Any]:
    """The one value, or each value of a sweep, as Python values."""
    if not override.is_sweep_override():
        return [_plain(override)]
    if not override.is_discrete_sweep():
        return []  # an interval, for sweepers that draw from it: every job checks what it drew
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []  # Hydra lists the options itself
    parser = OverridesParser.create()
    key = override.key_or_group
    return [_plain(parser.parse_override(f"{key}={item}")) for item in override.sweep_string_iterator()]


def _plain(override: Override) -> Any:
    value = override.value()
    if isinstance(value, (list, dict)):
        return OmegaConf.to_container(OmegaConf.create(value), resolve=False)
    return value


def _listed(raw: str) -> list[str] | None:
    """The texts of a list as it was typed (`[très,C#]`), if nothing in it is grammar; None: it is no list."""
    whole = raw.strip()
    if not (whole.startswith("[") and whole.endswith("]") and whole[1:-1].strip()) or "${" in whole:
        return None
    return [word.strip() for word in whole[1:-1].split(",")]


def _of_texts(parser: OverridesParser, key: str, words: Sequence[str]) -> Override:
    made: Override = parser.parse_override(f"{key}=[{','.join(map(_quoted, words))}]")
    return made


def _quoted(raw: str) -> str:
    if len(raw) >= 2 and raw[0] == raw[-1] and raw[0] in "'\"":
        return raw
    return "'" + raw.replace("\\", "\\\\").replace("'", "\\'") + "'"
