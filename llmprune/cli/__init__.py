"""The command line: one file a subcommand, each thin."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import llmprune
from llmprune.errors import LLMPruneError

COMMANDS = (
    "prune", "plan", "recover", "run", "eval", "compare", "speed", "sweep", "search", "verify", "report", "push",
    "inspect", "demo",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, 1 for a failure, 2 for a user's mistake, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="llmprune", description=llmprune.__doc__)
    parser.add_argument("--version", action="version", version=f"llmprune {llmprune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        text = (module.__doc__ or "").strip()
        sub = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=module.run)
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        sys.stdout.flush()
        return code
    except LLMPruneError as error:
        if chosen.debug:
            raise
        if not error.told:
            print(f"llmprune: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmprune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if chosen.debug:
            raise
        reason = str(error).strip().splitlines()[:1]
        print(f"llmprune: {type(error).__name__}: {''.join(reason)} (--debug shows where)", file=sys.stderr)
        return 1
