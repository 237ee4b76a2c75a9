"""One run from configuration to record (`run`), what it shows (`display`), and what can be done with it."""
