"""What a run promises, in facts, in words and in a picture."""
