"""simulations/speed/README.md, made from the records beside it."""

from __future__ import annotations

import json
from typing import Any

from scripts.benchmarks.common import OUTPUT, RECORDS

_HEAD = """# Speed

Made by `scripts/bench` from the files in `records/`, which hold every single measurement. Each figure is a
ratio of two things measured in turn in one run, because machines differ and are noisy. Processors that
multiply in bf16 quickly have theirs in `records/` itself, others in a folder named after their instructions.
Where the time of many small clients goes: [clients.md](clients.md); and that of a private step:
[step.md](step.md).

| question | measured | target | processor |
|---|---|---|---|
"""


def _figure(record: dict[str, Any]) -> str:
    if "beside" in record:
        books, ours = record["parts_seconds"]["books"], record["round_seconds"]["fedtune"]
        beside = "; ".join(f"{name}: {one['ratio_median']}x" for name, one in record["beside"].items())
        return (
            f"{beside}; fedtune takes {ours['median']} s, of which books {books['median']} "
            f"(pfl over fedtune without its books: {record['without_books']['ratio_median']}x)"
        )
    if "growth_over_nodes" in record:
        ours = "; ".join(
            f"{nodes}: {one['round']['median']}, {one['parts_seconds']['books']['median']}, "
            f"{one['start_seconds']}, {one['peak_megabytes']:.0f}"
            for nodes, one in record["nodes"].items()
        )
        peers = "; ".join(
            f"{nodes}: {one[program]['round']['median']}"
            for nodes, one in record["nodes"].items()
            for program in one
            if program.startswith("pfl, same")
        )
        return f"{ours} (a round of pfl with the same clipping and noise: {peers})"
    if "texts_answered_in_all" in record:
        held = record["megabytes"]
        return (
            f"{record['requests']:,} requests, {record['failed']} lost; p99 {record['p99_over_p50']}x p50; "
            f"{held[0]:.0f} MB after a look, {held[-1]:.0f} MB at the end, {max(held):.0f} MB at most"
        )
    if "came_back" in record:
        stops = record["seconds_to_stop"]
        lost = f"{record['lost']} of {sum(record['answered']):,}"
        return f"{lost}; {min(stops)} to {max(stops)} s from SIGTERM to the end"
    if "adapters" in record:
        return "; ".join(f"{name}: {value['ratio_median']}x" for name, value in record["adapters"].items())
    if "commands" in record:
        return "; ".join(f"`{name}`: {value['median']} s" for name, value in record["commands"].items())
    if "overhead" in record:
        waits, cpu = record["until_training"], record["until_training_cpu"]
        return (
            f"median {waits['median']} s, at most {waits['max']} s; {record['overhead']}x "
            f"(of the processor: {cpu['median']} s, {cpu['max']} s; {record['overhead_cpu']}x)"
        )
    if "sizes" in record:
        return "; ".join(
            f"{name}: {one['seconds']} s (processor {one['processor_seconds']} s), {one['page_megabytes']} MB"
            for name, one in record["sizes"].items()
        )
    if "register_seconds" in record:
        return (
            f"{record['register_seconds']} s, {record['megabytes']} MB on the disk and "
            f"{record['peak_megabytes']} MB of memory; the next export {record['next_export_seconds']} s; "
            f"a later release {record['release_ms_median']} ms; the first of a new cut after "
            f"{record['sweep_runs']} others at most {record['sweep_first_ms_max']} ms"
        )
    if "of_the_product_rate" in record:
        shares = ", ".join(f"{name} {share}" for name, share in record["of_the_product_rate"].items())
        rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in record["products_gflops"].items())
        return f"{shares} of {record['precision']} products (GFLOP/s: {rates}); [figure](roofline.png)"
    if "ratio_peak" in record:
        rounds = f"; over rounds {record['ratio_rounds']}x" if "ratio_rounds" in record else ""
        return f"{record['ratio_peak']}x{rounds}"
    figure = f"{record['ratio_median']}x"
    if "last_ms_median" in record:
        busy = record["processor_ms_median"]
        figure = f"{record['last_ms_median']} ms, of which the processor {busy}; {figure}"
    if "bytes_over_float32" in record:
        figure = f"{figure}; {record['bytes_over_float32']}x the bytes of a plain float32 update"
    if "seconds_max" in record:
        figure = f"{record['seconds_max']} s, {record['reached_min']} to {record['reached_max']}; {figure}"
    if "share_of_alone" in record:
        figure = (
            f"{record['share_of_alone']} of onnxruntime alone; p99 {record['p99_over_p50']}x p50; {figure}"
        )
    if "ratio_min" in record:
        figure += f" ({record['ratio_min']} to {record['ratio_max']})"
    return figure


def write_table() -> None:
    """Writes the table of all records that are there."""
    rows = []
    for path in sorted(RECORDS.rglob("*.json"), key=lambda path: (path.stem, path.parent != RECORDS)):
        record = json.loads(path.read_text())
        where = f"{record['machine']['processor']}, {record['machine']['cores']} cores"
        if path.parent != RECORDS:
            where += f", {record['machine']['instructions']} without bf16"
        rows.append(f"| {record['question']} | {_figure(record)} | {record['target']} | {where} |")
    (OUTPUT / "README.md").write_text(_HEAD + "\n".join(rows) + "\n")
