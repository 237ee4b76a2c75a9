"""Configuration: a typed schema, and the way from Hydra's YAML files and overrides to it.

`schema` is pure Python, and `values` says which values each setting may take; only `loader` meets
Hydra and OmegaConf, and it is imported when a configuration is composed, not before.
"""

from __future__ import annotations

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

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "FederationConfig",
    "ModelConfig",
    "PartitionConfig",
    "PricingConfig",
    "PrivacyConfig",
    "TrainConfig",
]
