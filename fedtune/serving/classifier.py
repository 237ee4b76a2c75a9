"""Logits of texts by an exported model, in whichever format: onnxruntime, or torch.

Texts are tokenised by the `tokenizers` library from the folder's tokenizer.json, cut as in training, sorted
by length and run in batches of few padded tokens; what a text gets does not depend on the others beside it,
up to the last bits of float32 sums.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError, ModelError
from fedtune.models.onnx_base import Constants, share
from fedtune.serving.bundle import Bundle

if TYPE_CHECKING:
    from fedtune.runs.predict import Asked

__all__ = [
    "BATCH_TOKENS",
    "Classifier",
    "Forward",
    "feed",
    "onnx_forward",
    "onnx_forwards",
    "onnx_session",
    "padded",
    "probabilities",
    "segments",
    "token_batches",
    "torch_forward",
]

# Measured on two cores with AVX512 and VNNI, in int8 and in float32 alike: a batch by itself costs about as
# much as seven tokens, and a token the same in a batch of 500 as in one of 2,000. So batches are small, which
# is better for whoever waits, and texts of unlike lengths are not padded to one.
BATCH_TOKENS = 512
_MOST_PADDING = 12
# onnxruntime 1.32 makes one kernel of an addition and the layer norm after it, which takes four times as long
# as the two do (11.7 ms of 67 in the default model's int8, 512 tokens, AVX512).
_SLOWER = ["SkipLayerNormFusion"]
# Token ids int64 [b, s] and their mask int64 [b, s] -> logits float32 [b, c].
Forward = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]


@dataclass(frozen=True)
class Classifier:
    """A tokenizer and a model.

    Attributes:
        labels: names, in the order of the classes.
        tokenizer: of the `tokenizers` library, which cuts.
        forward: the model.
        pad_id: the token that fills up.
    """

    labels: tuple[str, ...]
    tokenizer: Any
    forward: Forward
    pad_id: int

    @classmethod
    def open(cls, bundle: Bundle, wanted: str | None = None, threads: int = 0) -> Classifier:
        """The model of `bundle` in the format `wanted`; None: the fastest that is there.

        Args:
            threads: of the model itself; 0: as many as there are cores.

        Raises:
            ConfigError: there is no such format, or onnxruntime is not installed.
            ModelError: a file cannot be read.
        """
        (model,) = cls.open_all([bundle], wanted, threads)
        return model

    @classmethod
    def open_all(
        cls, bundles: Sequence[Bundle], wanted: str | None = None, threads: int = 0
    ) -> list[Classifier]:
        """The models of several bundles; adapters over one base share it. As `open` otherwise."""
        names = [bundle.chosen(wanted) for bundle in bundles]
        forwards: dict[int, Forward] = {}
        for name in sorted(set(names)):
            places = [place for place, other in enumerate(names) if other == name]
            if name == "hf":
                made = [_hf_forward(bundles[place].folder, bundles[place].separator) for place in places]
            else:
                paths = [bundles[place].path(name) for place in places]
                made = onnx_forwards(paths, threads, [bundles[place].separator for place in places])
            forwards.update(zip(places, made, strict=True))
        models = [
            cls(
                bundle.labels,
                read_tokenizer(bundle.folder, bundle.max_length),
                forwards[place],
                bundle.about["pad_id"],
            )
            for place, bundle in enumerate(bundles)
        ]
        for model, bundle, name in zip(models, bundles, names, strict=True):
            model._try(bundle.path(name), ("a", "b") if bundle.pairs else "a")
        return models

    def _try(self, path: Path, question: Asked) -> None:
        """Asks the model in `path` one `question`: one that cannot answer is refused before it is used.

        Raises:
            ModelError: it fails, or its answer is none about the labels of its folder.
        """
        try:
            ids, mask = padded(self.encode([question]), self.pad_id)
            answer = self.forward(ids, mask)
        except Exception as error:  # of onnxruntime or torch, which have no common base
            raise ModelError(
                f"{path} cannot be asked: {' '.join(str(error).split())[:300]}. Copy the folder again from "
                "where it came from, or export the run again."
            ) from error
        if answer.shape != (1, len(self.labels)):
            raise ModelError(
                f"{path} is no classifier of the {len(self.labels)} labels of its folder: of one text it "
                f"says {list(answer.shape)} numbers where [1, {len(self.labels)}] are needed. It is a model "
                "of another task or of other labels: export its own run."
            )
        if not np.isfinite(answer).all():
            raise ModelError(
                f"{path} says numbers that are none (NaN or infinity): its weights are damaged. Copy the "
                "folder again, or export the run again."
            )

    def encode(self, texts: Sequence[Asked]) -> list[list[int]]:
        """Token ids of each text, or of each pair, cut."""
        return [one.ids for one in self.tokenizer.encode_batch(list(texts))]

    def logits(
        self, ids: Sequence[Sequence[int]], advance: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Logits, float32 [n, c], of n texts' token ids; `advance` is told how many more are done."""
        found = np.zeros((len(ids), len(self.labels)), dtype=np.float32)
        for rows in token_batches([len(one) for one in ids], BATCH_TOKENS, _MOST_PADDING):
            found[rows] = self.forward(*padded([ids[row] for row in rows], self.pad_id))
            if advance is not None:
                advance(len(rows))
        return found


def padded(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids of b texts, filled up to the longest, and their mask: both int64 [b, s]."""
    longest = max(map(len, ids))
    tokens = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.int64)
    for place, one in enumerate(ids):
        tokens[place, : len(one)] = one
        mask[place, : len(one)] = 1
    return tokens, mask


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the last axis, in float64 between."""
    raised = np.exp(logits.astype(float) - logits.max(-1, keepdims=True))
    return (raised / raised.sum(-1, keepdims=True)).astype(np.float32)


def token_batches(
    lengths: Sequence[int], max_tokens: int, max_padding: float = math.inf
) -> Iterator[list[int]]:
    """Positions of `lengths`, longest first, cut into batches.

    Args:
        max_tokens: of a batch, padding included; one text may have more.
        max_padding: tokens of it that are padding.
    """
    batch, longest, padding = list[int](), 0, 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        more = longest - lengths[place]
        if batch and ((len(batch) + 1) * longest > max_tokens or padding + more > max_padding):
            yield batch
            batch, padding = [], 0
        if not batch:
            longest, more = lengths[place], 0
        batch.append(place)
        padding += more
    if batch:
        yield batch


def read_tokenizer(folder: Path, max_length: int) -> Any:
    """The folder's tokenizer, which cuts to `max_length` tokens and does not pad.

    Raises:
        ModelError: it cannot be read.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} is no tokenizer: {error}. Export the run again.") from error
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return tokenizer


def onnx_forward(path: Path, threads: int = 0, separator: int | None = None) -> Forward:
    """The ONNX file `path` in onnxruntime, on the processor; `separator`: as of `segments`.

    Raises:
        ConfigError: onnxruntime is not installed.
        ModelError: it cannot read the file.
    """
    return _session(str(path), path, threads)({}, separator)


def onnx_forwards(
    paths: Sequence[Path], threads: int = 0, separators: Sequence[int | None] | None = None
) -> list[Forward]:
    """Several ONNX files; if they are adapters over one base, they share one session and one copy of it.

    Args:
        paths: of the files.
        threads: of onnxruntime; 0: as many as there are cores.
        separators: of each file as of `segments`; None: none has any.

    Raises:
        ConfigError: onnxruntime is not installed.
        ModelError: it cannot read a file.
    """
    ends = separators or [None] * len(paths)
    try:
        shared = share(paths) if len(paths) > 1 else None
    except ImportError:  # onnx is for making files: a service may lack it
        shared = None
    if shared is None:
        return [onnx_forward(path, threads, one) for path, one in zip(paths, ends, strict=True)]
    base, constants = shared
    with_constants = _session(base, paths[0], threads)
    return [with_constants(one, end) for one, end in zip(constants, ends, strict=True)]


def onnx_session(model: str | bytes, path: Path, threads: int) -> Any:
    """onnxruntime's session of `model`, a file's name or content, which is called `path` in errors.

    Raises:
        ConfigError: onnxruntime is not installed.
        ModelError: it cannot read the model.
    """
    # It reports home by default; it reads this when it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "An ONNX file needs onnxruntime, which this Python lacks. Install it with "
            "`pip install onnxruntime`, or use transformers' format: --format hf."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOWER
        )
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ModelError(f"onnxruntime cannot read {path}: {' '.join(str(error).split())[:300]}") from error


def segments(ids: NDArray[np.int64], mask: NDArray[np.int64], separator: int | None) -> NDArray[np.int64]:
    """Which segment each token of `ids` [b, s] is of: 1 after the first `separator`, where a pair's second
    text begins; 0 everywhere if that is None. As in training (`fedtune.models.encoder`)."""
    if separator is None:
        return np.zeros_like(ids)
    ends = (ids == separator).astype(np.int64)
    return np.minimum(ends.cumsum(axis=1) - ends, 1) * mask


def feed(
    names: Sequence[str],
    ids: NDArray[np.int64],
    mask: NDArray[np.int64],
    constants: Constants,
    separator: int | None = None,
) -> dict[str, Any]:
    """What a session with the inputs `names` is given."""
    given = {"input_ids": ids, "attention_mask": mask, **constants}
    return {name: given[name] if name in given else segments(ids, mask, separator) for name in names}


def _session(model: str | bytes, path: Path, threads: int) -> Callable[[Constants, int | None], Forward]:
    """A session as `onnx_session`; what asks it with constants that are inputs of it."""
    session = onnx_session(model, path, threads)
    names = [one.name for one in session.get_inputs()]

    def with_constants(constants: Constants, separator: int | None) -> Forward:
        def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = session.run(None, feed(names, ids, mask, constants, separator))[0]
            return logits

        return forward

    return with_constants


def torch_forward(module: Any, separator: int | None = None) -> Forward:
    """A torch module that takes input_ids and attention_mask, and gives logits or an object with them.

    With a `separator` (as of `segments`) it takes token_type_ids too.
    """
    import torch

    def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            if separator is not None:
                given["token_type_ids"] = torch.from_numpy(segments(ids, mask, separator))
            found = module(**given)
            logits: NDArray[np.float32] = getattr(found, "logits", found).float().numpy()
            return logits

    return forward


def _hf_forward(folder: Path, separator: int | None) -> Forward:
    from fedtune.models.standalone import load_merged

    return torch_forward(load_merged(folder), separator)
