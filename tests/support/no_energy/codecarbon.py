"""In the place of codecarbon, for the processes that tests start: each would spend seconds on its start.

Python finds it first where this folder is in PYTHONPATH. `tests/cost` tests the real one.
"""

raise ImportError("tests do not measure energy")
