"""A site's own file, and what its administrator does: make a key, try a run, check and prove the books.

The books are the privacy ledger and the audit log (`fedtune.federation.client.audit_log.Books`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedtune.config.convert import read_yaml
from fedtune.deploy import certificates
from fedtune.deploy.archives import SEAL, check_archive
from fedtune.deploy.authorities import authority_fingerprint
from fedtune.deploy.certificates import parse_address
from fedtune.deploy.consent import check_lines
from fedtune.errors import ConfigError, DataError, LedgerError, PrivacyError
from fedtune.federation.client.audit_log import AuditLog, Books
from fedtune.federation.client.policy import SiteSettings
from fedtune.privacy.ledger.ledger import PrivacyLedger

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.privacy.mechanisms.counts import EvaluationPlan

__all__ = [
    "DryRun",
    "accept",
    "books_of",
    "check_books",
    "check_files",
    "dry_run",
    "make_key",
    "open_ledger",
    "proof",
    "read_site",
]

_T = TypeVar("_T")


def read_site(path: Path, *, with_data: bool = True) -> SiteSettings:
    """The settings in a node.yaml; paths in it are relative to its folder.

    Args:
        path: of the node.yaml.
        with_data: the data must exist too; `fedtune node init` runs before anybody has said where they are.

    Raises:
        ConfigError: a setting that is wrong, or data that is missing.
    """
    values = copy.deepcopy(read_yaml(path))
    folder = path.absolute().parent
    budget = values.pop("budget", None)
    if not isinstance(budget, Mapping) or not {"epsilon", "delta"} <= set(budget) <= {
        "epsilon",
        "delta",
        "unit",
    }:
        raise ConfigError(
            f"{path}: budget should have epsilon and delta, and may have unit; it is {budget!r}."
        )
    values |= {f"budget_{name}": value for name, value in budget.items()}
    for name in ("ca", "key", "ledger", "audit_log"):
        if isinstance(values.get(name), str):
            values[name] = str(folder / values[name])
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("path"), str):
        data["path"] = str(folder / data["path"])
        if with_data and data.get("source", "files") == "files" and not Path(data["path"]).exists():
            raise ConfigError(
                f"{path}: data.path is {data['path']}, and there is no such file or folder. Name there the "
                "file with your data, or the folder that holds train.csv (.tsv, .jsonl, .parquet)."
            )
    settings = SiteSettings.from_dict(values, str(path))
    check_lines(settings.submitters, str(path))
    parse_address(settings.server)
    return settings


def check_files(site: SiteSettings, folder: Path) -> tuple[str, str]:
    """What came with a site's archive: (fingerprint of the authority, what its signature says of the files).

    Args:
        site: the site's settings.
        folder: of its node.yaml.

    Raises:
        ConfigError: they were changed on their way, or there is no authority's certificate.
    """
    if not (folder / SEAL).exists():
        return (
            authority_fingerprint(Path(site.ca)),
            f"there is no {SEAL} here, so nobody vouches for these files: compare the server's address in "
            "node.yaml with the operator too",
        )
    authority, changed = check_archive(folder)
    edited = f"; changed since: {', '.join(changed)} (by you, if you edited it)" if changed else ""
    return authority, f"the files are those that the federation's authority signed{edited}"


def make_key(site: SiteSettings) -> tuple[str, str, bool]:
    """Makes the site's private key if there is none: (enrolment line, fingerprint, whether it is new).

    Raises:
        ConfigError: the key that is there cannot be used.
    """
    path = Path(site.key)
    new = not path.exists()
    key = certificates.make_node_key(path) if new else certificates.load_private_key(path)
    public = certificates.public_key_of(key)
    return certificates.public_line(public, site.site), certificates.fingerprint(public), new


def open_ledger(site: SiteSettings, *, setting: bool = False) -> PrivacyLedger:
    """The site's ledger.

    Args:
        site: the site's settings.
        setting: the ledger's budget becomes the one of node.yaml, also where its budget file is lost or
            damaged. Only a node that starts does that: whoever tries another node.yaml (a dry run, a proof)
            changes nothing for the node that runs, and makes no file.

    Raises:
        LedgerError: the ledger is damaged, or gone: it is not replaced by an empty one.
    """
    path = Path(site.ledger)
    if setting:
        ledger = PrivacyLedger.open(path)
        if lost := _lost_ledger(site, ledger):
            raise LedgerError(lost)
        try:
            is_set = ledger.state().has_budget and ledger.budgets().default == site.budget
        except LedgerError:  # of the budget file; anything else is raised again below
            is_set = False
        if not is_set:
            ledger.set_budget(site.budget)
    return PrivacyLedger.open(path, require_budget=True)


def _lost_ledger(site: SiteSettings, ledger: PrivacyLedger) -> str | None:
    """A message for the owner if there was a ledger with releases where there is none now; else None."""
    path, state, signs = Path(site.ledger), ledger.state(), []
    if state.seq == 0 and ledger.budget_path.exists():
        signs.append(f"its budget file {ledger.budget_path} is there")
    if not state.releases:
        entries = AuditLog(Path(site.audit_log)).entries()
        if released := sum(entry.get("event") == "released" for entry in entries):
            signs.append(f"the audit log {site.audit_log} tells of {released} releases")
    if not signs:
        return None
    return (
        f"The privacy ledger {path} is missing or empty, but {' and '.join(signs)}: a new one would forget "
        "what was spent. Nothing is released. Restore the folder from a backup. Only if nothing was ever "
        "released from this data, move away what is left of the old ledger and log, and start the node again."
    )


def books_of(site: SiteSettings) -> Books:
    """The site's ledger and audit log."""
    return Books(Path(site.ledger), Path(site.audit_log))


def check_books(site: SiteSettings) -> None:
    """Checks that ledger and audit log agree, and that the log is whole.

    Raises:
        LedgerError: what is wrong.
    """
    books = books_of(site)
    if wrong := [*_disagreements(books), *_log_damage(books)]:
        raise LedgerError(f"{' '.join(wrong[:3])} `fedtune node proof --config node.yaml` says all of it.")


def _disagreements(books: Books) -> list[str]:
    """Where ledger and audit log contradict each other, or the log is missing."""
    ledger, log = books.problems()
    if not log and not books.log.head().number and PrivacyLedger.open(books.ledger).releases():
        log = [
            f"There is no audit log {books.log.path}, and the privacy ledger tells of releases: it was moved "
            "or removed. Put it back. If it is gone for good, say so: `fedtune node accept --config "
            "node.yaml`."
        ]
    return [*ledger, *log]


def _log_damage(books: Books) -> list[str]:
    """What is wrong with the audit log by itself."""
    problems = books.log.verify(after=books.accepted()[0])
    if not problems:
        return []
    return [
        f"The audit log {books.log.path} was changed or damaged: {'; '.join(problems[:3])}. Restore it "
        "from a backup; if there is none, say so: `fedtune node accept --config node.yaml`."
    ]


def accept(site: SiteSettings) -> str:
    """Records in both books that the owner accepts what the audit log lost.

    Returns:
        What was accepted, for a person.

    Raises:
        LedgerError: the ledger lost something.
    """
    books = books_of(site)
    if lost := _lost_ledger(site, PrivacyLedger.open(books.ledger)):
        raise LedgerError(lost)
    missing = _disagreements(books)
    accepted = books.accept() or missing
    if missing and not books.log.head().number:
        books.append("accepted", problems=missing)
    if not accepted:
        return "Nothing is wrong with the books; nothing was accepted."
    return "\n".join(
        [
            *accepted,
            "accepted, and noted in both books; the node may start. If the server, which may know the longer "
            f"log, refuses it, its operator lets it in: `fedtune server DIR --accept-restore {site.site}`",
        ]
    )


def proof(site: SiteSettings, against: str | None = None) -> tuple[str, bool]:
    """What has left this site, from its ledger and audit log.

    Of damaged books it shows everything that is wrong, and what can still be read.

    Args:
        site: the site's settings.
        against: a head that was kept elsewhere, from which these books must go on.

    Returns:
        (text for a person, whether both books are whole).

    Raises:
        ConfigError: `against` is no head.
    """
    # Not `open_ledger`, which refuses a damaged one: here everything that is wrong is wanted.
    ledger, log = PrivacyLedger(Path(site.ledger), require_budget=True), AuditLog(Path(site.audit_log))
    wrong: list[str] = []

    def attempt(book: str, question: Callable[[], _T]) -> _T | None:
        try:
            return question()
        except LedgerError as error:
            wrong.append(f"{book}: {error}")
            return None

    rows, problems = attempt("ledger", ledger.verify) or (0, [])
    wrong += [f"ledger: {problem}" for problem in problems]
    books = books_of(site)
    since = (attempt("audit log", books.accepted) or (0, 0))[0]
    problems = attempt("audit log", lambda: log.verify(after=since)) or []
    wrong += [f"audit log: {problem}" for problem in problems]
    wrong += attempt("ledger and audit log", lambda: _disagreements(books)) or []
    if against is not None:
        wrong += attempt("ledger and audit log", lambda: books.against(against)) or []
    lines = [f"site {site.site}, budget epsilon {site.budget.epsilon:g} at delta {site.budget.delta:g}"]
    if not ledger.path.exists():
        lines.append(f"there is no ledger yet: {ledger.path} is made when the node starts")
    else:
        budgets = attempt("ledger", ledger.budgets)
        if budgets is not None and budgets.default is not None and budgets.default != site.budget:
            lines.append(
                f"until the node starts again, its budget is epsilon {budgets.default.epsilon:g} at delta "
                f"{budgets.default.delta:g}"
            )
    if lost := attempt("ledger", lambda: _lost_ledger(site, ledger)):
        wrong.append(f"ledger: {lost}")
    releases = attempt("ledger", lambda: ledger.releases()) or []
    used = dict.fromkeys((release.dataset, release.fingerprint) for release in releases)
    for dataset, fingerprint in used:
        count = sum(release.fingerprint == fingerprint for release in releases)
        spend = partial(ledger.epsilon, dataset=dataset, fingerprint=fingerprint, delta=site.budget.delta)
        spent = attempt("ledger", spend)
        shown = "unknown" if spent is None else f"{spent:.4g}"
        lines.append(f"  {dataset} ({fingerprint[:12]}): {count} releases, epsilon {shown} in all")
    entries = attempt("audit log", log.entries) or []
    sizes = [entry.get("bytes_out") for entry in entries]
    sent = sum(size for size in sizes if isinstance(size, int))
    lines.append(f"{len(entries)} answers, {sent} bytes left this site; the last of them:")
    lines += [f"  {_entry_text(entry)}" for entry in entries[-10:]]
    ledger.close()
    # Several attempts may have met the same problem.
    lines += dict.fromkeys(wrong) or [
        f"ledger ({rows} rows) and audit log are whole, and each is what the other knows"
        + ("" if against is None else "; they go on from the head that was kept")
    ]
    files = attempt("audit log", log.files) or []
    if len(files) > 1:
        lines.append(f"the audit log is in {len(files)} files: {', '.join(file.name for file in files)}")
    if since:
        lines.append(f"what was wrong before line {since} of the audit log was accepted there by the owner")
    if not wrong:
        lines.append(f"head {books.head()} (file it elsewhere; later: fedtune node proof --against HEAD)")
    return "\n".join(lines), not wrong


def _entry_text(entry: Mapping[str, Any]) -> str:
    """One entry of the audit log, on one line; what is in it may come from the server."""
    time, event, message, reason, run = (
        str(entry.get(name, "")) for name in ("time", "event", "message", "reason", "run")
    )
    about = f"run {run[:8]}" if run else ""
    if entry.get("round") is not None:
        about += f" round {entry['round']}"
    text = " ".join([time[:19], f"{event:<12}", f"{message:<12}", about, reason]).rstrip()
    return "".join(character if character.isprintable() else "?" for character in text)


@dataclass(frozen=True)
class DryRun:
    """What a proposed run would do here. `refusals` is empty if the site permits it and can pay for it."""

    lines: Sequence[tuple[str, Any]]
    refusals: Sequence[str]

    def text(self) -> str:
        """For a person."""
        width = max(len(name) for name, _ in self.lines)
        shown = [f"{name:<{width}}  {value}" for name, value in self.lines]
        verdict = [f"refused: {reason}" for reason in self.refusals] or ["permitted"]
        return "\n".join([*shown, "", *verdict, "Nothing was trained, released or sent."])


def _held_out(about: EvaluationPlan) -> str:
    what = f"a share of {about.share:g} is not trained on; {about.num_rounds} times two counts leave"
    return f"{what}, right and wrong, noise_multiplier={about.noise_multiplier:.4g}"


def dry_run(site: SiteSettings, asked: Config) -> DryRun:
    """Checks a proposed run against the site's file, data and ledger; trains and charges nothing.

    Args:
        site: the site's settings.
        asked: the configuration of the run.

    Raises:
        DataError, ModelError, ResourceError: the node could not take part at all.
    """
    from fedtune.federation.client.release import releases_of
    from fedtune.federation.resources import run_resources
    from fedtune.privacy.plan import make_plan

    try:
        shard = run_resources(site.own(asked)).prepared.shards[0]
    except DataError as error:
        # The server is not told this reason; the owner is.
        raise error.__cause__ if isinstance(error.__cause__, DataError) else error from None
    plan = make_plan(asked, [shard.declared_size], None if site.data.public else site.budget_delta)
    ledger = open_ledger(site)
    refusals: list[str] = []
    try:
        site.check(asked, plan)
    except PrivacyError as error:
        refusals.append(str(error))
    mine, about = plan.for_shard(shard.declared_size), plan.evaluation()
    if about is not None:
        try:
            site.check_evaluation(plan)
        except PrivacyError as error:
            refusals.append(str(error))
    delta = site.budget.delta
    before, after = ledger.outlook(
        dataset=shard.dataset,
        fingerprint=shard.identity,
        node=shard.node,
        run="dry run",
        plans=releases_of(mine, site),
        delta=delta,
        epsilon=site.budget.epsilon,
    )
    if after > site.budget.epsilon and not site.data.public:
        refusals.append(
            f"all {plan.num_rounds} rounds would raise epsilon from {before:.4g} to {after:.4g}, over "
            f"the budget of {site.budget.epsilon:g} at delta {delta:g}; the node would refuse it before its "
            "first round"
        )
    clip = f"max_grad_norm={plan.max_grad_norm:g}"
    clip += f", head_norm={plan.head_norm:g}" if plan.head_norm else ""
    lines: list[tuple[str, Any]] = [
        ("site", f"{site.site} of {site.federation}"),
        ("data", f"{shard.dataset}: {shard.data.num_records} records here, {shard.declared_size} declared"),
        ("fingerprint", ledger.known_as(shard.identity)[:12]),
        ("mechanism", f"trust={plan.trust}, unit={plan.unit}"),
        ("model", f"{asked.model.name} with {asked.adapter.name}"),
        (
            "noise",
            f"noise_multiplier={plan.noise_multiplier:.4g}, {clip}",
        ),
        ("steps", f"{plan.num_rounds} rounds of {plan.local_steps}, sample_rate={plan.sample_rate:g}"),
        ("leaves", "per round one array, the adapter's change; name, declared size, steps"),
        *([] if about is None else [("held out", _held_out(about))]),
        ("epsilon now", f"{before:.4g} at delta {delta:g}"),
        ("epsilon after", f"{after:.4g} of {site.budget.epsilon:g}"),
    ]
    return DryRun(lines, refusals)
