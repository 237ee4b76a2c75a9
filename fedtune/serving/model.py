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
        columns: as of `fedtune.runs.predict.Model`; an export keeps no names of columns, and knows no pairs.

    Raises:
        ModelError: the folder is no exported model, or a file of it was changed.
        ConfigError: its only format needs what is not installed.
    """

    columns: tuple[str, str | None] = ("text", None)

    def __init__(self, path: Path) -> None:
        self.path = path
        self._classifier = Classifier.open(Bundle.open(path))
        self.labels = self._classifier.labels

    def predict(self, texts: Sequence[Asked]) -> list[Prediction]:
        """As `fedtune.runs.predict.Model.predict`.

        Raises:
            DataError: there is no text, or one is empty, a pair or no text at all.
        """
        asked = [text for text in texts if isinstance(text, str)]
        if len(asked) < len(texts):
            raise DataError("An exported model takes single texts, each a str.")
        check_texts(asked)
        rows = probabilities(self._classifier.logits(self._classifier.encode(asked)))
        found = []
        for text, row in zip(asked, rows.tolist(), strict=True):
            by_label = dict(zip(self.labels, row, strict=True))
            label = max(by_label, key=by_label.__getitem__)
            found.append(Prediction(text, label, by_label[label], by_label))
        return found
