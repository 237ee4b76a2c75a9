"""`fedtune evaluate MODEL_DIR DATA --epsilon E`: how right an exported model is on private texts, told with
noise and charged.

    1  the model and the texts are opened and checked; nothing has been computed from both
    2  the release is reserved in the ledger, durably, or refused with the numbers
    3  the model is asked, the confusion matrix counted and noised (`fedtune.privacy.mechanisms.confusion`)
    4  the release is committed; a real site's audit log gets its line

The ledger is that of a real site (its `node.yaml`, which also says which column is which and what delta is),
else the one of simulations on this machine, which knows the texts and persons that earlier runs were charged
for. The unit is a person where the data names persons, else a record. What is returned holds nothing that was
not noised: whoever has it may publish it. What was decided while the texts were read (dropped rows) and what
the ledger says of all other uses are the owner's alone, and come apart (`Told`).
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

from fedtune.errors import CalibrationError, ConfigError
from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.mechanisms.confusion import ConfusionPlan, rates
from fedtune.privacy.mechanisms.counts import DELTA
from fedtune.privacy.publication import publish
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier
from fedtune.serving.evaluation import asked_of, labelled_texts

if TYPE_CHECKING:
    from fedtune.data.corpus import Corpus
    from fedtune.federation.client.policy import SiteSettings
    from fedtune.privacy.ledger.ledger import PrivacyLedger

__all__ = ["Told", "evaluate_private", "show"]

# With a delta of 1/n a mechanism may publish one of n people outright; how many there are is not public here.
_MOST_DELTA = 0.01
_SETTINGS = ("data.name", "data.text", "data.text_pair", "data.label", "data.unit", "data.test_split")


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
    advance: Callable[[int, int], None] = lambda done, whole: None,
) -> Told:
    """Releases a noised confusion matrix of the exported model in `model_dir` on the private texts of `data`.

    Args:
        model_dir: the exported folder.
        data: as `fedtune.serving.evaluation.evaluate`.
        words: settings, of which column is which, and `data.name`, by which a budget may know the texts.
        wanted: which format to ask; None: the fastest that is there.
        epsilon: what this release may cost by itself, above 0.
        delta: that epsilon belongs to; None: the owner's budget's, else 1e-6. Never from the texts.
        node: a real site's node.yaml; None: the ledger of this machine's simulations.
        advance: is told how many of the texts are done.

    Raises:
        BudgetExhausted: the owner's budget does not allow it; nothing was computed or charged.
        LedgerError: the ledger cannot be used; nothing was computed.
        CalibrationError: no noise meets epsilon.
        ModelError, ConfigError, DataError: as `fedtune.serving.evaluation.evaluate`; nothing was charged.
    """
    site = None if node is None else _site(node)
    if site is not None and any(word.startswith(("data.unit=", "data.name=")) for word in words):
        raise ConfigError(
            f"{node} says whose each text is and what the data is called, since its budget is for those: "
            "leave data.unit and data.name out, or change them there."
        )
    bundle = Bundle.open(model_dir)
    name = bundle.chosen(wanted)
    corpus = labelled_texts(data, [*_words_of(site), *words], bundle, _SETTINGS)
    model = Classifier.open(bundle, name)
    ledger = _ledger(site)
    if delta is None:
        budget = ledger.budget(dataset=corpus.name)
        delta = DELTA if budget is None else budget.delta
    plan = _plan(epsilon, delta, "record" if corpus.units is None else "person", len(bundle.labels))
    run, whose = uuid.uuid4().hex, "evaluate" if site is None else site.site
    reservation = ledger.reserve(
        dataset=corpus.name, fingerprint=corpus.identity, node=whose, run=run, round=0, plan=plan
    )
    # From here on the texts are used, whatever becomes of it.
    cells = plan.answer(*_answers(model, corpus, advance), plan.entropy(whose))
    ledger.commit(reservation)
    if site is not None:
        from fedtune.deploy.site import books_of

        books_of(site).append("released", message="fedtune evaluate", run=run, asked={"epsilon": epsilon})
    told = rates(cells, plan.noise_std, bundle.labels)
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


def _plan(epsilon: float, delta: float, unit: str, classes: int) -> ConfusionPlan:
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
    return ConfusionPlan(trust="local", unit=unit, noise_multiplier=noise, delta=delta, classes=classes)


def _answers(
    model: Classifier, corpus: Corpus, advance: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Labels, what the model says, and whose each text is, all int64 [n].

    What is said of a text must follow from that text alone, or one person more or less would move the votes
    of others, and the sensitivity would not hold. In a batch it nearly does: the other texts set its shape,
    which kernels round by. So each text is asked by itself.
    """
    said = np.zeros(corpus.num_records, dtype=np.int64)
    for row, ids in enumerate(model.encode(asked_of(corpus))):
        said[row] = model.logits([ids])[0].argmax()
        advance(row + 1, corpus.num_records)
    persons = None if corpus.units is None else np.unique(corpus.units, return_inverse=True)[1]
    return corpus.labels, said, persons


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
        "mechanism": "a confusion matrix with exact discrete Gaussian noise in every cell, once",
        "sensitivity": f"one vote a {plan.unit} (L2, over all {plan.classes**2} cells together)",
        "noise_multiplier": plan.noise_multiplier,
        "noise_std": plan.noise_std,
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
    console.print()
    lines = [
        f"Every number is from noised counts (standard deviation {privacy['noise_std']:.3g} {unit}s a "
        "cell, so a cell may be below 0). ± is one standard error; - is hidden by the noise.",
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


def _shown(rate: Mapping[str, float] | None, *, percent: bool = False) -> str:
    if rate is None:
        return "-"
    value, error = rate["value"], rate["standard_error"]
    return f"{value:.1%} ± {error:.1%}" if percent else f"{value:.3f} ± {error:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
