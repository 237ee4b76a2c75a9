"""A federation small enough for a test: a random 2-layer BERT of width 32, and 120 made-up texts.

Used by tests, by the processes that they kill, and by the engines' tests.
"""

from __future__ import annotations

import csv
import os
import random
from pathlib import Path
from typing import Any

from fedtune.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    EngineConfig,
    FederationConfig,
    ModelConfig,
    PartitionConfig,
    PricingConfig,
    PrivacyConfig,
    TrainConfig,
)

GOOD = ["good", "great", "fine", "nice", "happy"]
BAD = ["bad", "awful", "poor", "sad", "angry"]
OTHER = ["the", "film", "was", "a", "day", "and", "food", "so", "very", "it"]


def make_model(folder: Path) -> Path:
    """A random BERT with a word-level vocabulary, saved as a hub model would be."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    # transformers 5 ignores `vocab_file` without a word, and then every word is [UNK].
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


def save_adapter(
    base: Path | str,
    folder: Path,
    adapter: str,
    quantization: str = "none",
    normalize: bool = True,
    pooling: str = "mean",
) -> Path:
    """An adapter folder with random numbers in every parameter, the centre too."""
    import numpy as np

    from fedtune.models.classifier import load_model

    config = ModelConfig(name=str(base), quantization=quantization, normalize=normalize, pooling=pooling)
    model = load_model(
        config, AdapterConfig(name=adapter, rank=2), 3, 0, "cpu", ("a", "b", "c"), centred=normalize
    )
    noise = np.random.default_rng(1).normal(0, 0.2, model.num_parameters).astype(np.float32)
    model.set_vector(model.get_vector() + noise)
    model.save(folder)
    return folder


def make_data(folder: Path, n: int = 160) -> Path:
    """train.csv and test.csv (a quarter of all) with text, label and site; one word decides the label."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(3)
    for split, rows in (("train", n - n // 4), ("test", n // 4)):
        with (folder / f"{split}.csv").open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["text", "label", "site"])
            for i in range(rows):
                label = i % 2
                words = chance.choices(OTHER, k=chance.randint(2, 6))
                words.append(chance.choice(GOOD if label else BAD))
                chance.shuffle(words)
                writer.writerow([" ".join(words), "positive" if label else "negative", f"site-{i % 4}"])
    return folder


def make_public(path: Path, n: int = 40) -> Path:
    """A file of `n` labelled texts, none of which is in `make_data`."""
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label"])
        for i in range(n):
            word = (GOOD if i % 2 else BAD)[i // 2 % 5]
            writer.writerow([f"public{i} {OTHER[i % 10]} {word}", "positive" if i % 2 else "negative"])
    return path


def make_config(model: Path, data: Path, **changes: Any) -> Config:
    """A complete configuration; `changes` are `section__field=value` or top-level fields.

    Of its private data the owner has declared a test split public, and the size.
    """
    config = Config(
        device="cpu",
        data=DataConfig(
            source="files", name="made-up", path=str(data), site="site", labels=["negative", "positive"],
            test_split="test", test_public=True, declared_size=120, max_length=16,
        ),
        partition=PartitionConfig(name="natural"),
        model=ModelConfig(name=str(model), quantization="none"),
        adapter=AdapterConfig(name="lora", rank=2, alpha=4.0),
        privacy=PrivacyConfig(trust="none", epsilon=None),
        train=TrainConfig(sample_rate=0.3, local_steps=2, learning_rate=0.01, precision="fp32"),
        federation=FederationConfig(num_rounds=3, round_timeout=60.0),
        engine=EngineConfig(name="local"),
        pricing=PricingConfig(date="2026-01-01", source="made up"),
    )  # fmt: skip
    for name, value in changes.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section) if field else config, field or section, value)
    return config


def private(config: Config, epsilon: float = 8.0) -> Config:
    """The same with local differential privacy."""
    config.privacy = PrivacyConfig(trust="local", epsilon=epsilon)
    return config


def one_thread() -> None:
    """Tests share two cores with other things."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
