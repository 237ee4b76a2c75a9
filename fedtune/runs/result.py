"""A finished run, as its folder holds it: what `fedtune.run` returns.

Read from `record.json`, which is what may be published; what only the owner of the data may see
(`local.json`) is not shown, because notebooks travel.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedtune.errors import RecordError
from fedtune.runs import record as records

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """A finished run. `Result(path)` opens one that was made earlier; nothing is read before it is asked for.

    In a notebook it shows epsilon with delta, unit and adjacency, accuracy, and what the run cost. Each
    property raises `RecordError` if the folder has no finished run.

    Attributes:
        path: the run folder.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", records.run_folder(self.path))

    @cached_property
    def record(self) -> dict[str, Any]:
        """The whole record, `record.json`."""
        return records.read(self.path)

    @property
    def epsilon(self) -> float | None:
        """Upper bound, accounted over the releases that were made; None if there is none (trust `none`)."""
        return self._privacy("epsilon")

    @property
    def delta(self) -> float | None:
        """The delta that `epsilon` belongs to; None where there is no epsilon."""
        return self._privacy("delta")

    @property
    def unit(self) -> str:
        """What is protected as one whole: `record`, `person` or `client`."""
        return str(self._privacy("unit"))

    @property
    def adjacency(self) -> str:
        """What neighbours differ in: `add or remove one record`."""
        return str(self._privacy("adjacency"))

    @property
    def accuracy(self) -> float | None:
        """As a share; None if it was not measured, or is hidden by its noise."""
        accuracy: float | None = self.record["metrics"]["accuracy"]
        return accuracy

    @property
    def statement(self) -> str:
        """What was promised to whom, as Markdown, for a privacy officer."""
        return records.statement_page(self.record, self.path)

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, which `peft.PeftModel.from_pretrained` loads."""
        return self.path / str(self.record["artifacts"]["adapter"])

    def _privacy(self, name: str) -> Any:
        return self.record["privacy"][name]

    def __repr__(self) -> str:
        try:
            accuracy, epsilon = self.accuracy, self.epsilon
        except RecordError:
            return f"Result({str(self.path)!r}: no finished run)"
        quality = "unknown" if accuracy is None else f"{accuracy:.3f}"
        promise = "no epsilon"
        if epsilon is not None:
            promise = f"epsilon {epsilon:.3f} at delta {self.delta:.2e}, {self.adjacency}"
        return f"Result({str(self.path)!r}: accuracy {quality}, {promise})"

    def _repr_html_(self) -> str:
        from fedtune.runs.summary import accuracy_line, facts_and_notes

        facts, notes = facts_and_notes(self.record)
        rows = [
            ("accuracy", accuracy_line(self.record["metrics"])),
            *facts,
            *notes,
            ("folder", str(self.path)),
        ]
        cells = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for name, text in rows
            if text
        )
        return f"<table>{cells}</table>"
