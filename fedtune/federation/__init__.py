"""The exchange between server and nodes: messages, ClientApp, ServerApp, strategies, checkpoints.

The apps read their message and their Context and nothing else, so that the same two run in every
engine. Flower is imported by the modules that need it, never by this page.
"""

from __future__ import annotations

__all__: list[str] = []
