"""Where texts come from: embedded opinions, files, and the hub, as one checked Corpus."""
