"""Labels with probabilities from a finished run: `fedtune.load`, and what `fedtune predict` does.

The model is built the way anybody else would: the encoder that the run's adapter folder names, and the
adapter through `peft.PeftModel.from_pretrained`. So what is predicted here is what a user of the saved
adapter gets. Texts are cut to the run's `data.max_length` tokens, as in training.

Does not do: pairs of texts, serving, or explanations. Predictions are post-processing of the released
adapter; the texts that are asked about are not protected by anything and go nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import DataError, RecordError
from fedtune.federation.run_folder import PERSONAL
from fedtune.runs import record

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Model",
    "Prediction",
    "adapter_of",
    "answers",
    "check_texts",
    "load",
    "read_texts",
    "show",
    "write_answers",
]

_BATCH = 32  # texts at a time


@dataclass(frozen=True)
class Prediction:
    """What a model says of one text.

    Attributes:
        text: the text.
        label: the most probable label; None of a blank line, about which nothing can be told.
        probability: its probability, in [0, 1].
        probabilities: of every label; they sum to 1.
    """

    text: str
    label: str | None
    probability: float | None
    probabilities: dict[str, float]


class Model:
    """A trained classifier, as `fedtune.load` returns it.

    Attributes:
        path: the run folder that it comes from.
        labels: the label names, in the order of the model's classes.

    ```
    >>> result = fedtune.run("privacy=none", progress=False)
    >>> model = fedtune.load(result.path)
    >>> model.labels
    ('negative', 'positive')
    >>> (prediction,) = model.predict(["what a film"])
    >>> prediction.label in model.labels and 0.5 <= prediction.probability <= 1
    True

    ```
    """

    def __init__(self, path: Path, labels: Sequence[str], module: Any, tokenizer: Any, max_length: int):
        self.path = path
        self.labels = tuple(labels)
        self._module, self._tokenizer, self._max_length = module, tokenizer, max_length

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, labels={list(self.labels)})"

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Classifies each text by itself; what else is asked with it changes nothing.

        Args:
            texts: one or more texts, none of them empty.

        Returns:
            One prediction a text, in the order given.

        Raises:
            DataError: there is no text, one is empty or no text at all, or `texts` is one text and no list.
        """
        if isinstance(texts, str):
            raise DataError("predict takes a list of texts: write predict([text]) for a single one.")
        check_texts(texts)
        predictions: list[Prediction] = []
        for start in range(0, len(texts), _BATCH):
            predictions += self._predict_batch(list(texts[start : start + _BATCH]))
        return predictions

    def _predict_batch(self, texts: list[str]) -> list[Prediction]:
        import torch

        batch = self._tokenizer(
            texts, truncation=True, max_length=self._max_length, padding=True, return_tensors="pt"
        ).to(next(self._module.parameters()).device)
        with torch.no_grad():
            logits = self._module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            probabilities = logits.float().softmax(-1).tolist()  # [b, c]
        predictions = []
        for text, row in zip(texts, probabilities, strict=True):
            by_label = dict(zip(self.labels, row, strict=True))
            label = max(by_label, key=by_label.__getitem__)
            predictions.append(Prediction(text, label, by_label[label], by_label))
        return predictions


def load(path: Path | str, *, device: str = "auto", site: str | None = None) -> Model:
    """The classifier that a finished run trained.

    Args:
        path: the run folder (`Result.path`), or its record.json.
        device: `auto`, `cpu`, `cuda` or `mps`.
        site: of a run with `train.personalize`, whose model to load: the common one with the part that is
            this site's own. None: the common one alone.

    Returns:
        The model, in memory and ready to predict.

    Raises:
        RecordError: `path` is not a run folder, its run is not finished, or the adapter asked for is missing.
        DataError: the run was trained on pairs of texts.
        ModelError, ResourceError: the encoder or adapter cannot be loaded.

    ```
    >>> result = fedtune.run(progress=False)
    >>> [prediction.text for prediction in fedtune.load(result.path).predict(["a", "b"])]
    ['a', 'b']

    ```
    """
    folder, finished = record.run_folder(path), record.read(path)
    adapter = adapter_of(folder, finished, site)
    from fedtune.models.classifier import load_saved, read_saved
    from fedtune.models.encoder import load_tokenizer

    module = load_saved(adapter, device)
    tokenizer, _ = load_tokenizer(read_saved(adapter)[0])
    labels = finished["data"]["labels"]
    return Model(folder, labels, module, tokenizer, finished["config"]["data"]["max_length"])


def adapter_of(folder: Path, finished: Mapping[str, Any], site: str | None = None) -> Path:
    """The adapter folder of the finished run in `folder`, whose record is `finished`.

    Raises:
        RecordError: the adapter asked for is missing.
        DataError: the run was trained on pairs of texts.
    """
    adapter = folder / finished["artifacts"]["adapter"] if site is None else _of_site(folder, site)
    if not (adapter / "adapter_config.json").exists():
        raise RecordError(
            f"The run in {folder} has a record and no adapter at {adapter}. Copy the whole run folder, "
            f"or resume the run to write it again: fedtune run resume={folder}"
        )
    if pair := finished["config"]["data"].get("text_pair"):
        raise DataError(
            f"The run in {folder} was trained on pairs of texts (data.text_pair={pair}), and fedtune predict "
            "takes one text at a time: what it said of one alone would mean nothing. Load the adapter with "
            "peft.PeftModel.from_pretrained, and give both texts to the tokenizer."
        )
    return adapter


def check_texts(texts: Sequence[str]) -> None:
    """Raises `DataError` with the number of the text, and the way out, unless there are texts to classify."""
    if not texts:
        raise DataError("There is no text to classify. Give one or more, or '-' and one text a line.")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(f"Text {number} of {len(texts)} is {text!r}. Give texts, each a str.")
        if not text.strip():
            raise DataError(f"Text {number} of {len(texts)} is empty. Give a text with at least one word.")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a character: what was read was not UTF-8
            raise DataError(
                f"Text {number} of {len(texts)} is not UTF-8: {error.reason}. Convert it first."
            ) from error


def answers(model: Model, lines: Sequence[str]) -> list[Prediction]:
    """One prediction a line; of a blank one, from which nothing can be told, one without a label.

    Raises:
        DataError: there is no line.
    """
    asked = [line for line in lines if line.strip()]
    found = iter(model.predict(asked) if asked or not lines else [])
    return [next(found) if line.strip() else Prediction(line, None, None, {}) for line in lines]


def read_texts(path: Path, column: str) -> list[str]:
    """The texts in a column of a file, one a record; what is no text is blank.

    Raises:
        DataError: there is no such file or column, or it cannot be read.
        ResourceError: it may not be read.
    """
    from fedtune.config.schema import DataConfig
    from fedtune.data.sources.columns import Columns
    from fedtune.data.sources.files import find_split, read_table

    file = find_split(DataConfig(path=str(path)), "train_split")
    table = read_table(file, Columns(text=column, label=column))
    if column not in table.columns:
        raise DataError(
            f"{file} has no column {column!r}; its columns are: {', '.join(map(repr, table.columns))[:300]}. "
            "Name the one that holds the texts by --column."
        )
    return [value if isinstance(value, str) else "" for value in table.columns[column]]


def write_answers(path: Path, column: str, found: Sequence[Prediction]) -> None:
    """Writes predictions as CSV, one row each in their order: text, label, probability.

    Raises:
        ResourceError: the file cannot be written.
    """
    import csv
    import io

    from fedtune.config.files import save

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column, "label", "probability"])
    for one in found:
        known = one.probability is not None
        writer.writerow([one.text, one.label or "", f"{one.probability:.6f}" if known else ""])
    save(path, text.getvalue().encode())


def _of_site(folder: Path, site: str) -> Path:
    """The folder of a site's own model."""
    there = folder / PERSONAL
    sites = sorted(path.name for path in there.iterdir()) if there.is_dir() else []
    if site in sites:
        return there / site
    if sites:
        raise RecordError(f"The run in {folder} has no model of site {site!r}. It has: {', '.join(sites)}.")
    raise RecordError(
        f"The run in {folder} holds no model of a site. A simulation of public data with "
        f"train.personalize=head has them in {there}; a real site keeps its own beside its ledger, and may "
        f"copy it to {there / site}. Leave --site out for the common model."
    )


def show(predictions: Sequence[Prediction], console: Console | None = None) -> None:
    """Prints predictions as a table: label, probability, text; with many labels, the next best too."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    several = any(len(prediction.probabilities) > 2 for prediction in predictions)
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("label", style="bold", overflow="fold")
    table.add_column("probability", justify="right")
    if several:
        table.add_column("then", overflow="fold")
    table.add_column("text", overflow="fold")
    for prediction in predictions:
        # Text, not str: what a text holds in brackets is no markup.
        known = prediction.label is not None
        row = [Text(prediction.label or "-"), Text(f"{prediction.probability:.3f}" if known else "-")]
        if several:
            ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[1:3]
            row.append(Text(", ".join(f"{label} {probability:.3f}" for label, probability in ranked)))
        # One line a text, whatever control characters it has.
        shown = "".join(one if one.isprintable() else " " for one in prediction.text)
        table.add_row(*row, Text(shown))
    console.print(table)
