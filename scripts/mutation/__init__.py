"""Mutation testing of the privacy code: which small faults would no test notice? See `scripts/mutate`."""
