"""What README and docs/ say of the code is true: tables and links are compared with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedtune.config.convert import settings
from fedtune.config.pages import GROUPS
from fedtune.privacy.publication import EXPOSED, SINKS
from tests.support.pages import PAGES, ROOT

PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_or_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:[a-z_]+/)+[\w.-]*)`", text):
        # A path of the package may lack its first folder; what lies in a run folder is no path here.
        roots = [root for root in (ROOT, ROOT / "fedtune") if (root / named.split("/")[0]).exists()]
        if roots or named.endswith(".py"):
            assert any((root / named).exists() for root in roots), named


def test_the_floor_plan_has_every_package() -> None:
    """The table of docs/architecture.md names all that lies in fedtune/, in the order of the layers."""
    from tests.architecture.test_layers import LAYERS

    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Where is what") : page.index("Beside the package")]
    named = [name.removesuffix(".py").rstrip("/") for name in re.findall(r"`(\w+(?:/|\.py))`", table)]
    assert [name for name in named if name in LAYERS] == [name for name in LAYERS if name != "__main__"]


def test_the_code_names_no_document_that_is_not_there() -> None:
    """Docstrings and comments cite files of the repository: each is there."""
    for path in sorted((ROOT / "fedtune").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for named in re.findall(
            r"\b((?:docs|simulations|scripts|tests)/[\w./-]*\w\.(?:md|py|json|yaml))\b", text
        ):
            assert (ROOT / named).exists(), f"{path}: {named}"
        # The numbered list of privacy bugs is docs/pitfalls.md.
        assert not re.search(r"\b(DESIGN|STYLE)\.md\b", text), path


def test_all_that_leaves_a_node_is_in_the_page_for_the_privacy_officer() -> None:
    """Its table of what leaves a site names each field of a node's messages with its kind, and no other."""
    block = PROMISES[PROMISES.index("<!-- what leaves a site -->") : PROMISES.index("<!-- end -->")]
    rows = re.findall(r"^\| (\w+) \| (public|charged|local) \| (.+?) \|", block, re.MULTILINE)
    said = {(sink, kind): set(re.findall(r"`([^`]+)`", names)) for sink, kind, names in rows}
    real: dict[tuple[str, str], set[str]] = {}
    for sink, fields in SINKS.items():
        for name, field in fields.items():
            real.setdefault((sink, field.kind), set()).add(name)
    messages = {key: names for key, names in real.items() if key[0] in {sink for sink, _ in said}}
    assert said == messages
    assert {"hello", "reply", "evaluation", "secagg"} <= {sink for sink, _ in said}


def test_what_can_be_seen_unnoised_is_in_the_page_for_the_privacy_officer() -> None:
    flat = " ".join(PROMISES.split())
    for sentence in EXPOSED:
        assert " ".join(sentence.split()) in flat


def test_settings_that_stay_exist() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- names that stay -->") : page.index("<!-- end -->")]
    names = {word.split("=")[0] for word in re.findall(r"`([a-z_.]+(?:=[^`]*)?)`", table)}
    hydras = {"hydra.run.dir", "hydra.sweep.dir"}  # of Hydra's own, which the schema does not have
    assert len(names) > 30 and not names - set(settings()) - set(GROUPS) - hydras


def test_the_speed_of_others_is_that_of_the_record() -> None:
    page = " ".join((ROOT / "docs" / "compare.md").read_text(encoding="utf-8").split())
    made = json.loads((ROOT / "simulations/speed/records/clients.json").read_text(encoding="utf-8"))
    ours = made["round_seconds"]["fedtune"]["median"]
    ray, pfl = (
        made["beside"][name]["ratio_median"] for name in ("Flower on Ray", "pfl, same clipping and noise")
    )
    assert f"takes fedtune {ours:.3f} s; Flower on Ray takes {ray:.1f} times as long" in page
    assert f"pfl with the same clipping and noise {pfl:.2f} of it" in page
    assert f"a round of 100 small clients takes it {pfl:.2f} of the time" in page
