"""`fedtune export RUN_DIR`: a finished run as a folder that people can use without fedtune.

    1  the model, merged (`fedtune.models.standalone`), and each format that was asked for
    2  each format checked against the original on public texts (`fedtune.export.checks`)
    3  export.json, the cards (`fedtune.export.card`), the statement, and the sums of all files

Everything is made in a folder beside, which gets its name when it is whole. What is written is made of the
published part of the record, of the released adapter, and of public texts: it is post-processing, and costs
no privacy. The texts of a check that a person names are theirs to publish figures of.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune import __version__
from fedtune.errors import ConfigError, ResourceError
from fedtune.export import card, checks
from fedtune.privacy.publication import publish
from fedtune.runs import predict, record
from fedtune.serving.bundle import EXPORT_NAME, FORMATS, PATHS, write_sums
from fedtune.serving.classifier import Classifier, onnx_forward, probabilities, read_tokenizer, torch_forward
from fedtune.serving.measures import measure

__all__ = ["export"]

Say = Callable[[str], None]


def export(
    run_dir: Path | str,
    output: Path | None = None,
    formats: Sequence[str] = FORMATS,
    *,
    texts: Path | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Exports the finished run in `run_dir`.

    Args:
        output: the new folder; None: `export` in the run folder.
        formats: of `FORMATS`.
        texts: a file with one text a line to check with; None: the run's public test split, or made-up ones.
        say: is told of each step.

    Returns:
        The folder.

    Raises:
        ConfigError: a format is unknown, what it takes is not installed, or the folder is there already.
        RecordError, DataError: as `fedtune.load`; the texts to check with are missing.
        ModelError: the base cannot be loaded, or what was made is not what was trained.
        ResourceError: the folder cannot be written.
    """
    _check(formats)
    made, folder = record.read(run_dir), record.run_folder(run_dir)
    adapter = predict.adapter_of(folder, made)
    target = (folder / "export" if output is None else output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already. Name a new folder: --output FOLDER.")
    published, _ = publish("record", made, public_data=made["privacy"].get("data_public") is True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside:
            whole = Path(beside) / target.name
            whole.mkdir()
            _write(whole, adapter, published, [name for name in FORMATS if name in formats], texts, say)
            if target.exists():
                target.rmdir()  # it is empty
            whole.rename(target)
    except OSError as error:
        raise ResourceError(
            f"Cannot write {target}: {error.strerror or error}. Choose another folder with --output FOLDER."
        ) from error
    return target


def _check(formats: Sequence[str]) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(
            f"--format {','.join(unknown)} is not known; it takes one or more of {','.join(FORMATS)}."
        )
    if any(name.startswith("onnx") for name in formats):
        from fedtune.models.onnx_files import require_onnx

        require_onnx()


def _write(
    folder: Path, adapter: Path, made: Mapping[str, Any], formats: Sequence[str], named: Path | None, say: Say
) -> None:
    from fedtune.models import standalone
    from fedtune.models.classifier import load_saved, read_saved

    base, labels = read_saved(adapter)
    max_length = int(made["config"]["data"]["max_length"])
    say("merging the adapter into its base")
    inputs = standalone.save_tokenizer(adapter, folder, max_length)
    standalone.save_config(adapter, folder)
    model = standalone.merged(adapter)
    tokenizer = read_tokenizer(folder, max_length)
    asked = checks.check_texts_of(made, named, tokenizer.get_vocab())
    ids = [one.ids for one in tokenizer.encode_batch(list(asked.texts))]
    pad_id = int(model.config.encoder.pad_token_id or 0)

    def logits_of(forward: Any) -> NDArray[np.float32]:
        return Classifier(labels, tokenizer, forward, pad_id).logits(ids)

    say(f"asking the original about {len(ids)} texts: {asked.source}")
    original = logits_of(torch_forward(load_saved(adapter, "cpu")))
    about: dict[str, Any] = {}
    for name in formats:
        say(f"writing and checking {name}")
        forward = _make(name, folder, adapter, model, inputs)
        figures = checks.agreement(original, logits_of(forward), asked.labels)
        if name in ("hf", "onnx"):
            checks.refuse_if_wrong(name, figures)
        path = folder / PATHS[name]
        about[name] = {"file": PATHS[name], "bytes": path.stat().st_size, **figures}
    if "onnx" not in formats:
        (folder / PATHS["onnx"]).unlink(missing_ok=True)  # int8 is made of it
    description = {
        "schema": 1,
        "fedtune": __version__,
        "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "run": made["run"]["id"],
        "labels": list(labels),
        "max_length": max_length,
        "pad_id": pad_id,
        "inputs": inputs,
        "base": card.base_of(base),
        "formats": about,
        "check": {
            "texts": asked.source,
            "num_texts": len(ids),
            "tolerance": checks.TOLERANCE,
            "labels_equal_asked": checks.LABELS_EQUAL,
            "processor": _processor(),
        },
        "quality": None
        if asked.labels is None
        else measure(probabilities(original), asked.labels, labels, asked.sites),
    }
    say("writing the cards")
    _write_words(folder, made, description)
    write_sums(folder)


def _make(name: str, folder: Path, adapter: Path, model: Any, inputs: Sequence[str]) -> Any:
    """Writes one format; what asks the files that were written."""
    from fedtune.models import standalone
    from fedtune.models.classifier import read_saved

    if name == "hf":
        modeling, config = folder / standalone.MODELING_FILE, folder / "config.json"
        kept = modeling.read_bytes(), config.read_bytes()
        model.save_pretrained(folder)  # writes config.json anew, and may copy the file of its class
        modeling.write_bytes(kept[0])
        config.write_bytes(kept[1])
        (folder / PATHS[name]).chmod(config.stat().st_mode)  # safetensors makes files for their owner alone
        return torch_forward(standalone.load_merged(folder))
    if name == "adapter":
        there = (folder / PATHS[name]).parent
        there.mkdir()
        standalone.save_adapter(adapter, there)
        standalone.save_config(adapter, there)
        (folder / PATHS[name]).chmod((there / "config.json").stat().st_mode)
        return torch_forward(standalone.on_plain_base(there, read_saved(adapter)[0]))
    from fedtune.models import onnx_files

    path, plain = folder / PATHS[name], folder / PATHS["onnx"]
    path.parent.mkdir(exist_ok=True)
    if not plain.exists():
        onnx_files.write_fp32(model, inputs, plain)
    if name == "onnx-int8":
        onnx_files.write_int8(plain, path)
    return onnx_forward(path)


def _processor() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def _write_words(folder: Path, made: Mapping[str, Any], description: Mapping[str, Any]) -> None:
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
