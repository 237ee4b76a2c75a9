"""From `conf/` and overrides to a checked Config, through Hydra; and saved configurations back again.

Hydra composes plain dictionaries, whose base is the schema's own defaults; `convert.from_dict` then
checks every key, type and value, for Hydra's YAML exactly as for JSON from a server. The schema is not given
to OmegaConf itself, because its type errors name neither the setting in the user's words nor what is allowed.

Errors of Hydra, OmegaConf and YAML come out as `ConfigError`, one paragraph.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fedtune.config.convert import (
    config_from_json,
    from_dict,
    parse_yaml,
    settings,
    to_dict,
    to_json,
    unknown_setting,
)
from fedtune.config.files import meant_path, replace_whole
from fedtune.config.overrides import check_overrides
from fedtune.config.pages import GROUPS, conf_dir
from fedtune.config.schema import Config
from fedtune.errors import CheckpointError, ConfigError

__all__ = [
    "config_from_json",
    "defaults",
    "from_dict",
    "from_hydra",
    "hydra_errors",
    "load",
    "read_config",
    "register_schema",
    "save_config",
    "search_path",
    "started_hydra",
    "to_dict",
    "to_json",
]

CONFIG_FILE = "config.yaml"


def load(overrides: Sequence[str] = (), extra_dirs: Sequence[Path] = ()) -> Config:
    """The configuration that `fedtune run OVERRIDES` would use (without its run folder, `output`).

    Args: `overrides` in Hydra's syntax (`privacy.epsilon=2`, `adapter=ffa_lora`); `extra_dirs`, folders
    with groups of the user's own, searched after `conf/`.
    Raises `ConfigError`; with `resume=FOLDER`, `CheckpointError` if that folder holds no configuration.
    """
    places = [search_path(extra_dirs)] if extra_dirs else []
    checked = check_overrides(overrides, extra_dirs=extra_dirs)
    if checked.resume is not None:
        return _resumed(checked.resume)
    register_schema()
    arguments = [*checked.arguments, *places]
    with started_hydra(), hydra_errors():
        composed = compose("config", overrides=arguments)
    return from_hydra(composed, checked.keys)


def defaults() -> dict[str, Any]:
    """What `conf/` says where nothing is given, as nested dictionaries; unchecked, which saves `fedtune run
    --help` pydantic and numpy, so that every `auto` is one.
    """
    register_schema()
    with started_hydra(), hydra_errors():
        values: Any = OmegaConf.to_container(compose("config"), resolve=True)
    return {name: value for name, value in values.items() if name not in ("experiment", "sweep")}


@contextmanager
def started_hydra() -> Iterator[None]:
    """Hydra over the pages of `conf/`; afterwards it is as it was."""
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra_errors():
            started = initialize_config_dir(str(conf_dir()), "fedtune", version_base="1.3")
        with started:
            yield
    finally:
        GlobalHydra.instance().hydra = previous


def from_hydra(composed: DictConfig, named: Iterable[str]) -> Config:
    """A checked Config from what Hydra composed; `named` are the settings given on the command line.

    A noise multiplier given there replaces the target epsilon of the files, and the other way round; and
    `privacy.trust=none` needs neither. Both given on the command line contradict each other.
    """
    given = set(named)
    with hydra_errors():
        try:
            values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            name = str(error.full_key or "")
            raise ConfigError(f"{name} must be given: add {name}=VALUE.", setting=name) from error
    for group in ("experiment", "sweep"):
        # A page of these groups sets other groups' settings; without its first line Hydra puts them here.
        if isinstance(page := values.pop(group, None), dict):
            has = f"has settings ({', '.join(map(str, page))}) that would be ignored" if page else "is empty"
            raise ConfigError(
                f"A page of {group}/ {has}: its "
                f"first line must be '# @package _global_'. Add that line to the page of {group}=NAME.",
                setting=group,
            )
    if flat := next((name for name in map(str, values) if "." in name), None):
        group, _, name = flat.partition(".")
        raise ConfigError(
            f"A page has the setting {flat} in one name, and pages are nested: write '{group}:', and below "
            f"it, further in, '{name}: VALUE'.",
            setting=flat,
        )
    privacy = values.get("privacy")
    if isinstance(privacy, dict):
        from fedtune.privacy.mechanisms.registry import adds_noise  # late: `fedtune.config` is light

        if not adds_noise(privacy.get("trust")):
            if "privacy.epsilon" not in given:
                privacy["epsilon"] = None
            if "privacy.noise_multiplier" not in given:
                privacy["noise_multiplier"] = None
        else:
            for one, other in (("noise_multiplier", "epsilon"), ("epsilon", "noise_multiplier")):
                only = f"privacy.{one}" in given and f"privacy.{other}" not in given
                if only and privacy.get(one) is not None:
                    privacy[other] = None
    return from_dict(values, "the configuration")


def save_config(config: Config, folder: Path) -> Path:
    """Writes `folder/config.yaml`, complete, so that the run can be resumed; replaces it atomically."""
    path = folder / CONFIG_FILE
    text = "# The resolved configuration of this run; 'fedtune run resume=...' reads it.\n"
    text += yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    replace_whole(path, text.encode())
    return path


def read_config(folder: Path) -> Config:
    """The configuration that `save_config` wrote. Raises `CheckpointError` if it is missing or broken."""
    path = folder / CONFIG_FILE
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no run folder that can be resumed: {CONFIG_FILE} is missing in it. Give the folder "
            f"that 'fedtune run' printed.{meant_path(folder)}"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read, so the run cannot be resumed: {_one_line(error)}."
        ) from error
    try:
        return from_dict(values, str(path))
    except ConfigError as error:
        raise CheckpointError(f"{path} is no configuration of this version of fedtune: {error}") from error


def register_schema() -> None:
    """Gives Hydra the schema's defaults as the node on which `conf/config.yaml` builds."""
    values = to_dict(Config())
    ConfigStore.instance().store(name="schema", node={**values, "experiment": None, "sweep": None})


def search_path(extra_dirs: Sequence[Path]) -> str:
    """The override by which Hydra also looks for groups in the user's own folders."""
    places = []
    for folder in extra_dirs:
        if not folder.is_dir():
            raise ConfigError(f"There is no folder {folder} (given by --config-dir).{meant_path(folder)}")
        _refuse_hidden(folder)
        places.append("'file://" + str(folder.absolute()).replace("'", "\\'") + "'")
    return f"hydra.searchpath=[{','.join(places)}]"


def _refuse_hidden(folder: Path) -> None:
    """Refuses pages of a user's that are never read: Hydra takes fedtune's own of that name, and .yaml "
    "alone."""
    for group in ("", *GROUPS):
        pages = sorted((folder / group).glob("*")) if (folder / group).is_dir() else []
        for page in pages:
            shipped = conf_dir() / group / page.name
            if page.is_file() and page.read_bytes()[:3] == codecs.BOM_UTF8:
                raise ConfigError(
                    f"{page} begins with a byte order mark, which hides its first line. Save it as UTF-8 "
                    "without one (BOM)."
                )
            if page.suffix == ".yaml" and page.is_file():
                with hydra_errors():
                    held = yaml.compose(page.read_text(encoding="utf-8"))
                if held is not None and not isinstance(held, yaml.MappingNode):
                    what = "list" if isinstance(held, yaml.SequenceNode) else "text"
                    raise ConfigError(
                        f"{page} holds a {what}, which would be ignored. A page has a line 'NAME: VALUE' for "
                        "each setting."
                    )
            if page.suffix == ".yml":
                raise ConfigError(f"{page} is not read, since pages end in .yaml: name it {page.stem}.yaml.")
            if page.suffix == ".yaml" and shipped.is_file() and shipped.read_bytes() != page.read_bytes():
                other = f"{group}=my_{page.stem}" if group else "a page of experiment/"
                raise ConfigError(
                    f"{page} has the name of a page of fedtune's own, which would be read in its place. "
                    f"Give it another name, such as my_{page.name}, and use {other}."
                )


# Hydra's own settings that mean something here; the launchers have more.
_HYDRAS = ("hydra.run.dir", "hydra.sweep.dir", "hydra/launcher", "hydra.launcher.n_jobs")


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turns errors of Hydra, OmegaConf and YAML into `ConfigError`, one paragraph."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        key = getattr(error, "key", None) or getattr(error.__cause__, "key", None)
        message = _one_line(error)
        if key is not None and "not in" in message and str(key) not in settings():
            raise unknown_setting(str(key), [*settings(), *GROUPS]) from error
        if (own := re.search(r"Could not override '(hydra[\w./]*)'", message)) is not None:
            listing = f"Of Hydra's own there are: {', '.join(_HYDRAS)}."
            raise unknown_setting(own[1], _HYDRAS, listing=listing) from error
        raise ConfigError(f"The configuration cannot be composed: {message}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The configuration cannot be composed: a page is not UTF-8 text (byte {error.start}). Save it "
            "as UTF-8."
        ) from error
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's own; others are bugs
            raise
        raise ConfigError(
            "The option of a group is a name (adapter=head), and a number or a mapping was given. 'fedtune "
            "run --help' lists the options of each group."
        ) from error
    except RecursionError as error:
        raise ConfigError(
            "The configuration cannot be composed: a page holds itself, or a value is nested too deeply."
        ) from error


def _resumed(folder: str) -> Config:
    path = Path(folder).expanduser().absolute()
    return replace(read_config(path), resume=str(path), output=str(path))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
