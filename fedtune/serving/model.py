"""An exported model that answers as `fedtune.load` does: without torch, and within a second or two.

What it says is the model's in the fastest format that the folder has (`Bundle.chosen`); `fedtune export` has
checked how far that agrees with the run's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.errors import DataError
from fedtune.runs.predict import Asked, Prediction, check_texts
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier, probabilities

__all__ = ["ExportedModel"]


class ExportedModel:
    """The model of an exported folder, opened.

    Attributes:
        path: the folder.
        labels: the label names, in the order of the model's classes.
        columns: as of `fedtune.runs.predict.Model`; an export keeps no names of columns.

    Raises:
        ModelError: the folder is no exported model, or a file of it was changed.
        ConfigError: its only format needs what is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        bundle = Bundle.open(path)
        self.columns = ("text", "text_pair" if bundle.pairs else None)
        self._classifier = Classifier.open(bundle)
        self.labels = self._classifier.labels

    def predict(self, texts: Sequence[Asked]) -> list[Prediction]:
        """As `fedtune.runs.predict.Model.predict`.

        Raises:
            DataError: there is no text, or one is empty or no text at all, or pairs are asked of a model of
                single texts, or the other way round.
        """
        pairs = self.columns[1] is not None
        kind = tuple if pairs else str
        if not all(isinstance(text, kind) and (not pairs or len(text) == 2) for text in texts):
            raise DataError(
                f"The model in {self.path} was trained on pairs of texts: give both, a tuple of two in "
                "Python; a file with both columns to fedtune predict, by --input (--column, --pair-column)."
                if pairs
                else f"The model in {self.path} takes single texts, each a str."
            )
        parts = [text if isinstance(text, tuple) else (text,) for text in texts]
        check_texts([one for part in parts for one in part])
        rows = probabilities(self._classifier.logits(self._classifier.encode(texts)))
        found = []
        for part, row in zip(parts, rows.tolist(), strict=True):
            by_label = dict(zip(self.labels, row, strict=True))
            label = max(by_label, key=by_label.__getitem__)
            second = part[1] if len(part) == 2 else None
            found.append(Prediction(part[0], label, by_label[label], by_label, second))
        return found
