"""`fedtune export RUN_DIR`: a finished run as a folder that people can use without fedtune.

    1  the model, merged (`fedtune.models.standalone`), and each format that was asked for
    2  each format checked against the original on public texts (`fedtune.export.checks`)
    3  export.json, the cards (`fedtune.export.card`), the statement, and the sums of all files

Everything is made in a folder beside, which gets its name when it is whole. What is written is made of the
published part of the record, of the released adapter, and of public texts: it is post-processing, and costs
no privacy. The texts of a check that a person names are theirs to publish figures of.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune import __version__
from fedtune.config.schema import ModelConfig
from fedtune.data.windows import in_windows
from fedtune.errors import ConfigError, ResourceError
from fedtune.export import card, checks
from fedtune.privacy.publication import publish
from fedtune.runs import predict, record
from fedtune.runs.predict import Asked
from fedtune.serving.bundle import EXPORT_NAME, FORMATS, OPTIONAL, PATHS, write_sums
from fedtune.serving.classifier import (
    Classifier,
    Forward,
    onnx_forward,
    probabilities,
    read_tokenizer,
    torch_forward,
)
from fedtune.serving.measures import measure

__all__ = [
    "describe",
    "export",
    "figures_of",
    "new_folder",
    "processor",
    "write_format",
    "write_words",
]

Say = Callable[[str], None]


def export(
    run_dir: Path | str,
    output: Path | None = None,
    formats: Sequence[str] = FORMATS,
    *,
    texts: Path | None = None,
    calibrate: Path | None = None,
    site: str | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Exports the finished run in `run_dir`.

    Args:
        output: the new folder; None: `export` in the run folder.
        formats: of `FORMATS` and `OPTIONAL`.
        texts: a file with one text a line to check with; None: the run's public test split, or made-up ones.
        calibrate: a file with one public text a line that static int8 takes its ranges from; None: training
            texts of the run, if they are public.
        site: of a run with `train.personalize`, whose own model is exported, where the run folder has it (its
            owner's, or public data's); None: the common one.
        say: is told of each step.

    Returns:
        The folder.

    Raises:
        ConfigError: a format is unknown, what it takes is not installed, or the folder is there already.
        RecordError, DataError: as `fedtune.load`; the texts to check with are missing or no pairs, or the run
            saw long texts in windows, and a format cannot.
        ModelError: the base cannot be loaded, or what was made is not what was trained.
        ResourceError: the folder cannot be written.
    """
    _check(formats, calibrate)
    made, folder = record.read(run_dir), record.run_folder(run_dir)
    if any(name.startswith("onnx") for name in formats):
        predict.refuse_pieces(
            folder, made, "an ONNX file", f"Export it for transformers: fedtune export {folder} --format hf."
        )
    adapter = predict.adapter_of(folder, made, site)
    target = (folder / "export" if output is None else output).expanduser()
    published, _ = publish("record", made, public_data=made["privacy"].get("data_public") is True)
    calibrated = checks.calibration_texts(made, calibrate) if "onnx-int8-static" in formats else None
    asked = [name for name in (*FORMATS, *OPTIONAL) if name in formats]
    with new_folder(target) as whole:
        _write(whole, adapter, published, asked, texts, calibrated, site, say)
    return target


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, which gets its name when the block ends well, and is gone when it does not.

    Raises:
        ConfigError: `target` is there already, and not empty.
        ResourceError: it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already. Name a new folder: --output FOLDER.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside:
            whole = Path(beside) / target.name
            whole.mkdir()
            yield whole
            if target.exists():
                target.rmdir()  # it is empty
            whole.rename(target)
    except OSError as error:
        raise ResourceError(
            f"Cannot write {target}: {error.strerror or error}. Choose another folder with --output FOLDER."
        ) from error


def _check(formats: Sequence[str], calibrate: Path | None) -> None:
    known = (*FORMATS, *OPTIONAL)
    unknown = [name for name in formats if name not in known]
    if unknown or not formats:
        raise ConfigError(
            f"--format {','.join(unknown)} is not known; it takes one or more of {','.join(known)}."
        )
    if calibrate is not None and "onnx-int8-static" not in formats:
        raise ConfigError(
            "--calibrate names texts for static int8, and no such file is asked for: add onnx-int8-static to "
            "--format."
        )
    if any(name.startswith("onnx") for name in formats):
        from fedtune.models.onnx_files import require_onnx

        require_onnx()


def _write(
    folder: Path, adapter: Path, made: Mapping[str, Any], formats: Sequence[str], named: Path | None,
    calibrated: tuple[list[Asked], str] | None, site: str | None, say: Say,
) -> None:  # fmt: skip
    from fedtune.models import standalone
    from fedtune.models.classifier import load_saved, read_saved

    base, labels = read_saved(adapter)
    seen = predict.seen_of(made)
    window = standalone.window_of(adapter, seen)
    max_length = seen.longest
    if window is not None:
        special = window["before"] + window["after"]
        max_length = seen.windows * (seen.longest - special) + special
    say("merging the adapter into its base")
    inputs = standalone.save_tokenizer(adapter, folder, max_length)
    standalone.save_config(adapter, folder, window)
    model = standalone.merged(adapter, window)
    tokenizer = read_tokenizer(folder, max_length)
    asked = checks.check_texts_of(made, named, tokenizer.get_vocab(), site)
    ids = [one.ids for one in tokenizer.encode_batch(list(asked.texts))]
    trained: Any = load_saved(adapter, "cpu")
    separator: int | None = trained.get_base_model().encoder.separator
    pad_id = int(model.config.encoder.pad_token_id or 0)

    def logits_of(forward: Any) -> NDArray[np.float32]:
        return Classifier(labels, tokenizer, forward, pad_id).logits(ids)

    say(f"asking the original about {len(ids)} texts: {asked.source}")
    original = logits_of(torch_forward(trained) if window is None else _windows_forward(trained, **window))
    about = {}
    for name in formats:
        say(f"writing and checking {name}")
        if name == "adapter":
            forward = _adapter(folder, adapter, separator, window)
        elif name == "onnx-int8-static" and calibrated is not None:
            forward = _static(folder, model, inputs, tokenizer.encode_batch(calibrated[0]), pad_id, separator)
        else:
            forward = write_format(name, folder, model, inputs, separator=separator)
        about[name] = figures_of(name, folder, original, logits_of(forward), asked.labels)
    if calibrated is not None:
        about["onnx-int8-static"]["calibrated_on"] = calibrated[1]
    if "onnx" not in formats:
        (folder / PATHS["onnx"]).unlink(missing_ok=True)  # int8 is made of it
    say("writing the cards")
    description = describe(made, base, labels, pad_id, inputs, about, asked, original)
    description |= {"pairs": checks.of_pairs(made), "separator": separator, "site": site}
    if window is not None:
        description |= {"max_length": max_length, "window": seen.longest}
    write_words(folder, made, description)
    write_sums(folder)


def describe(
    made: Mapping[str, Any],
    base: ModelConfig,
    labels: Sequence[str],
    pad_id: int,
    inputs: Sequence[str],
    formats: Mapping[str, Any],
    asked: checks.CheckTexts,
    original: NDArray[np.float32],
) -> dict[str, Any]:
    """What export.json says of a model whose logits of the texts `asked` are `original`, float32 [n, c]."""
    return {
        "schema": 1,
        "fedtune": __version__,
        "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "run": made["run"]["id"],
        "labels": list(labels),
        "max_length": int(made["config"]["data"]["max_length"]),
        "pad_id": pad_id,
        "inputs": list(inputs),
        "base": card.base_of(base),
        "formats": dict(formats),
        "check": {
            "texts": asked.source,
            "num_texts": len(asked.texts),
            "tolerance": checks.TOLERANCE,
            "labels_equal_asked": checks.LABELS_EQUAL,
            "processor": processor(),
        },
        "quality": None
        if asked.labels is None
        else measure(probabilities(original), asked.labels, labels, asked.sites),
    }


def figures_of(
    name: str,
    folder: Path,
    original: NDArray[np.float32],
    found: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
) -> dict[str, Any]:
    """What export.json says of one format in `folder`, which gave the logits `found` where `original` was
    right.

    Raises:
        ModelError: it is float32, and gives others.
    """
    figures = checks.agreement(original, found, labels)
    if name in ("hf", "onnx"):
        checks.refuse_if_wrong(name, figures)
    return {"file": PATHS[name], "bytes": (folder / PATHS[name]).stat().st_size, **figures}


def _windows_forward(trained: Any, tokens: int, before: int, after: int) -> Forward:
    """What asks the run's own model about texts in windows, cut as they were in training."""

    def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = [row[seen > 0].tolist() for row, seen in zip(ids, mask, strict=True)]
        cut = [in_windows(row, before, after, tokens) for row in rows]
        logits: NDArray[np.float32] = predict.logits_of(trained, cut, tokens).numpy()
        return logits

    return forward


def _adapter(folder: Path, adapter: Path, separator: int | None, window: dict[str, int] | None) -> Any:
    """Writes the adapter alone; what asks it, on its base as published."""
    from fedtune.models import standalone
    from fedtune.models.classifier import read_saved

    there = (folder / PATHS["adapter"]).parent
    there.mkdir()
    standalone.save_adapter(adapter, there)
    standalone.save_config(adapter, there, window)
    (folder / PATHS["adapter"]).chmod((there / "config.json").stat().st_mode)
    return torch_forward(standalone.on_plain_base(there, read_saved(adapter)[0]), separator)


def _static(
    folder: Path,
    model: Any,
    inputs: Sequence[str],
    encoded: Sequence[Any],
    pad_id: int,
    separator: int | None,
) -> Forward:
    """Writes static int8, with ranges of the `encoded` texts; what asks it."""
    from fedtune.models.onnx_files import write_int8_static
    from fedtune.serving.calibration import product_ranges

    write_format("onnx", folder, model, inputs)
    plain, path = folder / PATHS["onnx"], folder / PATHS["onnx-int8-static"]
    ids = [one.ids for one in encoded]
    write_int8_static(plain, path, product_ranges(plain, ids, pad_id, separator=separator))
    return onnx_forward(path, separator=separator)


def write_format(
    name: str,
    folder: Path,
    model: Any,
    inputs: Sequence[str],
    threads: int = 0,
    separator: int | None = None,
) -> Forward:
    """Writes `model` in one format into `folder`, which has its configuration; what asks the files there.

    Args:
        inputs: names of the tokenizer's outputs, in its order.
        threads: of onnxruntime, when it is asked; 0: as many as there are cores.
        separator: of a model of pairs, as of `fedtune.serving.classifier.segments`.
    """
    from fedtune.models import standalone

    if name == "hf":
        modeling, config = folder / standalone.MODELING_FILE, folder / "config.json"
        kept = modeling.read_bytes(), config.read_bytes()
        model.save_pretrained(folder)  # writes config.json anew, and may copy the file of its class
        modeling.write_bytes(kept[0])
        config.write_bytes(kept[1])
        (folder / PATHS[name]).chmod(config.stat().st_mode)  # safetensors makes files for their owner alone
        return torch_forward(standalone.load_merged(folder), separator)
    from fedtune.models import onnx_files

    path, plain = folder / PATHS[name], folder / PATHS["onnx"]
    path.parent.mkdir(exist_ok=True)
    if not plain.exists():
        onnx_files.write_fp32(model, inputs, plain)
    if name == "onnx-int8":
        onnx_files.write_int8(plain, path)
    elif name != "onnx":
        from fedtune.models.onnx_weights import write_weights

        write_weights(plain, path, "nf4" if name == "onnx-nf4" else "int8")
    return onnx_forward(path, threads, separator)


def processor() -> str:
    """The instructions of this processor that torch uses, by its name for them."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def write_words(folder: Path, made: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Writes export.json, the cards and the statement, of what the door lets through."""
    # On public texts, or on texts that whoever exports may publish figures of: nothing is local.
    described, _ = publish("export", record.clean(description), public_data=False)
    (folder / EXPORT_NAME).write_text(
        json.dumps(described, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    record.write_statement(made, folder / "statement.md")
    (folder / "README.md").write_text(card.model_card(made, described), encoding="utf-8")
    (folder / "DATA.md").write_text(card.data_card(made), encoding="utf-8")
    if (folder / "adapter").is_dir():
        (folder / "adapter" / "README.md").write_text(card.adapter_card(described), encoding="utf-8")
