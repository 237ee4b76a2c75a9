"""What mkdocs does with the pages of docs/ beside Markdown: references from the code, links out of docs/.

A page says where something is to be made: `<!-- generated: NAME -->`, followed by a line in italics, which
readers of the bare file see and which the made text replaces. `GENERATED` has the makers. So the references
cannot go stale: they are made of `fedtune` as it is when the pages are built (`mkdocs build --strict`).

Links that leave docs/ cannot be followed in a built site. Pictures are taken along; of other files the path
is named.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import posixpath
import re
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "GENERATED",
    "fill",
    "links",
    "messages",
    "on_files",
    "on_page_content",
    "on_page_markdown",
    "run_summary",
]

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_JOB = ROOT / "simulations" / "private_accuracy" / "default_job" / "record.json"
_MARK = re.compile(r"<!-- generated: ([\w. ]+) -->\n\*.*?\*\n", re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)]*)?\)")
_CODE = re.compile(r"(?<!<pre>)<code>(.*?)</code>")  # inline
_OPTION, _IN_ONE = re.compile(r"(?<![\w-])--[a-z][\w-]*"), r'<span class="option">\g<0></span>'
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_JOINT, _MAY_BREAK = re.compile(r"(?<=\w)[._/=](?=\w)(?![^<]*>)"), r"\g<0><wbr>"
_PICTURE = re.compile(r'<img [^>]*\bsrc="([^"]+)"[^>]*>')
_STRENGTH = "../simulations/private_accuracy/default_job/strength.svg"
_WIDTH = 88
_REFERENCE_BOOST = 0.2  # in the search, beside 1


# --- mkdocs' hooks --------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures outside of docs/ that pages show."""
    from mkdocs.structure.files import File

    docs = Path(config.docs_dir)
    for page in sorted(docs.rglob("*.md")):
        for picture in _pictures(page.read_text(encoding="utf-8"), page.relative_to(docs).as_posix()):
            name = f"pictures/{picture}"
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in what is generated, and makes links out of docs/ fit for a site."""
    if page.file.src_uri.startswith("reference/"):
        # A reference holds every word: a page that explains one comes before it.
        page.meta["search"] = {"boost": _REFERENCE_BOOST}
    return links(fill(markdown), page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Makes a page fit for phones.

    Options of commands stay on one line, names in tables may break after a point, a bar or a slash, and a
    picture can be opened by itself.
    """
    html = _CODE.sub(lambda found: f"<code>{_OPTION.sub(_IN_ONE, found[1])}</code>", html)
    html = _TABLE.sub(
        lambda table: _CODE.sub(lambda found: f"<code>{_JOINT.sub(_MAY_BREAK, found[1])}</code>", table[0]),
        html,
    )
    return _PICTURE.sub(r'<a href="\1">\g<0></a>', html)


def fill(markdown: str) -> str:
    """`markdown` with every mark replaced by what it asks for.

    Raises:
        KeyError: a mark asks for what nobody makes.
    """
    return _MARK.sub(lambda found: GENERATED[found[1]]() + "\n", markdown)


def links(markdown: str, source: str) -> str:
    """Links out of docs/: pictures by their place in the site, of other files the path as code.

    Args:
        markdown: of the page.
        source: the page's path below docs/.
    """

    def replaced(found: re.Match[str]) -> str:
        picture, text, target, _ = found.groups()
        inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
        if inside.startswith("docs/"):
            return found[0]
        if picture:
            return f"![{text}]({posixpath.relpath('pictures/' + inside, posixpath.dirname(source) or '.')})"
        return f"`{inside}`" if text.strip("`") in inside else f"{text} (`{inside}`)"

    return _LINK.sub(replaced, markdown)


def _pictures(markdown: str, source: str) -> Iterator[str]:
    for picture, _, target, _ in _LINK.findall(markdown):
        inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
        if picture and not inside.startswith("docs/"):
            yield inside


# --- what is made from the code ---------------------------------------------------------------------------


def run_summary() -> str:
    """What `fedtune run` shows at the end of the default job, from its record."""
    from rich.console import Console

    from fedtune.runs.summary import summary

    said = io.StringIO()
    record = json.loads(DEFAULT_JOB.read_text(encoding="utf-8"))
    console = Console(file=said, width=_WIDTH, highlight=False)
    summary(record, Path("outputs/2026-11-30/10-00-00"), console)
    return "\n".join(line.rstrip() for line in said.getvalue().splitlines()).strip("\n")


def _summary() -> str:
    return f"```text\n{run_summary()}\n```"


def _statement() -> str:
    """The statement of the same run, without its title."""
    from fedtune.privacy.statement.facts import statement_markdown

    record = json.loads(DEFAULT_JOB.read_text(encoding="utf-8"))
    return statement_markdown(record, _STRENGTH).partition("\n\n")[2].rstrip()


def _attackers() -> str:
    """What an attacker finds of 1,000 persons, for a Gaussian mechanism at each epsilon."""
    from fedtune.privacy.accounting.calibration import noise_multiplier_for
    from fedtune.privacy.accounting.epsilon import Term
    from fedtune.privacy.accounting.strength import WRONG, grade, trade_off

    delta, rate, steps = 1e-5, 0.05, 60
    rows = [
        "| epsilon | of 1,000 in the data, found at most | largest advantage over guessing | in a word |",
        "|---:|---:|---:|---|",
    ]
    for epsilon in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        noise = noise_multiplier_for(epsilon, delta, sample_rate=rate, steps=steps)
        curve = trade_off({Term(rate, noise): steps}, epsilon, delta)
        found = 1000 * curve.found(WRONG[0])
        rows.append(
            # Bounds, so rounded up.
            f"| {epsilon:g} | {math.ceil(found)} | {math.ceil(100 * curve.advantage())} percent "
            f"| {grade(curve, delta)} |"
        )
    rows.append(f"\n*A run of {steps} steps that each draw one unit in {round(1 / rate)}.*")
    return "\n".join(rows)


def _commands() -> str:
    """Each command: what it does, its examples, arguments and options."""
    from fedtune.cli.app import command

    parts = ["## fedtune", _of_command(command())]
    for path, item in _all_commands(command()):
        parts += [f"## {path}", _of_command(item)]
    return "\n\n".join(parts)


def _all_commands(group: Any, prefix: str = "fedtune") -> Iterator[tuple[str, Any]]:
    for name, item in group.commands.items():
        yield f"{prefix} {name}", item
        if hasattr(item, "commands"):
            yield from _all_commands(item, f"{prefix} {name}")


def _of_command(item: Any) -> str:
    text = (item.help or item.short_help or "").replace(r"\[", "[")
    about, _, shown = text.partition("\b\nExamples:\n")
    examples, _, then = shown.partition("\nNext:\n")
    parts = [_plain(" ".join(about.split())), _as_typed(examples), "Often next:", _as_typed(then)]
    rows = [
        f"| {_names(parameter)} | {_cell(getattr(parameter, 'help', None) or '')} |"
        for parameter in item.params
        if not getattr(parameter, "hidden", False)
    ]
    if rows:
        parts.append("| argument or option | what it is |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _as_typed(lines: str) -> str:
    return f"```text\n{textwrap.dedent(lines).strip()}\n```"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    metavar = "" if parameter.is_flag else f" {parameter.metavar or parameter.type.name.upper()}"
    return ", ".join(f"`{name}{metavar}`" for name in parameter.opts)


def _exit_status() -> str:
    """The sentence of the command line's own docstring."""
    from fedtune.cli import app

    (said,) = [part for part in (app.__doc__ or "").split("\n\n") if part.startswith("Exit status:")]
    return " ".join(said.split())


def _json() -> str:
    """The commands that answer a program, with what they print if that is written down."""
    from fedtune.cli.app import command

    found = [
        path
        for path, item in _all_commands(command())
        if any("--json" in parameter.opts for parameter in item.params)
    ]
    parts = ["They are: " + ", ".join(f"`{path}`" for path in found) + "."]
    for where in ("cli/answers.json", "config/files.json"):
        if (path := ROOT / "fedtune" / where).exists():
            schema = json.loads(path.read_text(encoding="utf-8"))
            parts += [f"### {schema['title']}", f"From `fedtune/{where}`, which is a JSON schema."]
            for name, part in schema["$defs"].items():
                if rows := [
                    f"| `{field}` | {_cell(kind)} |" for field, kind in _fields(part, schema["$defs"])
                ]:
                    parts += [f"**{name}**", "| field | what it is |\n|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(parts)


def _fields(part: Any, known: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The fields below `part` of a JSON schema with what they are; what it refers to is by its name."""
    below = part.get("properties", {})
    if path and not below:
        yield path, _kind(part, known)
    for name, field in below.items():
        yield from _fields(field, known, f"{path}.{name}" if path else name)
    if isinstance(items := part.get("items"), dict) and ("properties" in items or not path):
        yield from _fields(items, known, f"{path}[]")
    if isinstance(others := part.get("additionalProperties"), dict):
        yield from _fields(others, known, f"{path}.NAME" if path else "NAME")


def _kind(part: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return name if "properties" in known[name] else _kind(known[name], known)
    if values := part.get("enum", [part["const"]] if "const" in part else []):
        return " or ".join(str(value) for value in values)
    kinds = part.get("type", "anything")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    items = part.get("items")
    of = f"array of {_kind(items, known)}" if isinstance(items, dict) else "array"
    return " or ".join(of if kind == "array" else kind for kind in kinds)


def _settings() -> str:
    """Groups with their pages, then each setting, of runs, of `fedtune compress` and of a node's file."""
    from fedtune.config.compression import Compression
    from fedtune.config.pages import GROUPS, default_options, group_options
    from fedtune.config.schema import Config
    from fedtune.federation.client.policy import SiteSettings

    chosen = default_options()
    parts = ["## Pages", "`NAME=OPTION`, for instance `privacy=central`; the default is in bold."]
    for group in GROUPS:
        rows = []
        for name in group_options(group):
            page = f"**`{group}={name}`**" if name == chosen[group] else f"`{group}={name}`"
            rows.append(f"| {page} | {_cell(_about_page(group, name))} |")
        parts += [f"### {group}=", "| page | what it is |\n|---|---|\n" + "\n".join(rows)]
    parts += ["## Settings of a run", *_tables(Config)]
    parts += ["## Settings of fedtune compress", *_tables(Compression)]
    parts += [
        "## Settings of node.yaml",
        "[A real federation](../administrator.md) explains the file line by line. Its `budget.epsilon`, "
        "`budget.delta` and `budget.unit` are the three `budget_` settings here.",
        *_tables(SiteSettings),
    ]
    return "\n\n".join(parts)


def _about_page(group: str, name: str) -> str:
    """The words of a page's first comment, without the command."""
    from fedtune.config.pages import conf_dir

    lines = []
    for line in (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words = line.lstrip("# ").strip()
        if not words.startswith(("fedtune ", "@package")):
            lines.append(words)
    return " ".join(" ".join(lines).split())


def _tables(schema: type) -> Iterator[str]:
    """A table for each group of settings of a schema."""
    from fedtune.config.convert import settings, value_text

    groups: dict[str, list[str]] = {}
    for name, item in settings(schema).items():
        default = "" if item.default is dataclasses.MISSING else f"`{value_text(item.default)}`"
        unit = f"{item.unit} " if item.unit else ""
        said = f"{unit}{item.description}"
        groups.setdefault(name.rpartition(".")[0], []).append(
            f"| `{name}` | {default} | {_cell(said)} | {_cell(item.allowed)} |"
        )
    for rows in groups.values():
        yield "| setting | default | meaning | may be |\n|---|---|---|---|\n" + "\n".join(rows)


def _node_yaml() -> str:
    """The `node.yaml` that `fedtune provision` gives a site."""
    from fedtune.deploy.provision import provision

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "federation.yaml"
        file.write_text("name: hospitals\nserver: fed.example.org:9443\nsites: [clinic-1]\n")
        provision(file, Path(folder) / "made")
        with zipfile.ZipFile(Path(folder) / "made" / "sites" / "clinic-1.zip") as archive:
            text = archive.read("clinic-1/node.yaml").decode()
    return f"```yaml\n{text.rstrip()}\n```"


def _record() -> str:
    """Fields of `record.json`, each with why it may leave."""
    from fedtune.privacy.publication import SINKS

    rows = [f"| `{name}` | {field.kind} | {_cell(field.why)} |" for name, field in SINKS["record"].items()]
    return "| field | kind | why it may be published, or not |\n|---|---|---|\n" + "\n".join(rows)


def messages(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The texts of errors that the code below `folder` raises: class -> file below the package -> texts.

    A value in a text is an ellipsis. What is raised with a text that is made elsewhere is not found.
    """
    from fedtune import errors

    found: dict[str, dict[str, list[str]]] = {}
    package = ROOT / "fedtune"
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            name = getattr(node.exc.func, "id", "")
            text = " ".join(_template(node.exc.args[0]).split())
            # A message that is nothing but a value is made elsewhere.
            if name in errors.__all__ and len(re.sub(r"[^a-z]", "", text)) > 12:
                texts = found.setdefault(name, {}).setdefault(path.relative_to(package).as_posix(), [])
                if text not in texts:
                    texts.append(text)
    return found


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "…"


def _errors() -> str:
    """The tree, then each class with its meaning and the messages that the code has for it."""
    from fedtune import errors

    tree = (errors.__doc__ or "").partition("\n\n")[2].partition("\n\nEvery message")[0]
    lines = [line.removeprefix("    ") for line in tree.splitlines()]
    parts = ["```text\n" + "\n".join(lines) + "\n```"]
    texts = messages(ROOT / "fedtune")
    for name in sorted(errors.__all__):
        kind = getattr(errors, name)
        about = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
        shown = (
            "others may read it" if kind.of_public_values else "its words are for the owner of the data alone"
        )
        status = 2 if issubclass(kind, errors.ConfigError) else 1
        parts += [f"## {name}", f"{about} Exit status {status}; {shown}."]
        for file, each in sorted(texts.get(name, {}).items()):
            parts.append(f"In `{file}`:\n\n" + "\n".join(f"- {_plain(text)}" for text in each))
    return "\n\n".join(parts)


def _messages_of(*folders: str) -> str:
    """The messages of what lies in some folders of the package, under what each file is about."""
    by_file: dict[str, list[str]] = {}
    for folder in folders:
        for files in messages(ROOT / "fedtune" / folder).values():
            for file, texts in files.items():
                by_file.setdefault(file, []).extend(texts)
    parts = []
    for file in sorted(by_file):
        about = ast.get_docstring(ast.parse((ROOT / "fedtune" / file).read_text(encoding="utf-8"))) or ""
        first = " ".join(about.partition("\n\n")[0].split())
        parts.append(f"**{_plain(first)}**\n\n" + "\n".join(f"- {_plain(text)}" for text in by_file[file]))
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """`text` with what Markdown or HTML would take for markup escaped; what stands in backticks stays."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_\[\]<>#|])", r"\\\1", parts[i])
    return "`".join(parts)


def _cell(text: str) -> str:
    """`text`, which is no code, as a cell of a table: in code a bar needs no backslash, and would keep it."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


GENERATED: Mapping[str, Callable[[], str]] = {
    "summary of the default job": _summary,
    "statement of the default job": _statement,
    "what an attacker finds": _attackers,
    "commands": _commands,
    "settings": _settings,
    "node.yaml": _node_yaml,
    "record.json": _record,
    "json": _json,
    "exit status": _exit_status,
    "errors": _errors,
    "messages of deploy": lambda: _messages_of("deploy", "federation/client", "privacy/ledger"),
    "messages of data": lambda: _messages_of("data"),
}
