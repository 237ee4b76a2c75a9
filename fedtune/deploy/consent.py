"""May this run be asked of this site at all: who submitted it, and has the site's administrator approved it.

Both come before the worker sees a message, so before any data, budget or model is touched, and beside the
checks of `federation.client.policy`, of which they weaken none.

**Submitters.** With `submitters` in node.yaml (the lines of operators' keys, as `fedtune operator` prints
them), a site takes the runs of these people only. The submitter signs the run's whole configuration; the
server passes the signature on, and cannot make one. A signature is good for one run at the server, and for
one run by the messages' own number, by which the ledger counts: a server that starts the same run again, or
puts messages of another into it, would spend the site's budget again. What was signed before the site began
to keep signatures (its file is new, or was lost) may have been used, and is refused.

**Approval.** With `approval: true` each run waits for the site's administrator: it is refused, uncharged, and
noted in `state/consent.json`; `fedtune node approve` shows it with what it would spend, and approves it; it
is then submitted again. What is approved is the whole configuration, and for one run: its resumptions are the
same run, and the ledger holds it to the number of releases that it was proposed with.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.config.files import lock_file, replace_whole
from fedtune.deploy import certificates, signing
from fedtune.errors import ConfigError, FederationError, LedgerError
from fedtune.federation.client.policy import SiteSettings

__all__ = ["SUBMITTER", "Consent", "Waiting", "check_lines", "shown", "sign_run", "signature_of"]

SUBMITTER = "submitter"  # of the run's own configuration, beside "fedtune"
_PURPOSE = b"fedtune-submit:"
_DAYS = 7.0  # from the signature until a node first sees the run
_EARLIER = 60.0  # seconds by which clocks may differ
_MOST = 50  # runs that wait, or were approved and used
_LARGEST = 100_000  # characters of a configuration
_LONGEST_RUN = 100  # characters of a run's number
_SHOWN = 32  # digits of a digest, of 64; of fewer a pair of runs with one beginning is found


def sign_run(key: Any, federation: str, config: str) -> str:
    """What a submitter sends along with a run: a signature over its configuration, as JSON."""
    now = datetime.datetime.now(datetime.UTC)
    return json.dumps(signing.sign(key, _PURPOSE, _text(federation, config), now))


def signature_of(proof: str, federation: str, config: str) -> tuple[bytes, datetime.datetime, str]:
    """(public key (PEM), when it signed, a name of what was signed) of what `sign_run` made.

    The name is of key, time and configuration, not of the signature's bytes: of one signature anybody makes
    another that is as good.

    Raises:
        ValueError: it is nothing of the kind, or signs another configuration.
    """
    values = json.loads(proof)
    if not isinstance(values, dict) or len(proof) > 10_000:
        raise ValueError("no signature")
    named = {str(name): str(value).encode() for name, value in values.items()}
    key, when = signing.signed_by(named, _PURPOSE, _text(federation, config))
    name = hashlib.sha256(b"\n".join((key, named[signing.TIME], _text(federation, config))))
    return key, when, name.hexdigest()


def check_lines(lines: tuple[str, ...], where: str) -> dict[bytes, str]:
    """The submitters' names by key (PEM). Raises ConfigError for a line that is none."""
    found: dict[bytes, str] = {}
    for line in lines:
        try:
            key, name = certificates.read_public_line(line)
        except ConfigError as error:
            raise ConfigError(f"{where}: submitters: {error}") from error
        found[key] = name
    return found


class Waiting(dict[str, Any]):
    """A run that waits for approval, or had it: digest, config, by, since, approved, run."""


class Consent:
    """What a site's administrator takes and has approved.

    Args:
        site: the site's settings.
    """

    def __init__(self, site: SiteSettings) -> None:
        self._site = site
        self._path = Path(site.audit_log).with_name("consent.json")
        self._submitters = check_lines(site.submitters, "node.yaml")
        if self._submitters:
            with self._changing() as known:
                known["since"] = known["since"] or _now()

    def check(self, server_run: int, run_config: Mapping[str, Any], message: Any) -> None:
        """Refuses a message of a run that may not be asked here.

        Args:
            server_run: the server's number of the run.
            run_config: of the run, as the server sent it.
            message: what is asked.

        Raises:
            FederationError: why not; nothing was charged.
        """
        if message.metadata.message_type == "query.hello":
            return  # name and declared size, which are public
        config, proof = str(run_config.get("fedtune", "")), str(run_config.get(SUBMITTER, ""))
        run = _run_of(message)
        by = self._submitter(server_run, run, config, proof) if self._submitters else ""
        if self._site.approval:
            self._approved(config, by, run)

    def waiting(self) -> list[Waiting]:
        """Runs that wait, and those that were approved, oldest first.

        Raises:
            LedgerError: the file cannot be read.
        """
        return [Waiting(digest=digest, **entry) for digest, entry in self._read()["runs"].items()]

    def one(self, digest: str) -> Waiting:
        """A run that waits, by its digest or the beginning of it that is shown. Raises as `approve` does."""
        known = self._read()
        name = _named(known, digest)
        return Waiting(digest=name, **known["runs"][name])

    def approve(self, digest: str) -> Waiting:
        """Approves a run that waits, by its digest or the beginning of it that is shown.

        Raises:
            ConfigError: none or several begin so, or fewer digits were given than are shown.
            LedgerError: the file cannot be read.
        """
        with self._changing() as known:
            name = _named(known, digest)
            known["runs"][name] |= {"approved": _now(), "run": None}
            return Waiting(digest=name, **known["runs"][name])

    # --- inside -------------------------------------------------------------------------------------

    def _submitter(self, server_run: int, run: str | None, config: str, proof: str) -> str:
        who = f"Site '{self._site.site}' takes runs of {', '.join(sorted(self._submitters.values()))} only"
        try:
            key, when, name = signature_of(proof, self._site.federation, config)
        except (ValueError, RecursionError):
            raise FederationError(
                f"{who}, and this one is not signed by any of them. Submit it with an operator's own key "
                "(`fedtune operator`). Nothing was charged."
            ) from None
        if key not in self._submitters:
            raise FederationError(
                f"{who}, and this one is signed by another (fingerprint {certificates.fingerprint(key)}). "
                "Nothing was charged."
            )
        with self._changing() as known:
            seen = known["signatures"].get(name)
            age = (datetime.datetime.now(datetime.UTC) - when).total_seconds() / 86_400
            if seen is None and not -0.01 < age < _DAYS:
                raise FederationError(
                    f"{who}, and this one was signed {age:.1f} days ago: submit it again. Nothing was "
                    "charged."
                )
            if seen is not None and seen[0] != str(server_run):
                raise FederationError(
                    f"The submitter signed this run once, and the server starts it again as run "
                    f"{server_run}. Nothing was charged."
                )
            known["since"] = known["since"] or _now()
            began = datetime.datetime.fromisoformat(known["since"])
            if seen is None and (began - when).total_seconds() > _EARLIER:
                raise FederationError(
                    f"{who}, and this one was signed before the site began to keep signatures: submit it "
                    "again. Nothing was charged."
                )
            if run is None or (seen is not None and seen[2] != run):
                raise FederationError(
                    f"The submitter signed one run, and this message of run {server_run} at the server is "
                    f"of {'none' if run is None else 'another'}. Nothing was charged."
                )
            known["signatures"][name] = [str(server_run), when.isoformat(), run]
        return self._submitters[key]

    def _approved(self, config: str, by: str, run: str | None) -> None:
        digest = hashlib.sha256(_text(self._site.federation, config)).hexdigest()
        with self._changing() as known:
            entry = known["runs"].get(digest)
            if entry is None and len(config) <= _LARGEST:
                # Those that wait and those that were used are forgotten from the oldest on.
                runs = known["runs"].items()
                free = [one for one, values in runs if not values["approved"] or values["run"]]
                for one in free[: max(0, len(free) - _MOST + 1)]:
                    del known["runs"][one]
                known["runs"][digest] = {
                    "config": config, "by": by, "since": _now(), "approved": None, "run": None,
                }  # fmt: skip
            if entry is not None and entry["approved"] and run and entry["run"] in (None, run):
                entry["run"] = run
                return
        raise FederationError(
            f"Site '{self._site.site}' asks its administrator before each run (`fedtune node approve "
            f"{shown(digest)} --config node.yaml` there): submit it again, unchanged, when they have "
            "approved it. Nothing was charged."
        )

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        with lock_file(self._path.with_suffix(".lock")):
            known = self._read()
            before = json.dumps(known)
            yield known
            if json.dumps(known) != before:
                replace_whole(self._path, json.dumps(known).encode(), mode=0o600)

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text())
            runs, signatures = dict(known["runs"]), dict(known["signatures"])
            began = known.get("since")
            since = began and datetime.datetime.fromisoformat(began).astimezone(datetime.UTC).isoformat()
        except FileNotFoundError:
            return {"runs": {}, "signatures": {}, "since": None}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{self._path} cannot be read ({error}), and it says which runs were approved and which "
                "signatures were used. Restore it from a backup; if there is none, move it away, and each "
                "run is asked about anew."
            ) from error
        oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=10 * _DAYS)
        kept = {one: seen for one, seen in signatures.items() if str(seen[1]) > oldest.isoformat()}
        return {"runs": runs, "signatures": kept, "since": since}


def _named(known: Mapping[str, Any], digest: str) -> str:
    """The digest of the one run that begins so. Raises ConfigError."""
    found = [one for one in known["runs"] if len(digest) >= _SHOWN and one.startswith(digest)]
    if len(found) != 1:
        names = ", ".join(map(shown, known["runs"])) or "none"
        raise ConfigError(f"{len(found)} runs that wait begin with {digest!r}; there are: {names}.")
    return str(found[0])


def shown(digest: str) -> str:
    """As much of a digest as names a run."""
    return digest[:_SHOWN]


def _run_of(message: Any) -> str | None:
    """The number of the run in a message's own words; None if it names none, several, or one of no kind that
    a run has."""
    from flwr.app import ConfigRecord

    records = message.content.values() if message.has_content() else ()
    named = {record.get("run") for record in records if isinstance(record, ConfigRecord)}
    runs = [one for one in named if isinstance(one, str)]
    return runs[0] if len(runs) == 1 and len(runs[0]) <= _LONGEST_RUN else None


def _text(federation: str, config: str) -> bytes:
    return hashlib.sha256(f"{federation}\n{config}".encode()).digest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
