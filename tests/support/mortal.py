"""Nodes of a simulation on Ray whose worker dies by SIGKILL, of what the first node is asked in round 2."""

from __future__ import annotations

import os
import signal
from typing import Any

from flwr.app import Context, Message

from fedtune.engines.ray import ConfiguredClientApp

__all__ = ["DiesBefore", "DiesCharged", "DiesTwice"]


def _die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_last(message: Message, context: Context) -> bool:
    about = message.metadata
    return (about.message_type, about.group_id, context.node_config["partition-id"]) == ("train", "2", 0)


class DiesBefore(ConfiguredClientApp):
    """Before it has done anything."""

    def __call__(self, message: Message, context: Context) -> Message:
        """As its base."""
        return _die() if _is_last(message, context) else super().__call__(message, context)


class DiesCharged(ConfiguredClientApp):
    """When the release is charged, and the data are about to be read."""

    def __call__(self, message: Message, context: Context) -> Message:
        """As its base."""
        if _is_last(message, context):
            from fedtune.federation.client import app

            app._train = _die
        return super().__call__(message, context)


class DiesTwice(DiesBefore):
    """The worker that is asked in its place, too."""

    def once_more(self) -> ConfiguredClientApp:
        """As its base."""
        return self
