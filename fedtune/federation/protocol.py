"""What server, nodes and submitter must have in common: a protocol, whose number is apart from the program's.

They agree on it before anything else: a node when it joins, and again for each run by the app that comes
with it. Programs of different versions work together as long as their number is the same, so that a
federation of many sites is upgraded one machine at a time, in any order.

The number is raised by whoever changes

- a message: its records, their keys or types (`fedtune.federation.messages`,
  `fedtune.federation.secagg.messages`);
- a field of the plan or of a mechanism, or what one means: plans are compared field by field;
- the default of a setting, or what a setting means; what the encoder's digest is made of; how keys and
  masks of the secure sum are derived.

A new setting does not raise it: a server sends the settings that differ from their defaults
(`fedtune.config.convert.changes_to_json`), so a node that does not know it is not told of it unless it is
used, and then refuses by its name. A test holds all this to what it was when the number was given
(`tests/golden/protocol.json`).
"""

from __future__ import annotations

__all__ = ["PROTOCOL"]

PROTOCOL = 2
