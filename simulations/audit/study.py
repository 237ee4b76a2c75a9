#!/usr/bin/env python
"""Claimed against measured epsilon: the right mechanism at several budgets, and six bugs at one.

    python simulations/audit/study.py                 all audits, then the report
    python simulations/audit/study.py --report        the report alone, from the records there are
    python simulations/audit/study.py --seeds 0       one repetition of each

Nothing is trained and no data is read: `fedtune.audit.attack.audit_mechanism` runs the plan's own sampler,
clipping, noise and averaging on canaries (the same as `fedtune audit RUN_DIR`). Randomness comes from the
seed, so that a record can be made again. An audit that is done is kept as `records/NAME.json` and skipped the
next time. A bug is a plan whose one method does something else while its claim stays: see `BUGS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from fedtune.audit.attack import audit_mechanism  # noqa: E402
from fedtune.privacy.accounting.calibration import noise_multiplier_for  # noqa: E402
from fedtune.privacy.mechanisms.distributed import Distributed  # noqa: E402
from fedtune.privacy.mechanisms.local import Local  # noqa: E402
from fedtune.privacy.plan import PrivacyPlan  # noqa: E402
from fedtune.runs import (  # noqa: E402
    environment,
    record,
)

SEEDS = (0, 1, 2)
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
CANARIES = 20_000
DELTA = 1e-5
BUGGY = ("sampled", 4.0)  # the plan in which the bugs are switched on

PLANS: dict[str, dict[str, Any]] = {
    "sampled": {"mechanism": Local(sample_rate=0.05, local_steps=5), "num_rounds": 24},
    "every step": {"mechanism": Local(sample_rate=1.0, local_steps=1), "num_rounds": 12},
    "distributed": {
        "mechanism": Distributed(sample_rate=0.05, max_dropouts=1), "num_rounds": 30, "nodes": 4,
    },
}  # fmt: skip


class HalfNoise(PrivacyPlan):
    """noise at half of its scale"""

    def noise(self, size: int, entropy: Any) -> Any:
        return super().noise(size, entropy) / 2.0


class NoClipping(PrivacyPlan):
    """clipping left out"""

    def clip_factors(self, norms: Any) -> Any:
        return np.ones(len(np.asarray(norms)))


class HeadNotNoised(PrivacyPlan):
    """a tenth of the parameters not noised"""

    def noise(self, size: int, entropy: Any) -> Any:
        values = super().noise(size, entropy)
        values[-(size // 10) :] = 0.0
        return values


class FixedBatch(PrivacyPlan):
    """the same batch in every step"""

    def sample(self, num_units: int, entropy: Any) -> Any:
        return np.arange(num_units)[: round(self.sample_rate * num_units)]


class CyclicBatches(PrivacyPlan):
    """batches in turn, not shuffled"""

    def sample(self, num_units: int, entropy: Any) -> Any:
        step = getattr(self, "_step", 0)
        object.__setattr__(self, "_step", step + 1)
        return np.flatnonzero(np.arange(num_units) % round(1.0 / self.sample_rate) == step % 20)


class ResetAccountant(PrivacyPlan):
    """accountant reset each round"""


BUGS: dict[str, type[PrivacyPlan]] = {
    kind.__name__: kind
    for kind in (HalfNoise, NoClipping, HeadNotNoised, FixedBatch, CyclicBatches, ResetAccountant)
}


@dataclass(frozen=True)
class Cell:
    """One audit of the study."""

    plan: str
    epsilon: float
    bug: str | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its record file."""
        return f"{self.plan.replace(' ', '-')}-epsilon{self.epsilon:g}-{self.bug or 'right'}-seed{self.seed}"

    def audit(self) -> dict[str, Any]:
        """The record of this audit."""
        started = time.perf_counter()
        settings = PLANS[self.plan]
        mechanism = settings["mechanism"]
        steps = mechanism.steps_per_release() * settings["num_rounds"]
        # Resetting the accountant: each round is calibrated as if it were the only one.
        counted = mechanism.steps_per_release() if self.bug == "ResetAccountant" else steps
        plan = PrivacyPlan(
            **settings,
            unit="record",
            noise_multiplier=noise_multiplier_for(
                self.epsilon, DELTA, sample_rate=mechanism.sample_rate_accounted(), steps=counted
            ),
            max_grad_norm=1.0,
            declared_size=20_000,
            delta=DELTA,
            target_epsilon=self.epsilon,
            reproducible_noise=True,
            seed=self.seed,
        )
        releases = 1 if self.bug == "ResetAccountant" else plan.num_rounds
        claimed = plan.epsilon(releases)
        if self.bug is not None:
            values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
            plan = BUGS[self.bug](**values)
        result = audit_mechanism(plan, plan.num_rounds, claimed=claimed, canaries=CANARIES)
        return {
            "cell": dataclasses.asdict(self),
            "bug": None if self.bug is None else BUGS[self.bug].__doc__,
            "plan": plan.to_json(),
            "audit": result.to_json(),
            "seconds": time.perf_counter() - started,
            "commit": environment.commit()[0],
            "python": platform.python_version(),
        }


def cells(seeds: list[int]) -> list[Cell]:
    """The audits, one seed after the other."""
    found = []
    for seed in seeds:
        found += [Cell(plan, epsilon, None, seed) for plan, epsilon in itertools.product(PLANS, EPSILONS)]
        found += [Cell(*BUGGY, bug, seed) for bug in BUGS]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), metavar="N,N", help="default: 0,1,2")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="where records are kept")
    parser.add_argument("--report", action="store_true", help="audit nothing; figure and README only")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(HERE))
    import report

    wanted = [] if options.report else cells([int(seed) for seed in options.seeds.split(",")])
    for number, cell in enumerate(wanted, start=1):
        path = options.records / f"{cell.name}.json"
        if not path.exists():
            record.write(cell.audit(), path)
        print(f"[{number}/{len(wanted)}] {cell.name}", flush=True)
    target = HERE if options.records.resolve() == HERE / "records" else options.records
    print(report.write(options.records, target))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
