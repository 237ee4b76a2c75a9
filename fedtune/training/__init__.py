"""Training on a node: per-example gradients, clipping, noise, evaluation, preflight.

Only this package knows Opacus. `dp_step` is the file to read line by line.
"""
