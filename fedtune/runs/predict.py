"""Labels with probabilities from a finished run: what `fedtune predict` does.

The model is built the way anybody else would: the encoder that the run's adapter folder names, and the
adapter through `peft.PeftModel.from_pretrained`. So what is predicted here is what a user of the saved
adapter gets. Texts are cut to the run's `data.max_length` tokens, as in training.

Does not do: pairs of texts, serving, or explanations. Predictions are post-processing of the released
adapter; the texts that are asked about are not protected by anything and go nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import DataError, RecordError
from fedtune.runs import record

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

__all__ = ["predict", "show"]

_BATCH = 32  # texts at a time


def predict(run_dir: Path | str, texts: Sequence[str], *, device: str = "auto") -> list[dict[str, Any]]:
    """One `{"text", "label", "probability", "probabilities": {label: p}}` a text, in the order given.

    Raises:
        RecordError: `run_dir` is not a run folder, or its run is not finished.
        DataError: there is no text, or one is empty; the run was trained on pairs of texts.
        ModelError, ResourceError: the encoder or adapter cannot be loaded.
    """
    finished = record.read(run_dir)
    folder = Path(run_dir) if Path(run_dir).is_dir() else Path(run_dir).parent
    adapter = folder / finished["artifacts"]["adapter"]
    if not (adapter / "adapter_config.json").exists():
        raise RecordError(
            f"The run in {folder} has a record and no adapter at {adapter}. Copy the whole run folder, "
            f"or resume the run to write it again: fedtune run resume={folder}"
        )
    if not texts:
        raise DataError("There is no text to classify. Give one or more, or '-' and one text a line.")
    if pair := finished["config"]["data"].get("text_pair"):
        raise DataError(
            f"The run in {folder} was trained on pairs of texts (data.text_pair={pair}), and fedtune predict "
            "takes one text at a time: what it said of one alone would mean nothing. Load the adapter with "
            "peft.PeftModel.from_pretrained, and give both texts to the tokenizer."
        )
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(f"Text {number} of {len(texts)} is empty. Give a text with at least one word.")
    probabilities = _probabilities(adapter, texts, finished["config"]["data"]["max_length"], device)
    labels = finished["data"]["labels"]
    return [_row(text, labels, row) for text, row in zip(texts, probabilities, strict=True)]


def _row(text: str, labels: Sequence[str], probabilities: np.ndarray) -> dict[str, Any]:
    best = int(probabilities.argmax())
    return {
        "text": text,
        "label": labels[best],
        "probability": float(probabilities[best]),
        "probabilities": {label: float(p) for label, p in zip(labels, probabilities, strict=True)},
    }


def _probabilities(adapter: Path, texts: Sequence[str], max_length: int, device: str) -> np.ndarray:
    """float32 [n, c] for n texts and c classes."""
    import json

    import numpy as np
    import torch

    from fedtune.config.schema import ModelConfig
    from fedtune.models.classifier import load_saved
    from fedtune.models.encoder import load_tokenizer

    model = load_saved(adapter, device)
    saved = json.loads((adapter / "fedtune.json").read_text(encoding="utf-8"))
    tokenizer, _ = load_tokenizer(ModelConfig(**saved["model"]))
    where = next(model.parameters()).device
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), _BATCH):
            batch = tokenizer(
                list(texts[start : start + _BATCH]),
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            ).to(where)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            rows.append(logits.float().softmax(-1).cpu().numpy())
    return np.concatenate(rows)


def show(predictions: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints predictions as a table: label, probability, text; with many labels, the next best too."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    several = len(predictions[0]["probabilities"]) > 2
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("label", style="bold", overflow="fold")
    table.add_column("probability", justify="right")
    if several:
        table.add_column("then", overflow="fold")
    table.add_column("text", overflow="fold")
    for one in predictions:
        # Text, not str: what a text holds in brackets is no markup.
        row = [Text(one["label"]), Text(f"{one['probability']:.3f}")]
        if several:
            ranked = sorted(one["probabilities"].items(), key=lambda item: -item[1])[1:3]
            row.append(Text(", ".join(f"{label} {probability:.3f}" for label, probability in ranked)))
        table.add_row(*row, Text(one["text"]))
    console.print(table)
