"""Benchmarks: what fedtune costs, always beside something else in the same process or minute.

Machines differ and are noisy, so every figure that is claimed is a ratio of two things measured in
turn (A B A B ...), and the record keeps every single measurement, the machine and the versions.
"""
