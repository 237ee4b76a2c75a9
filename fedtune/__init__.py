"""fedtune: federated fine-tuning of quantized BERT, with a differential-privacy guarantee that holds.

Several sites hold private text, none may hand it over, and together they want one good classifier.
Each node trains a small Adapter on its own Shard; only the Adapter's change ever leaves the node,
and only after noise that was calibrated before any data was read.

The guarantee, which every record and every statement repeats with the numbers filled in:

* **Unit of privacy**: what is protected as one whole. `privacy.unit=person`, the default where the
  data has a unit column: everything that shares one value of it. `record`: one text with its
  label. `client`: all that one node holds.
* **Adjacency**: add or remove one unit. Two data sets are neighbours if one is the other with one
  unit more. (`client`: all that one client holds is replaced by nothing, for their list is public.)
* **Who is trusted with what**: `privacy.trust=local`: nobody but the node itself; what it sends is
  already private. `distributed`: the server sees only a sum over the nodes, which holds enough
  noise for up to the configured number of dropouts and colluding nodes, as long as it follows the
  protocol; against a node, which knows its own share of the noise, a little less is promised, and
  every statement says how much. `central`: the server sees raw updates and must be trusted. `none`:
  no guarantee; epsilon is infinite and reported as null.
* **Mechanism**: Poisson sampling of units at a fixed rate, clipping of each unit's whole gradient
  to `max_grad_norm`, Gaussian noise of standard deviation `noise_multiplier * max_grad_norm`. One
  frozen `PrivacyPlan` makes the sampler, the clipping, the noise, the aggregation weights and the
  event that is accounted, so that none of them can disagree with another.
* **Delta** is always given beside epsilon.
* **Epsilon** is an upper bound, rounded to the safe side, and the largest over everybody who sees what
  was released: under `distributed` a node knows its own share of the noise, and that is counted with. Of
  one run, which is fixed in advance, it comes from privacy loss distributions; over everything that this
  data has ever been used for, as the node's PrivacyLedger knows it (earlier runs, retries, crashes and
  resumed runs count), from Renyi DP. A budget stops by a filter that is proven for releases that are chosen
  while earlier ones are seen (`fedtune.privacy.accounting.filter`). Shards are disjoint, so a federation's
  epsilon is the largest over its nodes, never an average.

Not covered: what was not done through this node's ledger; a person whose records lie on several
nodes (their epsilons add up); the choice of settings by looking at results of private runs, except
as each of those runs is itself in the ledger; and what the owner declares public: data set name,
label set, declared sizes, maximum length, and a test split that is declared so.

The API, which the command line calls too:

    import fedtune

    result = fedtune.run("privacy.epsilon=4", "adapter=lora")
    print(result.epsilon, result.delta, result.accuracy)
    model = fedtune.load(result.path)
    model.predict(["what a film"])

Heavy libraries are imported when they are needed, never by `import fedtune`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedtune.errors import FedtuneError

if TYPE_CHECKING:
    from fedtune.api import Model, Prediction, Result, SweepResult, epsilon, load, run, sweep
    from fedtune.config.schema import Config
    from fedtune.privacy.plan import PrivacyPlan
    from fedtune.report.frame import Frontier

__all__ = [
    "Config",
    "FedtuneError",
    "Frontier",
    "Model",
    "Prediction",
    "PrivacyPlan",
    "Result",
    "SweepResult",
    "__version__",
    "epsilon",
    "load",
    "run",
    "sweep",
]

__version__ = "0.2.0"

_MODULES = {"Config": "config.schema", "Frontier": "report.frame", "PrivacyPlan": "privacy.plan"}  # else: api


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"fedtune.{_MODULES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
