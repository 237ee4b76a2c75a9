"""A node's side of the federation: what it answers, what it permits, and what it writes down before."""
