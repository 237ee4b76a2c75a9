"""`fedtune node backup | restore`: all that a site must not lose, in one file, and back.

The file is a zip archive: ledger, its secret and budget, audit log, the site's own parts of models, and
with them `node.yaml`, `ca.crt` and `node.key`, so that a new machine can take the place of a lost one. It
is as secret as what is in it (mode 0600). `manifest.json` has the SHA-256 of each file and the head of the
books.

A backup is one moment of both books, also of a node that runs: while the ledger is copied, the audit log is
locked, so that the ledger names no line that the copied log lacks.

A ledger that is restored does not know what was released since. That is never silent:

- Where the books at the site know more than the backup, `restore` refuses, and says how many releases would
  be forgotten; the owner who means it types that number (`--forget N`), and the audit log keeps it. What
  was there is moved aside, never removed.
- The server keeps the head of the books (`fedtune.deploy.admission.BookHeads`) and does not let in a site
  whose books lack it, until its operator accepts (`fedtune server DIR --accept-restore SITE`).
- A head that was filed elsewhere shows it too (`fedtune node proof --against HEAD`).
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fedtune.config.files import create_whole, lock_file, replace_whole
from fedtune.deploy.authorities import trusted
from fedtune.deploy.site import books_of, check_books
from fedtune.errors import ConfigError, LedgerError, ResourceError
from fedtune.federation.client.audit_log import Books
from fedtune.federation.client.policy import SiteSettings
from fedtune.federation.run_folder import PERSONAL
from fedtune.privacy.ledger.chain import Chain
from fedtune.privacy.ledger.ledger import PrivacyLedger

__all__ = ["Restored", "backup", "restore"]

_FORMAT = 1
_MANIFEST = "manifest.json"
_LEDGER, _SECRET, _BUDGET, _LOG = "ledger.sqlite", "ledger.key", "ledger.budget.json", "audit.jsonl"
_LARGEST = 2**33  # bytes of one file: an archive that says more is not unpacked


def backup(site: SiteSettings, config: Path, target: Path) -> str:
    """Writes a backup of a site to the new file `target`; returns the head of its books.

    Args:
        site: the site's settings.
        config: the node.yaml that they are from.
        target: the file; none may be there.

    Raises:
        LedgerError: the books are not whole: what is not right now would not be right later.
        ConfigError: there is a file `target`.
        ResourceError: a file cannot be read or written.
    """
    check_books(site)
    ledger, log = Path(site.ledger), Path(site.audit_log)
    contents: dict[str, bytes] = {}
    try:
        with tempfile.TemporaryDirectory() as folder, lock_file(log.with_name(f"{log.name}.lock")):
            copy = Path(folder) / _LEDGER
            for name, path in _log_files(log):
                contents[name] = path.read_bytes()
                (Path(folder) / name).write_bytes(contents[name])
            if ledger.exists():
                Chain(ledger).copy(copy)
                contents[_LEDGER] = copy.read_bytes()
            head = Books(copy, Path(folder) / _LOG).head()
        for name, path in _beside(site, config):
            if path.exists():
                contents[name] = path.read_bytes()
        create_whole(target, _packed(site, contents, head), mode=0o600)
    except FileExistsError as error:
        raise ConfigError(f"{target} exists already and is not replaced. Name a new file with -o.") from error
    except OSError as error:
        raise ResourceError(
            f"The backup cannot be made: {error.filename or target}: {error.strerror}. Nothing was written."
        ) from error
    return head


def _log_files(log: Path) -> Iterator[tuple[str, Path]]:
    """The files of an audit log, the older ones that were rotated too: (name in a backup, place)."""
    for path in sorted(log.parent.glob(f"{log.name}*")):
        if path.is_file() and path.suffix not in (".lock", ".tmp"):
            yield _LOG + path.name.removeprefix(log.name), path


def _beside(site: SiteSettings, config: Path) -> Iterator[tuple[str, Path]]:
    """What a backup has beside the two books: (name in it, place)."""
    ledger = PrivacyLedger(Path(site.ledger))
    yield _SECRET, ledger.secret_path
    yield _BUDGET, ledger.budget_path
    yield "node.yaml", config
    yield "ca.crt", trusted(site)
    yield "node.key", Path(site.key)
    personal = ledger.path.parent / PERSONAL
    for path in sorted(personal.rglob("*")) if personal.is_dir() else ():
        if path.is_file():
            yield f"{PERSONAL}/{path.relative_to(personal).as_posix()}", path


def _packed(site: SiteSettings, contents: dict[str, bytes], head: str) -> bytes:
    manifest = {
        "format": _FORMAT,
        "site": site.site,
        "federation": site.federation,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "head": head,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for name, data in contents.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@dataclass(frozen=True)
class Restored:
    """What `restore` did.

    Attributes:
        forgotten: releases that were known here and are not any more; None: nothing here could say.
        aside: where what was there before lies; None if nothing was.
    """

    head: str
    made: str
    forgotten: int | None
    aside: Path | None


def restore(site: SiteSettings, source: Path, forget: int | None = None) -> Restored:
    """Puts the books of a backup in their place; the key of the node and its part of models where they lack.

    Args:
        site: the site's settings. The backup's own `node.yaml` stays in the backup.
        source: the backup.
        forget: releases that the owner accepts to forget.

    Raises:
        ConfigError: it is no backup, or another site's.
        LedgerError: its books are not whole, or those that are there know more.
        ResourceError: a file cannot be read or written.
    """
    try:
        manifest, contents = _unpacked(source)
        if (manifest["site"], manifest["federation"]) != (site.site, site.federation):
            raise ConfigError(
                f"{source} is a backup of site '{manifest['site']}' of federation "
                f"'{manifest['federation']}', and this is site '{site.site}' of '{site.federation}'."
            )
        with _put_down(contents) as saved:
            if saved.head() != manifest["head"] or (wrong := _problems(saved)):
                raise LedgerError(
                    f"The books in {source} are not whole, or not those that its manifest names. Take "
                    f"another backup. {' '.join(wrong)}".rstrip()
                )
            here = books_of(site)
            forgotten = _known_since(here, saved, manifest["head"])
        if forgotten and forgotten != forget:
            raise LedgerError(
                f"The books of site '{site.site}' tell of {forgotten} releases that the backup of "
                f"{manifest['made']} does not know: restored, they would be forgotten, and what they cost "
                "would be spent again. Take a newer backup. If there is none, lower budget.epsilon in "
                "node.yaml by what those rounds cost (the records of the runs say it) and give --forget "
                f"{forgotten}. Nothing was changed."
            )
        aside = _replace(site, contents)
    except OSError as error:
        raise ResourceError(
            f"{source} cannot be restored: {error.filename or source}: {error.strerror}."
        ) from error
    here.append("restored", backup=manifest["head"], made=manifest["made"], forgotten=forgotten)
    return Restored(here.head(), manifest["made"], forgotten, aside)


def _unpacked(source: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, content of each file that it names) of a backup. Raises ConfigError, OSError."""
    try:
        with zipfile.ZipFile(source) as archive:
            if any(info.file_size > _LARGEST for info in archive.infolist()):
                raise ValueError("a file in it is too large")
            manifest = json.loads(archive.read(_MANIFEST))
            contents = {str(name): archive.read(name) for name in manifest["files"]}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        if manifest["format"] != _FORMAT or digests != manifest["files"] or not all(map(_inside, contents)):
            raise ValueError("its manifest and its content do not agree")
        return {name: str(manifest[name]) for name in ("site", "federation", "made", "head")}, contents
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {source}.") from error
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{source} is no backup that `fedtune node backup` wrote, or a part of one ({error}). Nothing "
            "was changed."
        ) from error


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


@contextmanager
def _put_down(contents: dict[str, bytes]) -> Iterator[Books]:
    """The books of a backup, in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            if name in (_LEDGER, _SECRET, _BUDGET) or name.startswith(_LOG):
                replace_whole(Path(folder) / name, content, mode=0o600)
        yield Books(Path(folder) / _LEDGER, Path(folder) / _LOG)


def _problems(books: Books) -> list[str]:
    ledger = PrivacyLedger(books.ledger)
    try:
        disagreements = [problem for part in books.problems() for problem in part]
        return [*ledger.verify()[1], *disagreements, *books.log.verify(after=books.accepted()[0])]
    except LedgerError as error:
        return [str(error)]
    finally:
        ledger.close()


def _known_since(here: Books, saved: Books, head: str) -> int | None:
    """Releases of which the books `here`, whole or not, tell and the backup does not; None if they tell of
    nothing at all: they are gone, or cannot be read.

    Raises:
        LedgerError: the books here are whole and go on from the backup: there is nothing to restore.
    """
    if here.ledger.exists() and not _problems(here) and not here.against(head):
        raise LedgerError(
            f"The books of this site are whole and know all that the backup knows (theirs is head "
            f"{here.head()}, the backup's {head}): there is nothing to restore, and nothing was changed."
        )
    told = [count(here) for count in (_releases, _logged)]
    if not any(told):
        return None
    known = (count(saved) for count in (_releases, _logged))
    return max(sum((one - other).values()) for one, other in zip(told, known, strict=True))


def _releases(books: Books) -> Counter[tuple[object, ...]]:
    """Those that a ledger tells of, as far as it can be read."""
    ledger = PrivacyLedger(books.ledger)
    try:
        return Counter((one.run, one.round, one.purpose) for one in ledger.releases())
    except LedgerError:
        return Counter()
    finally:
        ledger.close()


def _logged(books: Books) -> Counter[tuple[object, ...]]:
    """Those that an audit log tells of."""
    try:
        entries = books.log.entries()
    except LedgerError:
        return Counter()
    kept = ("run", "round", "attempt", "message")
    return Counter(
        tuple(str(entry.get(name)) for name in kept) for entry in entries if entry.get("event") == "released"
    )


def _present(site: SiteSettings) -> list[Path]:
    """What there is of the books now, with what SQLite keeps beside the ledger."""
    ledger = PrivacyLedger(Path(site.ledger))
    files = [ledger.path, ledger.secret_path, ledger.budget_path]
    files += [Path(f"{ledger.path}{end}") for end in ("-wal", "-shm")]
    return [path for path in files if path.exists()] + [path for _, path in _log_files(Path(site.audit_log))]


def _replace(site: SiteSettings, contents: dict[str, bytes]) -> Path | None:
    """Puts the books of a backup in the place of the present ones; returns the folder that has those now.

    The budget file is there first, and the ledger last: a site does not start with the one and without the
    other, so a crash in between forgets nothing.
    """
    books, log, there = PrivacyLedger(Path(site.ledger)), Path(site.audit_log), _present(site)
    ledger, budget = books.path, books.budget_path
    aside = ledger.parent / f"before-restore-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S%f}"
    ledger.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if there:
        aside.mkdir(mode=0o700)
    if budget in there:
        replace_whole(aside / budget.name, budget.read_bytes(), mode=0o600)
    if _BUDGET in contents:
        _put(budget, contents[_BUDGET])
    for path in there:
        if path != budget:
            path.replace(aside / path.name)
    places = {_SECRET: books.secret_path}
    places |= {
        name: log.with_name(log.name + name.removeprefix(_LOG)) for name in contents if name.startswith(_LOG)
    }
    for name, path in {**places, _LEDGER: ledger}.items():
        if name in contents:
            _put(path, contents[name])
    lacking = {"node.key": Path(site.key)}
    lacking |= {name: ledger.parent / name for name in contents if name.startswith(f"{PERSONAL}/")}
    for name, path in lacking.items():
        if name in contents and not path.exists():
            _put(path, contents[name])
    return aside if there else None


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_whole(path, content, mode=0o600)
