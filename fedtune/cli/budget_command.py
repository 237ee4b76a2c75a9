"""`fedtune budget show | set | history | verify`: what each data set has spent, and what its owner allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.shared import Json, help_text, option, print_json
from fedtune.config.schema import Unit
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.privacy.ledger.budget_report import Report

__all__ = ["commands"]

commands = typer.Typer(
    name="budget",
    invoke_without_command=True,
    subcommand_metavar="ACTION [ARGS]...",
    rich_markup_mode="rich",
    short_help="What each data set has spent, and what its owner allows.",
    help=help_text(
        "Reads the ledgers, which remember every release. All simulated nodes share one.",
        """\
fedtune budget show                             epsilon so far, of what budget
fedtune budget set --epsilon 3 --delta 1e-5     for all data without its own
fedtune budget set --dataset visits --epsilon 3 --delta 1e-5
fedtune budget history --dataset opinions       every release, with parameters
fedtune budget verify                           was a ledger edited?""",
        "fedtune run --dry-run data=files ...  what a run would spend of it",
    ),
)
Node = Annotated[str | None, option("A node with its own ledger, or a simulated one; left out: all.")]
LedgerOf = Annotated[
    str | None, option("A node with its own ledger; 'simulation': that of all simulations; left out: all.")
]
Dataset = Annotated[str | None, option("This data set only.")]


@commands.callback()
def choose(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        raise ConfigError("Name an ACTION: show, set, history or verify. See 'fedtune budget --help'.")


@commands.command(
    help=help_text(
        "What each data set has spent, and of how much.",
        "fedtune budget show --dataset visits",
        "fedtune budget history --dataset visits  by which releases",
    )
)
def show(node: Node = None, dataset: Dataset = None, json: Json = False) -> int:
    from fedtune.privacy.ledger import budget_report

    paths, only = budget_report.find_ledgers(_folder(), node)
    return _print("show", budget_report.show(paths, dataset, only), json)


@commands.command(
    "set",
    help=help_text(
        "Allow data so much epsilon, in all, ever; without --node in simulations and at every node with a "
        "ledger here.",
        "fedtune budget set --dataset visits --epsilon 3 --delta 1e-5",
        "fedtune run --dry-run data=files ...  what a run would spend of it",
    ),
)
def set_budget(
    epsilon: Annotated[float, option("The largest epsilon of all releases together, ever.")],
    delta: Annotated[float, option("The delta that epsilon belongs to.")],
    node: LedgerOf = None,
    dataset: Dataset = None,
    unit: Annotated[Unit | None, option("The finest unit that may be protected.")] = None,
    json: Json = False,
) -> int:
    from fedtune.privacy.ledger import budget_report

    found = budget_report.set_budgets(
        _folder(), epsilon=epsilon, delta=delta, node=node, dataset=dataset, unit=unit
    )
    return _print("set", found, json)


@commands.command(
    help=help_text(
        "Every release, oldest first.",
        "fedtune budget history --dataset visits",
        "fedtune budget verify  was a row edited?",
    )
)
def history(node: Node = None, dataset: Dataset = None, json: Json = False) -> int:
    from fedtune.privacy.ledger import budget_report

    paths, only = budget_report.find_ledgers(_folder(), node)
    return _print("history", budget_report.history(paths, dataset, only), json)


@commands.command(
    help=help_text(
        "Read every row; exit status 1 if one was edited, moved or removed.",
        "fedtune budget verify",
        "fedtune node proof --config node.yaml  at a real site: the audit log, too",
    )
)
def verify(node: Node = None, json: Json = False) -> int:
    from fedtune.privacy.ledger import budget_report

    paths, _ = budget_report.find_ledgers(_folder(), node)
    return _print("verify", budget_report.verify(paths), json)


def _folder() -> Path:
    from fedtune.config.files import state_dir

    return state_dir() / "ledgers"


def _print(name: str, report: Report, json: bool) -> int:
    """Prints what a command found; returns its exit status."""
    if json:
        print_json(f"budget {name}", report.json)
    else:
        print(report.text)
    return report.status
