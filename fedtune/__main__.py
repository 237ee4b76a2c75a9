"""`python -m fedtune` is the command `fedtune`."""

from __future__ import annotations

from fedtune.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
