"""From JSON, YAML and Hydra's values to the schema's dataclasses and back.

Hydra's composed pages, the JSON that a node receives from a server, the `config.yaml` of a finished run and
a site's own file are untrusted in the same way, so one function checks them: `build` refuses a key that the
schema lacks, a value of another type or outside its range, and NaN; the two parsers refuse a key that is
given twice. A setting that is left out has the schema's default.

Pydantic converts and checks, over the dataclasses as they are. The words of a refusal are ours: the setting,
its value, what it may be, and what may have been meant. Pydantic is imported with the first check, because
that takes longer than all the rest of `fedtune.config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedtune.config.choices import check_together, resolved
from fedtune.config.schema import Config
from fedtune.errors import ConfigError

if typing.TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

__all__ = [
    "Setting",
    "build",
    "changes_to_json",
    "check_value",
    "config_from_json",
    "from_dict",
    "nearest",
    "parse_json",
    "parse_yaml",
    "read_yaml",
    "settings",
    "to_dict",
    "to_json",
    "unknown_setting",
    "value_text",
]

Schema = TypeVar("Schema")

# A text that Hydra's grammar takes as it is; it takes the words below for something else than a text.
_PLAIN_TEXT = re.compile(r"(?:\.{1,2}/|[A-Za-z_/:@])[\w./:@-]*")
# What other programs call a setting, by its last part.
_OTHER_WORDS = {
    "lr": "train.learning_rate",
    "eta": "train.learning_rate",
    "head_lr": "train.head_learning_rate",
    "server_lr": "federation.server_learning_rate",
    "rounds": "federation.num_rounds",
    "epochs": "federation.num_rounds",
    "num_epochs": "federation.num_rounds",
    "clients": "federation.nodes",
    "num_clients": "federation.nodes",
    "num_nodes": "federation.nodes",
    "sites": "federation.nodes",
    "batch_size": "train.sample_rate",
    "eps": "privacy.epsilon",
    "target_epsilon": "privacy.epsilon",
    "sigma": "privacy.noise_multiplier",
    "clip": "privacy.max_grad_norm",
    "clip_norm": "privacy.max_grad_norm",
    "clipping_norm": "privacy.max_grad_norm",
    "max_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "text_column": "data.text",
    "label_column": "data.label",
    "target": "data.label",
    "person": "data.unit",
    "model_name_or_path": "model.name",
    "lora_rank": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "wd": "train.weight_decay",
}
_SHOWN_LETTERS = 200  # of a value, in a message
_WORDS = frozenset({"null", "true", "false", "nan", "inf"})
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    list: "a list of texts such as [negative,positive]",
    tuple: "a list of texts such as [negative,positive]",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the schema says of one setting.

    Attributes:
        name: as on the command line (`train.sample_rate`).
        kind: `str`, `int`, `float`, `bool`, `list` or `tuple`.
        optional: whether it may be null.
        default: `dataclasses.MISSING` where it has to be given.
        choices: the words that it, or each of a list, may be; empty where any may.
        description: what it means.
        unit: what a number counts; None where the name says it.
        bounds: of a number, by pydantic's words (`gt`, `ge`, `lt`, `le`).
    """

    name: str
    kind: type
    optional: bool
    default: Any
    choices: tuple[str, ...]
    description: str
    unit: str | None
    bounds: Mapping[str, float]

    @property
    def range(self) -> str:
        """The bounds in words ('above 0', 'in (0, 1]'); empty where there are none."""
        low, high = (
            next((self.bounds[key] for key in keys if key in self.bounds), None)
            for keys in (("gt", "ge"), ("lt", "le"))
        )
        if low is None:
            return ""
        if high is None:
            return f"above {low:g}" if "gt" in self.bounds else f"{low:g} or more"
        left, right = "(" if "gt" in self.bounds else "[", ")" if "lt" in self.bounds else "]"
        return f"in {left}{low:.10g}, {high:.10g}{right}"

    @property
    def allowed(self) -> str:
        """All values that it may have, in words."""
        kind = _KINDS[self.kind]
        if self.choices:
            kind = f"{'one' if self.kind is str else 'a list'} of {', '.join(self.choices)}"
        return kind + (f" that is {self.range}" if self.range else "") + (" or null" if self.optional else "")


@functools.cache
def settings(schema: type = Config) -> dict[str, Setting]:
    """All settings of a schema by dotted name, in its order."""
    found: dict[str, Setting] = {}
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            below = settings(typing.cast(type, hint))
            found |= {
                f"{item.name}.{name}": dataclasses.replace(setting, name=f"{item.name}.{name}")
                for name, setting in below.items()
            }
            continue
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        optional = type(None) in typing.get_args(hint)
        kind = kinds[0] if optional else hint
        outer = typing.get_origin(kind) or kind
        word = typing.get_args(kind)[0] if outer in (list, tuple) else kind
        choices = typing.get_args(word) if typing.get_origin(word) is typing.Literal else ()
        found[item.name] = Setting(
            item.name,
            str if outer is typing.Literal else outer,
            optional,
            item.default,
            choices,
            item.metadata.get("description", ""),
            item.metadata.get("unit"),
            {key: item.metadata[key] for key in ("gt", "ge", "lt", "le") if key in item.metadata},
        )
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of settings as nested dictionaries of plain values, complete, in the schema's order."""
    return dataclasses.asdict(config)


def to_json(config: Any) -> str:
    """A dataclass of settings as one line of JSON, from which `build` makes an equal one."""
    return json.dumps(to_dict(config), allow_nan=False, ensure_ascii=False)


def changes_to_json(config: Config) -> str:
    """The settings that differ from their defaults: what fedtunes of one protocol tell one another."""
    values: dict[str, Any] = {}
    whole = to_dict(config)
    for name, setting in settings().items():
        *groups, last = name.split(".")
        value = functools.reduce(dict.__getitem__, [*groups, last], whole)
        if value != setting.default:
            group = functools.reduce(lambda at, part: at.setdefault(part, {}), groups, values)
            group[last] = value
    return json.dumps(values, allow_nan=False, ensure_ascii=False)


def config_from_json(text: str) -> Config:
    """Reads what `to_json` wrote of a Config.

    Raises:
        ConfigError: anything else.
    """
    return from_dict(parse_json(text))


def from_dict(values: object, where: str = "the configuration") -> Config:
    """A checked Config from nested dictionaries, every `auto` resolved.

    Args:
        values: settings by name; what is left out has its default.
        where: their origin, for messages.

    Raises:
        ConfigError: an unknown key, a wrong type, a value that is not allowed, or two that contradict.
    """
    config = resolved(build(Config, values, where))
    check_together(config)
    return config


def build(schema: type[Schema], values: object, where: str) -> Schema:
    """An instance of a dataclass of settings from nested mappings, every key, type and range checked.

    Raises:
        ConfigError: the first that is wrong, in one paragraph.
    """
    from pydantic import ValidationError

    try:
        made: Schema = _adapter(typing.cast(type, schema)).validate_python(values)
        return made
    except ValidationError as error:
        raise _refusal(error, schema, where) from None


def check_value(name: str, value: object) -> Any:
    """`value` as the type that the setting `name` of a Config has.

    Raises:
        ConfigError: it is not allowed; says what is.
    """
    *groups, last = name.split(".")
    values: object = {last: value}
    for group in reversed(groups):
        values = {group: values}
    return functools.reduce(getattr, [*groups, last], build(Config, values, ""))


def parse_json(text: str, what: str = "The configuration") -> Any:
    """The values in a JSON text, strictly.

    Raises:
        ConfigError: it is no JSON, holds NaN or an infinity, or a key twice.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise ConfigError(f"{what} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{what} is not valid JSON: its values are nested too deeply.") from error


def parse_yaml(text: str) -> Any:
    """The values in a YAML text.

    Raises:
        yaml.YAMLError: it is no YAML, gives a key twice, or a value holds itself.
        RecursionError: it is nested too deeply.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()  # else yaml itself refuses it
            keys = [key.value for key, _ in pairs]
            if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{', '.join(twice)} is given twice", node.start_mark
                )
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            return super().construct_object(node, deep=True)  # refuses what holds itself

    return yaml.load(text, Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: there is none.
    """
    import yaml

    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {path}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} cannot be read: its values are nested too deeply.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should be a mapping of settings (key: value), and it is not one.")
    return values


def unknown_setting(name: str, known: Iterable[str], where: str = "", listing: str = "") -> ConfigError:
    """The error for a setting that the schema lacks, with the nearest that it has."""
    guess = nearest(name, known)
    hint = f" Did you mean {guess}?" if guess else ""
    place = f" in {where}" if where else ""
    listing = listing or "'fedtune run --help' lists all of them."
    return ConfigError(f"There is no setting {name!r}{place}.{hint} {listing}", setting=name)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` most likely meant, or None; looks at whole names and at last parts.

    `epsilon` finds `privacy.epsilon`, and `privacy.epsilom` does too.
    """
    names = list(known)
    lowered = {name.lower(): name for name in reversed(names)}
    if word.lower() in lowered:
        return lowered[word.lower()]
    last = word.rpartition(".")[2].lower().replace("-", "_")
    if (meant := _OTHER_WORDS.get(last)) in names:
        return meant
    same_ending = [name for name in names if name.rpartition(".")[2].lower() == last]
    if len(same_ending) == 1:
        return same_ending[0]
    whole = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    if whole:
        return lowered[whole[0]]
    by_ending = {name.rpartition(".")[2].lower(): name for name in reversed(names)}
    ending = difflib.get_close_matches(last, list(by_ending), n=1, cutoff=0.6)
    return by_ending[ending[0]] if ending else None


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def value_text(value: Any) -> str:
    """`value` as it is written in an override: `NAME=value_text(value)` gives the setting this value.

    Args:
        value: None, a bool, a number, a text or a path, or a list of these.
    """
    if hasattr(value, "item"):  # a number of numpy's
        value = value.item()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value).removesuffix(".0")
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(value_text(item) for item in value) + "]"
    text = str(value)
    if _PLAIN_TEXT.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@functools.cache
def _adapter(schema: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _refusal(error: ValidationError, schema: type, where: str) -> ConfigError:
    """What pydantic found wrong, as one paragraph with a way out; a misspelt key comes first."""
    found = error.errors(include_url=False)
    unknown = [one for one in found if one["type"] in ("unexpected_keyword_argument", "invalid_key")]
    problem = (unknown or found)[0]
    # The place of an element of a list is that of the list.
    name = ".".join(str(part) for part in problem["loc"] if isinstance(part, str) or problem in unknown)
    value, known = problem["input"], settings(schema)
    place = f" in {where}" if where else ""
    if unknown:
        listing = "" if schema is Config else f"There are: {', '.join(known)}."
        return unknown_setting(name, known, where, listing)
    if problem["type"] == "missing":
        return ConfigError(f"{name}{place} is missing: it must be {_needed(name, known)}.", setting=name)
    if problem["type"] == "dataclass_type":
        if not name:
            return ConfigError(f"{where} must be a mapping of settings, not {type(value).__name__}.")
        below = ", ".join(other for other in known if other.startswith(name + "."))
        return ConfigError(
            f"{name}{place} must be a mapping of settings, not {_cut(repr(value))}. "
            f"Settings below it: {below}.",
            setting=name,
        )
    setting = known[name]
    reason = problem["ctx"]["error"] if problem["type"] == "value_error" else setting.allowed
    other = f", not {type(value).__name__} {value!r}" if problem["type"].endswith("_type") else ""
    guess = nearest(str(value), setting.choices)
    hint = f" Did you mean {name}={guess}?" if guess else ""
    if setting.kind in (list, tuple) and isinstance(value, (bool, int)):
        hint = " YAML reads a bare no, yes or 1 as something else: quote it."
    return ConfigError(
        f"{name}={_cut(value_text(value))}{place} is not allowed: it must be {reason}{_cut(other)}.{hint}",
        setting=name,
    )


def _needed(name: str, known: Mapping[str, Setting]) -> str:
    return known[name].allowed if name in known else "a mapping of settings"


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number that a setting may have")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a setting is given twice")
    return values
