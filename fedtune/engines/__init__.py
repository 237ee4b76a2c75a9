"""What runs a federation: `local` in this process, `ray` over worker processes, `deployment` over real
sites. The apps are the same.

An engine gives every node a Context (`partition-id`, `num-partitions`, and the configuration as JSON)
and the server loop a Flower Grid; everything else is `fedtune.federation`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult, Observer

__all__ = ["ENGINES", "run"]

ENGINES = ("local", "ray", "deployment")


def run(config: Config, run_dir: Path, observer: Observer | None = None) -> FederationResult:
    """Runs the federation that `config` describes, with the engine that it names.

    Raises:
        ConfigError: the engine is not known.
        FedtuneError: as `fedtune.federation.server.loop.run_rounds` does.
    """
    if config.engine.name == "local":
        from fedtune.engines.local import run as run_local

        return run_local(config, run_dir, observer)
    if config.engine.name == "ray":
        from fedtune.engines.ray import run as run_ray

        return run_ray(config, run_dir, observer)
    if config.engine.name == "deployment":
        from fedtune.deploy.submit import run as run_deployment

        return run_deployment(config, run_dir, observer)
    raise ConfigError(f"engine={config.engine.name!r} is not known; it can be {' or '.join(ENGINES)}.")
