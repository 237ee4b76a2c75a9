"""What a node permits: its own configuration and file, against which all that a server asks is checked.

The server proposes, the node disposes. A site's settings (`node.yaml`, read by the deployment engine)
reach the ClientApp as the node's own Context, never by a message. They replace the whole data section of a
run's configuration, so that a server can name no other data, and `SiteSettings.check` refuses a run that
asks for a mechanism, model, adapter, noise, clipping norm, step count, rate or number of rounds that the
site has not permitted. Budgets are the ledger's; a fingerprint that changes within a run is refused here.
`check_plan` is what every node checks, simulated ones too: that the plan is the one which its own
configuration makes.

Pure: no Flower, no file is opened.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fedtune.config.choices import resolved
from fedtune.config.convert import build, parse_json, to_json
from fedtune.config.schema import (
    AdapterName,
    Before,
    Config,
    DataConfig,
    Group,
    PartitionConfig,
    PublicConfig,
    Source,
    Trust,
    Unit,
    as_tuple,
    setting,
)
from fedtune.errors import ConfigError, PrivacyError
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.mechanisms.registry import MECHANISMS, mechanism_of
from fedtune.privacy.plan import UNITS, PrivacyPlan

__all__ = ["Limits", "Permit", "SiteData", "SiteSettings", "check_plan"]

_MOST_NODES = 1_000_000  # a plan is made from as many sizes: a server that names more would fill the memory


def _classes(value: object) -> object:
    if isinstance(value, (list, tuple)) and (len(value) < 2 or len(set(map(str, value))) < len(value)):
        raise ValueError("two classes or more, each once")
    return as_tuple(value)


ADAPTERS: tuple[AdapterName, ...] = typing.get_args(AdapterName)

Words = Annotated[tuple[str, ...], Before(as_tuple)]
Trusts = Annotated[tuple[Trust, ...], Before(as_tuple)]
Adapters = Annotated[tuple[AdapterName, ...], Before(as_tuple)]
Classes = Annotated[tuple[str, ...], Before(_classes)]


@dataclass(frozen=True)
class SiteData(Group):
    """Where the site's data is.

    Public of it: `declared_size`, about how many units of privacy there are, and `labels`, the classes in
    order. A run must name the same labels. None: a run may name any, and a server that tries one set after
    another learns, from which of them cannot be used, what labels occur.
    """

    name: str
    declared_size: int = field(metadata={"ge": 1})
    source: Source = "files"
    path: str | None = None
    subset: str | None = None
    revision: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    unit: str | None = None
    site: str | None = None
    train_split: str = "train"
    labels: Classes | None = None
    public: bool = False


@dataclass(frozen=True)
class Permit(Group):
    """What a run may ask. Bounds on the plan hold for trust models that are private.

    A model is permitted as `NAME`, without a revision, or as `NAME@REVISION`.
    """

    trust: Trusts = ("local", "distributed")
    models: Words = ("embedded:minilm",)
    pickle: bool = setting(False, "weights may be read from a pickle, by a reader that runs no code of it")
    adapters: Adapters = ADAPTERS
    max_rank: int = setting(64, "of the two matrices of lora and ffa_lora", ge=1)
    max_length: int = setting(512, "tokens that are seen of a text, in all of its windows", ge=4)
    max_micro_batch_tokens: int = setting(16384, "computed at once: memory grows with it", ge=16)
    max_epsilon: float | None = setting(None, "of one run; null: what is left of the budget", gt=0)
    min_noise_multiplier: float = 0.3
    max_grad_norm: float = 10.0
    max_local_steps: int = 100
    max_rounds: int = 200
    max_sample_rate: float = 1.0
    max_evaluations: int = setting(10, "noised answers about held-out data that a run may ask; 0: none", ge=0)
    min_colluders: int = setting(
        1, "trust=distributed: nodes that may side with the server, which noise must cover", ge=0
    )


@dataclass(frozen=True)
class Limits(Group):
    """What the node's worker may use of the machine."""

    threads: int = setting(2, "of the processor", ge=1)
    memory_gb: float | None = setting(8.0, "of the worker; null: any", gt=0)
    message_seconds: float = setting(7200.0, "a worker that takes longer for one message is killed", gt=0)
    idle_seconds: float | None = setting(
        900.0, "a worker without a message for so long ends; null: it stays", gt=0
    )
    stop_seconds: float = setting(60.0, "a node that is told to leave finishes its message, so long", ge=0)


@dataclass(frozen=True)
class SiteSettings(Group):
    """A site's own file, checked. Paths are absolute.

    `submitters`: lines of the operators whose runs this site takes; none: of any that the server lets in.
    `approval`: each run waits until the site's administrator has approved it (`fedtune node approve`).
    """

    federation: str
    site: str
    server: str
    ca: str
    key: str
    data: SiteData
    ledger: str
    audit_log: str
    budget_epsilon: float
    budget_delta: float
    budget_unit: Unit | None = None
    permit: Permit = field(default_factory=Permit)
    limits: Limits = field(default_factory=Limits)
    publish_budget: bool = False
    submitters: Words = ()
    approval: bool = False

    @property
    def budget(self) -> PrivacyBudget:
        """The owner's budget.

        Where the data names persons they are what it protects, unless the file says `unit: record` in words:
        a server cannot choose a finer promise than the data allows.

        Raises:
            PrivacyError: it has no meaning.
        """
        unit = "person" if self.budget_unit is None and self.data.unit is not None else self.budget_unit
        return PrivacyBudget(self.budget_epsilon, self.budget_delta, unit)

    def to_json(self) -> str:
        """One line; `from_json` reads it back to equal settings."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> SiteSettings:
        """Inverse of `to_json`.

        Raises:
            ConfigError: `to_json` does not write such a text.
        """
        return cls.from_dict(parse_json(text), "the node's settings")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> SiteSettings:
        """Checked settings from nested mappings.

        Raises:
            ConfigError: a setting is wrong; it names key, value and `where`.
        """
        settings = build(cls, values, where)
        for trust in settings.permit.trust:
            if not MECHANISMS[trust].is_private and not settings.data.public:
                raise ConfigError(
                    f"{where}: permit.trust names {trust}, which protects nobody, and data.public is false. "
                    "Take it out, or declare the data public."
                )
        _ = settings.budget
        return settings

    def own(self, asked: Config) -> Config:
        """The configuration that this node works with: the run's, with the data and engine of its own.

        What is seen of a text and the split of a public data set stay the run's, and the label set
        where the site's file names none.
        """
        mine = {name: value for name, value in vars(self.data).items() if name != "labels"}
        data = DataConfig(
            **mine,
            only_site=self.site,
            test_fraction=asked.data.test_fraction,
            max_length=asked.data.max_length,
            long_text=asked.data.long_text,
            max_windows=asked.data.max_windows,
            labels=asked.data.labels if self.data.labels is None else list(self.data.labels),
        )
        return dataclasses.replace(
            asked,
            data=data,
            public=PublicConfig(),  # a file of the submitter's: nothing is looked for here at its path
            partition=PartitionConfig(name="natural"),
            federation=dataclasses.replace(asked.federation, nodes=None),
            engine=dataclasses.replace(asked.engine, name="deployment", server=None),
            resume=None,
            output=None,
        )

    def check(
        self, asked: Config, plan: PrivacyPlan, used: Iterable[str] = (), fingerprint: str = ""
    ) -> None:
        """Refuses what this site does not permit, with all that is wrong at once.

        Args:
            asked: the run's configuration as the server sent it.
            plan: what the server proposes.
            used: what the ledger knows the data of this run's releases by; not published.
            fingerprint: what the ledger knows the data by now; not published.

        Raises:
            PrivacyError: the site does not permit it.
        """
        problems = [*self._asked_problems(asked), *self._plan_problems(plan)]
        if any(known != fingerprint for known in used):
            problems.append(
                "its data has changed since this run began, and what this run was charged to is not what it "
                "would be trained on now; start a new run"
            )
        self._refuse(problems)

    def admit(self, asked: Config) -> None:
        """The part of `check` that can be made before data, tokenizer or model is loaded for a run.

        Raises:
            PrivacyError: the run names other data, another model or adapter; nothing is loaded for it.
        """
        self._refuse([*self._asked_problems(asked)])

    def check_evaluation(self, plan: PrivacyPlan) -> None:
        """Refuses questions about held-out data that this site does not answer.

        Apart from `check`: a site that answers none can still take part in the training.

        Raises:
            PrivacyError: it does not permit so many answers, or so little noise.
        """
        most, least = self.permit.max_evaluations, self.permit.min_noise_multiplier
        if plan.evaluation_answers > most:
            allowed = f"permits {most}" if most else "permits none"
            self._refuse(
                [f"it asks for {plan.evaluation_answers} answers about held-out data, and the site {allowed}"]
            )
        if plan.is_private() and not plan.evaluation_noise >= least:
            self._refuse(
                [
                    f"evaluation noise {plan.evaluation_noise:.4g} is below the least permitted "
                    f"noise_multiplier, {least:g}"
                ]
            )

    def _refuse(self, problems: Sequence[str]) -> None:
        if problems:
            raise PrivacyError(
                f"Site '{self.site}' does not permit this run: {'; '.join(problems)}. Nothing was released. "
                "Change the run, or ask the site's administrator."
            )

    def _asked_problems(self, asked: Config) -> Iterable[str]:
        permit = self.permit
        if asked.data.name != self.data.name:
            yield f"it asks for data '{asked.data.name}', and the site offers '{self.data.name}' (data.name)"
        labels = self.data.labels
        if labels is not None and labels != tuple(asked.data.labels or ()):
            named = ", ".join(asked.data.labels or ()) or "none"
            yield f"its labels are {named}, and the site's {', '.join(labels)}, in this order (data.labels)"
        model, revision = asked.model.name, asked.model.revision
        if (model if revision is None else f"{model}@{revision}") not in permit.models:
            named = repr(model) if revision is None else f"{model!r} of revision {revision!r}"
            yield f"model {named} is not among the permitted {', '.join(permit.models)}"
        if asked.model.pickle and not permit.pickle:
            yield "model.pickle=true has weights read from a pickle, which is not permitted (permit.pickle)"
        if asked.adapter.name not in permit.adapters:
            yield f"adapter {asked.adapter.name} is not among the permitted {', '.join(permit.adapters)}"
        windows = asked.data.windows
        seen = "data.max_length" if windows == 1 else f"{windows} windows of data.max_length, together"
        for name, value, most in (
            ("adapter.rank", asked.adapter.rank, permit.max_rank),
            (seen, asked.data.longest * windows, permit.max_length),
            ("train.micro_batch_tokens", asked.train.micro_batch_tokens, permit.max_micro_batch_tokens),
        ):
            if value > most:
                yield f"{name}={value} is more than the permitted {most}"

    def _plan_problems(self, plan: PrivacyPlan) -> Iterable[str]:
        permit = self.permit
        if plan.trust not in permit.trust:
            yield f"privacy.trust={plan.trust} is not among the permitted {', '.join(permit.trust)}"
        if plan.num_rounds > permit.max_rounds:
            yield f"{plan.num_rounds} rounds are more than the permitted {permit.max_rounds}"
        if plan.local_steps > permit.max_local_steps:
            yield f"{plan.local_steps} local steps are more than the permitted {permit.max_local_steps}"
        if plan.reproducible_noise:
            yield "reproducible noise is for simulations only"
        if not plan.is_private():
            return
        if (unit := self.budget.unit) is not None and UNITS.index(plan.unit) < UNITS.index(unit):
            yield f"privacy.unit={plan.unit} is finer than the site's budget allows: set privacy.unit={unit}"
        if plan.unit == "person" and self.data.unit is None and self.data.source == "files":
            yield (
                "privacy.unit=person asks it to protect persons, and its file names no column that says "
                "whose record is whose (data.unit)"
            )
        if not self.data.public and plan.delta > self.budget_delta:
            yield (
                f"its delta is {plan.delta:g}, and the budget is at delta {self.budget_delta:g}, whose "
                "epsilon is not promised at a larger one (set privacy.delta to that or less, or leave it "
                "out: then the smallest of the sites' is taken)"
            )
        if not plan.noise_multiplier >= permit.min_noise_multiplier:
            yield (
                f"noise_multiplier={plan.noise_multiplier:.4g} is below the least permitted, "
                f"{permit.min_noise_multiplier:g}"
            )
        if permit.max_epsilon is not None and not self.data.public:
            epsilon = plan.epsilon()
            if not epsilon <= permit.max_epsilon * (1 + 1e-6):
                yield f"epsilon {epsilon:.4g} of this run is more than the permitted {permit.max_epsilon:g}"
        if not plan.max_grad_norm <= permit.max_grad_norm:
            yield f"max_grad_norm={plan.max_grad_norm:g} is above the permitted {permit.max_grad_norm:g}"
        yield from plan.mechanism.refusals(plan, permit.max_sample_rate, permit.min_colluders)


def check_plan(plan: PrivacyPlan, config: Config) -> None:
    """The node's own check of what the server proposes.

    The plan must be the one that the node's own configuration makes, in every field: another unit, trust
    model, rate, clipping norm or number of steps is refused. The noise may be any, as long as it meets
    the configured epsilon over all the rounds that the plan is for.

    Raises:
        PrivacyError: they differ; it names both values.
    """
    from fedtune.privacy.mechanisms.counts import evaluation_epsilon
    from fedtune.privacy.plan import make_plan

    config = resolved(config)
    privacy, federation, nodes = config.privacy, config.federation, plan.nodes
    if nodes > _MOST_NODES:
        raise PrivacyError(
            f"The server proposes a plan for {nodes:,} nodes, and this node makes none for more than "
            f"{_MOST_NODES:,}."
        )
    if federation.evaluation == "private" and plan.is_private():
        # What the configuration says, before the target that it may be a part of is taken out below.
        federation = dataclasses.replace(federation, evaluation_epsilon=evaluation_epsilon(config))
    sizes = plan.mechanism.sizes_like(plan)  # what they are one by one the node need not know
    if mechanism_of(privacy.trust).is_private and plan.is_private():
        given = privacy.noise_multiplier
        noise = plan.noise_multiplier if given is None else given
        privacy = dataclasses.replace(privacy, epsilon=None, noise_multiplier=noise)
    # A default delta may be any smaller one: the smallest of the sites' budgets'.
    limit = plan.delta if plan.is_private() else None
    mine = make_plan(dataclasses.replace(config, privacy=privacy, federation=federation), sizes, limit)
    free = {"target_epsilon", "evaluation_noise", *mine.mechanism.free_settings()}
    proposed, permitted = plan.settings(), mine.settings()
    for name in [*permitted, *proposed]:
        if name not in free and proposed.get(name) != permitted.get(name):
            raise PrivacyError(
                f"The server proposes a plan with {name}={proposed.get(name)!r}, and this node's "
                f"configuration permits {name}={permitted.get(name)!r}. Start server and nodes with "
                "the same configuration."
            )
    about = plan.evaluation()
    if about is not None and plan.is_private():
        cost, most = about.epsilon(), evaluation_epsilon(config)
        if not cost <= most * (1 + 1e-6):
            raise PrivacyError(
                f"The server proposes evaluation_noise={plan.evaluation_noise:.4g}, with which "
                f"{about.num_rounds} answers cost epsilon {cost:.4g}; this node's configuration permits "
                f"{most:g}. Use the calibrated noise."
            )
    if plan.is_private() and config.privacy.epsilon is not None:
        epsilon = plan.epsilon()
        if not epsilon <= config.privacy.epsilon * (1 + 1e-6):
            raise PrivacyError(
                f"The server proposes noise_multiplier={plan.noise_multiplier:.4g}, which gives epsilon "
                f"{epsilon:.4g} over {plan.num_rounds} rounds at delta {plan.delta:g}; this node's "
                f"configuration permits {config.privacy.epsilon:g}. Use the calibrated noise multiplier."
            )
