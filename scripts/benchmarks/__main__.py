"""python -m scripts.benchmarks [NAME ...]"""

from __future__ import annotations

import sys

from scripts.benchmarks import (
    aggregation,
    calibration,
    capacity,
    clients,
    identity,
    ledger,
    peers,
    quantized,
    report,
    roofline,
    serving,
    sweep,
    system,
    training,
)
from scripts.benchmarks.table import write_table

BENCHMARKS = {
    "peers": peers.peers,
    "step": training.step,
    "roofline": roofline.roofline,
    "quantized": quantized.quantized,
    "base_memory": quantized.base_memory,
    "clients": clients.clients,
    "scale": clients.scale,
    "engine": system.engine,
    "memory": system.memory,
    "startup": system.startup,
    "aggregation": aggregation.aggregation,
    "ledger": ledger.ledger,
    "identity": identity.identity,
    "sweep": sweep.sweep,
    "calibration": calibration.calibration,
    "report": report.report,
    "serving": serving.serving,
    "soak": serving.soak,
    "restarts": serving.restarts,
    "capacity": capacity.capacity,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(
            f"There is no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}.", file=sys.stderr
        )
        return 2
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()
        write_table()
    return 0


sys.exit(main(sys.argv[1:]))
