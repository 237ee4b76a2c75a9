"""`fedtune evaluate MODEL_DIR DATA`: how right an exported model is on labelled texts, in words, JSON, a
picture.

Data is read and checked as a run reads it (`fedtune.data.sources.files`), with the model's own label set: a
label that the model does not have is refused. Figures are of the labels as they are, without noise, so
those of private texts are as private as the texts. What may be told of private texts, noised and charged, is
`fedtune.serving.private_evaluation`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.config.files import save
from fedtune.config.loader import load
from fedtune.data.corpus import Corpus
from fedtune.data.sources.columns import Columns, build_corpus
from fedtune.data.sources.files import find_split, read_table
from fedtune.errors import ConfigError, DataError
from fedtune.runs.figures import COLORS, picture
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier, probabilities
from fedtune.serving.measures import measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedtune.runs.predict import Asked

__all__ = ["asked_of", "draw", "evaluate", "keep", "labelled_texts", "show"]

_SETTINGS = ("data.text", "data.text_pair", "data.label", "data.site", "data.test_split")


def evaluate(
    model_dir: Path,
    data: Path,
    words: Sequence[str] = (),
    wanted: str | None = None,
    *,
    advance: Callable[[int, int], None] = lambda done, whole: None,
) -> dict[str, Any]:
    """Measures the exported model in `model_dir` on the labelled texts of `data`.

    Args:
        data: a file (.csv, .tsv, .jsonl, .parquet), or a folder with a file `test`, or as `data.test_split`
        says. words: settings, of which column is which: `data.text=review`. wanted: which format to ask;
        None: the fastest that is there. advance: is told how many of the texts are done.

    Returns:
        model (its run), format, data (its name), notes, and what `measure` gives.

    Raises:
        ModelError: the folder is no export, or not what was exported.
        ConfigError: a setting is none of these, or the format is not there.
        DataError: the data is missing or unusable, or has labels that the model does not have.
    """
    bundle = Bundle.open(model_dir)
    name = bundle.chosen(wanted)
    corpus = labelled_texts(data, words, bundle)
    model = Classifier.open(bundle, name)
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        advance(done, corpus.num_records)

    found = probabilities(model.logits(model.encode(asked_of(corpus)), more))
    return {
        "model": bundle.about["run"],
        "format": name,
        "data": data.name,
        "notes": list(corpus.notes),
        **measure(found, corpus.labels, bundle.labels, corpus.sites),
    }


def labelled_texts(
    data: Path, words: Sequence[str], bundle: Bundle, settings: Sequence[str] = _SETTINGS
) -> Corpus:
    """The texts of `data` with labels of a model.

    Args:
        data: as `evaluate`.
        words: settings.
        bundle: the model's folder.
        settings: the names that `words` may set.

    Raises:
        ConfigError, DataError: as `evaluate`.
    """
    from fedtune.config.convert import value_text

    for word in words:
        if word.partition("=")[0] not in settings or "=" not in word:
            raise ConfigError(
                f"{word!r} is none of the settings of an evaluation: {', '.join(settings)} (as in "
                "data.text=review). The label set is the model's."
            )
    if bundle.pairs != any(word.startswith("data.text_pair=") for word in words):
        raise ConfigError(
            "The model was trained on pairs of texts: name the column of the second ones by "
            "data.text_pair=COLUMN."
            if bundle.pairs
            else "The model was trained on single texts: leave data.text_pair out."
        )
    path = data.expanduser()
    if not path.exists():
        raise DataError(
            f"There is no {data}. Name a file of labelled texts, or a folder that holds test.csv."
        )
    named = any(word.startswith("data.test_split=") for word in words)
    split = ["data.test_split=test"] if path.is_dir() and not named else []
    config = load(["data=files", f"data.path={value_text(path)}", *split, *words]).data
    # One file is the split that is tested on, whatever it is called.
    file = find_split(config, "test_split" if path.is_dir() else "train_split")
    columns = Columns.of(config)
    # All of one class may be what somebody wants to know about.
    return build_corpus(config.name, read_table(file, columns), columns, bundle.labels, part=True, fixed=True)


def asked_of(corpus: Corpus) -> Sequence[Asked]:
    """What a model is asked about each record: its text, or both of a pair."""
    return corpus.texts if corpus.pairs is None else list(zip(corpus.texts, corpus.pairs, strict=True))


def keep(found: Mapping[str, Any], folder: Path, *, mode: int = 0o600) -> list[Path]:
    """Writes evaluation.json and evaluation.png into `folder`; returns their paths.

    Both are readable as `mode` and the umask say: by their owner alone, unless what they tell was noised, for
    else they tell exactly about texts that may be private.

    Raises:
        ResourceError: they cannot be written.
    """
    text = json.dumps(dict(found), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    save(folder / "evaluation.json", text.encode(), mode=mode)
    save(folder / "evaluation.png", draw(found), mode=mode)
    return [folder / "evaluation.json", folder / "evaluation.png"]


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the measures: all together, by class, by site."""
    console = console or Console(highlight=False)
    console.print(
        Text(
            f"accuracy {found['accuracy']:.1%}  macro F1 {found['f1_macro']:.3f}  calibration error "
            f"{found['calibration_error']:.3f}  on {found['num_records']:,} records of {found['data']}, "
            f"by {found['format']}"
        )
    )
    of_class = ("precision", "recall", "f1")
    console.print()
    console.print(_table(["class", "records", *of_class], found["per_class"], of_class))
    if found["per_site"]:
        head = ["site", "records", "accuracy", "macro F1"]
        console.print()
        console.print(_table(head, found["per_site"], ("accuracy", "f1_macro")))
    if found["threshold"] is not None:
        second = list(found["per_class"])[1]
        console.print()
        console.print(
            Text(
                f"Saying {second!r} from a probability of {found['threshold']['probability']:.3f} on would "
                f"give these texts the best macro F1, {found['threshold']['f1_macro']:.3f}. Try it on "
                "others."
            )
        )
    for note in found["notes"]:
        console.print(Text(note, style="yellow"))


def _table(head: Sequence[str], rows: Mapping[str, Mapping[str, Any]], rates: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for name, one in rows.items():
        cells = ["-" if one[rate] is None else f"{one[rate]:.3f}" for rate in rates]
        table.add_row(Text(name), f"{one['num_records']:,}", *cells)
    return table


def draw(found: Mapping[str, Any]) -> bytes:
    """evaluation.png: the confusion matrix, and how far its probabilities are to be believed."""
    return picture(lambda _, axes: _fill(axes, found), (9.6, 4.4), columns=2)


def _fill(axes: Sequence[Axes], found: Mapping[str, Any]) -> None:
    # Between two dollar signs matplotlib reads a formula, and fails at what is none.
    names = [name.replace("$", r"\$") for name in found["per_class"]]
    confusion = np.array(found["confusion"])
    left, right = axes
    whole = np.maximum(confusion.sum(1, keepdims=True), 1)
    shares = np.clip(confusion / whole, 0, 1)  # of noised cells some are below 0
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 12:  # more would not be legible
        for row, column in np.ndindex(confusion.shape):
            color = "white" if shares[row, column] > 0.6 else "black"
            left.text(column, row, f"{confusion[row, column]:,.0f}", ha="center", va="center", color=color)
        left.set_xticks(range(len(names)), names, rotation=30, ha="right")
        left.set_yticks(range(len(names)), names)
    left.set(xlabel="what was said", ylabel="label")
    left.set_title("Which label is taken for which")
    left.spines[["top", "right"]].set_visible(True)  # of a matrix
    bins = found["calibration"]
    right.plot([0, 1], [0, 1], color="#999999", ls=":", lw=1, label="as it should be")
    right.errorbar(
        [one["probability"] for one in bins],
        [one["right"] for one in bins],
        [one.get("standard_error", 0.0) for one in bins],
        fmt="o-",
        color=COLORS[0],
        ms=4,
        capsize=2,
    )
    right.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="probability of the label that was said",
        ylabel="share that is right",
    )
    right.set_title("How far to believe a probability")
    right.legend(loc="upper left")
