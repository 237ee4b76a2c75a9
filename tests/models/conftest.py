"""A tiny random model of each family, and tokenised made-up texts."""

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
        AlbertConfig,
        AlbertModel,
        BertConfig,
        BertModel,
        CamembertConfig,
        CamembertModel,
        DebertaV2Config,
        DebertaV2Model,
        DistilBertConfig,
        DistilBertModel,
        ElectraConfig,
        ElectraModel,
        ModernBertConfig,
        ModernBertModel,
        MPNetConfig,
        MPNetModel,
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
        "small electra": ElectraModel(ElectraConfig(**sizes, embedding_size=16)),
        "mpnet": MPNetModel(MPNetConfig(**sizes, pad_token_id=1)),
        "albert": AlbertModel(
            AlbertConfig(**sizes | {"num_hidden_layers": 3}, embedding_size=16, num_hidden_groups=1)
        ),
        "albert in two groups": AlbertModel(
            AlbertConfig(
                **sizes | {"num_hidden_layers": 4}, embedding_size=16, num_hidden_groups=2, inner_group_num=2
            )
        ),
        "modernbert": ModernBertModel(
            # One layer in two looks at two tokens on each side.
            ModernBertConfig(
                **sizes, pad_token_id=0, local_attention=4, global_attn_every_n_layers=2, bos_token_id=2,
                cls_token_id=2, eos_token_id=3, sep_token_id=3, embedding_dropout=0.1, attention_dropout=0.1,
                mlp_dropout=0.1,
            )
        ),
        "deberta-v3": DebertaV2Model(
            DebertaV2Config(
                **sizes, relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm",
                share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, type_vocab_size=0,
            )
        ),
        "deberta-v2": DebertaV2Model(
            DebertaV2Config(
                **sizes, relative_attention=True, max_relative_positions=8, pos_att_type="p2c|c2p",
                embedding_size=16, type_vocab_size=2, conv_kernel_size=3, conv_act="gelu",
            )
        ),
        "multilingual": BertModel(BertConfig(**sizes)),  # has XLM-R's kind of tokenizer, as below
    }  # fmt: skip
    for name, model in models.items():
        if name not in ("distilbert", "roberta", "camembert", "xlm-roberta", "electra"):
            with torch.no_grad():  # at the start many biases are zero, and attention sees next to nothing
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_bert / file, found[name])
    _multilingual_tokenizer(found["multilingual"])
    return found


def _multilingual_tokenizer(folder: Path) -> None:
    """A sentencepiece vocabulary in XLM-R's form: its own special tokens, its padding 1, and no segments."""
    from transformers import XLMRobertaTokenizer

    pieces = [
        "\u2581the",
        "\u2581film",
        "\u2581\u0444\u0438\u043b\u044c\u043c",
        "\u2581\u6620\u753b",
        "\u2581",
        "a",
        "b",
        "\u0438",
    ]
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -1.0 - number) for number, piece in enumerate(pieces)] + [("<mask>", 0.0)]
    XLMRobertaTokenizer(vocab=vocabulary).save_pretrained(folder)


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
