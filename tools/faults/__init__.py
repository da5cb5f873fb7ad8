"""Runs a real server, hurts it, and checks what it promises (PROMISES.md). `python -m tools.faults.chaos --help`."""
