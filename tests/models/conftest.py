"""A tiny BERT, a tiny DistilBERT and a tiny RoBERTa, and tokenised made-up texts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fedtune.data.corpus import TokenizedCorpus
from tests.support.tiny_federation import make_model, one_thread

one_thread()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Path]:
    import torch
    from transformers import (
        CamembertConfig,
        CamembertModel,
        DistilBertConfig,
        DistilBertModel,
        ElectraConfig,
        ElectraModel,
        PreTrainedModel,
        RobertaConfig,
        RobertaModel,
        XLMRobertaConfig,
        XLMRobertaModel,
    )

    torch.manual_seed(5)
    found = {"bert": tiny_bert}
    distil = DistilBertConfig(
        vocab_size=25,
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=64,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    sizes = {"vocab_size": 25, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 34}  # fmt: skip
    offset = {"type_vocab_size": 1, "pad_token_id": 1}  # RoBERTa counts positions from its padding
    models: dict[str, PreTrainedModel] = {
        "distilbert": DistilBertModel(distil),
        "roberta": RobertaModel(RobertaConfig(**sizes, **offset)),
        "camembert": CamembertModel(CamembertConfig(**sizes, **offset)),
        "xlm-roberta": XLMRobertaModel(XLMRobertaConfig(**sizes, **offset)),
        "electra": ElectraModel(ElectraConfig(**sizes, embedding_size=32)),
    }
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_bert / file, found[name])
    return found


def random_corpus(n: int = 12, seed: int = 0, persons: int | None = None) -> TokenizedCorpus:
    """`n` records of 3 to 12 tokens with two classes; ids avoid the special ones except first and last."""
    chance = np.random.default_rng(seed)
    lengths = chance.integers(3, 13, size=n)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = chance.integers(5, 25, size=offsets[-1]).astype(np.int32)
    ids[offsets[:-1]], ids[offsets[1:] - 1] = 2, 3
    return TokenizedCorpus(
        name="random",
        source="random",
        input_ids=ids,
        offsets=offsets,
        labels=chance.integers(0, 2, size=n).astype(np.int64),
        label_names=("no", "yes"),
        units=None if persons is None else np.array([f"p{i % persons}" for i in range(n)]),
        sites=None,
        digests=chance.integers(0, 256, size=(n, 32)).astype(np.uint8),
        marks=chance.integers(0, 256, size=(n, 32)).astype(np.uint8),
    )
