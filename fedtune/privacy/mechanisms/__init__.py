"""What adds noise and how much: the mechanisms, and where their randomness comes from."""
