"""The command line: one parser, one function a command."""
