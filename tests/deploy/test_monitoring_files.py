"""The Grafana dashboard and Prometheus' file ask for what server and node tell, and for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, ProcessCollector

from fedtune.monitoring.endpoint import PORT, parse_listen
from fedtune.privacy.publication import SINKS

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
JOBS = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:fedtune|process)_\w+", re.sub(r'"[^"]*"', "", expression)))


def test_every_metric_that_the_dashboard_names_exists_and_each_is_shown() -> None:
    told = {*SINKS["server_metrics"], *SINKS["node_metrics"]}
    of_the_process = {metric.name for metric in ProcessCollector(registry=CollectorRegistry()).collect()}
    shown = set().union(*map(metrics_in, expressions()))
    assert len(shown) > 15
    assert shown <= told | of_the_process, shown - told - of_the_process
    assert told <= shown, told - shown
    assert metrics_in('rate(fedtune_server_x_total{job="fedtune_y"}[5m])') == {"fedtune_server_x_total"}


def test_counters_are_shown_as_rates_and_gauges_as_they_are() -> None:
    for expression in expressions():
        for name in metrics_in(expression):
            rated = bool(re.search(rf"rate\({name}\b", expression))
            assert rated == name.endswith("_total"), expression


def test_labels_that_panels_name_are_told() -> None:
    labels = {"job", "instance"}  # Prometheus' own
    for file in ("server_metrics.py", "node_metrics.py"):
        source = (FOLDER.parents[1] / "fedtune" / "deploy" / file).read_text()
        labels |= set(re.findall(r'"(\w+)"', source))
    text = json.dumps(DASHBOARD["panels"])
    named = set(re.findall(r"{{(\w+)}}", text))
    for listed in re.findall(r"(?:by|on) \(([^)]*)\)", text):
        named |= set(listed.split(", "))
    assert named and named <= labels, named - labels


def test_panels_have_places_of_their_own_and_a_source() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${source}" and panel["targets"]


def test_prometheus_asks_this_machine_by_the_jobs_that_the_dashboard_names() -> None:
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in JOBS}
    assert set(re.findall(r'job=\\"([^\\]+)', json.dumps(DASHBOARD))) <= set(jobs)
    for targets in jobs.values():
        for target in targets:
            host, port = parse_listen(target)
            assert host == "127.0.0.1" and port in (PORT, PORT + 1)
