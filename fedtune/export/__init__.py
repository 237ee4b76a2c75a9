"""A finished run as a folder that people can use without fedtune: files, checks, cards, sums."""
