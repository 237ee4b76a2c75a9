"""`fedtune evaluate MODEL_DIR DATA --epsilon E`: how right an exported model is on private texts, told with
noise and charged.

    1  the model and the texts are opened and checked; nothing has been computed from both
    2  the release is reserved in the ledger, durably, or refused with the numbers
    3  the model is asked, and what it says counted and noised (`fedtune.privacy.mechanisms.confusion`)
    4  the release is committed; a real site's audit log gets its line

All figures are computed from those counts (`fedtune.serving.private_measures`). The ledger is that of a real
site (its `node.yaml`, which also says which column is which and what delta is), else the one of simulations
on this machine, which knows the texts and persons that earlier runs were charged for. The unit is a person
where the data names persons, else a record. What is returned holds nothing that was not noised: whoever has
it may publish it. What was decided while the texts were read (dropped rows) and what the ledger says of all
other uses are the owner's alone, and come apart (`Told`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.errors import BudgetExhausted, CalibrationError, ConfigError
from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.mechanisms.confusion import ConfusionPlan, Votes
from fedtune.privacy.mechanisms.counts import CLEAR, DELTA
from fedtune.privacy.publication import publish
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier, probabilities
from fedtune.serving.evaluation import asked_of, labelled_texts
from fedtune.serving.private_measures import private_measures

if TYPE_CHECKING:
    from fedtune.data.corpus import Corpus
    from fedtune.federation.client.policy import SiteSettings
    from fedtune.privacy.ledger.ledger import PrivacyLedger

__all__ = ["Told", "evaluate_private", "show"]

# With a delta of 1/n a mechanism may publish one of n people outright; how many there are is not public here.
_MOST_DELTA = 0.01
_SETTINGS = (
    "data.name",
    "data.text",
    "data.text_pair",
    "data.label",
    "data.unit",
    "data.site",
    "data.test_split",
)


@dataclass(frozen=True)
class Told:
    """What an evaluation of private texts gave.

    Attributes:
        found: noised, and with what it cost: may leave.
        notes: what was decided while the texts were read; the owner's alone.
        total: (epsilon, delta) of everything these texts were ever used for; the owner's alone.
    """

    found: dict[str, Any]
    notes: tuple[str, ...]
    total: tuple[float, float]


def evaluate_private(
    model_dir: Path,
    data: Path,
    words: Sequence[str] = (),
    wanted: str | None = None,
    *,
    epsilon: float,
    delta: float | None = None,
    node: Path | None = None,
    sites: Sequence[str] = (),
    advance: Callable[[int, int], None] = lambda done, whole: None,
) -> Told:
    """Releases noised counts of how right the model in `model_dir` is on the private texts of `data`.

    Args:
        model_dir: the exported folder.
        data: as `fedtune.serving.evaluation.evaluate`.
        words: settings, of which column is which, and `data.name`, by which a budget may know the texts.
        wanted: which format to ask; None: the fastest that is there.
        epsilon: what this release may cost by itself, above 0.
        delta: that epsilon belongs to; None: the owner's budget's, else 1e-6. Never from the texts.
        node: a real site's node.yaml; None: the ledger of this machine's simulations.
        sites: names in the column `data.site` to be told about, which are public; texts of others count for
            no site.
        advance: is told how many of the texts are done.

    Raises:
        BudgetExhausted: the owner's budget does not allow it; nothing was computed or charged.
        LedgerError: the ledger cannot be used; nothing was computed.
        CalibrationError: no noise meets epsilon; or, of a size that its owner declared, it would hide even
            the accuracy. Nothing was charged.
        ModelError, ConfigError, DataError: as `fedtune.serving.evaluation.evaluate`; nothing was charged.
    """
    site = None if node is None else _site(node)
    if site is not None and any(word.startswith(("data.unit=", "data.name=")) for word in words):
        raise ConfigError(
            f"{node} says whose each text is and what the data is called, since its budget is for those: "
            "leave data.unit and data.name out, or change them there."
        )
    _check_sites(words, sites)
    bundle = Bundle.open(model_dir)
    name = bundle.chosen(wanted)
    corpus = labelled_texts(data, [*_words_of(site), *words], bundle, _SETTINGS)
    model = Classifier.open(bundle, name)
    ledger = _ledger(site)
    if delta is None:
        budget = ledger.budget(dataset=corpus.name)
        delta = DELTA if budget is None else budget.delta
    unit = "record" if corpus.units is None else "person"
    _check_unit(ledger, corpus, unit, node)
    plan = _plan(epsilon, delta, unit, len(bundle.labels), len(sites))
    if site is not None:
        _check_size(site.data.declared_size, plan, epsilon)
    run, whose = uuid.uuid4().hex, "evaluate" if site is None else site.site
    reservation = ledger.reserve(
        dataset=corpus.name, fingerprint=corpus.identity, node=whose, run=run, round=0, plan=plan
    )
    # From here on the texts are used, whatever becomes of it.
    cells = plan.answer(_votes(model, corpus, sites, advance), plan.entropy(whose))
    ledger.commit(reservation)
    if site is not None:
        from fedtune.deploy.site import books_of

        books_of(site).append("released", message="fedtune evaluate", run=run, asked={"epsilon": epsilon})
    told = private_measures(cells, plan, bundle.labels, sites)
    found = {
        "model": bundle.about["run"],
        "format": name,
        "data": corpus.name,
        "privacy": _privacy(plan, told["units"]),
        **told,
    }
    spent = ledger.epsilon(dataset=corpus.name, fingerprint=corpus.identity, delta=delta)
    published, _ = publish("private_evaluation", found, public_data=False)
    return Told(published, corpus.notes, (spent, delta))


def _site(node: Path) -> SiteSettings:
    from fedtune.deploy.site import check_books, read_site

    site = read_site(node)
    check_books(site)
    return site


def _words_of(site: SiteSettings | None) -> list[str]:
    """The site's own names of its columns, as settings."""
    if site is None:
        return []
    from fedtune.config.convert import value_text

    named = {name: getattr(site.data, name) for name in ("name", "text", "text_pair", "label", "unit")}
    return [f"data.{name}={value_text(value)}" for name, value in named.items() if value is not None]


def _ledger(site: SiteSettings | None) -> PrivacyLedger:
    if site is not None:
        from fedtune.deploy.site import open_ledger

        return open_ledger(site)
    from fedtune.config.files import state_dir
    from fedtune.privacy.ledger.simulation import simulation_ledger

    return simulation_ledger(state_dir() / "ledgers")


def _check_sites(words: Sequence[str], sites: Sequence[str]) -> None:
    """Refuses sites without their column, and a column without them: which there are has to be public."""
    if bool(sites) != any(word.startswith("data.site=") for word in words) or len(set(sites)) < len(sites):
        raise ConfigError(
            "To be told about sites, name the column and the sites: data.site=COLUMN --sites north,south. "
            "Their names are not taken from the private texts, and have to be public; each is named once."
        )


def _check_unit(ledger: PrivacyLedger, corpus: Corpus, unit: str, node: Path | None) -> None:
    """Refuses a unit that is finer than a budget of these texts asks for, and says this command's way out."""
    from fedtune.privacy.ledger.releases import is_coarser

    names = ledger.account(dataset=corpus.name, fingerprint=corpus.identity).names
    for budget in ledger.budgets().of(names):
        if budget.unit is None or not is_coarser(budget.unit, unit):
            continue
        if budget.unit == "person":
            column = "data.unit=COLUMN" if node is None else f"data.unit in {node}"
            why = f"nothing says whose each text is. Name the column that does: {column}."
        else:
            why = (
                f"an evaluation protects one {unit}. Leave --epsilon: fedtune evaluate without it tells the "
                "owner everything, and costs nothing while it stays there."
            )
        raise BudgetExhausted(
            f"The owner's budget asks for every {budget.unit} of '{corpus.name}' to be protected, and {why} "
            "Nothing was charged.",
            public=True,
        )


def _check_size(declared: int | None, plan: ConfusionPlan, epsilon: float) -> None:
    """Refuses, before anything is charged, what the noise would hide by the size that the owner declared."""
    least = CLEAR * plan.noise_of("confusion") * plan.classes  # the sum of all cells of the matrix
    if declared is not None and declared < least:
        raise CalibrationError(
            f"The site declares {declared:,} {plan.unit}s, and at --epsilon {epsilon:g} the noise hides the "
            f"accuracy of fewer than {least:,.0f} (four standard deviations of a matrix of {plan.classes} "
            f"classes). Nothing was charged. Ask with a larger --epsilon, or leave it: fedtune evaluate "
            "without --epsilon tells the owner everything, and costs nothing while it stays there.",
            setting="--epsilon",
        )


def _plan(epsilon: float, delta: float, unit: str, classes: int, sites: int) -> ConfusionPlan:
    for name, value, most in (("--epsilon", epsilon, np.inf), ("--delta", delta, _MOST_DELTA)):
        if not 0 < value < most:
            raise ConfigError(f"{name} {value:g} promises nothing: give a number above 0 and below {most:g}.")
    try:
        noise = noise_multiplier_for(epsilon, delta, sample_rate=1.0, steps=1)
    except CalibrationError as error:
        raise CalibrationError(
            f"No noise of a confusion matrix meets --epsilon {epsilon:g} at --delta {delta:g}. {error}",
            setting="--epsilon",
        ) from error
    return ConfusionPlan(
        trust="local", unit=unit, noise_multiplier=noise, delta=delta, classes=classes, sites=sites
    )


def _votes(
    model: Classifier, corpus: Corpus, sites: Sequence[str], advance: Callable[[int, int], None]
) -> Votes:
    """What the model says of each text.

    It must follow from that text alone, or one person more or less would move the votes of others, and the
    sensitivity would not hold. In a batch it nearly does: the other texts set its shape, which kernels round
    by. So each text is asked by itself.
    """
    rows = np.zeros((corpus.num_records, len(model.labels)), dtype=np.float32)
    for row, ids in enumerate(model.encode(asked_of(corpus))):
        rows[row] = model.logits([ids])[0]
        advance(row + 1, corpus.num_records)
    said = rows.argmax(1).astype(np.int64)
    sure = probabilities(rows).astype(np.float64)
    persons = None if corpus.units is None else np.unique(corpus.units, return_inverse=True)[1]
    places = None
    if sites and corpus.sites is not None:
        known = {name: place for place, name in enumerate(sites)}
        places = np.array([known.get(str(one), -1) for one in corpus.sites], dtype=np.int64)
    return Votes(corpus.labels, said, sure[:, 1] if sure.shape[1] == 2 else sure.max(1), persons, places)


def _privacy(plan: ConfusionPlan, units: float) -> dict[str, Any]:
    """What was promised; `units`: how many there are, noised."""
    caution = None
    if plan.delta * units >= 1.0:
        caution = (
            f"delta {plan.delta:.2g} is not below one over the about {units:,.0f} {plan.unit}s: by the "
            "promise alone somebody's texts might be told outright. Give a smaller --delta."
        )
    return {
        "epsilon": plan.epsilon(),
        "delta": plan.delta,
        "unit": plan.unit,
        "adjacency": f"add or remove one {plan.unit}",
        "mechanism": "histograms of one vote with exact discrete Gaussian noise in every cell, once",
        "sensitivity": f"one vote a {plan.unit} (L2, over all cells together)",
        "noise_multiplier": plan.noise_multiplier,
        "noise_std": {part: plan.noise_of(part) for part in plan.shapes},
        "caution": caution,
    }


def show(told: Told, console: Console | None = None) -> None:
    """Prints the rates with their errors, what they cost, and, for the owner, what all uses cost."""
    console = console or Console(highlight=False)
    found, privacy = told.found, told.found["privacy"]
    unit = privacy["unit"]
    whole = f"accuracy {_shown(found['accuracy'], percent=True)}  macro F1 {_number(found['f1_macro'])}"
    units = f"about {max(0, round(found['units'])):,} {unit}s of {found['data']}"
    console.print(Text(f"{whole}  on {units}, by {found['format']}"))
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("class", overflow="fold")
    for head in (f"{unit}s", "precision", "recall", "f1"):
        table.add_column(head, justify="right")
    for name, one in found["per_class"].items():
        shown = (_shown(one[rate]) for rate in ("precision", "recall", "f1"))
        table.add_row(Text(name), f"{one['units']:,.0f}", *shown)
    console.print()
    console.print(table)
    classes = list(found["per_class"])
    if len(classes) <= 12:  # more would not be legible; the JSON has all
        matrix = Table(box=None, padding=(0, 2), header_style="dim")
        matrix.add_column("label, and what was said", overflow="fold")
        for name in classes:
            matrix.add_column(Text(name), justify="right", overflow="fold")
        for name, row in zip(classes, found["confusion"], strict=True):
            matrix.add_row(Text(name), *(f"{cell:,.0f}" for cell in row))
        console.print()
        console.print(matrix)
    if found["per_site"]:
        of_sites = Table(box=None, padding=(0, 2), header_style="dim")
        of_sites.add_column("site", overflow="fold")
        for head in (f"{unit}s", "accuracy"):
            of_sites.add_column(head, justify="right")
        for name, one in found["per_site"].items():
            of_sites.add_row(Text(name), f"{one['units']:,.0f}", _shown(one["accuracy"], percent=True))
        console.print()
        console.print(of_sites)
    console.print()
    lines = [
        *_on_probabilities(found),
        "Every number is from noised counts (standard deviation "
        f"{privacy['noise_std']['confusion']:.3g} {unit}s a cell of the matrix, so a cell may be below 0). "
        "± is one standard error; - is hidden by the noise.",
        f"Guarantee: epsilon {privacy['epsilon']:.3g} at delta {privacy['delta']:.2g}, "
        f"{privacy['adjacency']}; {privacy['sensitivity']}. It was charged before the texts were used.",
    ]
    if privacy["caution"]:
        lines.append(f"Caution: {privacy['caution']}")
    if found["hidden"]:
        lines.append(
            f"The noise hides a rate of {len(found['hidden'])} of {len(classes)} classes; means are over the "
            "others. More texts or a larger --epsilon show more."
        )
    spent, delta = told.total
    lines.append(f"For you alone: these texts have cost epsilon {spent:.3g} in all (delta {delta:.2g}).")
    for line in lines:
        console.print(Text(line))
    for note in told.notes:
        console.print(Text(f"For you alone: {note}", style="yellow"))


def _on_probabilities(found: Mapping[str, Any]) -> list[str]:
    """Calibration error and threshold, or what hides them."""
    error, best = found["calibration_error"], found["threshold"]
    lines = [
        f"Calibration error {error['value']:.3f}, which the noise moved by {error['noise']:.3f} at most (98 "
        "times in 100)."
        if error is not None
        else "The calibration error is not told: the noise could have moved it by more than 0.05, which is "
        "as much as it often is. It takes more texts, or a larger --epsilon."
    ]
    if best is not None:
        second = list(found["per_class"])[1]
        lines.append(
            f"Saying {second!r} from a probability of {best['probability']:.2f} on gives macro F1 "
            f"{best['f1_macro']:.3f} ± {best['standard_error']:.3f}; from 0.5 on, "
            f"{best['f1_macro_at_half']:.3f}."
        )
    return lines


def _shown(rate: Mapping[str, float] | None, *, percent: bool = False) -> str:
    if rate is None:
        return "-"
    value, error = rate["value"], rate["standard_error"]
    return f"{value:.1%} ± {error:.1%}" if percent else f"{value:.3f} ± {error:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
