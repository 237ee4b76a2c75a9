"""The server's side of the federation: the loop over rounds, and everything that it goes on from."""
