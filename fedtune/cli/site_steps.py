"""What `fedtune node` does that takes more than a line: try a run, approve one, back up, restore."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError, FedtuneError

if TYPE_CHECKING:
    from fedtune.deploy.site import DryRun
    from fedtune.federation.client.policy import SiteSettings

__all__ = ["approve", "back_up", "try_run"]


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
        if done.forgotten is None:
            lines.append(
                "What was released since then is not known here, and was not counted: if it was anything, "
                "lower budget.epsilon in node.yaml by what it cost (the records of the runs say it)"
            )
        elif done.forgotten:
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


def approve(
    site: SiteSettings, digests: list[str], *, yes: bool = False, ask: Callable[[str], bool] | None = None
) -> tuple[dict[str, Any], str]:
    """Runs that wait, with what each would spend here; or approves one: (values, text for a person).

    Args:
        site: the site's settings.
        digests: the digest of one run, as it is shown; none: all are shown, and none is approved.
        yes: approve it without a question.
        ask: shows a person what it would spend, and returns whether they say yes; None: nobody is there.

    Raises:
        ConfigError: no such run waits, or nobody said yes.
    """
    from fedtune.deploy.consent import Consent, shown

    if len(digests) > 1:
        raise ConfigError("fedtune node approve takes one run at a time: look at what it would spend.")
    consent = Consent(site)
    if not digests:
        told = [_told(site, run) for run in consent.waiting()]
        texts = [text for _, text in told]
        if not site.approval:
            texts.append(
                "node.yaml has approval: false, so no run waits; set approval: true and start the node."
            )
        return {"runs": [values for values, _ in told]}, "\n\n".join(texts) or "no run waits"
    run = consent.one(digests[0])
    if not yes:
        if ask is None:
            raise ConfigError(
                f"Nobody is asked here whether run {shown(run['digest'])} may have what it would spend, for "
                "this is no terminal. Type it at one, or give --yes if you have looked. Nothing was approved."
            )
        if not ask(_told(site, run)[1]):
            raise ConfigError(f"Run {shown(run['digest'])} was not approved, and waits.")
    values, text = _told(site, consent.approve(run["digest"]))
    return {"runs": [values]}, text


def _told(site: SiteSettings, run: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A run that waits, or was approved, and what it would spend here: (values, text)."""
    from fedtune.config.convert import config_from_json
    from fedtune.deploy.consent import shown
    from fedtune.deploy.site import dry_run
    from fedtune.privacy.publication import one_line

    state = "waits" if not run["approved"] else "approved" if not run["run"] else "approved, and used"
    try:
        asked = config_from_json(run["config"])
        site.admit(asked)  # nothing that it names is looked for, here or on the network, before this
        found = dry_run(site, asked).text()
    except FedtuneError as error:
        found = f"what it would do here cannot be said: {error}"
    who = f" by {run['by']}" if run["by"] else ""
    # Whoever submitted it wrote its words: they must not write lines of their own here, or hide any.
    lines = [one_line(line, keep_blanks=True) for line in found.splitlines()]
    head = f"run {shown(run['digest'])}, asked for at {run['since']}{who}: {state}"
    return {**run, "dry_run": lines}, "\n".join([head, *lines])
