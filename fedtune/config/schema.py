"""Every setting that fedtune has, each declared once: type, default, range, unit and meaning.

Whoever says something about a setting reads it here: the checks of what a person, a page of `conf/` or a
server gives and the messages of their errors (`fedtune.config.convert`), `fedtune run --help`, and other
packages that need a closed set of words (`UNITS`).

Pure Python: neither Hydra nor the library that converts is imported, so that a node, a test or a notebook
builds a `Config` without them. Building one checks nothing; every way in from outside (`convert.from_dict`,
`loader.load`) does. Nothing in the package changes one. Rules that need two settings are in
`choices.check_together`; those that need the data (delta against the number of records) are where it is.

Rates are probabilities per step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

__all__ = [
    "TRUSTS",
    "UNITS",
    "AdapterConfig",
    "AdapterName",
    "Before",
    "Compute",
    "Config",
    "DataConfig",
    "EngineConfig",
    "Evaluation",
    "FederationConfig",
    "Group",
    "ModelConfig",
    "PartitionConfig",
    "PricingConfig",
    "PrivacyConfig",
    "PublicConfig",
    "Source",
    "Strategy",
    "TrackerConfig",
    "TrainConfig",
    "Trust",
    "Unit",
    "as_tuple",
    "setting",
]

Value = TypeVar("Value")

Source = Literal["opinions", "hub", "files"]
AdapterName = Literal["lora", "ffa_lora", "bitfit", "head"]
ALL_LINEAR = "all-linear"  # as PEFT calls them
Compute = Literal["quick", "standard", "thorough"]
Strategy = Literal["fedsgd", "fedavg", "fedavgm", "fedadam"]
Evaluation = Literal["public", "private", "held_out", "none"]
LongText = Literal["cut", "window"]
Trust = Literal["local", "distributed", "central", "none"]
TRUSTS: tuple[Trust, ...] = get_args(Trust)
Unit = Literal["record", "person", "client"]
UNITS: tuple[Unit, ...] = get_args(Unit)  # from the finest to the coarsest


def setting(
    default: Value,
    description: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    unit: str | None = None,
) -> Value:
    """A field of a `Group`, with what is known of it as its metadata, in the words of pydantic.

    Args:
        default: what it is where nothing is given.
        description: what it means, for `fedtune run --help`.
        gt: numbers are above this.
        ge: numbers are this or more.
        lt: numbers are below this.
        le: numbers are this or less.
        unit: what a number counts, where the name does not say it.
    """
    known = {"gt": gt, "ge": ge, "lt": lt, "le": le, "unit": unit}
    bounds = {key: value for key, value in known.items() if value is not None}
    made: Value = field(default=default, metadata={"description": description, **bounds})
    return made


class Before:
    """Metadata of a type: pydantic calls `function` on a value before it checks it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Pydantic's own hook, by which it need not be imported here."""
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.function, handler(source))


def _text(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("a text that is not empty")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("a text, without halves of characters")
    return str(value) if type(value) is int else value  # a column may be called 0


def _date(value: object) -> object:
    if isinstance(value, str) and value:
        try:
            date.fromisoformat(value)
        except ValueError:
            raise ValueError("a date such as 2026-11-01, or empty") from None
    return value


def as_tuple(value: object) -> object:
    """A list as a tuple, which is how JSON and YAML give one."""
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, Before(_text)]  # not empty
Date = Annotated[str, Before(_date)]
Texts = Annotated[list[Text], Before(lambda value: list(value) if isinstance(value, tuple) else value)]


class Group:
    """Base of what is read strictly from outside: no unknown key, no `true` for 1, no NaN and no infinity."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Strict in its values, while it may itself be given as a mapping."""
        return {**handler(source), "strict": False}


@dataclass
class DataConfig(Group):
    """Where texts and labels come from, and which column is which."""

    source: Source = setting("opinions", "where the data is: embedded, on the Hugging Face hub, or in files")
    name: Text = setting("opinions", "the data set's name: hub name, or what the ledger calls these files")
    subset: Text | None = setting(None, "hub: configuration name (for instance 'sst2' of 'glue')")
    revision: Text | None = setting(None, "hub: branch, tag or commit")
    path: Text | None = setting(None, "files: folder (one file a split) or one file")
    text: Text = setting("text", "column that holds the text")
    text_pair: Text | None = setting(None, "column of a second text, for sentence pairs")
    label: Text = setting("label", "column that holds the label")
    unit: Text | None = setting(None, "column that names the person a record belongs to")
    site: Text | None = setting(None, "column that names the site a record comes from")
    only_site: Text | None = setting(None, "train on this site's records alone; the test split stays whole")
    declared_size: int | None = setting(
        None, "public: about how many units of privacy there are, shared out evenly over the nodes", ge=1
    )
    train_split: Text = setting(
        "train", "hub, files: the split to train on (files: file name without its ending)"
    )
    test_split: Text | None = setting(
        None, "evaluation=public: the split to test on; null: hold out test_fraction of public data"
    )
    test_public: bool = setting(
        False, "the test split is declared public by its owner: evaluated on without noise"
    )
    test_fraction: float = setting(
        0.15, "share of the persons (or records) held out where there is no test split", gt=0, lt=1
    )
    max_length: int | None = setting(
        None,
        "to which texts are cut; null: by the texts where they are public, else 64. Public: never derived "
        "from private texts",
        ge=4,
        le=8192,
        unit="tokens",
    )
    long_text: LongText = setting(
        "cut", "of a text longer than max_length: its beginning, or windows whose vectors are averaged"
    )
    max_windows: int = setting(
        8,
        "long_text=window: at most so many windows of a text, each of max_length tokens or less",
        ge=2,
        le=64,
    )
    labels: Texts | None = setting(None, "public label set, in order; null: as the source declares it")
    public: bool = setting(False, "declared public by its owner: the ledger records, and does not refuse")

    @property
    def longest(self) -> int:
        """Tokens that an encoder sees at once: at most `max_length`, or 64 where nobody gave it."""
        return 64 if self.max_length is None else self.max_length

    @property
    def windows(self) -> int:
        """Pieces of that length that are seen of a text at most."""
        return self.max_windows if self.long_text == "window" else 1


@dataclass
class PublicConfig(Group):
    """Labelled texts that are public, on which the server trains first."""

    path: Text | None = setting(
        None,
        "file of labelled texts, which whoever names it here declares public: the server trains on them "
        "before the first round, and epsilon does not cover them; null: none",
    )
    text: Text | None = setting(None, "its column that holds the text; null: as data.text")
    text_pair: Text | None = setting(None, "its column of a second text; null: as data.text_pair")
    label: Text | None = setting(None, "its column that holds the label; null: as data.label")


@dataclass
class PartitionConfig(Group):
    """How a corpus becomes shards."""

    name: Literal["natural", "iid", "dirichlet"] = setting("natural", "how records come to nodes")
    alpha: float = setting(0.5, "dirichlet: concentration; smaller is more uneven", gt=0)


@dataclass
class ModelConfig(Group):
    """The frozen encoder."""

    name: Text = setting("embedded:minilm", "hub name, folder, or 'embedded:minilm'")
    revision: Text | None = setting(None, "hub: branch, tag or commit")
    quantization: Literal["none", "int8", "nf4"] = setting("int8", "how the encoder's weights are stored")
    pooling: Literal["mean", "cls"] = setting("mean", "how token states become one vector for the head")
    pickle: bool = setting(
        False, "weights may be read from a pickle (pytorch_model.bin), by a reader that runs no code of it"
    )
    normalize: bool = setting(True, "each text's vector is scaled to one length before the head")


@dataclass
class AdapterConfig(Group):
    """The trainable part: all that ever travels."""

    name: Literal["auto", AdapterName] = setting(
        "auto", "what is trained beside the frozen encoder; auto: by the recipe of train"
    )
    layers: int | None = setting(
        None, "top k encoder layers; null: all. What lies below is computed once a text and cached", ge=1
    )
    rank: int = setting(8, "lora, ffa_lora: inner width of the two matrices", ge=1)
    alpha: float = setting(16.0, "lora, ffa_lora: the scale is alpha / rank", gt=0)
    target_modules: Texts | None = setting(
        None,
        f"lora, ffa_lora: layers beside which they are; [{ALL_LINEAR}]: every linear layer; null: by the "
        "recipe of train, else query and value of the architecture",
    )


@dataclass
class PrivacyConfig(Group):
    """What is promised to whom; see `fedtune.privacy.plan`."""

    trust: Trust = setting("local", "trust model: who must be believed")
    unit: Literal["auto", Unit] = setting(
        "auto", "what is protected; auto: person where data.unit names them, client under trust=central"
    )
    epsilon: float | None = setting(8.0, "target over all rounds; null: use noise_multiplier", gt=0)
    delta: float | None = setting(
        None, "null: n^-1.1, at most 1e-3; n: units of the largest declared shard", gt=0, lt=1
    )
    max_grad_norm: float | None = setting(
        None, "L2 norm that a unit's gradient (central: a node's update) is clipped to; null: by train", gt=0
    )
    head_norm: float | None = setting(
        None,
        "L2 norm that the head's part of a unit's gradient is clipped to by itself, at most a thousand times "
        "max_grad_norm and at least a thousandth; 0: one norm over everything, as ever for adapter=head and "
        "trust=none; null: by the recipe",
        ge=0,
    )
    head_share: float | None = setting(
        None,
        "head_norm: part of max_grad_norm squared, the sensitivity, that the head has; null: by the recipe",
        gt=0,
        lt=1,
    )
    noise_multiplier: float | None = setting(
        None, "standard deviation over max_grad_norm; null: calibrated to epsilon", ge=0
    )
    records_per_unit: int = setting(8, "unit=person: at most this many records of a person a step", ge=1)
    reproducible_noise: bool = setting(False, "simulation only: noise from `seed`; every report shows it")
    adaptive_clipping: bool = setting(False, "trust=central: clip at a private quantile (Andrew et al. 2021)")
    clip_quantile: float = setting(
        0.5, "adaptive_clipping: share of the updates that stay unclipped", gt=0, lt=1
    )
    mechanism: Literal["gaussian", "dp_ftrl"] = setting(
        "gaussian", "dp_ftrl (trust=central): noise correlated over rounds"
    )
    bands: int | None = setting(
        None, "dp_ftrl: rounds over which noise is correlated; null: min_separation", ge=1
    )
    min_separation: int = setting(1, "dp_ftrl: a client takes part at most once in so many rounds", ge=1)
    max_dropouts: int = setting(0, "trust=distributed: dropouts in a round that the noise still covers", ge=0)
    max_colluders: int | None = setting(
        None, "trust=distributed: nodes that may collude with the server; null: 1", ge=0
    )


@dataclass
class TrainConfig(Group):
    """Training; what is null follows from the recipe, `fedtune.config.recipe`."""

    compute: Compute = setting("standard", "what the recipe may take: minutes, some minutes, or long")
    sample_rate: float | None = setting(
        None, "probability that a unit is in a step's batch; null: by the recipe", gt=0, le=1
    )
    local_steps: int | None = setting(None, "steps of a node in one round; null: by the recipe", ge=1)
    learning_rate: float | None = setting(
        None, "of the optimizer, wherever it is (fedsgd: on the server); null: by the recipe", gt=0
    )
    head_learning_rate: float | None = setting(
        None, "of the rounds in which the head alone is trained; null: by the recipe", gt=0
    )
    schedule: Literal["constant", "rise", "cosine"] | None = setting(
        None,
        "fedsgd: of the rate. rise: from half to one and a half of it; cosine: it rises over a tenth of the "
        "rounds, then falls to a tenth; null: by the recipe",
    )
    averaging: float | None = setting(
        None,
        "fedsgd: the average of late adapters, which is the result, keeps this share of itself a round; 0: "
        "the last adapter; null: by the recipe",
        ge=0,
        lt=1,
    )
    damped: bool | None = setting(
        None,
        "fedsgd: a tenth of the rate where noise is so heavy that a head would lose in it what its start by "
        "the classes' names knows; null: by the recipe",
    )
    optimizer: Literal["sgd", "adam", "adamw", "adam_mini"] | None = setting(
        None, "takes the steps; adam_mini: one second moment for all of the adapter; null: by the recipe"
    )
    start: Literal["zero", "names"] | None = setting(
        None, "of the head: zero, or the classes' names as the encoder sees them; null: by the recipe"
    )
    centre: bool | None = setting(
        None,
        "adapter=head, fedsgd: the first round gives the noised mean of the texts' vectors, charged as a "
        "step, from which the head then sees them; null: by the recipe",
    )
    label_smoothing: float | None = setting(
        None, "share of a label that is spread over all classes; null: by the recipe", ge=0, lt=1
    )
    head_rounds: int | None = setting(
        None,
        "first rounds, in which the head alone is trained, on a frozen encoder (LP-FT, Kumar et al. 2022); "
        "without effect under adapter=head; null: by the recipe",
        ge=0,
    )
    personalize: Literal["none", "head", "adapter"] = setting(
        "none",
        "fedsgd, trust local and none: beside the common model each site trains an offset of its own, of the "
        "head's numbers or of all, in the same charged steps. It never leaves the site; a new site gets the "
        "common model alone, which is then less accurate by half a point or more",
    )
    momentum: float = setting(0.0, "sgd: share of the last step's direction that is kept", ge=0, lt=1)
    weight_decay: float = setting(0.0, "adamw, sgd: how much of each weight a step takes off", ge=0)
    proximal_mu: float = setting(0.0, "FedProx; 0: off", ge=0)
    micro_batch_tokens: int = setting(
        1024, "computed at once; memory grows with it, privacy does not see it", ge=16, unit="tokens"
    )
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "of the computation; auto: bf16 where the processor computes it fast"
    )


@dataclass
class FederationConfig(Group):
    """Who takes part and how updates become the next adapter."""

    nodes: int | None = setting(
        None, "null: as many as there are natural sites (4 where there are none)", ge=1
    )
    num_rounds: int | None = setting(None, "exchanges with the nodes; null: by the recipe of train", ge=1)
    cohort_size: int | None = setting(None, "nodes asked in a round; null: all", ge=1)
    strategy: Strategy | None = setting(
        None,
        "fedsgd: a node sends one gradient a round, and the server steps with the optimizer of train; "
        "else nodes train, and the server averages; null: fedsgd, but fedavg under trust=central or where "
        "train.local_steps is above 1",
    )
    server_learning_rate: float = setting(1.0, "times the average update", gt=0)
    server_momentum: float = setting(0.9, "fedavgm; beta_1 of fedadam", ge=0, lt=1)
    min_updates: int = setting(1, "usable updates that a round needs", ge=1)
    max_update_norm: float = setting(
        100.0, "an update with a larger L2 norm is rejected; fedsgd: beside that of the noise in it", gt=0
    )
    weighting: Literal["uniform", "declared"] | None = setting(
        None, "of updates; declared: by public sizes; null: declared with fedsgd, where the noise allows it"
    )
    round_timeout: float = setting(
        600.0, "until a node that does not answer is given up", gt=0, unit="seconds"
    )
    evaluation: Literal["auto", Evaluation] = setting(
        "auto", "what the model is evaluated on; auto: no private data without noise"
    )
    evaluate_every: int | None = setting(
        None,
        "evaluation=public, held_out: rounds between; null: twelve times at most, inside the encoder six",
        ge=1,
    )
    evaluation_rounds: int = setting(
        1, "evaluation=private: rounds in which nodes are asked, evenly spread; the last is one", ge=1
    )
    evaluation_share: float = setting(
        0.2, "evaluation=private: a node's persons (or records) held out for it", gt=0, lt=1
    )
    evaluation_epsilon: float | None = setting(
        None, "evaluation=private: of all answers, inside privacy.epsilon; null: a quarter of it", gt=0
    )


@dataclass
class EngineConfig(Group):
    """What runs the federation."""

    name: Literal["local", "ray", "deployment"] = setting(
        "local", "all nodes in this process, on Ray, or real sites (which `fedtune submit` sets)"
    )
    cpus_per_node: float = setting(1.0, "of one node's worker (ray)", gt=0, unit="processor cores")
    server: Text | None = setting(None, "deployment: the folder that `fedtune provision` made for the server")


@dataclass
class PricingConfig(Group):
    """A price book; cost is usage times price."""

    name: Text = setting("cloud_cpu", "what the record calls these prices")
    currency: Text = setting("USD", "of every price below")
    date: Date = setting("", "when the prices were read (2026-11-01)")
    source: str = setting("", "who says so")
    device: Text = setting("cpu", "what the hour is an hour of")
    device_hour: float = setting(0.0, "an hour of one node's training device", ge=0, unit="money")
    gigabyte_up: float = setting(0.0, "per 10^9 bytes from a node to the server", ge=0, unit="money")
    gigabyte_down: float = setting(0.0, "per 10^9 bytes from the server to a node", ge=0, unit="money")
    kilowatt_hour: float = setting(0.0, "a kilowatt-hour; 0 where the hour includes it", ge=0, unit="money")
    carbon_kg_per_kwh: float = setting(0.0, "a kilowatt-hour of electricity", ge=0, unit="kg CO2 equivalent")
    record: float = setting(0.0, "a data record, where data is bought", ge=0, unit="money")
    serving_hour: float = setting(0.0, "an hour of the machine that serves a model", ge=0, unit="money")
    serving_watts: float = setting(0.0, "what that machine takes while it is busy", ge=0, unit="W")
    serving_load: float = setting(0.7, "share of the time that it is busy", gt=0, le=1)
    licences: float = setting(0.0, "software that serving needs, a month", ge=0, unit="money")
    engineering_hour: float = setting(0.0, "an hour of whoever looks after it", ge=0, unit="money")
    engineering_hours: float = setting(0.0, "of that work a month", ge=0, unit="h")
    tasks: Texts | None = setting(None, "models are for: 'NAME, MILLION TEXTS, BUDGET'")


@dataclass
class TrackerConfig(Group):
    """Who else is told the numbers of a run; files only, nothing is sent anywhere."""

    name: Literal["none", "tensorboard", "mlflow", "wandb"] = setting("none", "which tracker")
    folder: Text | None = setting(None, "where it writes; null: RUN_DIR/NAME")
    project: Text = setting("fedtune", "mlflow: the experiment, wandb: the project")


@dataclass
class Config(Group):
    """One run, complete."""

    seed: int = setting(0, "data split, initialisation, client sampling; never the noise", ge=0, le=2**32 - 1)
    resume: Text | None = setting(None, "run folder to go on from")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "what computes")
    output: Text | None = setting(None, "run folder; filled in from hydra.run.dir")
    data: DataConfig = field(default_factory=DataConfig)
    public: PublicConfig = field(default_factory=PublicConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    pricing: PricingConfig = field(default_factory=PricingConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
