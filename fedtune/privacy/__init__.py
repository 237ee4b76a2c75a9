"""Differential privacy: what is promised, what it costs, and what has been spent.

`plan` holds the one object from which sampler, clipping, noise and the accounted event all come;
`accounting` and `calibration` turn events into epsilon and back; `noise` draws the randomness;
`ledger` remembers every release durably; `statement` says it all in words. Pure Python and numpy:
nothing here knows of torch, of a model, or of a network. The submodules are imported by name, so that
`import fedtune` stays fast.
"""

from __future__ import annotations

__all__: list[str] = []
