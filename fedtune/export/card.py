"""The words of an export: model card (README.md), data card (DATA.md) and the card of the bare adapter.

Made of the published record and of `export.json` alone, which the door (`fedtune.privacy.publication`) has
passed; no path of the machine, no measured time. A model card is read by the Hugging Face hub too, which
takes the block at its head. What the record does not know (language, licence, who is responsible) is said
to be unknown, and is for whoever publishes the folder to fill in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.schema import ModelConfig
from fedtune.models.encoder import EMBEDDED
from fedtune.privacy.mechanisms.registry import adds_noise
from fedtune.privacy.publication import one_line
from fedtune.privacy.statement.facts import statement_json
from fedtune.privacy.statement.markdown import bullets, coded, plain, table
from fedtune.privacy.statement.words import left_out
from fedtune.runs.summary import human_bytes

__all__ = ["adapter_card", "base_of", "data_card", "model_card"]

# What the embedded packages hold, by its name on the hub.
_ON_THE_HUB = {"embedded:minilm": "sentence-transformers/all-MiniLM-L6-v2"}


def base_of(model: ModelConfig) -> dict[str, Any]:
    """The base as export.json names it: a hub name, or what it is called where it is a folder."""
    embedded = EMBEDDED.get(model.name)
    local = embedded is None and (
        model.name.startswith((".", "/", "~")) or Path(model.name).expanduser().is_dir()
    )
    return {
        "name": Path(model.name).name if local else _ON_THE_HUB.get(model.name, model.name),
        "hub": not local,
        "package": None if embedded is None else embedded[0].replace("_", "-"),
        "revision": model.revision,
        "quantization": model.quantization,
    }


def model_card(record: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """README.md of an export, from the published record and what export.json says."""
    facts = statement_json(record)
    parts = [
        _hub_block(record, about),
        f"# Text classifier: {_labels(about['labels'])}",
        f"Says of {'a pair of texts' if about.get('pairs') else 'a text'} which of {len(about['labels'])} "
        "labels it has. Trained by "
        f"{record['federation']['nodes']} nodes of a federation with "
        f"fedtune {record['run']['versions'].get('fedtune', '')}: each kept its texts. Run "
        f"{coded(about['run'])}.",
        *_whose(about),
        "## How to load it",
        *_loading(about),
        "## What was promised to the people in the data",
        _promise(record, facts),
        *[f"**Caution.** {text}" for text in facts["cautions"]],
        "[The whole statement](statement.md) says what is covered and what is not.",
        "## How right it is",
        *_quality(record, about),
        "## The formats, and how they were checked",
        *_formats(about),
        "## How it was made",
        bullets(_making(record, about)),
        "## What it is for, and what not",
        bullets(_limits(record, about)),
        "## Files",
        "`export.json` says all of this for programs, [DATA.md](DATA.md) what it was trained on. "
        "`sha256sum -c SHA256SUMS` tells whether a file was cut short or changed; `fedtune evaluate` and "
        "`fedtune serve` refuse a folder whose files are not those.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_FILM, _TALK = '"what a wonderful film"', '"a man is talking"'
# What is asked in the lines of the card: by the pipeline, by the tokenizer, by the `tokenizers` library.
_EXAMPLES = {
    False: (_FILM, f"[{_FILM}]", _FILM),
    True: (
        f'{{"text": {_FILM}, "text_pair": {_TALK}}}',
        f"[{_FILM}], [{_TALK}]",
        f"({_FILM}, {_TALK})",
    ),
}


def _whose(about: Mapping[str, Any]) -> list[str]:
    """Of a site's own model: whose it is, and what that means for the promise."""
    if about.get("site") is None:
        return []
    site = plain(about["site"])
    return [
        f"**This is the model of {site} alone**: the federation's common one, with a part that was moved by "
        f"the releases of {site} itself and that no other site has. Epsilon below covers the people of "
        f"{site} too, since the part is made of charged releases alone; but the site never handed it to the "
        "federation, so to hand on this folder is for the site to decide."
    ]


def _hub_block(record: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    metrics, data = record["metrics"], record["config"]["data"]
    data_name = one_line(record["data"]["name"])
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "license": "unknown",
        "tags": [
            "text-classification",
            "federated-learning",
            "differential-privacy",
            "fedtune",
            "custom_code",
        ],
    }
    if about["base"]["hub"]:
        values |= {"base_model": one_line(about["base"]["name"]), "base_model_relation": "finetune"}
    if data["source"] == "hub":
        values["datasets"] = [data_name]
    if metrics["accuracy"] is not None:
        measured = [
            {"type": kind, "value": round(metrics[field], 4)}
            for kind, field in (("accuracy", "accuracy"), ("f1", "f1_macro"))
            if metrics[field] is not None
        ]
        task = {"type": "text-classification"}
        dataset = {"name": data_name, "type": data_name}
        values["model-index"] = [
            {"name": "fedtune", "results": [{"task": task, "dataset": dataset, "metrics": measured}]}
        ]
    # JSON is YAML, and quotes whatever a printable name may hold.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _loading(about: Mapping[str, Any]) -> list[str]:
    one, some, pair = _EXAMPLES[bool(about.get("pairs"))]
    parts = [
        f"Put the folder's place for `FOLDER`. Texts are cut to {about['max_length']} tokens, as in "
        "training: `truncation=True` does that." + _windows(about)
    ]
    if "hf" in about["formats"]:
        parts += [
            "**transformers.** This model takes the mean over a text's tokens, which is no part of "
            "transformers' own classes, so the folder ships `modeling_fedtune.py`, a short file to be "
            "read first, and `trust_remote_code=True` says that it may be run. fedtune is not needed: "
            "`pip install torch transformers`.",
            _code(
                "from transformers import pipeline\n\n"
                'classify = pipeline("text-classification", model="FOLDER", trust_remote_code=True)\n'
                f"print(classify([{one}], truncation=True))"
            ),
            "Or, for logits:",
            _code(
                "import torch\n"
                "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
                'tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)\n'
                'model = AutoModelForSequenceClassification.from_pretrained("FOLDER", '
                "trust_remote_code=True)\n"
                f"batch = tokenizer({some}, truncation=True, padding=True, "
                'return_tensors="pt")\n'
                "with torch.inference_mode():\n"
                "    logits = model(**batch).logits\n"
                "print([model.config.id2label[i] for i in logits.argmax(-1).tolist()])"
            ),
        ]
    if any(name.startswith("onnx") for name in about["formats"]):
        files = {"onnx-int8": "model_int8.onnx", "onnx-int8-static": "model_int8_static.onnx"}
        name = next((file for one, file in files.items() if one in about["formats"]), "model.onnx")
        types = "np.array([one.type_ids for one in encoded])" if about.get("pairs") else "mask * 0"
        zeros = f', "token_type_ids": {types}' if "token_type_ids" in about["inputs"] else ""
        parts += [
            "**onnxruntime**, without torch: `pip install onnxruntime tokenizers`.",
            _code(
                "import os\n\n"
                'os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # or it reports to its maker\n'
                "import numpy as np\n"
                "import onnxruntime\n"
                "from tokenizers import Tokenizer\n\n"
                f"labels = {list(about['labels'])!r}\n"
                'tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")\n'
                f"tokenizer.enable_truncation({about['max_length']})\n"
                f"tokenizer.enable_padding(pad_id={about['pad_id']})\n"
                f'session = onnxruntime.InferenceSession("FOLDER/onnx/{name}")\n'
                f"encoded = tokenizer.encode_batch([{pair}])\n"
                "ids = np.array([one.ids for one in encoded])\n"
                "mask = np.array([one.attention_mask for one in encoded])\n"
                f'(logits,) = session.run(None, {{"input_ids": ids, "attention_mask": mask{zeros}}})\n'
                "print([labels[i] for i in logits.argmax(-1)])"
            ),
        ]
    if "adapter" in about["formats"]:
        parts.append(
            "**The adapter alone**, onto a base of your own: see [adapter/README.md](adapter/README.md)."
        )
    return parts


def _windows(about: Mapping[str, Any]) -> str:
    """Of a model that sees a long text in windows."""
    if "window" not in about:
        return ""
    return (
        f" The model cuts one longer than {about['window']} tokens into windows of no more than that, as "
        "even as they can be, and takes the mean of their vectors."
    )


def adapter_card(about: Mapping[str, Any]) -> str:
    """README.md beside the bare adapter."""
    base = about["base"]
    package = base["package"]
    name = one_line(base["name"])
    where = json.dumps(name, ensure_ascii=False) if base["hub"] else f'"..."  # the folder of {name}'
    compressed = base["quantization"] != "none"
    figures = about["formats"]["adapter"]
    parts = [
        '---\nlibrary_name: peft\ntags: ["fedtune"]\n---',
        "# The adapter alone",
        f"What was trained, {human_bytes(figures['bytes'])}, in PEFT's format; it belongs onto "
        f"{coded(name)}"
        + (f", revision {coded(base['revision'])}" if base["revision"] else "")
        + ". `AutoPeftModelForSequenceClassification` cannot load it, since the model takes the mean over a "
        "text's tokens, which transformers' own classes do not; these lines do (`pip install torch "
        "transformers peft`; put this folder's place for `FOLDER`):",
        _code(
            "from peft import PeftModel\n"
            "from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification\n\n"
            f"base = {where}\n"
            'config = AutoConfig.from_pretrained("FOLDER", trust_remote_code=True)\n'
            "model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)\n"
            'model.encoder = AutoModel.from_pretrained(base, dtype="float32")\n'
            'model = PeftModel.from_pretrained(model, "FOLDER").eval()'
        ),
        f"Where no hub can be reached: the Python package `{package}` holds the base, in its folder `model`."
        if package
        else "",
        "The tokenizer is the base's, cut to " + str(about["max_length"]) + " tokens." + _windows(about),
        (
            f"It was trained on that base compressed to {base['quantization']}, and the lines above take "
            "it as it is published. So logits differ a little: on "
            + _asked(about)
            + f" {figures['labels_equal']:.1%} of the "
            "labels are those of the run's own model. The merged model beside it has the compressed "
            "base's numbers, and so all of its labels."
        )
        if compressed
        else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _promise(record: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    accounting, unit = facts["accounting"], facts["unit"]
    if accounting["epsilon"] is None or accounting["delta"] is None:
        return str(facts["summary"])
    return (
        f"{facts['summary']} **Epsilon {accounting['epsilon']:.4g} at delta {accounting['delta']:.3g}; unit: "
        f"{unit['name']} ({unit['meaning']}); adjacency: {facts['adjacency']}; trust model: "
        f"{facts['trust']['model']}.**"
    )


def _quality(record: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    metrics, quality = record["metrics"], about["quality"]
    if metrics["accuracy"] is None and quality is None:
        return ["Not known: nobody declared a test split public, and the nodes told no noised counts."]
    parts = []
    if metrics["accuracy"] is not None:
        noised = (metrics.get("evaluation") or {}).get("standard_error")
        how = (
            f"from noised counts that the nodes released (standard error of the noise {noised:.3f})"
            if noised
            else "measured without noise"
        )
        chance = metrics.get("majority_rate")
        always = f"; always saying the commonest label: {chance:.1%}" if chance is not None else ""
        parts.append(f"By the run's record: accuracy **{metrics['accuracy']:.1%}**, {how}{always}.")
    if quality is not None:
        parts.append(
            f"On {quality['num_records']:,} records of {about['check']['texts']}: accuracy "
            f"{quality['accuracy']:.1%}, macro F1 {quality['f1_macro']:.3f}, expected calibration error "
            f"{quality['calibration_error']:.3f}."
        )
        parts.append(
            table(
                ["class", "records", "precision", "recall", "F1"],
                [
                    [
                        plain(name),
                        f"{one['num_records']:,}",
                        *(_rate(one[rate]) for rate in ("precision", "recall", "f1")),
                    ]
                    for name, one in quality["per_class"].items()
                ],
            )
        )
    sites = (
        quality["per_site"] if quality is not None and quality["per_site"] else metrics.get("per_site") or {}
    )
    absent = left_out(record)
    rows = [
        [
            plain(name) + (" (took no part in training)" if name in absent else ""),
            _count(one.get("num_records")),
            _rate(one.get("accuracy")),
        ]
        for name, one in sites.items()
        if isinstance(one, Mapping)
    ]
    if rows:
        parts.append(table(["site", "records", "accuracy"], rows))
    return parts


def _formats(about: Mapping[str, Any]) -> list[str]:
    check = about["check"]
    rows = [
        [
            f"`{name}`",
            f"`{one['file']}`",
            human_bytes(one["bytes"]),
            f"{one['largest_difference']:.2g}",
            f"{one['labels_equal']:.2%}",
            _rate(one["accuracy"]),
        ]
        for name, one in about["formats"].items()
    ]
    parts = [
        f"Each was asked about {_asked(about)}, beside the model of the run as `fedtune predict` asks it; "
        f"a logit of `hf` and `onnx` may differ by {check['tolerance']:g} at most, or nothing is exported.",
        table(["format", "file", "size", "largest difference of a logit", "labels equal", "accuracy"], rows),
    ]
    eights = {
        name: about["formats"][name] for name in ("onnx-int8", "onnx-int8-static") if name in about["formats"]
    }
    for name, eight in eights.items():
        if eight["labels_equal"] < check["labels_equal_asked"]:
            parts.append(
                f"**`{name}` keeps {eight['labels_equal']:.2%} of the labels, less than the "
                f"{check['labels_equal_asked']:.0%} that are asked for.** Use `onnx` where that matters."
            )
        if "calibrated_on" in eight:
            parts.append(
                f"`{name}` has fixed ranges, taken from {plain(eight['calibrated_on'])}. Texts of another "
                "kind may lie outside of them."
            )
    if eights:
        names = " and ".join(f"`{name}`" for name in eights)
        were = "was" if len(eights) == 1 else "were"
        parts.append(
            f"{names} {were} checked on a processor with {check['processor']}. On an x86 without VNNI "
            "large products saturate: run `fedtune evaluate` there before you rely on it."
        )
    return parts


def _making(record: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    base, adapter, model = about["base"], record["config"]["adapter"], record["config"]["model"]
    layers = "all layers" if adapter["layers"] is None else f"the top {adapter['layers']} layers"
    where = "" if adapter["name"] == "head" else f", in {layers}"
    compressed = (
        "" if base["quantization"] == "none" else f", compressed to {base['quantization']} while training"
    )
    revision = f", revision {coded(base['revision'])}" if base["revision"] else ""
    return [
        f"Base: {coded(base['name'])}{revision}, frozen{compressed}; {model['pooling']} pooling.",
        f"Trained: adapter `{adapter['name']}`{where}; {record['cost']['num_parameters']:,} numbers."
        if record["cost"].get("num_parameters")
        else f"Trained: adapter `{adapter['name']}`{where}.",
        f"How: {record['federation'].get('recipe') or 'see the statement'}.",
        f"Privacy: {record['privacy']['mechanism']}.",
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in record["run"]["versions"].items())
        + ".",
    ]


def _limits(record: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    return [
        f"For {'pairs of texts' if about.get('pairs') else 'texts'} like those of "
        f"{plain(record['data']['name'])}, one at a time, with the labels "
        f"{_labels(about['labels'])}. It always says one of them, whatever the text.",
        f"It looks at the first {about['max_length']} tokens of a text and at nothing after them.",
        "Not for decisions about a person without a human who looks at the text. Nobody has tested it for "
        "fairness between groups; the table by site shows what differs between kinds of texts.",
        "What the base learnt from its own training data, its mistakes among it, is still in it, and no "
        "epsilon covers it.",
        "Licence, language and who is responsible are not in the run's record: fill them in before you "
        "publish, and look at the licences of the base and of the data.",
    ]


def data_card(record: Mapping[str, Any]) -> str:
    """DATA.md: what the model was trained on, as far as it is public."""
    data, config, privacy = record["data"], record["config"]["data"], record["privacy"]
    sizes = data.get("declared_sizes") or {}
    units = f"{privacy['unit']}s" if privacy["unit"] != "record" else "records"
    lines = [
        f"Name: {coded(data['name'])}, read as `data={config['source']}`.",
        _how_private(record),
        f"Labels: {_labels(data['labels'])}"
        + (
            " (declared)." if data.get("labels_declared") else " (taken from the records; see the statement)."
        ),
        f"Unit of privacy: {privacy['unit']}; {privacy['adjacency']}.",
        f"Texts are cut to {config['max_length']} tokens."
        if config.get("long_text", "cut") == "cut"
        else f"Texts are seen in up to {config['max_windows']} windows of {config['max_length']} tokens.",
        _testing(record),
    ]
    if start := data.get("public_start"):
        lines.append(
            f"Before that: {start['texts']:,} labelled texts that whoever started the run declared public "
            f"(SHA-256 of their file: {start['digest'][:16]}). They were learnt from without noise."
        )
    parts = [
        "# Data card",
        "What the model of this folder was trained on, by what is public of it.",
        bullets(lines),
    ]
    if sizes:
        parts += [
            f"Sizes, as their owners declared them (or told them with noise), in {units}:",
            table(["node", units], [[plain(name), f"{int(size):,}"] for name, size in sizes.items()]),
        ]
    if config["source"] == "opinions":
        parts.append(
            "Source: C. Hutto and E. Gilbert, VADER: a parsimonious rule-based model for sentiment "
            "analysis of social media text, ICWSM 2014: English movie reviews, product reviews, newspaper "
            "editorials and tweets, each rated by 20 people. `positive` is a mean rating above zero."
        )
    parts.append(
        "Not in the run's record, and for whoever publishes this to say: how the texts were collected, "
        "who wrote them, in which languages, under which licence, and with whose consent."
    )
    return "\n\n".join(parts) + "\n"


def _how_private(record: Mapping[str, Any]) -> str:
    data = record["data"]
    if data.get("public"):
        return "Its owner declared it public."
    if not adds_noise(record["privacy"]["trust"]):
        return "It is private, and the model was trained on it without noise: treat this folder as the data."
    but = "" if data.get("labels_declared") else " and the names of the labels"
    return (
        "It is private: its texts stay with the nodes, and nothing here was computed from them but what was "
        f"noised and charged{but}."
    )


def _testing(record: Mapping[str, Any]) -> str:
    tested = record["data"].get("test_records")
    if record["metrics"]["accuracy"] is None:
        return "Nothing of it was used to say how right the model is."
    if (record["metrics"].get("evaluation") or {}).get("data") == "public" and tested:
        config = record["config"]
        # Compared where persons are named and all of the data was at one place.
        named = config["data"].get("unit") is not None or config["data"]["source"] == "opinions"
        apart = named and record["run"]["engine"] != "deployment"
        shared = "that share no person with the training data" if apart else "(persons were not compared)"
        return f"Tested on {tested:,} public records {shared}."
    return f"Tested: {record['privacy'].get('evaluation_data') or 'see the statement'}."


def _asked(about: Mapping[str, Any]) -> str:
    check = about["check"]
    return f"{check['num_texts']:,} texts ({check['texts']})"


def _labels(names: Sequence[object]) -> str:
    return ", ".join(map(plain, names))


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _code(lines: str) -> str:
    return f"```python\n{lines}\n```"
