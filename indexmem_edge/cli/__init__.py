"""The command line. Nothing that a program imports imports this room."""
