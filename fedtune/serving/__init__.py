"""Exported models at work: their folders, opened and checked, and what can be done with one."""
