"""Attacks on our own guarantee: what can be shown about epsilon from outside, beside what is claimed.

A claimed epsilon is an upper bound, proved for the mechanism as it is written down. An audit runs the
mechanism as it is coded, with canaries, and gives a lower bound with a confidence: if it is above the claim,
the code does not do what was proved. A bound below the claim proves nothing: no attack is perfect.

`bounds` turns guesses into epsilon, `verdict` chooses them; `canaries` runs a plan's own pieces on synthetic
gradients; `model` trains the real model; `attack` is what the command calls.
"""

from __future__ import annotations

__all__ = ["attack", "bounds", "canaries", "model", "verdict"]
