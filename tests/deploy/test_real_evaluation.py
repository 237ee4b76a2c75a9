"""Private evaluation over a real SuperLink: asked through TLS, answered by workers, charged in the books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.test_real_federation import SITES, Federation, record
from tests.support.tiny_federation import one_thread


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites, of which the third permits no answer about what it holds out."""
    one_thread()
    made = Federation(tmp_path_factory.mktemp("evaluation"))
    path = made.root / SITES[2] / "node.yaml"
    node = yaml.safe_load(path.read_text())
    node["permit"]["max_evaluations"] = 0
    path.write_text(yaml.safe_dump(node))
    try:
        made.start_server()
        made.until("server", "sites enrolled")
        for site in SITES:
            made.start(site, "node", "--config", made.root / site / "node.yaml")
        for site in SITES:
            made.until(site, "joined")
        yield made
    finally:
        made.close()


def settings(federation: Federation, folder: Path, *more: str) -> list[str]:
    """Of a run that has no public test data at all."""
    kept = [
        one
        for one in federation.settings("public")
        if not one.startswith(("data.path=", "data.test_split=", "data.test_public="))
    ]
    return [
        *kept, "federation.evaluation=private", "federation.evaluation_share=0.25", "federation.num_rounds=2",
        f"hydra.run.dir={folder}", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sites_answer_about_what_they_hold_out_and_charge_it(federation: Federation) -> None:
    folder = federation.root / "run"
    more = ["privacy.epsilon=8", "privacy.delta=1e-3"]
    status = federation.run("submit", "submit", federation.server, *settings(federation, folder, *more))
    assert status == 0, federation.log("submit")[-3000:]
    finished = record(folder)
    about, privacy = finished["metrics"]["evaluation"], finished["privacy"]
    assert about["data"] == "private"
    assert sorted(finished["metrics"]["per_site"]) == list(SITES[:2])
    (missing,) = about["missing"]
    assert missing["node"] == SITES[2] and "the site permits none" in missing["reason"]
    assert privacy["target_epsilon"] == 8 and 0 < privacy["epsilon"] <= 8
    assert {one["node"]: one["answers"] for one in privacy["per_node"]} == dict(
        zip(SITES, (1, 1, 0), strict=True)
    )
    text = (folder / "statement.md").read_text()
    assert "Evaluation: accuracy comes from noised counts" in text
    for site in SITES:
        log, ledger = federation.site_state(site)
        assert log.verify() == [] and ledger.verify()[1] == []
        released = [one for one in log.entries() if one["event"] == "released"]
        answers = [one for one in released if one["message"] == "query.evaluate"]
        charged = ledger.releases(purpose="evaluation")
        assert len(answers) == len(charged) == (0 if site == SITES[2] else 1)
        assert len(ledger.releases(purpose="training")) == 2
        for answer in answers:
            # Two noised integers, of the order of the noise's steps, and nothing else.
            assert set(answer["left"]) == {"right", "wrong"}
            assert abs(answer["left"]["right"]) + abs(answer["left"]["wrong"]) > 1000
            assert charged[0].committed and answer["after"]["epsilon"] > answer["before"]["epsilon"]
        assert (site != SITES[2]) or log.entries()[-1]["event"] == "refused"
