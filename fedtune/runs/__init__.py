"""One run from configuration to record: what it does, what it shows, and what it leaves in its folder."""
