"""Whether an encoder is what its folder says: checked before transformers reads it, and by what it loaded.

transformers makes up what it does not find: weights under names that it does not know stay random, a missing
tokenizer becomes one of five tokens, an attention mask of the wrong kind is taken for granted. It says so in
a log that nobody reads, or nowhere. Here each is a refusal that names the file, the weights and the way out.

Weights under a common prefix (`module.`, as DataParallel saves them) are found where exactly one prefix fits
every weight of the encoder.

Nothing that a folder or a hub brings is run: neither its own modelling code (`trust_remote_code` is off,
always), nor a pickle, unless `model.pickle` asks for it; and then by torch's reader that takes weights alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.models.families import FAMILIES
from fedtune.models.weight_files import BODY, refuse_pointer, some_of

__all__ = [
    "check_finite",
    "check_folder",
    "check_kind",
    "check_output",
    "check_report",
    "check_size",
    "check_special_tokens",
    "check_tokenizer",
    "check_type",
    "check_vocabulary",
    "computation_of",
    "digest_of",
    "prefix_of",
]

_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model",
               "spiece.model", "spm.model")  # fmt: skip
_BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SIZES = {  # the largest of each that is believed
    "vocab_size": 10_000_000,
    "hidden_size": 20_000,
    "num_hidden_layers": 500,
    "num_attention_heads": 1_000,
    "intermediate_size": 100_000,
    "max_position_embeddings": 1_000_000,
    "embedding_size": 20_000,
    "num_hidden_groups": 500,
}
# What is computed with the weights follows from these settings too. As of a plain BERT they are not named.
_COMPUTED: dict[str, Any] = {
    "model_type": "bert", "num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "pad_token_id": 0, "activation": None, "hidden_activation": None, "norm_eps": None,
    "num_hidden_groups": None, "inner_group_num": None, "local_attention": None,
    "global_attn_every_n_layers": None, "relative_attention": None, "max_relative_positions": None,
    "position_buckets": None, "pos_att_type": None, "share_att_key": None, "norm_rel_ebd": None,
    "conv_act": None,
}  # fmt: skip


def check_folder(folder: Path, name: str) -> None:
    """Checks that a folder may be a model's, by its configuration.

    Args:
        folder: `name` as a path.
        name: `model.name`, for messages; in those below too.

    Raises:
        ModelError: config.json is missing, a pointer to another file, or unreadable.
    """
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"The folder {folder} (model.name) holds an adapter (adapter_config.json) and no encoder: an "
                "adapter trains on top of one. Name the encoder's own folder, or merge the two with PEFT's "
                "merge_and_unload and save_pretrained."
            )
        raise ModelError(
            f"The folder {folder} (model.name) has no config.json, so it is no model. It should hold "
            "config.json, model.safetensors and tokenizer.json, as transformers' save_pretrained writes them."
        )
    refuse_pointer(config, name)
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{config} is not JSON, so model.name={name} cannot be loaded. Copy it again."
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{config} is no configuration of a model, which is a JSON object. Copy it again.")


def check_type(folder: Path) -> None:
    """Checks that a folder's configuration, read by `check_folder` before, names a family that fedtune runs.

    Raises:
        ModelError: it names another one.
    """
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "bert")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _other_family(kind)


def _other_family(kind: Any) -> ModelError:
    return ModelError(
        f"The model is of type {kind!r}, and fedtune adapts encoders of these families: "
        f"{', '.join(FAMILIES)}."
    )


def check_vocabulary(folder: Path, name: str) -> None:
    """Checks that a folder has files of a tokenizer.

    Raises:
        ModelError: there is none, or it is empty or a pointer to another file.
    """
    there = [folder / file for file in _TOKENIZERS if (folder / file).is_file()]
    if not there:
        raise ModelError(
            f"The folder {folder} (model.name) has no tokenizer: neither tokenizer.json nor a vocabulary "
            "(vocab.txt, vocab.json, sentencepiece.bpe.model). Without one every word would be unknown. Copy "
            "it from where the model is from, or write it there: tokenizer.save_pretrained(FOLDER)."
        )
    for path in (*there, *(folder / file for file in _BESIDE if (folder / file).is_file())):
        refuse_pointer(path, name)
        if path.stat().st_size == 0:
            raise ModelError(
                f"{path} is empty (0 bytes), so the tokenizer of model.name={name} is not whole. Copy it "
                "again."
            )


def check_kind(config: Any, name: str) -> None:
    """Checks that a configuration of transformers' is one of an encoder that fedtune runs as it is.

    Raises:
        ModelError: it is of another family, a decoder, compressed already, or says what no encoder has.
    """
    import transformers
    from transformers.activations import ACT2FN

    if config.model_type not in FAMILIES:
        raise _other_family(config.model_type)
    for key in ("is_decoder", "add_cross_attention"):
        if getattr(config, key, False):
            raise ModelError(
                f"The model {name!r} is a decoder: its config.json says {key}=true. There each token sees "
                "the ones before it alone, and fedtune runs encoders, in which every token sees all. Name an "
                f'encoder; or, if it was trained as one, write "{key}": false into its config.json.'
            )
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"The model {name!r} is stored compressed (quantization_config in its config.json). Name the "
            "model that it was made from: fedtune compresses by itself, as model.quantization says."
        )
    for key in ("hidden_act", "activation", "hidden_activation"):
        if (used := getattr(config, key, "gelu")) not in ACT2FN:
            raise ModelError(
                f"config.json of the model {name!r} says {key}={used!r}, which transformers "
                f"{transformers.__version__} has no function for. Copy it again from where the model is from."
            )
    padding, tokens = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if padding is not None and isinstance(tokens, int) and not 0 <= padding < tokens:
        raise ModelError(
            f"config.json of the model {name!r} says pad_token_id={padding}, and its tokens are those "
            f"from 0 to {tokens - 1}. Copy it again from where the model is from."
        )


def check_size(config: Any, folder: Path, name: str) -> None:
    """Checks that a folder's weights can be those that its configuration describes, before they are loaded.

    Raises:
        ModelError: a size in config.json is no size, or there are more weights than the files have bytes.
    """
    sizes = {}
    for key, most in _SIZES.items():
        value = getattr(config, key, 1)
        if type(value) is not int or not 0 < value <= most:
            raise ModelError(
                f"config.json of the model {name!r} says {key}={value!r}, which is no size of an encoder "
                f"(a whole number from 1 to {most}). Copy it again from where the model is from."
            )
        sizes[key] = value
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layers = getattr(config, "num_hidden_groups", sizes["num_hidden_layers"])  # ALBERT's share their weights
    tokens = sizes["vocab_size"] + sizes["max_position_embeddings"]
    weights = tokens * getattr(config, "embedding_size", width)
    weights += layers * (4 * width * width + 2 * width * inner)
    held = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if weights > held:
        raise ModelError(
            f"config.json of the model {name!r} describes an encoder of {weights} weights, and its files "
            f"have {held} bytes. Copy config.json and the weights from the same model."
        )


def prefix_of(report: Mapping[str, Any]) -> str | None:
    """The one prefix under which all weights of the encoder lie that transformers did not find.

    None if there is no such prefix, or several.

    Args:
        report: transformers' loading report (`missing_keys`, `unexpected_keys`).
    """
    missing = [key for key in report["missing_keys"] if not _of_pooler(key)]
    if not missing:
        return None
    there = {_modern(key) for key in report["unexpected_keys"]}
    last = missing[0]
    prefixes = {key[: -len(last)] for key in there if key.endswith("." + last)}
    fitting = [prefix for prefix in prefixes if all(prefix + key in there for key in missing)]
    return fitting[0] if len(fitting) == 1 else None


def check_report(report: Mapping[str, Any], name: str) -> None:
    """Checks that every weight of the encoder came from its file, and that the file has no more of them.

    Heads of other tasks, and the pooler, which fedtune does not use, may be there or not.

    Raises:
        ModelError: with the names, their number and their shapes.
    """
    missing = [key for key in report["missing_keys"] if not _of_pooler(key)]
    unexpected = [key for key in report["unexpected_keys"] if BODY.search(key) and not _of_pooler(key)]
    mismatched = {
        key: (there, asked) for key, there, asked in report["mismatched_keys"] if not _of_pooler(key)
    }
    if mismatched:
        key = min(mismatched)
        there, asked = (list(shape) for shape in mismatched[key])
        raise ModelError(
            f"The weights of the model {name!r} do not fit its config.json: {key} is {there} in the file and "
            f"{asked} by config.json{_more(len(mismatched) - 1, 'weight')}. Copy config.json and the weights "
            "from the same model."
        )
    if missing:
        others = f" The file has {some_of(unexpected)} instead." if unexpected else ""
        raise ModelError(
            f"The model {name!r} lacks {len(missing)} weights of its encoder, which would be random: "
            f"{some_of(missing)}.{others} Name the folder that the encoder was saved in, with all of its "
            "weights under the names that transformers gives them (save_pretrained)."
        )
    if unexpected:
        raise ModelError(
            f"The weights of the model {name!r} are not those of its config.json: the file also has "
            f"{len(unexpected)} weights of an encoder that config.json does not speak of, "
            f"{some_of(unexpected)}. They would be left out. Copy config.json and the weights from the same "
            "model."
        )


def check_finite(model: nn.Module, name: str) -> None:
    """Checks that no weight is NaN or infinite, and that words have embeddings at all.

    Raises:
        ModelError: some are, with their names; or all embeddings are zero.
    """
    wrong = [key for key, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise ModelError(
            f"The model {name!r} holds NaN or infinity in {len(wrong)} of its weights: {some_of(wrong)}. It "
            "was saved after a training that failed, or damaged. Take another copy of it."
        )
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if not bool(table.any()):
        raise ModelError(
            f"The model {name!r} has zeros for all of its embeddings of words, so that all texts are the "
            "same to it: its file was made and never filled. Take another copy of it."
        )


def check_output(stack: Any, name: str) -> None:
    """Checks that an encoder makes finite numbers of two texts, and not the same ones of both.

    Weights may be finite, and what is computed with them not: they are too large, or a setting in config.json
    (layer_norm_eps) is no number that one divides by.

    Args:
        stack: the `EncoderStack`, before it is compressed.
        name: of the model.

    Raises:
        ModelError: it does not.
    """
    rows = int(stack.config.vocab_size)
    ids = torch.arange(6).view(2, 3) % rows
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        one, other = stack.run(stack.embed(ids, mask), mask, 0, len(stack.layer))
    if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        raise ModelError(
            f"The model {name!r} makes NaN or infinity of a text, though each of its weights is a number: "
            "they are too large, or config.json has another layer_norm_eps than they were trained with. Copy "
            "config.json and the weights from where the model is from."
        )
    if bool((one - other).abs().max() <= 1e-6 * one.abs().max()):
        raise ModelError(
            f"The model {name!r} makes the same of every text: its weights are almost zero, or config.json "
            "has another layer_norm_eps than they were trained with. Copy config.json and the weights from "
            "where the model is from."
        )


def check_tokenizer(tokenizer: Any, rows: int, name: str) -> None:
    """Checks that a tokenizer has words, and the encoder an embedding for each of its tokens.

    Args:
        tokenizer: of transformers.
        rows: of the encoder's embedding.
        name: of the model.

    Raises:
        ModelError: it has none, or more tokens than that.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    try:
        tokenizer("a \U0001f47e")  # has what is in no vocabulary
    except Exception as error:  # the library raises what it likes
        raise ModelError(
            f"The tokenizer of the model {name!r} fails at a word that it does not know "
            f"({str(error).rstrip('.')}). Copy its files from where the model is from."
        ) from error
    if not set(vocabulary) - set(tokenizer.all_special_tokens):
        raise ModelError(
            f"The tokenizer of the model {name!r} knows no words, only {len(vocabulary)} special tokens: its "
            "vocabulary is missing or empty. Copy tokenizer.json from where the model is from, or write it "
            "there: tokenizer.save_pretrained(FOLDER)."
        )
    largest = max(vocabulary.values())
    if largest >= rows:
        beyond = sorted(
            (token for token, number in vocabulary.items() if number >= rows), key=vocabulary.__getitem__
        )
        raise ModelError(
            f"The tokenizer of the model {name!r} has {largest + 1} tokens, and the encoder has embeddings "
            f"for {rows}: {some_of(beyond)} would have none. If tokens were added, save the encoder after "
            f"resize_token_embeddings({largest + 1}); else take the tokenizer that the encoder was saved "
            "with."
        )


def check_special_tokens(folder: Path, tokenizer: Any, name: str) -> None:
    """Checks that a list of words by lines, which nothing else numbers, has the tokens around each text.

    transformers adds those that it does not find at the end: after a line that is missing each word would
    have the number, and so the embedding, of another one.

    Raises:
        ModelError: some are missing.
    """
    path = folder / "vocab.txt"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return
    lines = set(path.read_text(encoding="utf-8").splitlines())
    around = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token)
    if missing := [token for token in around if token is not None and token not in lines]:
        raise ModelError(
            f"{path} has no line {' and no line '.join(missing)}, which the tokenizer of model.name={name} "
            "needs: lines are missing or changed in it, and each word would have the number of another. Copy "
            "it again, with tokenizer.json, from where the model is from."
        )


def computation_of(config: Any) -> str:
    """What of a configuration changes what is computed with the same weights; empty of a plain BERT."""
    found = {key: getattr(config, key, None) for key in _COMPUTED}
    told = {key: worth for key, worth in found.items() if worth not in (None, _COMPUTED[key])}
    if "num_hidden_groups" in told:  # weights are shared, and do not tell how often they are used
        told["num_hidden_layers"] = config.num_hidden_layers
    return json.dumps(told, sort_keys=True) if told else ""


def digest_of(model: nn.Module, tokenizer_id: str) -> str:
    """SHA-256 of the encoder as it was loaded, before it is compressed, and of its tokenizer: 64 hex digits.

    The same on every machine for the same weights and the same computation, wherever they lie.
    """
    digest = hashlib.sha256(f"fedtune encoder 1|{tokenizer_id}{computation_of(model.config)}".encode())
    for key, value in sorted(model.named_parameters()):
        if not _of_pooler(key):
            digest.update(f"|{key}{list(value.shape)}|".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_pooler(key: str) -> bool:
    return "pooler." in key


def _modern(key: str) -> str:
    """The name of a weight as it is today: early BERTs called a norm's two gamma and beta."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", key))


def _more(count: int, what: str) -> str:
    return f", and {count} more {what}{'s' if count > 1 else ''} do not" if count else ""
