"""The one data set and the one model that a process holds, for all nodes and the server in it.

In the local engine a hundred nodes and the server live in one process; each node's Shard is an index
into one tokenized corpus, and one Encoder serves all, because only the adapter differs and that is
loaded before each use. So memory does not grow with the number of nodes. `using_model` holds a lock:
whoever has the model has it alone.

A node that hangs may hold the model for ever. `forget` leaves it with the hanging thread: the next
user gets a new lock and a freshly loaded model, and what the lost thread still does reaches nobody.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedtune.config.choices import resolved
from fedtune.config.schema import AdapterConfig, Config
from fedtune.errors import ModelError

if TYPE_CHECKING:
    from fedtune.data.corpus import TokenizedCorpus
    from fedtune.data.prepare import PreparedData
    from fedtune.data.public_texts import PublicTexts
    from fedtune.models.classifier import AdaptedModel
    from fedtune.models.frozen_outputs import Progress
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["RunResources", "TrainingUsage", "config_of", "forget", "run_resources", "training_usage"]


class TrainingUsage:
    """What this process measured of its own training; never sent, since it depends on the drawn examples."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.seconds = 0.0
        self.flops = 0

    def add(self, seconds: float, flops: int) -> None:
        """Adds one local training."""
        with self._lock:
            self.seconds += seconds
            self.flops += flops


training_usage = TrainingUsage()


class _Slot:
    """A model and the lock that goes with it. A hung thread keeps its slot; everyone else gets a new one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.key: str | None = None
        self.model: Any = None
        self.bare_head: Any = None  # over the same encoder, frozen: for rounds that train the head alone


_slots = [_Slot()]  # one element, replaced by `forget`


_MOST_READ = 8  # configurations that a process remembers
# By identity: what `config_of` made, which nobody changes, with its key; nodes ask for it in every message.
_read: dict[int, tuple[Config, str]] = {}


@functools.lru_cache(maxsize=_MOST_READ)
def config_of(text: str) -> Config:
    """The Config in a run config's `fedtune` value; empty text means the defaults of conf/.

    Raises:
        ConfigError: the text is no configuration.
    """
    if not text.strip():
        from fedtune.config.loader import load

        config = load()
    else:
        from fedtune.config.convert import config_from_json

        config = config_from_json(text)
    if config.engine.name != "deployment":  # whose key follows from its files too
        while len(_read) >= _MOST_READ:
            _read.pop(next(iter(_read)))
        _read[id(config)] = (config, _key_of(config))
    return config


class RunResources:
    """What a configuration works on: the prepared data, and the model when it is needed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._start: NDArray[np.float32] | None = None

    @functools.cached_property
    def prepared(self) -> PreparedData:
        """Tokenized data and its shards.

        Raises:
            DataError, ModelError, ResourceError: they cannot be prepared.
        """
        from fedtune.data.prepare import prepare
        from fedtune.models.encoder import load_tokenizer

        tokenizer, tokenizer_id = load_tokenizer(self.config.model)
        if self.config.engine.name == "deployment":
            from fedtune.data.prepare import prepare_deployed

            return prepare_deployed(self.config, tokenizer, tokenizer_id)
        return prepare(self.config, tokenizer, tokenizer_id)

    @functools.cached_property
    def public_texts(self) -> PublicTexts | None:
        """What the server trains on first; None where `public.path` names nothing.

        Raises:
            DataError, ModelError, ResourceError: as `prepared`, or `read_public`.
        """
        if self.config.public.path is None:
            return None
        from fedtune.data.public_texts import read_public
        from fedtune.models.encoder import load_tokenizer

        tokenizer, tokenizer_id = load_tokenizer(self.config.model)
        prepared = self.prepared
        return read_public(
            self.config, prepared.label_names, tokenizer, tokenizer_id,
            private=prepared.train, test=prepared.test,
        )  # fmt: skip

    @property
    def public_notes(self) -> tuple[str, ...]:
        """What was found in the public texts, if they were read: at the end of a run the file may be gone."""
        texts: PublicTexts | None = vars(self).get("public_texts")
        return () if texts is None else texts.notes

    @functools.cached_property
    def _key(self) -> str:
        config = self.config
        names = list(self.prepared.label_names)
        base = [asdict(config.model), asdict(config.adapter), config.train.centre, config.data.text_pair]
        return json.dumps([*base, config.seed, config.device, names])

    @contextmanager
    def using_model(self) -> Iterator[AdaptedModel]:
        """The model, for this thread alone. Its adapter is whatever the last user left: set it first."""
        slot = _slots[0]
        with slot.lock:
            key = self._key
            if slot.key != key:
                from fedtune.models.classifier import load_model

                config, names = self.config, tuple(self.prepared.label_names)
                slot.model = load_model(
                    config.model, config.adapter, len(names), config.seed, config.device, names,
                    centred=bool(config.train.centre), pairs=config.data.text_pair is not None,
                )  # fmt: skip
                slot.key, slot.bare_head = key, None
            positions, longest = slot.model.base.encoder.max_positions, self.config.data.longest
            if longest > positions:
                raise ModelError(
                    f"data.max_length is {longest}, and the encoder {self.config.model.name!r} has "
                    f"{positions} positions. Set data.max_length={positions} or less."
                )
            yield slot.model

    @property
    def _head_first(self) -> bool:
        return bool(self.config.train.head_rounds) and self.config.adapter.name != "head"

    def _bare_head(self) -> AdaptedModel:
        """The head on the encoder as it is; for who is `using_model`."""
        slot, config = _slots[0], self.config
        if slot.bare_head is None:
            from fedtune.models.classifier import load_model

            alone, names = AdapterConfig(name="head"), tuple(self.prepared.label_names)
            slot.bare_head = load_model(
                config.model, alone, len(names), config.seed, config.device, names,
                pairs=config.data.text_pair is not None,
            )  # fmt: skip
        bare: AdaptedModel = slot.bare_head
        return bare

    @contextmanager
    def training_model(
        self, plan: PrivacyPlan, round: int
    ) -> Iterator[tuple[AdaptedModel, NDArray[np.bool_] | None]]:
        """The model that `round` of `plan` trains, as `using_model`; and where that is the head alone, which
        numbers of the adapter it has, bool [P]."""
        with self.using_model() as model:
            yield (self._bare_head(), model.head) if plan.head_alone(round) else (model, None)

    @contextmanager
    def model_at(self, adapter: np.ndarray) -> Iterator[AdaptedModel]:
        """The model with `adapter` [P] in it, as `using_model`.

        As long as nothing but the head has moved from the start, as in the first `train.head_rounds` rounds,
        the head alone: every adapter starts as the encoder itself, whose outputs are kept.
        """
        with self.using_model() as model:
            if self._head_first and adapter.shape == model.initial.shape:
                rest = ~model.head
                if np.array_equal(adapter[rest], model.initial[rest]):
                    model, adapter = self._bare_head(), adapter[model.head]
            model.set_vector(adapter)
            yield model

    def warm(self, progress: Progress | None = None) -> None:
        """Computes the frozen layers' outputs of every text that the cache lacks, before a round waits
        for them; `progress(done, all)` counts texts. No adapter is involved, and nothing is released.

        Raises:
            DataError, ModelError, ResourceError: as `prepared` and `using_model` do.
        """
        from fedtune.models.frozen_outputs import Features

        # Shards and what they hold out are cut from `train`: together they are in the cache at once.
        corpora = [self.prepared.train, self.prepared.test]
        train = self.config.train
        with self.using_model() as model:
            # An adapter in every layer leaves nothing frozen below it.
            models = [model] if model.first_layer > 0 else []
            if self._head_first:
                models.append(self._bare_head())
            total, behind = len(models) * sum(corpus.num_records for corpus in corpora), 0
            for frozen in models:
                for corpus in corpora:

                    def forward(done: int, _: int, before: int = behind) -> None:
                        if progress is not None:
                            progress(before + done, total)

                    Features.of(frozen, corpus, train.micro_batch_tokens, forward, precision=train.precision)
                    behind += corpus.num_records

    # What the server needs of its own; of the data, only what it may evaluate on without noise.

    def digest(self) -> str:
        """Of the encoder and its tokenizer: the same for the same weights, wherever they lie."""
        with self.using_model() as model:
            return model.digest

    def initial(self, progress: Progress | None = None) -> np.ndarray:
        """The adapter that a run starts from, float32 [P]: the same for the same configuration and public
        texts; made once. `progress(done, all)` counts public texts.

        Raises:
            DataError, ModelError, ResourceError: as `public_texts`.
        """
        if self._start is None:
            texts = self.public_texts
            with self.using_model() as model:
                start = self._before_any_text(model)
                self._start = start if texts is None else self._taught(model, start, texts.tokens, progress)
        return self._start.copy()

    def _before_any_text(self, model: AdaptedModel) -> NDArray[np.float32]:
        if self.config.train.start != "names":
            return np.array(model.initial, dtype=np.float32)
        from fedtune.models.encoder import load_tokenizer
        from fedtune.models.name_start import start_by_names

        model.set_vector(model.initial)
        return start_by_names(model, load_tokenizer(self.config.model)[0])

    def _taught(
        self,
        model: AdaptedModel,
        start: NDArray[np.float32],
        texts: TokenizedCorpus,
        progress: Progress | None,
    ) -> NDArray[np.float32]:
        """`start` [P] after training on public `texts`: the head, and the rest too unless the first rounds
        train the head alone, on the encoder as it is."""
        from fedtune.training.public_start import train_head, train_inside

        config, inside = self.config, self.config.adapter.name != "head"
        part: Any = model.head if inside else slice(None)
        bare = self._bare_head() if inside else model
        start[part] = train_head(bare, texts, start[part], config.train, progress)
        if inside and not self._head_first:
            start = train_inside(model, texts, start, config.train, config.seed, progress)
        return start

    def public_facts(self) -> dict[str, Any]:
        """Which public texts the start was trained on; only asked where there are some."""
        texts = self.public_texts
        return {} if texts is None else texts.facts()

    def head(self) -> np.ndarray:
        """Which of the adapter's numbers are the classifier's, bool [P]."""
        with self.using_model() as model:
            return model.head

    def centre_size(self) -> int:
        """How many of the adapter's numbers, its last ones, are the centre."""
        with self.using_model() as model:
            return model.centre_size

    def classes(self) -> int:
        """How many classes there are: a public number."""
        return len(self.prepared.label_names)

    def evaluate(self, adapter: np.ndarray) -> Any:
        """`Evaluation` of `adapter` on the test part: public, or held out of a run without privacy."""
        from fedtune.training.evaluation import evaluate

        with self.model_at(adapter) as model:
            return evaluate(model, self.prepared.test, self.config.train)

    def save(self, adapter: np.ndarray, folder: Path) -> None:
        """Writes `adapter` in PEFT's own format."""
        with self.using_model() as model:
            model.set_vector(adapter)
            model.save(folder)


_resources: dict[str, RunResources] = {}


def run_resources(config: Config) -> RunResources:
    """The RunResources of a configuration. The last one is cached, so every node of a process shares it."""
    read = _read.get(id(config))
    key = read[1] if read is not None and read[0] is config else _key_of(config)
    if key not in _resources:
        _resources.clear()
        _resources[key] = RunResources(resolved(config))
    return _resources[key]


def _key_of(config: Config) -> str:
    """What resources depend on, as text."""
    config = resolved(config)
    relevant = [asdict(config.data), asdict(config.partition), asdict(config.model), asdict(config.adapter)]
    if config.engine.name == "deployment" and config.data.path:
        from fedtune.data.sources.files import state_of

        # A node runs for months: a file that was replaced must be read again, and then refused.
        relevant.append({"engine": "deployment", "files": state_of(Path(config.data.path))})
    if config.public.path is not None:
        from fedtune.data.sources.files import state_of

        relevant.append(
            {"public": asdict(config.public), "files": state_of(Path(config.public.path).expanduser())}
        )
    evaluation = config.federation.evaluation
    relevant.append(
        {"held out": config.federation.evaluation_share if evaluation == "private" else evaluation}
    )
    relevant.append({"unit": config.privacy.unit})
    return json.dumps([*relevant, config.federation.nodes, config.seed, config.device, asdict(config.train)])


def forget() -> None:
    """Leaves lock and model to whoever holds them, and starts afresh; after a node has hung."""
    from fedtune.models import classifier

    _slots[0] = _Slot()
    classifier.forget_models()
