"""A finished model made smaller and faster, each step with its measured effect. Start at `compress.py`."""
