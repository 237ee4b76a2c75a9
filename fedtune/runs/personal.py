"""Sites' own parts of the model (`train.personalize`) at the end of a simulation: measured, and saved.

A simulation has all nodes' files at hand, so each site's model can be tested on the test records of that
site, beside the common one, and be saved in PEFT's format as `RUN_DIR/personal/SITE`, which `fedtune predict
--site` loads. Of real sites nothing is here: their parts are with them (`fedtune.federation.personal`).

Only where the server may test openly: where nodes answer about their own data, they answer about this model.
Saved only of data that is declared public: else the model of one site is that site's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedtune.config.choices import tests_openly
from fedtune.federation.personal import PersonalPart, place_of_simulated
from fedtune.federation.run_folder import PERSONAL
from fedtune.privacy.publication import publish
from fedtune.training.evaluation import evaluate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult
    from fedtune.federation.resources import RunResources

__all__ = ["PersonalScore", "finish_parts"]


@dataclass(frozen=True)
class PersonalScore:
    """One site's model: its own part, added to the common one.

    Attributes:
        steps: how often its part moved.
        records: test records of the site; 0 where it was not tested.
        accuracy: on those; None where there are none.
    """

    steps: int
    records: int = 0
    accuracy: float | None = None


def finish_parts(
    config: Config, resources: RunResources, result: FederationResult, run_dir: Path
) -> Mapping[str, PersonalScore] | None:
    """By site that has a part: how its model does. None where the run has no such parts.

    Where a part moved less often than its node released, the run's notices say so.

    Raises:
        OSError: `run_dir` cannot be written.
    """
    if config.train.personalize == "none":
        return None
    scores: dict[str, PersonalScore] = {}
    if config.engine.name == "deployment":
        return scores
    test = resources.prepared.test if tests_openly(config) else None
    head = resources.head()
    for node in result.nodes:
        part = PersonalPart(place_of_simulated(run_dir, node.name), result.run, config, head)
        if part.steps < (made := result.releases.get(node.name, 0)):
            result.notices.append(
                f"The personal part of {node.name} moved for {part.steps} of its {made} releases: rounds "
                "were charged and not trained, or it was lost on the way."
            )
        if not part.steps:
            continue
        adapter = part.result(result.adapter)
        leaving = {"node": node.name, "steps": part.steps, "adapter": adapter}
        published, _ = publish("personal", leaving, public_data=resources.prepared.public)
        if published["adapter"] is not None:
            resources.save(adapter, run_dir / PERSONAL / node.name)
        scores[node.name] = PersonalScore(part.steps)
        if test is not None and test.sites is not None:
            rows = np.flatnonzero(np.asarray(test.sites) == node.name)
            if rows.size:
                with resources.model_at(adapter) as model:
                    accuracy = evaluate(model, test.subset(rows), config.train).accuracy
                scores[node.name] = PersonalScore(part.steps, int(rows.size), accuracy)
    return scores
