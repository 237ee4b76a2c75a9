"""Makes the plan of a run from its configuration: checks, fills in defaults, calibrates the noise.

It reads settings and declared (public) sizes and nothing else, so that all of it happens before any private
data is read; a node makes the same plan from its own configuration and compares (`federation.node`). What a
plan says and does is in `fedtune.privacy.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.config.choices import resolved
from fedtune.config.schema import Config, PrivacyConfig
from fedtune.errors import CalibrationError, PrivacyError
from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.checks import TRUSTS, number, whole
from fedtune.privacy.evaluation import evaluation_noise, evaluation_settings
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.sizes import DELTA, SIZE_NOISE, largest, size_noise

__all__ = ["default_delta", "make_plan"]


def make_plan(
    config: Config, declared_sizes: Sequence[int], largest_delta: float | None = None
) -> PrivacyPlan:
    """The plan of a run, its noise calibrated before any data is read.

    Args: `config`, complete; `declared_sizes`, the public size of each node's shard in units of
    `privacy.unit` (records or persons; for unit=client only their number counts), without what is held out
    for evaluation; `largest_delta`, which a default delta is not to exceed (the smallest of the owners'
    budgets'). The default delta is that of `default_delta`, where n is the size of the largest shard
    (local), of all shards together (distributed) or the number of clients (central), so that it is below 1/n
    for every shard; where sizes are told with noise (`fedtune.privacy.sizes`), which is in the epsilon, it is
    a constant. For `local` the plan holds the largest size; each node takes its own with `for_shard`.
    Raises `PrivacyError` or `CalibrationError`, naming the setting; where one unit has all the data, no
    default delta is made.
    """
    config = resolved(config)
    privacy, train, federation = config.privacy, config.train, config.federation
    if not declared_sizes:
        raise PrivacyError("A plan needs the declared size of at least one node.")
    sizes = [whole(size, "declared size of a node") for size in declared_sizes]
    if privacy.trust not in TRUSTS:
        raise PrivacyError(f"privacy.trust must be one of {', '.join(TRUSTS)}, not {privacy.trust!r}.")
    nodes = len(sizes)
    cohort = nodes if federation.cohort_size is None else federation.cohort_size
    central, distributed = privacy.trust == "central", privacy.trust == "distributed"
    declared = {"distributed": sum(sizes), "central": nodes}.get(privacy.trust, max(sizes))
    common: dict[str, Any] = {
        "trust": privacy.trust,
        "unit": privacy.unit,
        "sample_rate": 1.0 if central else train.sample_rate,
        "local_steps": 1 if central or distributed else train.local_steps,
        "num_rounds": federation.num_rounds,
        "declared_size": declared,
        "records_per_unit": privacy.records_per_unit if privacy.unit == "person" else 1,
        "reproducible_noise": privacy.reproducible_noise,
        "seed": config.seed,
        "weighting": federation.weighting,
        "nodes": nodes,
        "max_dropouts": privacy.max_dropouts if distributed else 0,
        "max_colluders": _colluders(privacy, nodes) if distributed else 0,
        "cohort_size": cohort,
        "training_sample_rate": train.sample_rate,
        "training_steps": train.local_steps,
        "adaptive_clipping": privacy.adaptive_clipping,
        "clip_quantile": privacy.clip_quantile,
        "mechanism": privacy.mechanism,
        "bands": privacy.min_separation if privacy.bands is None else privacy.bands,
        "min_separation": privacy.min_separation,
    }
    share, answers = evaluation_settings(config)
    told = size_noise(config)
    common |= {"evaluation_share": share, "evaluation_answers": answers, "size_noise": told}
    if privacy.unit == "person":
        whole(privacy.records_per_unit, "privacy.records_per_unit")
    if privacy.trust == "none":
        if privacy.noise_multiplier not in (None, 0.0):
            raise PrivacyError(
                f"privacy.trust=none adds no noise, but privacy.noise_multiplier is "
                f"{privacy.noise_multiplier}. Choose trust=local, distributed or central, or leave the noise "
                "multiplier out."
            )
        unmeasured = {
            "adaptive_clipping": False, "reproducible_noise": False,
            "mechanism": "gaussian", "bands": 1, "min_separation": 1,
        }  # fmt: skip
        return PrivacyPlan(
            **{**common, **unmeasured},
            noise_multiplier=0.0,
            max_grad_norm=math.inf,
            delta=0.0,
            target_epsilon=None,
        )
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        both = privacy.epsilon is not None
        raise PrivacyError(
            f"privacy.epsilon and privacy.noise_multiplier are {'both' if both else 'neither'} set; one "
            "determines the other. Set one and give the other as null: privacy.epsilon=null to choose the "
            "noise, privacy.noise_multiplier=null to choose the guarantee."
        )
    if declared == 1 and not told and not central and privacy.delta is None and largest_delta is None:
        way_out = ", privacy.unit=record, or another column in data.unit" if privacy.unit == "person" else ""
        raise PrivacyError(
            f"One {privacy.unit} holds all the data, so there is nobody to hide it among, and no delta can "
            f"be chosen for you. Choose a privacy.delta of your own (1e-5, say){way_out}."
        )
    # What is declared is what is trained on; who is held out is promised the same. Of sizes that were told
    # with noise no part of the mechanism may follow: it would then be chosen after a release was seen.
    default = DELTA if told else default_delta(declared / (1.0 - share))
    limit = math.inf if largest_delta is None else largest_delta
    delta = min(default, limit) if privacy.delta is None else privacy.delta
    if told:
        _check_told(privacy.delta, delta, privacy.epsilon, largest(declared / (1.0 - share), told, nodes))
    common["evaluation_noise"] = evaluation_noise(config, delta, answers) if answers else 0.0
    common |= {"max_grad_norm": privacy.max_grad_norm, "delta": delta, "target_epsilon": privacy.epsilon}
    # A plan with any noise first: it refuses every setting without meaning before time is spent.
    given = 1.0 if privacy.noise_multiplier is None else privacy.noise_multiplier
    draft = _with_noise(common, given)
    if privacy.epsilon is None:
        return draft
    if draft.mechanism == "dp_ftrl":
        rate, steps = 1.0, 1  # the whole run is one Gaussian
    else:
        ((term, steps),) = (draft.terms(draft.num_rounds) or {}).items()
        rate = term.sample_rate
    also = draft.everything(0, answers)
    try:
        noise = noise_multiplier_for(privacy.epsilon, delta, sample_rate=rate, steps=steps, also=also)
    except CalibrationError as error:
        if not central:
            raise
        root = draft.root()
        often = "every round" if root is None else f"{root.participations} of {root.num_rounds} rounds"
        raise CalibrationError(
            f"{error} The unit here is a client, and each of {nodes} takes part in {often} in sight of all."
        ) from error
    return _with_noise(common, noise)


def default_delta(units: float) -> float:
    """min(n^-1.1, 1e-3) for n `units`: below 1/n for every n above 1, and small where n is.

    With a delta of 1/n a mechanism may publish one of n people outright (Dwork and Roth 2014, section 2.3).
    """
    return min(units**-1.1, 1e-3)


def _colluders(privacy: PrivacyConfig, nodes: int) -> int:
    """`privacy.max_colluders`, or what can be had: one, unless dropouts leave secure aggregation too few
    answers for that (it needs those of more than half of nodes and colluders together)."""
    if privacy.max_colluders is not None:
        return privacy.max_colluders
    return 1 if nodes > 1 and (nodes + 1) // 2 + 1 <= nodes - privacy.max_dropouts else 0


def _check_told(given: float | None, delta: float, target: float | None, most: float) -> None:
    """What is asked of a run whose sizes are told with noise. Raises PrivacyError, CalibrationError."""
    way_out = "Declare a size, which is then public: data.declared_size=N, about how many there are in all"
    if given is None and most**-1.1 < delta:
        raise PrivacyError(
            f"There may be {most:,.0f} units, and the default delta of {delta:g}, which is fixed before any "
            f"size is told, is too large for so many. Set privacy.delta (below {most**-1.1:.1g}). "
            f"Or: {way_out}."
        )
    cost = epsilon_of_terms({Term(1.0, SIZE_NOISE): 1}, delta)
    if target is not None and cost >= target:
        raise CalibrationError(
            f"Nobody declared how much data each node has, and to tell it with noise costs epsilon "
            f"{cost:.2g}, which leaves nothing of privacy.epsilon={target:g} for training. {way_out}."
        )


def _with_noise(common: Mapping[str, Any], noise_multiplier: float) -> PrivacyPlan:
    spread = 0.0
    if common["adaptive_clipping"]:
        # A twentieth of the cohort (Andrew et al. 2021), but enough that something is left for the updates.
        noise = number(noise_multiplier, "privacy.noise_multiplier")
        spread = max(whole(common["cohort_size"], "federation.cohort_size") / 20.0, noise)
    return PrivacyPlan(**{**common, "quantile_noise": spread}, noise_multiplier=noise_multiplier)
