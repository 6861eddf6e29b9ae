"""The command line. Nothing is imported before it is needed: `memplan --help` is instant."""

from __future__ import annotations


def main() -> int:
    """The `memplan` command; its exit code."""
    try:
        from memplan.cli.app import run

        return run()
    except KeyboardInterrupt:
        return 130
