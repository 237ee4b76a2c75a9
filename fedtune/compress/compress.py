"""`fedtune compress`: a finished run, or a base encoder before any, as a smaller and faster model.

    1  the model, and texts to learn from and to be measured on (`fedtune.compress.texts`)
    2  each step that changes it (`fedtune.compress.steps`), asked about the measured texts after it
    3  the formats, each checked against the compressed model; of a base encoder, transformers' own
    4  what all of them cost to ask, in turn (`fedtune.compress.measure`)
    5  compression.json, the cards, the sums

Everything is made in a folder beside, which gets its name when it is whole: what ends early, by an error or
by Ctrl-C, leaves nothing. The folder of a run's model is one as `fedtune export` writes, so that `fedtune
evaluate` and `fedtune serve` take it; that of a base encoder is one for `model.name=FOLDER` of `fedtune
run`.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedtune import __version__
from fedtune.compress import steps as surgery
from fedtune.compress.card import compressed_card, encoder_card
from fedtune.compress.measure import memory_of, speeds
from fedtune.compress.steps import Lesson, State
from fedtune.compress.texts import POST_PROCESSING, Texts, altered, texts_for, texts_of_file
from fedtune.compress.transfer import Advance, Inputs
from fedtune.config.compression import Compression, load
from fedtune.config.schema import ModelConfig
from fedtune.errors import ConfigError, ModelError
from fedtune.export import card, checks
from fedtune.export.export import describe, figures_of, new_folder, processor, write_format, write_words
from fedtune.models import standalone
from fedtune.models.classifier import read_saved
from fedtune.models.encoder import load_pretrained, load_tokenizer
from fedtune.models.quantization import stored_bytes
from fedtune.models.surgery import anatomy
from fedtune.privacy.publication import publish
from fedtune.runs import predict, record
from fedtune.serving.bundle import PATHS, write_sums
from fedtune.serving.classifier import Classifier, Forward, read_tokenizer, torch_forward

__all__ = ["RECORD_NAME", "compress"]

RECORD_NAME = "compression.json"
ORIGINAL = "original"
Say = Callable[[str], None]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class _Subject:
    """What is compressed.

    Attributes:
        made: the published record of its run; None of a base encoder.
        base: the encoder's settings.
        adapter: what the run trained; None of a base encoder.
        labels: of the classes; empty of a base encoder.
        max_length: to which texts are cut.
        output: where the result goes if nobody says.
    """

    made: Mapping[str, Any] | None
    base: ModelConfig
    adapter: Path | None
    labels: tuple[str, ...]
    max_length: int
    output: Path | None


def compress(
    source: Path | str,
    words: Sequence[str] = (),
    output: Path | None = None,
    *,
    say: Say = lambda line: None,
    advance: Advance = lambda done, whole: None,
) -> Path:
    """Compresses the finished run in `source`, or the base encoder of that name.

    Args:
        source: a run folder; or a base encoder, as `model.name` of a run takes it.
        words: settings, `compress=PAGE` and `NAME=VALUE` (`fedtune.config.compression`).
        output: the new folder; None: `compressed-PAGE` in the run folder.
        say: is told of each step.
        advance: is told how far a step that learns is.

    Returns:
        The folder.

    Raises:
        ConfigError: a setting is wrong, the steps make no sense, or the folder is there already.
        RecordError: the run is not finished, or is none.
        DataError: there are no texts that may be used, or the run saw long texts in windows.
        ModelError: a step cannot be done with this model, or what it learnt is no number.
        ResourceError: the folder cannot be written, or the model not be fetched.
    """
    settings = load(words)
    subject = _subject(source, words)
    if subject.made is None and "quantize" in settings.steps:
        say("quantize is left out: a base is quantized when it is trained on (model.quantization)")
        settings = replace(settings, steps=tuple(step for step in settings.steps if step != "quantize"))
        if not settings.steps:
            raise ConfigError(
                "A base encoder is quantized when it is trained on, by model.quantization=int8 or nf4 of "
                "fedtune run. Prune or distill it here: compress=student or compress=pruned."
            )
    if (
        any(name.startswith("int8") or name == "nf4" for name in settings.quantize)
        and "quantize" in settings.steps
    ):
        from fedtune.models.onnx_files import require_onnx

        require_onnx()
    target = output if output is not None else subject.output
    if target is None:
        raise ConfigError("A base encoder needs a folder to go to: add -o FOLDER.")
    target = target.expanduser()
    with new_folder(target) as folder:
        if subject.made is None:
            _base(folder, subject, settings, say, advance)
        else:
            _classifier(folder, subject, subject.made, settings, say, advance)
    return target


def _subject(source: Path | str, words: Sequence[str]) -> _Subject:
    path = Path(source).expanduser()
    if (path / "export.json").is_file():
        raise ConfigError(
            f"{source} is an exported model, whose texts and record are not in it. Name the run that it was "
            "made of."
        )
    is_run = path.is_file() or any(
        (path / name).exists() for name in ("record.json", "checkpoint", "config.yaml")
    )
    if not is_run and (not path.is_dir() or (path / "config.json").is_file()):
        base = ModelConfig(name=str(source))
        return _Subject(None, base, None, (), 128, None)
    made, folder = record.read(path), record.run_folder(path)
    predict.refuse_pieces(
        folder, made, "a compressed model", f"Export it as it is: fedtune export {folder} --format hf."
    )
    adapter = predict.adapter_of(folder, made)
    published, _ = publish("record", made, public_data=made["privacy"].get("data_public") is True)
    base, labels = read_saved(adapter)
    page = next((word.partition("=")[2] for word in words if word.startswith("compress=")), "student")
    length = int(made["config"]["data"]["max_length"])
    return _Subject(published, base, adapter, labels, length, folder / f"compressed-{page}")


def _classifier(
    folder: Path,
    subject: _Subject,
    made: Mapping[str, Any],
    settings: Compression,
    say: Say,
    advance: Advance,
) -> None:
    assert subject.adapter is not None
    texts = texts_for(made, settings.texts, settings.share, settings.seed)
    say(
        f"{len(texts.learn):,} texts to learn from ({texts.learn_from}), {len(texts.measure):,} to measure on"
    )
    inputs = standalone.save_tokenizer(subject.adapter, folder, subject.max_length)
    original: Any = standalone.merged(subject.adapter)
    tokenizer = read_tokenizer(folder, subject.max_length)
    pad = int(original.config.encoder.pad_token_id or 0)
    separator = standalone.separator(subject.adapter) if checks.of_pairs(made) else None
    asking = Inputs(pad, separator)
    ids = [one.ids for one in tokenizer.encode_batch(list(texts.measure))]

    def asked(forward: Forward) -> Classifier:
        return Classifier(subject.labels, tokenizer, forward, pad)

    models = {ORIGINAL: asked(torch_forward(original, separator))}
    said = {ORIGINAL: models[ORIGINAL].logits(ids)}
    if not np.isfinite(said[ORIGINAL]).all():
        raise ModelError(
            "The run's own model says NaN of public texts, so that there is nothing to learn from it. Run "
            "again with a lower train.learning_rate."
        )
    states = _changed(original, tokenizer, texts, settings, subject.labels, asking, say, advance)
    for name, state in states.items():
        models[name] = asked(torch_forward(state.model, separator))
        said[name] = models[name].logits(ids)
    last: Any = list(states.values())[-1].model if states else original
    compressed = list(said.values())[-1]
    standalone.write_config(last.config, folder)
    formats: dict[str, Any] = {}
    for name in ("hf", "onnx", *(_FORMATS[one] for one in settings.quantize if "quantize" in settings.steps)):
        say(f"writing and checking {name}")
        models[name] = asked(write_format(name, folder, last, inputs, settings.threads, separator))
        said[name] = models[name].logits(ids)
        formats[name] = figures_of(name, folder, compressed, said[name], texts.labels)
    say("measuring what each costs to ask")
    told = speeds(models, ids, settings.threads)
    found = {name: {**_right(said[ORIGINAL], said[name], texts.labels), **told[name]} for name in models}
    for name in formats:
        path = folder if name == "hf" else folder / PATHS[name]
        found[name]["memory_bytes"] = memory_of(path, ids, asking, len(subject.labels), settings.threads)
        found[name]["bytes"] = formats[name]["bytes"]
    description = _description(subject, settings, texts, original, states, found, list(formats))
    said_of_it = describe(
        made, subject.base, subject.labels, pad, inputs, formats,
        checks.CheckTexts(texts.measure, texts.measured_on, texts.labels, texts.sites), compressed,
    )  # fmt: skip
    said_of_it |= {"pairs": checks.of_pairs(made), "separator": separator}
    say("writing the cards")
    write_words(folder, made, said_of_it)
    (folder / "README.md").write_text(
        compressed_card(card.model_card(made, said_of_it), description), encoding="utf-8"
    )
    _keep(folder, description)


_FORMATS = {"int8": "onnx-int8", "int8-weights": "onnx-int8-weights", "nf4": "onnx-nf4"}


def _base(folder: Path, subject: _Subject, settings: Compression, say: Say, advance: Advance) -> None:
    """A base encoder as a smaller one, in transformers' own form."""
    texts = texts_of_file(settings.texts, settings.seed)
    say(
        f"{len(texts.learn):,} texts to learn from ({texts.learn_from}), {len(texts.measure):,} to measure on"
    )
    loaded, _ = load_tokenizer(subject.base)
    original: Any = load_pretrained(subject.base).eval()
    loaded.save_pretrained(str(folder))
    length = min(subject.max_length, int(original.config.max_position_embeddings) - 2)
    tokenizer = read_tokenizer(folder, length)
    pad = int(original.config.pad_token_id or 0)
    ids = [one.ids for one in tokenizer.encode_batch(list(texts.measure))]
    width = tuple(map(str, range(int(original.config.hidden_size))))

    def asked(model: nn.Module) -> Classifier:
        return Classifier(width, tokenizer, surgery.states_forward(model), pad)

    models = {ORIGINAL: asked(original)}
    states = _changed(original, tokenizer, texts, settings, (), Inputs(pad), say, advance)
    for name, state in states.items():
        models[name] = asked(state.model)
    last: Any = list(states.values())[-1].model
    say("measuring what each costs to ask")
    said = {name: model.logits(ids) for name, model in models.items()}
    told = speeds(models, ids, settings.threads)
    found = {
        name: {"cosine": float((said[ORIGINAL] * said[name]).sum(1).mean()), **told[name]} for name in models
    }
    about = last.config
    about._name_or_path = ""
    last.save_pretrained(folder)
    description = _description(subject, settings, texts, original, states, found, [])
    (folder / "README.md").write_text(encoder_card(description), encoding="utf-8")
    _keep(folder, description)


def _changed(
    original: nn.Module,
    tokenizer: Any,
    texts: Texts,
    settings: Compression,
    labels: Sequence[str],
    inputs: Inputs,
    say: Say,
    advance: Advance,
) -> dict[str, State]:
    """The model after each step that changes it, by the step's name."""
    vocabulary = tokenizer.get_vocab()
    mask = next((word for word in ("[MASK]", "<mask>") if word in vocabulary), "")
    more = [*texts.learn, *altered(texts.learn, settings.transfer.augment, mask, settings.seed)]
    ids = [one.ids for one in tokenizer.encode_batch(more)]
    lesson = Lesson(original, vocabulary, ids[: len(texts.learn)], ids, inputs)
    count = anatomy(original).layers if set(settings.steps) - {"quantize"} else 1
    state = State(original, tuple(range(count)), count - 1)
    found: dict[str, State] = {}
    for step in settings.steps:
        if step == "quantize":
            continue
        say(f"{step}: it learns from {len(ids):,} texts, {settings.transfer.epochs} times")
        start = time.perf_counter()
        if step == "prune":
            state = surgery.prune(state, lesson, settings, advance)
        else:
            state = surgery.distill(state, lesson, settings, labels, advance)
        state = replace(state, seconds=time.perf_counter() - start)
        found[step] = state
        say(state.what)
    return found


def _right(original: Logits, found: Logits, labels: NDArray[np.int64] | None) -> dict[str, Any]:
    """How often a model says what the original says, and how right it is beside it, on the same texts.

    `difference_error` is the standard error of the difference: of the mean, over texts, of who is right.
    """
    first, second = original.argmax(1), found.argmax(1)
    figures: dict[str, Any] = {"labels_equal": float((first == second).mean())}
    if labels is not None:
        gained = (second == labels).astype(float) - (first == labels).astype(float)
        figures |= {
            "accuracy": float((second == labels).mean()),
            "difference": float(gained.mean()),
            "difference_error": float(gained.std(ddof=1) / np.sqrt(len(gained))),
        }
    return figures


def _description(
    subject: _Subject,
    settings: Compression,
    texts: Texts,
    original: nn.Module,
    states: Mapping[str, State],
    found: Mapping[str, dict[str, Any]],
    formats: Sequence[str],
) -> dict[str, Any]:
    """compression.json."""

    def size(model: nn.Module) -> dict[str, Any]:
        sizes: dict[str, Any] = {
            "numbers": sum(p.numel() for p in model.parameters()),
            "bytes": stored_bytes(model),
        }
        if states:
            now = anatomy(model)
            sizes |= {"layers": now.layers, "heads": sum(now.heads), "units": sum(now.units)}
        return sizes

    values = asdict(settings)
    values["texts"] = None if settings.texts is None else Path(settings.texts).name
    values["distill"]["student"] = surgery.shown(settings.distill.student)
    return {
        "schema": 1,
        "fedtune": __version__,
        "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "run": None if subject.made is None else subject.made["run"]["id"],
        "base": card.base_of(subject.base),
        "settings": values,
        "texts": {
            "learn_from": texts.learn_from,
            "num_learn": len(texts.learn),
            "measured_on": texts.measured_on,
            "num_measured": len(texts.measure),
            "notes": [*texts.notes, *(note for state in states.values() for note in state.notes)],
        },
        "privacy": POST_PROCESSING if subject.made is not None else None,
        "processor": processor(),
        "original": {**size(original), **found[ORIGINAL]},
        "steps": [
            {"step": name, "what": state.what, "seconds": state.seconds, "loss": state.loss,
            **size(state.model),
             **found[name]}
            for name, state in states.items()
        ],
        "formats": {name: dict(found[name]) for name in formats},
    }  # fmt: skip


def _keep(folder: Path, description: Mapping[str, Any]) -> None:
    passed, _ = publish("compression", record.clean(description), public_data=False)
    (folder / RECORD_NAME).write_text(json.dumps(passed, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_sums(folder)
