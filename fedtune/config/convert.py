"""Config to plain dictionaries and JSON and back, strictly: every way into a `Config` passes here.

Hydra's composed YAML, the JSON that a node receives from a server and the `config.yaml` of a finished
run are all untrusted in the same way, so one function checks them: no key that the schema lacks, no
value of another type, nothing outside `fedtune.config.values.RULES`, no NaN. Keys that are left out take
the schema's default.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Union

from fedtune.config.choices import public_test, resolved
from fedtune.config.schema import Config
from fedtune.config.values import check_value, nearest
from fedtune.errors import ConfigError

__all__ = [
    "Setting",
    "check_together",
    "config_from_json",
    "from_dict",
    "settings",
    "to_dict",
    "to_json",
    "unknown_setting",
]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: its dotted name, its type (`str`, `int`, `float`, `bool`, `list`) and its default."""

    name: str
    kind: type
    optional: bool
    default: Any


@functools.cache
def settings() -> dict[str, Setting]:
    """All settings by dotted name, in the schema's order."""
    found: dict[str, Setting] = {}

    def visit(schema: type, instance: Any, prefix: str) -> None:
        hints = typing.get_type_hints(schema)
        for item in dataclasses.fields(schema):
            name, default = prefix + item.name, getattr(instance, item.name)
            if dataclasses.is_dataclass(default):
                visit(type(default), default, name + ".")
            else:
                kind, optional = _unwrap(hints[item.name])
                found[name] = Setting(name, kind, optional, default)

    visit(Config, Config(), "")
    return found


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values, complete, in the schema's order."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """The configuration as one line of JSON; `config_from_json` reads it back to an equal Config."""
    return json.dumps(to_dict(config), allow_nan=False, ensure_ascii=False)


def config_from_json(text: str) -> Config:
    """Reads what `to_json` wrote. Raises `ConfigError` for anything else."""
    try:
        values = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise ConfigError(f"The configuration is not valid JSON: {error}.") from error
    return from_dict(values)


def from_dict(values: object, where: str = "the configuration") -> Config:
    """A checked Config from nested dictionaries, every `auto` resolved; `where` names their origin in
    messages.

    Raises `ConfigError` for an unknown key, a wrong type or a value that is not allowed.
    """
    config = Config()
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings, not {type(values).__name__}.")
    _fill(config, values, "", where)
    config = resolved(config)
    check_together(config)
    return config


def check_together(config: Config) -> None:
    """Rules that need two settings. Raises `ConfigError` with both of them named."""
    privacy, federation = config.privacy, config.federation
    if privacy.trust == "none":
        if privacy.epsilon is not None or privacy.noise_multiplier:
            raise ConfigError(
                "privacy.trust=none adds no noise and has no epsilon, but "
                + (
                    f"privacy.epsilon={privacy.epsilon:g}"
                    if privacy.epsilon is not None
                    else f"privacy.noise_multiplier={privacy.noise_multiplier:g}"
                )
                + " was given. Leave it out, or choose privacy.trust=local."
            )
    elif privacy.epsilon is not None and privacy.noise_multiplier is not None:
        raise ConfigError(
            f"privacy.epsilon={privacy.epsilon:g} and privacy.noise_multiplier={privacy.noise_multiplier:g} "
            "were both given, but each follows from the other. Give privacy.epsilon to have the noise "
            "calibrated, or privacy.noise_multiplier to have the epsilon computed."
        )
    elif privacy.epsilon is None and privacy.noise_multiplier is None:
        raise ConfigError(
            f"privacy.trust={privacy.trust} needs privacy.epsilon (the noise is then calibrated) or "
            "privacy.noise_multiplier (epsilon is then computed). For a run without any privacy, say "
            "privacy.trust=none."
        )
    elif privacy.noise_multiplier == 0:
        raise ConfigError(
            f"privacy.noise_multiplier=0 with privacy.trust={privacy.trust} would promise privacy without "
            "noise. Give a multiplier above 0, or say privacy.trust=none."
        )
    if privacy.adaptive_clipping and privacy.trust != "central":
        raise ConfigError(
            f"privacy.adaptive_clipping=true works with privacy.trust=central only, not with {privacy.trust}."
        )
    _check_unit(config)
    _check_evaluation(config)
    if privacy.mechanism == "dp_ftrl" and privacy.trust != "central":
        raise ConfigError(
            f"privacy.mechanism=dp_ftrl works with privacy.trust=central only, not with {privacy.trust}: a "
            "server that all clients trust makes its noise."
        )
    if privacy.mechanism != "dp_ftrl" and (privacy.bands is not None or privacy.min_separation != 1):
        raise ConfigError(
            f"privacy.bands and privacy.min_separation are settings of privacy.mechanism=dp_ftrl, and it is "
            f"{privacy.mechanism}. Leave them out, or start from privacy=central_ftrl."
        )
    nodes, cohort = federation.nodes, federation.cohort_size
    if nodes is not None and cohort is not None and cohort > nodes:
        raise ConfigError(
            f"federation.cohort_size={cohort} is more than federation.nodes={nodes}: a round cannot ask more "
            "nodes than there are."
        )
    most = cohort if cohort is not None else nodes
    if most is not None and federation.min_updates > most:
        raise ConfigError(
            f"federation.min_updates={federation.min_updates} can never be met: a round asks {most} nodes. "
            "Lower federation.min_updates."
        )


def _check_unit(config: Config) -> None:
    data = config.data
    # A real site names its own columns, and opinions knows its persons.
    if config.privacy.unit != "person" or data.unit is not None or data.source == "opinions":
        return
    if config.engine.name == "deployment" or config.privacy.trust == "central":
        return
    raise ConfigError(
        f"privacy.unit=person needs to know whose record is whose, and {data.name!r} has no unit column. "
        "Name it in data.unit, or use privacy.unit=record."
    )


def _check_evaluation(config: Config) -> None:
    data, evaluation = config.data, config.federation.evaluation
    if data.test_public and data.test_split is None:
        raise ConfigError(
            "data.test_public=true says that a test split is public, and data.test_split names none. Name it "
            "(data.test_split=test), or leave data.test_public out."
        )
    if evaluation == "public" and not public_test(data):
        split = "test" if data.test_split is None else data.test_split
        raise ConfigError(
            f"federation.evaluation=public would evaluate on {data.name!r} without noise, and its owner has "
            "declared neither all of it nor a test split public: what is held out of private data is "
            "private. Leave federation.evaluation out (nodes then answer with noised counts, inside "
            "epsilon), or, if it is true, declare a test split: "
            f"data.test_split={split} data.test_public=true."
        )
    if evaluation == "held_out" and config.privacy.trust != "none":
        raise ConfigError(
            "federation.evaluation=held_out evaluates on private data without noise, which only a run "
            f"without privacy does (privacy.trust=none), and privacy.trust is {config.privacy.trust}. Leave "
            "federation.evaluation out, or use private or none."
        )
    if evaluation == "private":
        _check_private_evaluation(config)


def _check_private_evaluation(config: Config) -> None:
    privacy, federation = config.privacy, config.federation
    if privacy.trust == "central":
        raise ConfigError(
            "federation.evaluation=private does not work with privacy.trust=central: the unit is a client, "
            "and the noise that hides one client hides all that a client could tell about its own data. Use "
            "federation.evaluation=public or none, or trust=local or distributed."
        )
    part, whole = federation.evaluation_epsilon, privacy.epsilon
    if part is not None and whole is not None and part >= whole:
        raise ConfigError(
            f"federation.evaluation_epsilon={part:g} leaves nothing for training of "
            f"privacy.epsilon={whole:g}, which it is a part of. Lower it (a quarter costs training little), "
            "or raise privacy.epsilon."
        )
    if part is None and whole is None and privacy.trust != "none":
        raise ConfigError(
            "federation.evaluation=private with privacy.noise_multiplier needs "
            "federation.evaluation_epsilon, which says what all answers about held-out data may cost."
        )


def unknown_setting(name: str, known: Iterable[str], where: str = "") -> ConfigError:
    """The error for a setting that the schema lacks, with the nearest that it has."""
    guess = nearest(name, known)
    hint = f" Did you mean {guess}?" if guess else ""
    place = f" in {where}" if where else ""
    return ConfigError(f"There is no setting {name!r}{place}.{hint} 'fedtune run --help' lists all of them.")


def _fill(target: Any, values: Mapping[Any, Any], prefix: str, where: str) -> None:
    fields = {item.name: getattr(target, item.name) for item in dataclasses.fields(target)}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            raise unknown_setting(name, settings(), where)
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{name} in {where} must be a mapping of settings, not {value!r}. "
                    f"Settings below it: {', '.join(n for n in settings() if n.startswith(name + '.'))}."
                )
            _fill(fields[key], value, name + ".", where)
        else:
            setattr(target, key, convert_value(settings()[name], value))


def convert_value(setting: Setting, value: Any) -> Any:
    """`value` as the setting's type, checked. Raises `ConfigError`, which says what is allowed."""
    if value is None:
        if setting.optional:
            return None
        raise ConfigError(f"{setting.name}=null is not allowed: it must be {_article(setting.kind)}.")
    converted = _convert(setting, value)
    if setting.kind is str and not converted.strip() and setting.default != "":
        raise ConfigError(f"{setting.name} is empty: it must be a text that is not empty.")
    check_value(setting.name, converted)
    return converted


def _convert(setting: Setting, value: Any) -> Any:
    kind = setting.kind
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a column may be called 0
    if kind is list and isinstance(value, (list, tuple)):
        return [_convert(dataclasses.replace(setting, kind=str), item) for item in value]
    optional = " or null" if setting.optional else ""
    raise ConfigError(
        f"{setting.name}={value} is not allowed: it must be {_article(kind)}{optional}, "
        f"not {type(value).__name__} {value!r}."
    )


def _article(kind: type) -> str:
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list of texts such as [negative,positive]",
    }[kind]


def _unwrap(hint: Any) -> tuple[type, bool]:
    """`str | None` -> (str, True); `list[str]` -> (list, False)."""
    optional = False
    if typing.get_origin(hint) in (Union, types.UnionType):
        optional = True
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    return typing.get_origin(hint) or hint, optional


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number that a setting may have")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a setting is given twice")
    return values
