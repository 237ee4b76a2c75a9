"""Which sites' keys are enrolled, and which are revoked: the files of a server folder.

    nodes/SITE.pub          the key that SITE is let in by: one line, as its `fedtune node init` printed it
    revoked/PRINT.pub       a key that is let in no more, ever; written by `--revoke`, and where a site's new
                            key is enrolled, for its old one
    revoked/SITE.request    "whatever key SITE was let in by": where no file could be read to name the key

Only these files revoke. A key whose file in `nodes/` is missing or broken is suspended: refused for as long
as that lasts, and let in again when the file is back (`fedtune.deploy.admission`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fedtune.config.files import replace_whole
from fedtune.deploy import certificates
from fedtune.deploy.provision import Federation
from fedtune.errors import ConfigError, ResourceError

__all__ = ["enrol", "enrolled", "note_revoked", "requests", "revoke", "revoked"]

_SITE_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def enrol(server: Path, line: str) -> tuple[str, str]:
    """Enrols the public key in `line` (or in the file that `line` names): (site, fingerprint of the key).

    The key that the site had before is revoked. Raises ConfigError for an unknown site, a key that another
    site uses or that was revoked, or a line that is none.
    """
    if "\n" not in line.strip() and len(line) < 1000 and " " not in line.strip() and Path(line).is_file():
        line = Path(line).read_text()
    key, site = certificates.read_public_line(line)
    known = Federation.read(server / "server.yaml").sites
    if site not in known:
        raise ConfigError(
            f"The key is for site {site!r}, and the federation's sites are {', '.join(known)}. Add it to the "
            "federation file and run `fedtune provision` again."
        )
    now = enrolled(server)
    for other, used in now.items():
        if used == key and other != site:
            raise ConfigError(
                f"The key of {site!r} is the key of {other!r} already. Each site makes its own with "
                "`fedtune node init`; a private key must not be copied."
            )
    print_ = certificates.fingerprint(key)
    if key in revoked(server):
        raise ConfigError(
            f"The key of {site!r} (fingerprint {print_}) was revoked, and a key that was revoked stays so. "
            "The site moves its node.key away, makes a new one with `fedtune node init`, and sends that line."
        )
    if now.get(site, key) != key:
        note_revoked(server, site, now[site])
    _write(server / "nodes" / f"{site}.pub", line.strip() + "\n")
    return site, print_


def revoke(server: Path, site: str) -> None:
    """Revokes the key of `site`, for good; a running server lets it in no more.

    A site whose file is broken or missing, though it was enrolled, loses every key that it was let in by.
    Raises ConfigError if it was never enrolled or has been revoked.
    """
    path = server / "nodes" / f"{site}.pub"
    broken: dict[str, str] = {}
    key = enrolled(server, broken).get(site)
    suspended = site in broken or (_SITE_FILE.fullmatch(site) and site in _known_to_the_server(server))
    if key is not None:
        note_revoked(server, site, key)
    elif suspended:
        _write(server / "revoked" / f"{site}.request", "every key that this site was let in by\n")
    else:
        raise ConfigError(
            f"No key of {site!r} is enrolled; enrolled are {', '.join(enrolled(server)) or 'none'}."
        )
    path.unlink(missing_ok=True)


def enrolled(server: Path, unreadable: dict[str, str] | None = None) -> dict[str, bytes]:
    """Public keys (PEM) of the enrolled sites, by name.

    A file that is no key, or holds another site's (a copy: that site's books would be kept under this name),
    is passed over, so that it keeps no other site from being let in or revoked; `unreadable` is given what is
    wrong with it, and the way out, by the site's name.
    """
    found: dict[str, bytes] = {}
    wrong: dict[str, object] = {}
    for path in sorted((server / "nodes").glob("*.pub")):
        try:
            key, site = certificates.read_public_line(path.read_text())
        except FileNotFoundError:
            continue  # gone since the folder was listed
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            wrong[path.stem] = error
            continue
        if site == path.stem:
            found[site] = key
        else:
            wrong[path.stem] = f"it holds the key of site {site!r}."
    for site, key in found.items():
        if others := [other for other, used in found.items() if used == key and other != site]:
            wrong.setdefault(site, f"the key in it is also that of {', '.join(others)}.")
    if unreadable is not None:
        for site, why in wrong.items():
            unreadable[site] = (
                f"{server / 'nodes' / f'{site}.pub'} cannot be used: {why} Enrol {site} again (`fedtune "
                f"server DIR --enrol 'LINE'`), or revoke it (`fedtune server DIR --revoke {site}`)."
            )
    return {site: key for site, key in found.items() if site not in wrong}


def revoked(server: Path) -> dict[bytes, str]:
    """The keys (PEM) that are let in no more, each with the site that it was of.

    Raises ConfigError for a file that cannot be read: whom it keeps out would be let in.
    """
    found: dict[bytes, str] = {}
    folder = server / "revoked"
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(
            f"{folder} may not be read by this user, and says whom not to let in. Change its mode."
        )
    for path in sorted(folder.glob("*.pub")):
        try:
            key, site = certificates.read_public_line(path.read_text())
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}), and it names a key that must not be let in. Restore it "
                "from a backup; if there is none, revoke the site that it is of again, and remove this file."
            ) from error
        found[key] = site
    return found


def requests(server: Path) -> dict[str, Path]:
    """The sites of which every key is to be revoked, with the file that asks for it."""
    return {path.stem: path for path in sorted((server / "revoked").glob("*.request"))}


def note_revoked(server: Path, site: str, key: bytes) -> None:
    """Writes down, durably, that the public key (PEM) of `site` is let in no more."""
    name = certificates.fingerprint(key).replace(" ", "")
    _write(server / "revoked" / f"{name}.pub", certificates.public_line_of(key, site) + "\n")


def _known_to_the_server(server: Path) -> set[str]:
    """The sites that the server's database lets in, without opening it as Flower does."""
    import sqlite3

    path = server / "superlink.sqlite"
    if not path.exists():
        return set()
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = connection.execute("SELECT name FROM node WHERE status != 'unregistered'")
            return {str(name) for (name,) in rows}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ResourceError(f"The server's database {path} cannot be read ({error}).") from error


def _write(path: Path, text: str) -> None:
    """Whole: a running server or a crash finds all of it or what was there before."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        replace_whole(path, text.encode())
        path.chmod(0o644)  # nothing secret; the server may be another user than who enrols
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.") from error
