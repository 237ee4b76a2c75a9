"""The configuration as typed dataclasses: every setting that fedtune has, with its default.

Pure Python: Hydra and OmegaConf are met only in `fedtune.config.loader`, so that a node, a test or
a notebook can build a `Config` without them. The dataclasses are not frozen because OmegaConf cannot
merge into frozen schemas; nothing in fedtune changes a Config after the loader has made it.

Sizes are counts of records unless a name says otherwise; rates are probabilities per step; seconds,
tokens and bytes are named in the field.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    "TrackerConfig",
    "TrainConfig",
]


@dataclass
class DataConfig:
    """Where texts and labels come from, and which column is which."""

    source: str = "opinions"  # opinions | hub | files
    name: str = "opinions"  # the data set's name: hub name, or what the ledger calls these files
    subset: str | None = None  # hub: configuration name (for instance 'sst2' of 'glue')
    revision: str | None = None  # hub: branch, tag or commit
    path: str | None = None  # files: folder (one file a split) or one file
    text: str = "text"  # column that holds the text
    text_pair: str | None = None  # column of a second text, for sentence pairs
    label: str = "label"  # column that holds the label
    unit: str | None = None  # column that names the person a record belongs to
    site: str | None = None  # column that names the site a record comes from
    only_site: str | None = None  # train on this site's records alone; the test split stays whole
    declared_size: int | None = None  # public: about how many units of privacy there are (shared out evenly)
    train_split: str = "train"  # hub, files: name of the split to train on
    test_split: str | None = None  # evaluation=public: None: hold out `test_fraction` of public data
    test_public: bool = False  # the test split is declared public by its owner: evaluated on without noise
    test_fraction: float = 0.15  # share of the persons (or records) held out where there is no test split
    max_length: int = 64  # tokens; longer texts are cut. Public: never derived from the texts
    labels: list[str] | None = None  # public label set, in order; None: as the source declares it
    public: bool = False  # declared public by its owner: the ledger records, and does not refuse


@dataclass
class PartitionConfig:
    """How a corpus becomes shards."""

    name: str = "natural"  # natural | iid | dirichlet
    alpha: float = 0.5  # dirichlet: concentration; smaller is more uneven


@dataclass
class ModelConfig:
    """The frozen encoder."""

    name: str = "embedded:minilm"  # hub name, folder, or 'embedded:minilm'
    revision: str | None = None  # hub: branch, tag or commit
    quantization: str = "int8"  # none | int8 | nf4
    pooling: str = "mean"  # mean | cls: how token states become one vector for the head


@dataclass
class AdapterConfig:
    """The trainable part: all that ever travels."""

    name: str = "head"  # lora | ffa_lora | bitfit | head
    layers: int | None = None  # top k encoder layers; None: all
    rank: int = 8  # lora, ffa_lora: inner width of the two matrices
    alpha: float = 16.0  # lora, ffa_lora: the scale is alpha / rank
    target_modules: list[str] | None = None  # None: query and value of the architecture


@dataclass
class PrivacyConfig:
    """What is promised to whom; see `fedtune.privacy.plan`."""

    trust: str = "local"  # local | distributed | central | none
    unit: str = "auto"  # auto | record | person | client; auto: person where data.unit names them
    epsilon: float | None = 8.0  # target over all rounds; None: use noise_multiplier
    delta: float | None = None  # None: n^-1.1, at most 1e-3; n: units of the largest declared shard
    max_grad_norm: float = 1.0  # L2 norm that a unit's gradient (central: a node's update) is clipped to
    noise_multiplier: float | None = None  # std over max_grad_norm; None: calibrated to epsilon
    records_per_unit: int = 8  # unit=person: at most this many records of a person a step
    reproducible_noise: bool = False  # simulation only: noise from `seed`; every report shows it
    adaptive_clipping: bool = False  # trust=central: clip at a private quantile (Andrew et al. 2021)
    clip_quantile: float = 0.5  # adaptive_clipping: share of the updates that stay unclipped
    mechanism: str = "gaussian"  # gaussian | dp_ftrl (trust=central: noise correlated over rounds)
    bands: int | None = None  # dp_ftrl: rounds over which noise is correlated; None: min_separation
    min_separation: int = 1  # dp_ftrl: a client takes part at most once in so many rounds
    max_dropouts: int = 0  # trust=distributed: dropouts in a round that the noise still covers
    max_colluders: int | None = None  # trust=distributed: nodes that may collude with the server; None: 1


@dataclass
class TrainConfig:
    """Training on a node."""

    sample_rate: float = 0.1  # probability that a unit is in a step's batch
    local_steps: int = 4  # steps of a node in one round
    learning_rate: float = 0.01  # of the node's optimizer
    optimizer: str = "adam"  # sgd | adam | adamw
    momentum: float = 0.0  # sgd
    weight_decay: float = 0.0  # adamw, sgd
    proximal_mu: float = 0.0  # FedProx; 0: off
    micro_batch_tokens: int = 2048  # tokens computed at once; memory grows with it
    precision: str = "auto"  # auto | fp32 | bf16; auto: bf16 where the processor computes it fast


@dataclass
class FederationConfig:
    """Who takes part and how updates become the next adapter."""

    nodes: int | None = None  # None: as many as there are natural sites (4 where there are none)
    num_rounds: int = 12  # exchanges with the nodes
    cohort_size: int | None = None  # nodes asked in a round; None: all
    strategy: str = "fedavg"  # fedavg | fedavgm | fedadam
    server_learning_rate: float = 1.0  # times the average update
    server_momentum: float = 0.9  # fedavgm; beta_1 of fedadam
    min_updates: int = 1  # usable updates that a round needs
    max_update_norm: float = 100.0  # an update with a larger L2 norm is rejected
    weighting: str = "uniform"  # uniform | declared (public sizes)
    round_timeout: float = 600.0  # seconds until a node that does not answer is given up
    evaluation: str = "auto"  # auto | public | private | held_out | none; auto: no private data without noise
    evaluate_every: int = 1  # evaluation=public, held_out: rounds between evaluations on the test split
    evaluation_rounds: int = 1  # evaluation=private: rounds in which nodes are asked; the last is one
    evaluation_share: float = 0.2  # evaluation=private: a node's persons (or records) held out for it
    evaluation_epsilon: float | None = None  # all answers, inside privacy.epsilon; None: a quarter of it


@dataclass
class EngineConfig:
    """What runs the federation."""

    name: str = "local"  # local | ray | deployment (which `fedtune submit` sets)
    cpus_per_node: float = 1.0  # ray: processor cores that one node's worker takes
    server: str | None = None  # deployment: folder with the server's address and the operator's token


@dataclass
class PricingConfig:
    """A price book; cost is usage times price."""

    name: str = "cloud_cpu"  # what the record calls these prices
    currency: str = "USD"  # of every price below
    date: str = ""  # when the prices were read (ISO 8601)
    source: str = ""  # who says so
    device: str = "cpu"  # what the hour is an hour of
    device_hour: float = 0.0  # money an hour of one node's training device
    gigabyte_up: float = 0.0  # money per 10^9 bytes from a node to the server
    gigabyte_down: float = 0.0  # money per 10^9 bytes from the server to a node
    kilowatt_hour: float = 0.0  # money a kilowatt-hour; 0 where the hour includes it
    carbon_kg_per_kwh: float = 0.0  # kg of CO2 equivalent a kilowatt-hour
    record: float = 0.0  # money a data record, where data is bought


@dataclass
class TrackerConfig:
    """Who else is told the numbers of a run; files only, nothing is sent anywhere."""

    name: str = "none"  # none | tensorboard | mlflow | wandb
    folder: str | None = None  # where it writes; None: RUN_DIR/NAME
    project: str = "fedtune"  # mlflow: the experiment, wandb: the project


@dataclass
class Config:
    """One run, complete."""

    seed: int = 0  # data split, initialisation, client sampling; never the noise
    resume: str | None = None  # run folder to go on from
    device: str = "auto"  # auto | cpu | cuda | mps
    output: str | None = None  # run folder; set by the loader from hydra.run.dir
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    pricing: PricingConfig = field(default_factory=PricingConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
