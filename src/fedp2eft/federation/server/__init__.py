"""The server's phases, rounds and run folder."""
