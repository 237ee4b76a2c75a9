"""What `fedtune node` does that takes more than a line: try a run, back up, restore."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.deploy.site import DryRun
    from fedtune.federation.client.policy import SiteSettings

__all__ = ["back_up", "try_run"]


def back_up(
    site: SiteSettings, config: Path, words: list[str], output: Path | None, forget: int | None
) -> tuple[dict[str, Any], str]:
    """`fedtune node backup | restore FILE`: what was done, as values and as text."""
    from fedtune.deploy import backup

    if words == ["backup"] and output is not None:
        head = backup.backup(site, config, output)
        return {"file": str(output), "head": head}, (
            f"{output} has all that site {site.site} must not lose, and its keys: keep it as secret.\n"
            f"head {head} (file it elsewhere; later: fedtune node proof --against HEAD)"
        )
    if words[0] == "restore" and len(words) == 2:
        done = backup.restore(site, Path(words[1]), forget)
        lines = [f"the books of site {site.site} are as they were on {done.made}; their head is {done.head}"]
        if done.aside is not None:
            lines.append(f"what was there before is in {done.aside}")
        if done.forgotten:
            lines.append(f"{done.forgotten} releases are forgotten; the audit log says so")
        lines.append(
            "If the server, which may know longer books, does not let this site in, its operator does: "
            f"`fedtune server DIR --accept-restore {site.site}`"
        )
        found = {"head": done.head, "made": done.made, "forgotten": done.forgotten}
        return {**found, "aside": None if done.aside is None else str(done.aside)}, "\n".join(lines)
    raise ConfigError(
        "Give `fedtune node backup --config node.yaml -o FILE.zip`, or `fedtune node restore FILE.zip "
        "--config node.yaml`."
    )


def try_run(site: SiteSettings, overrides: list[str]) -> DryRun:
    """`fedtune node --dry-run`: what a proposed run would do here."""
    from fedtune.config.convert import value_text
    from fedtune.config.loader import load
    from fedtune.deploy.site import dry_run

    # What a run of this site's data asks by default, and not one of the data that `fedtune run` simulates.
    words = ["engine.name=deployment"]
    if not any(word.startswith("data=") for word in overrides):
        words.append(f"data={site.data.source}")
    if site.data.unit is not None and not any(word.startswith("data.unit=") for word in overrides):
        words.append(f"data.unit={value_text(site.data.unit)}")
    proposed = load([*words, *overrides])
    if not any(word.startswith("data.name=") for word in overrides):
        data = dataclasses.replace(proposed.data, name=site.data.name)
        proposed = dataclasses.replace(proposed, data=data)
    return dry_run(site, proposed)
