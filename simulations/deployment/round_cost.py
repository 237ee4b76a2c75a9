#!/usr/bin/env python
r"""What does a round cost over its slowest training, and what is the rest made of?

    python simulations/deployment/round_cost.py default        MiniLM and the default head, three sites
    python simulations/deployment/round_cost.py tiny           a random BERT of width 32

Three nodes, a server and the submitting process on one machine, local privacy, evaluation in every round. The
first round loads encoder and data and is told apart. Every hop is timed in every process (`trace/`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from processes import HERE, Federation, default, quiet_folder, tiny, write

Event = dict[str, Any]


def read(file: Path) -> list[Event]:
    """The trace, in the order of time."""
    events = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(events, key=lambda one: float(one["begin"]))


def take_apart(events: list[Event], rounds: int) -> list[dict[str, float]]:
    """For each round, seconds of each hop on the way of the node that answered last."""
    pushes = [one for one in events if one["name"] == "HttpGrid.push_messages"][1:]  # the first says hello
    assert len(pushes) == rounds, (len(pushes), rounds)
    last_end = max(one["end"] for one in events if one["name"] in ("RunResources.evaluate", "RunState.save"))
    edges = [one["begin"] for one in pushes] + [last_end]
    found = []
    for push, begin, end in zip(pushes, edges[:-1], edges[1:], strict=True):
        inside = [one for one in events if begin <= one["begin"] < end]

        def named(name: str, inside: list[Event] = inside) -> list[Event]:
            return [one for one in inside if one["name"] == name]

        pulls = [one for one in named("_pull_and_store_message") if one["something"]]
        asks, sends = named("WorkerProcess.ask"), named("_push_messages")
        trainings = named("train_locally")
        answers = [one for one in named("HttpGrid.pull_messages") if one["size"]]
        saves, evaluations = named("RunState.save"), named("RunResources.evaluate")
        ask = max(asks, key=lambda one: one["end"])
        pull = next(one for one in pulls if one["pid"] == ask["pid"])
        send = next(one for one in sends if one["pid"] == ask["pid"] and one["end"] > ask["end"])
        inner = [one for one in trainings if ask["begin"] <= one["begin"] and one["end"] <= ask["end"]]
        training = max(inner, key=lambda one: one["end"])
        after = ask["end"] if send["begin"] < ask["end"] else send["begin"]
        seconds = end - begin
        slowest = max(one["end"] - one["begin"] for one in trainings)
        found.append(
            {
                "round": seconds,
                "slowest_training": slowest,
                "over_training": seconds - slowest,
                "server_sends": push["end"] - push["begin"],
                "until_the_node_asks": pull["begin"] - push["end"],
                "message_to_node": pull["end"] - pull["begin"],
                "until_worker_has_it": ask["begin"] - pull["end"],
                "worker_without_training": ask["end"] - ask["begin"] - (training["end"] - training["begin"]),
                "training_of_last_node": training["end"] - training["begin"],
                "until_node_sends": after - ask["end"],
                "answer_to_server": send["end"] - after,
                "until_server_has_it": answers[-1]["end"] - send["end"],
                "saves": sum(one["end"] - one["begin"] for one in saves),
                "evaluation": sum(one["end"] - one["begin"] for one in evaluations),
            }
        )
    return found


def main() -> None:
    """Runs it and keeps the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setup", choices=("default", "tiny"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--name", help="of the record; default: round_cost_SETUP")
    parser.add_argument("--folder", type=Path, help="keep what was made here")
    arguments = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    with quiet_folder(arguments.folder) as root:
        setup = tiny(root, 3) if arguments.setup == "tiny" else default(3)
        trace = root / "trace.jsonl"
        path = f"{HERE / 'trace'}:{HERE.parents[1]}"
        federation = Federation(root, setup, environment={"FEDTUNE_TRACE": str(trace), "PYTHONPATH": path})
        try:
            federation.start_server()
            federation.start_nodes()
            _, seconds = federation.submit("run", f"federation.num_rounds={arguments.rounds}")
        finally:
            federation.close()
        hops = take_apart(read(trace), arguments.rounds)
    steady = hops[1:]
    names = list(hops[0])
    write(
        arguments.name or f"round_cost_{setup.name}",
        {
            "question": "seconds of a round of 3 nodes on one machine over its slowest training",
            "command": f"python simulations/deployment/round_cost.py {' '.join(sys.argv[1:])}",
            "setup": setup.name,
            "rounds": arguments.rounds,
            "load_average_before": load,
            "submit_seconds": round(seconds, 1),
            "target": "over_training at most 4 s",
            "median": {name: round(statistics.median(one[name] for one in steady), 3) for name in names},
            "largest": {name: round(max(one[name] for one in steady), 3) for name in names},
            "first_round": {name: round(value, 3) for name, value in hops[0].items()},
            "by_round": [{name: round(value, 3) for name, value in one.items()} for one in hops],
        },
    )


if __name__ == "__main__":
    main()
