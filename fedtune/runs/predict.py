"""Labels with probabilities from a finished run: `fedtune.load`, and what `fedtune predict` does.

The model is built the way anybody else would: the encoder that the run's adapter folder names, and the
adapter through `peft.PeftModel.from_pretrained`. So what is predicted here is what a user of the saved
adapter gets. Of a text is seen what the run saw (`data.max_length`, `data.long_text`).

Does not do: serving, or explanations. Predictions are post-processing of the released
adapter; the texts that are asked about are not protected by anything and go nowhere.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedtune.errors import DataError, RecordError
from fedtune.federation.run_folder import PERSONAL
from fedtune.runs import record

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.config.schema import DataConfig

__all__ = [
    "Answering",
    "Asked",
    "Model",
    "Prediction",
    "adapter_of",
    "answers",
    "check_texts",
    "columns_of",
    "load",
    "read_texts",
    "refuse_pieces",
    "seen_of",
    "show",
    "write_answers",
]

_BATCH = 32  # texts at a time
_CHUNK = 16 * _BATCH  # texts that are sorted by length together, and answered before the next are read

Asked = str | tuple[str, str]  # a text, or two of a model of pairs


@dataclass(frozen=True)
class Prediction:
    """What a model says of one text.

    Attributes:
        text: the text.
        label: the most probable label; None of a blank line, about which nothing can be told.
        probability: its probability, in [0, 1].
        probabilities: of every label; they sum to 1.
        pair: the second text, of a model that was trained on pairs.
    """

    text: str
    label: str | None
    probability: float | None
    probabilities: dict[str, float]
    pair: str | None = None


class Model:
    """A trained classifier, as `fedtune.load` returns it.

    Attributes:
        path: the run folder that it comes from.
        labels: the label names, in the order of the model's classes.
        columns: of the data that it was trained on: the text's, and of pairs the second text's.

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

    def __init__(
        self,
        path: Path,
        labels: Sequence[str],
        module: Any,
        tokenizer: Any,
        data: DataConfig,
        columns: tuple[str, str | None] = ("text", None),
    ):
        self.path = path
        self.labels = tuple(labels)
        self.columns = columns
        self._module, self._tokenizer, self._data = module, tokenizer, data

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, labels={list(self.labels)})"

    def predict(self, texts: Sequence[Asked]) -> list[Prediction]:
        """Classifies each text by itself; what else is asked with it changes nothing.

        Args:
            texts: one or more texts, none of them empty; of a model that was trained on pairs each is a pair.

        Returns:
            One prediction a text, in the order given.

        Raises:
            DataError: there is no text, one is empty or no text at all, `texts` is one text and no list, or
                pairs are asked of a model of single texts, or the other way round.
        """
        if isinstance(texts, str):
            raise DataError("predict takes a list of texts: write predict([text]) for a single one.")
        firsts, seconds = self._parted(texts)
        check_texts(firsts)
        if seconds is not None:
            check_texts(seconds)
        # Texts of like lengths are padded least.
        order = sorted(range(len(firsts)), key=lambda i: len(firsts[i]) + len(seconds[i] if seconds else ""))
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            second = None if seconds is None else [seconds[i] for i in rows]
            found.update(zip(rows, self._predict_batch([firsts[i] for i in rows], second), strict=True))
        return [found[i] for i in range(len(firsts))]

    def _parted(self, asked: Sequence[Asked]) -> tuple[list[str], list[str] | None]:
        """First and second texts; None where the model takes single texts."""
        pair = self.columns[1]
        for number, one in enumerate(asked, start=1):
            if pair is None and isinstance(one, tuple):
                raise DataError(f"Text {number} is a pair, and the model was trained on single texts.")
            if pair is not None and not (isinstance(one, tuple) and len(one) == 2):
                raise DataError(
                    f"The run in {self.path} was trained on pairs of texts (data.text_pair={pair}), and text "
                    f"{number} is a single one: what it said of one alone would mean nothing. Give both: a "
                    "tuple of two in Python; a file with both columns to fedtune predict, by --input."
                )
        if pair is None:
            return list(asked), None  # type: ignore[arg-type]
        return [one[0] for one in asked], [one[1] for one in asked]

    def _predict_batch(self, texts: list[str], seconds: list[str] | None) -> list[Prediction]:
        from fedtune.data.tokenize import encoded

        ids = encoded(self._tokenizer, texts, seconds, self._data.longest, self._data.windows)
        probabilities = logits_of(self._module, ids, self._data.longest).softmax(-1).tolist()  # [b, c]
        predictions = []
        pairs: Sequence[str | None] = [None] * len(texts) if seconds is None else seconds
        for text, pair, row in zip(texts, pairs, probabilities, strict=True):
            by_label = dict(zip(self.labels, row, strict=True))
            label = max(by_label, key=by_label.__getitem__)
            predictions.append(Prediction(text, label, by_label[label], by_label, pair))
        return predictions


def logits_of(module: Any, ids: Sequence[Sequence[int]], longest: int) -> Any:
    """What a run's model says of b texts.

    Args:
        module: the model, an `EncoderClassifier` with its adapter.
        ids: token ids of each text; of one with several windows, one after the other.
        longest: tokens of a window, at most.

    Returns:
        Logits, a float32 tensor [b, c].
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from fedtune.data.windows import window_sizes

    pieces, text_of = list[Sequence[int]](), list[int]()
    for number, one in enumerate(ids):
        start = 0
        for size in window_sizes(len(one), longest):
            pieces.append(one[start : start + size])
            text_of.append(number)
            start += size
    device = next(module.parameters()).device
    rows = [torch.tensor(piece, device=device) for piece in pieces]
    with torch.no_grad():
        logits = module(
            input_ids=pad_sequence(rows, batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            text_of=torch.tensor(text_of, device=device) if len(pieces) > len(ids) else None,
        )
    return logits[: len(ids)].float()


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
        ModelError, ResourceError: the encoder or adapter cannot be loaded.

    ```
    >>> result = fedtune.run(progress=False)
    >>> [prediction.text for prediction in fedtune.load(result.path).predict(["a", "b"])]
    ['a', 'b']

    ```
    """
    folder, finished = record.run_folder(path), record.read(path)
    adapter = adapter_of(folder, finished, site)
    from fedtune.models.plain import load_plain

    module, tokenizer = load_plain(adapter, device) or _long_way(adapter, device)
    known = finished["config"]["data"]
    columns = known.get("text") or "text", known.get("text_pair")
    return Model(folder, finished["data"]["labels"], module, tokenizer, seen_of(finished), columns)


def seen_of(finished: Mapping[str, Any]) -> DataConfig:
    """How much of a text the finished run saw: its settings of lengths, the others as by default."""
    from fedtune.config.schema import DataConfig

    known = finished["config"]["data"]
    # Records of earlier versions lack the last two.
    return DataConfig(
        **{name: known[name] for name in ("max_length", "long_text", "max_windows") if name in known}
    )


def _long_way(adapter: Path, device: str) -> tuple[Any, Any]:
    """The model and its tokenizer as transformers and PEFT make them."""
    from fedtune.models.classifier import load_saved, read_saved
    from fedtune.models.encoder import load_tokenizer

    return load_saved(adapter, device), load_tokenizer(read_saved(adapter)[0])[0]


def adapter_of(folder: Path, finished: Mapping[str, Any], site: str | None = None) -> Path:
    """The adapter folder of the finished run in `folder`, whose record is `finished`.

    Raises:
        RecordError: the adapter asked for is missing.
    """
    adapter = folder / finished["artifacts"]["adapter"] if site is None else _of_site(folder, site)
    if not (adapter / "adapter_config.json").exists():
        raise RecordError(
            f"The run in {folder} has a record and no adapter at {adapter}. Copy the whole run folder, "
            f"or resume the run to write it again: fedtune run resume={folder}"
        )
    return adapter


def refuse_pieces(folder: Path, finished: Mapping[str, Any], what: str, instead: str) -> None:
    """Raises `DataError` for a run on windows of long texts, where `what` takes a text in one piece.

    `instead`: what does not, in a sentence.
    """
    data = finished["config"]["data"]
    if data.get("long_text", "cut") != "cut":
        raise DataError(
            f"The run in {folder} sees up to {data['max_windows']} windows of {data['max_length']} tokens "
            f"of a text (data.long_text=window), and {what} sees its beginning alone: of long texts it would "
            f"say something else. {instead} Or train with data.long_text=cut and as large a data.max_length "
            "as the encoder takes."
        )


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


def columns_of(run_dir: Path, text: str | None, pair: str | None) -> tuple[str, str | None]:
    """The columns to ask a run about: those that are named, else its own.

    Raises:
        RecordError: as `load`.
        DataError: a second column is named, and the run was on single texts.
    """
    data = record.read(run_dir)["config"]["data"]
    own = data.get("text_pair")
    if pair is not None and own is None:
        raise DataError(
            "--pair-column names a second text, and the run was trained on single texts: leave it out."
        )
    return text or data.get("text") or "text", (pair or own) if own is not None else None


class Answering(Protocol):
    """What answers: a `Model`, or an exported one."""

    def predict(self, texts: Sequence[Asked]) -> list[Prediction]:
        """See `Model.predict`."""


def answers(
    model: Answering, asked: Iterable[Asked], advance: Callable[[int], None] | None = None
) -> Iterator[Prediction]:
    """One prediction each, a few hundred at a time; of a blank text, from which nothing can be told, one
    without a label.

    Args:
        advance: told after each few hundred how many are done.

    Raises:
        DataError: there is none, or one of another kind than the model takes.
    """
    done, source = 0, iter(asked)
    while chunk := list(itertools.islice(source, _CHUNK)):
        whole = [one for one in chunk if _whole(one)]
        found = iter(model.predict(whole) if whole else [])
        for one in chunk:
            text, pair = one if isinstance(one, tuple) else (one, None)
            yield next(found) if _whole(one) else Prediction(text, None, None, {}, pair)
        done += len(chunk)
        if advance is not None:
            advance(done)
    if not done:
        check_texts([])


def _whole(asked: Asked) -> bool:
    return all(text.strip() for text in (asked if isinstance(asked, tuple) else (asked,)))


def read_texts(path: Path, column: str, pair: str | None = None) -> Iterator[Asked]:
    """The texts in a column of a file, one a record as they are read, or pairs of two columns.

    What is no text is blank.

    Raises:
        DataError: there is no such file or column, it cannot be read, or holds no text at all; wherever that
            is met in reading on.
        ResourceError: it may not be read.
    """
    from fedtune.config.convert import nearest
    from fedtune.config.files import meant_path
    from fedtune.data.sources.files import open_records, readable
    from fedtune.data.sources.spellings import column_name

    file = path.expanduser()
    if not file.is_file():
        what = "a folder" if file.is_dir() else "a pipe or device" if file.exists() else "no file"
        raise DataError(f"--input is {path}, which is {what}. Name a file of texts.{meant_path(path)}")
    readable(file, "--input")
    asked = {"--column": column_name(column)}
    if pair is not None:
        asked["--pair-column"] = column_name(pair)

    def refuse_missing(header: Sequence[str]) -> None:
        for option, name in asked.items():
            if name not in header:
                meant = nearest(name, header)
                raise DataError(
                    f"{file} has no column {name!r}; its columns are: "
                    f"{', '.join(map(repr, header))[:300]}. "
                    + (
                        f"Did you mean {option} {shlex.quote(meant)}?"
                        if meant
                        else f"Name the one that holds the texts by {option}."
                    )
                )

    with open_records(file, asked) as found:
        if found.complete:
            refuse_missing(found.header)
        others = set[str]()
        for row in found.rows:
            others.add("" if isinstance(row[0], str) else type(row[0]).__name__)
            texts = [value if isinstance(value, str) else "" for value in row]
            yield texts[0] if pair is None else (texts[0], texts[-1])
        refuse_missing(found.header)
        if others and "" not in others and others != {"NoneType"}:
            raise DataError(
                f"Column {asked['--column']!r} of {file} holds no text: its values are "
                f"{' and '.join(sorted(others - {'NoneType'}))}. Name the one with the texts by --column."
            )


def write_answers(path: Path, columns: tuple[str, str | None], found: Iterable[Prediction]) -> int:
    """Writes predictions as CSV as they come, one row each in their order: text, label, probability.

    The file appears under its name when it is whole. Returns how many rows it has.

    Raises:
        ResourceError: the file cannot be written.
    """
    import csv

    from fedtune.config.files import being_written

    named = [name for name in columns if name is not None]
    rows = 0
    with being_written(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*named, "label", "probability"])
        for one in found:
            rows += 1
            texts = [one.text, one.pair][: len(named)]
            known = one.probability is not None
            writer.writerow([*texts, one.label or "", f"{one.probability:.6f}" if known else ""])
    return rows


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
        whole = prediction.text if prediction.pair is None else f"{prediction.text} / {prediction.pair}"
        shown = "".join(one if one.isprintable() else " " for one in whole)
        table.add_row(*row, Text(shown))
    console.print(table)
