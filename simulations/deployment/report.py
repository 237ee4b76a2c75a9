#!/usr/bin/env python
# ruff: noqa: E501
"""Writes the tables of README.md from the record files.

python simulations/deployment/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- made by report.py -->", "<!-- end -->"
HOPS = {
    "server_sends": "server sends the question (TLS, database)",
    "until_the_node_asks": "until the node asks (below zero: while the server still sends)",
    "message_to_node": "the question to the node",
    "until_worker_has_it": "until the worker has it",
    "worker_without_training": "ledger, audit log, checks in the worker",
    "training_of_last_node": "training of the node that answers last",
    "answer_to_server": "the answer to the server",
    "until_server_has_it": "until the submitting process has it",
    "saves": "checkpoints (two, durable)",
    "evaluation": "evaluation on the test split",
}


def load(name: str) -> dict[str, Any] | None:
    """A record, if it has been made."""
    path = HERE / "records" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rounds() -> list[str]:
    """What a round is made of."""
    found = [(name, one) for name in ("default", "tiny") if (one := load(f"round_cost_{name}"))]
    if not found:
        return []
    lines = ["## A round of 3 nodes", "", "| median seconds |" + "".join(f" {n} |" for n, _ in found)]
    lines.append("|---|" + "---:|" * len(found))
    for key, words in {
        "round": "**round**",
        "slowest_training": "slowest training",
        "over_training": "**over the slowest training** (target: 4)",
        **HOPS,
    }.items():
        lines.append(f"| {words} |" + "".join(f" {one['median'][key]:.2f} |" for _, one in found))
    for name, one in found:
        lines += [
            "",
            f"`{name}`: largest over the slowest training {one['largest']['over_training']:.2f} s; the first "
            f"round, which loads encoder and data, {one['first_round']['round']:.1f} s. Load average "
            f"{one['load_average_before'][0]} before, {one['machine']['load_average_after'][0]} after, on "
            f"{one['machine']['cores']} cores.",
        ]
    return [*lines, ""]


def idle() -> list[str]:
    """A node with nothing to do."""
    found = [(name, one) for name in ("default", "tiny") if (one := load(f"idle_{name}"))]
    lines = ["## An idle node", ""] if found else []
    for name, one in found:
        nodes = list(one["nodes"].values())
        low, high = (
            f(node[k] for node in nodes for k in ("percent_of_a_core_first", "percent_of_a_core_later"))
            for f in (min, max)
        )
        parts = {
            which: median(v["rss"] for k, v in one["processes"].items() if k.endswith(which)) / 1e6
            for which in ("node", "worker")
        }
        over = median(node["rss_over_encoder"] for node in nodes) / 1e6
        share = median(node["pss_over_encoder"] for node in nodes) / 1e6
        resting = median(node["rss"] for node in one["resting"].values()) / 1e6
        runs = one["submit_seconds"]
        compared = ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in one["for_comparison_rss"].items())
        lines += [
            f"`{name}`: {low:.2f} to {high:.2f} percent of a core (target: 1), right after the last round and a "
            f"minute later. Memory: SuperNode {parts['node']:.0f} MB, worker {parts['worker']:.0f} MB resident; "
            f"together **{over:.0f} MB over the encoder** ({one['encoder_bytes'] / 1e6:.0f} MB), of which three "
            f"nodes on one machine share so much that each one's part is {share:.0f} MB (target: 400). When "
            f"nothing has been asked for `limits.idle_seconds` the worker ends, and **{resting:.0f} MB** are left; a run "
            f"of two rounds then took {runs['of_resting_nodes']:.0f} s, and {runs['first']:.0f} s before. For "
            f"comparison, an interpreter that has imported only: {compared}.",
            "",
        ]
    return lines


def chaos() -> list[str]:
    """What bad nodes cost."""
    lines: list[str] = []
    for name in ("default", "tiny"):
        one = load(f"chaos_{name}")
        if one is None:
            continue
        wild, quiet = one["disturbed"], one["undisturbed"]
        lines += [
            "## Chaos",
            "",
            f"| `{name}`, {wild['rounds']} rounds, 5 nodes | undisturbed | disturbed |",
            "|---|---:|---:|",
            f"| accuracy | {quiet['accuracy']:.4f} | {wild['accuracy']:.4f} |",
            f"| epsilon | {quiet['epsilon']:.2f} | {wild['epsilon']:.2f} |",
            f"| seconds | {quiet['seconds']:.0f} | {wild['seconds']:.0f} |",
            f"| median seconds a round | {median(quiet['seconds_by_round']):.1f} | "
            f"{median(wild['seconds_by_round']):.1f} |",
            f"| updates lost | {sum(quiet['dropped'].values())} | {sum(wild['dropped'].values())} |",
            f"| kills | 0 | {len(wild['kills'])} |",
            "",
            f"Points of accuracy lost: **{one['accuracy_lost_in_points']}** (target: at most 1). All ledgers and "
            f"audit logs verify: **{one['all_books_verify']}**. A kill every {one['kill_every_seconds']:g} s, "
            f"`federation.round_timeout={one['round_timeout_seconds']:g}`; load average "
            f"{one['machine']['load_average_after'][0]} at the end.",
            "",
        ]
    return lines


def far() -> list[str]:
    """Many nodes, and nodes far away."""
    lines: list[str] = []
    if one := load("scale_20"):
        lines += [
            "## Twenty nodes",
            "",
            f"{one['rounds']} rounds, {one['updates']} updates, {len(one['dropped'])} dropped; joined after "
            f"{one['seconds_until_all_joined']:.0f} s, the run took {one['submit_seconds']:.0f} s, a round "
            f"{median(one['seconds_by_round']):.1f} s (median); {one['bytes_up']:,} bytes up and "
            f"{one['bytes_down']:,} down in messages. The nodes' part of memory: "
            f"{one['pss_of_all_nodes'] / 1e9:.1f} GB. Books verify: {one['all_books_verify']}. Load average "
            f"{one['load_average_before'][0]} before.",
            "",
        ]
    if one := load("lines"):
        there, wire = one["over_lines"], one["on_the_wire"]
        up, down = (sum(line[k] for line in wire.values()) for k in ("bytes_up", "bytes_down"))
        lost, packets = (sum(line[k] for line in wire.values()) for k in ("lost", "packets"))
        lines += [
            "## Bad lines",
            "",
            f"{len(wire)} nodes, {one['latency_seconds_each_way'] * 1000:.0f} ms each way (a round trip takes "
            f"{median(one['round_trips_seconds']):.2f} s), {one['loss']:.0%} of packets lost ({lost} of "
            f"{packets}), {one['bits_per_second'] / 1e6:.0f} Mbit/s: {there['rounds']} rounds in "
            f"{there['submit_seconds']:.0f} s, a round {median(there['seconds_by_round'][1:]):.1f} s (median "
            f"after the first) and {median(one['over_loopback']['seconds_by_round'][1:]):.1f} s over the "
            f"loopback; {len(there['dropped'])} updates dropped. In messages {there['bytes_up']:,} bytes up and "
            f"{there['bytes_down']:,} down; on the wire, with TLS, HTTP and questions for messages, {up:,} and "
            f"{down:,}. Load average {one['load_average_before'][0]} before.",
            "",
        ]
    return lines


def many() -> list[str]:
    """Fifty sites at one server."""
    one = load("many_50")
    if one is None:
        return []
    megabytes, seconds = one["megabytes_of_the_server"], one["round_seconds"]
    return [
        "## Fifty sites",
        "",
        f"{one['nodes']} sites with toys for training, threads of one process, at one server: {one['rounds']} rounds, "
        f"{one['updates']} updates; a round {seconds['median']:.0f} s (median; target: 5 s over the slowest "
        f"training, which takes no time here). The server's memory: {megabytes['before_any_joined']:.0f} MB before "
        f"any site joined, {megabytes['all_joined']:.0f} with all, {megabytes['after_round_1']:.0f} after the first "
        f"round, **{megabytes['largest']:.0f} MB** at most, {megabytes['at_the_end']:.0f} at the end (target: 300 "
        f"after a day of rounds). {one['server_percent_of_a_core_while_all_are_idle']:.0f} percent of a core while "
        f"all sites are idle. Load average {one['load_average_before'][0]} before.",
        "",
    ]


def day() -> list[str]:
    """What a day of rounds does to the server's memory."""
    one = load("day_50")
    if one is None:
        return []
    megabytes, growth = one["megabytes_of_the_server"], one["growth_of_the_server"]
    (by_the_fit,) = (value for name, value in growth.items() if name.endswith("by_the_fit"))
    return [
        "## A day of rounds",
        "",
        f"{one['nodes']} sites, {one['rounds']} rounds that followed each other at once ({one['updates']} updates, a round "
        f"{one['round_seconds']['median']:.1f} s): the server had {megabytes['after_round_1']:.0f} MB after the first, "
        f"{megabytes['largest']:.0f} at most. From round {growth['fitted_from_round']} to {growth['to_round']} it grew by "
        f"{1000 * growth['megabytes_a_round']:.0f} kB a round (linear fit); a day of 144 rounds, one in ten minutes, ends "
        f"by that at **{by_the_fit:.0f} MB** (target: 300). Load average {one['load_average_before'][0]} before.",
        "",
    ]


TRIALS = {
    "certificate": "The certificate expires in a run",
    "skew": "Clocks are an hour wrong",
    "read_only": "Folders cannot be written",
    "oversized": "A question of 300 MiB",
    "foreign": "Another app than fedtune's",
    "descriptors": "256 descriptors, 230 half-sent requests",
    "rotation": "Another authority, with kills",
}


def weather() -> list[str]:
    """What a federation meets in years."""
    found = {words: one for name, words in TRIALS.items() if (one := load(f"weather_{name}"))}
    if not found:
        return []
    lines = [
        "## Weather",
        "",
        "| trial | runs: rounds, updates in each, status | tracebacks | books verify |",
    ]
    lines.append("|---|---|---:|---|")
    for words, one in found.items():
        runs = [
            f"{name.replace('_', ' ')}: {run['rounds']}, {' '.join(map(str, run['updates_by_round']))}, {run['status']}"
            if "rounds" in run
            else f"{name.replace('_', ' ')}: none, {run['status']}"
            for name, run in one.items()
            if isinstance(run, dict) and "status" in run
        ]
        lines.append(
            f"| {words} | {'; '.join(runs)} | {len(one['tracebacks'])} | {one['all_books_verify']} |"
        )
    lines += ["", "What was said, shortened (`records/weather_*.json` have it all):", ""]
    for words, one in found.items():
        lines.append(f"- **{words}.** Load average {one['load_average_before'][0]} before.")
        lines += [f"    - *{who}*: {text[:330]}" for who, text in one["said"].items()]
    return [*lines, ""]


def main() -> None:
    """Rewrites what is between the marks."""
    page = HERE / "README.md"
    head, _, rest = page.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    body = "\n".join([*rounds(), *idle(), *chaos(), *far(), *many(), *day(), *weather()])
    page.write_text(f"{head}{BEGIN}\n\n{body}\n{END}{tail}")


if __name__ == "__main__":
    main()
