#!/usr/bin/env python
"""`fedtune submit`, gone wrong: what a site must survive from a server, or from whoever may submit there.

    strange_submit.py oversized MEGABYTES submit DIR ...   each question to a node has so much more in it
    strange_submit.py folded MEGABYTES submit DIR ...      the same, of one megabyte that is named so often
    strange_submit.py foreign MARK submit DIR ...          the run's app is another, which makes a file MARK

Everything else is the product's. A server could do the same: it hands on what a submitter says.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from processes import REPOSITORY

assert str(REPOSITORY) in sys.path

_APP = """\
[project]
name = "averages"
version = "1.0.0"
description = "Somebody else's app."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "averages:app"
clientapp = "averages:app"

[tool.flwr.app.config]
fedtune = ""
submitter = ""
"""


def oversized(megabytes: int, *, folded: bool = False) -> None:
    """Puts numbers that nobody asked for into each question of a round; `folded`: all of them the same."""
    from flwr.app import Array, ArrayRecord

    from fedtune.federation.messages import RoundRequest

    to_records = RoundRequest.to_records

    @functools.wraps(to_records)
    def padded(self: Any) -> Any:
        record = to_records(self)
        record["more"] = ArrayRecord(
            {
                str(number): Array(np.full(2**18, 0 if folded else number, np.float32))
                for number in range(megabytes)
            }
        )
        return record

    RoundRequest.to_records = padded  # type: ignore[method-assign]


def foreign(mark: Path) -> None:
    """Sends an app whose code makes a file as soon as it is imported."""
    from fedtune.deploy import flower, submit

    code = "\n".join(
        [
            "from pathlib import Path",
            f"Path({str(mark)!r}).touch()",
            "from flwr.clientapp import ClientApp",
            "app = ClientApp()",
        ]
    )
    content, _ = flower.build_fab_from_files({"pyproject.toml": _APP.encode(), "averages.py": code.encode()})
    submit.thin_app = lambda: (content, hashlib.sha256(content).hexdigest())


def main() -> int:
    """Runs fedtune's own command with one thing of it replaced."""
    from fedtune.cli.app import main as fedtune

    kind, argument, *rest = sys.argv[1:]
    if kind in ("oversized", "folded"):
        oversized(int(argument), folded=kind == "folded")
    else:
        foreign(Path(argument))
    return int(fedtune(rest) or 0)


if __name__ == "__main__":
    sys.exit(main())
