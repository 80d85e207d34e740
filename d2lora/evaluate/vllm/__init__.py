"""Benchmarks on vLLM, which runs in an environment and a process of its own."""

import sys


def close() -> None:
    """End this process's engine, if one is open: its memory is free when this returns. Nothing is imported for it."""
    if sessions := sys.modules.get(f"{__name__}.sessions"):
        sessions.close()


def make_room() -> None:
    """End this process's engine, if one is open, before an evaluation in memory: it is not asked again if it failed."""
    if sessions := sys.modules.get(f"{__name__}.sessions"):
        sessions.make_room()
