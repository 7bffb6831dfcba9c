"""The `fused-lora` command. Each subcommand is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def doctor(arguments: Sequence[str]) -> int:
    """check that this machine computes right results, and how fast"""
    from fused_lora.diagnostics.doctor import main

    return main(arguments)


def serve(arguments: Sequence[str]) -> int:
    """answer OpenAI's API for a model and a folder of adapters"""
    from fused_lora.cli.serve import main

    return main(arguments)


def run(arguments: Sequence[str]) -> int:
    """run a script with every LoRA layer that PEFT builds in it accelerated"""
    from fused_lora.cli.run import main

    return main(arguments)


def merge(arguments: Sequence[str]) -> int:
    """merge adapters into a model's files, without a model"""
    from fused_lora.cli.merge import merge as main

    return main(arguments)


def unmerge(arguments: Sequence[str]) -> int:
    """write the files from before a merge with --record"""
    from fused_lora.cli.merge import unmerge as main

    return main(arguments)


COMMANDS = {"doctor": doctor, "merge": merge, "run": run, "serve": serve, "unmerge": unmerge}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status, 2 for an unknown one."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        known = "\n".join(f"  {name:16} {command.__doc__}" for name, command in COMMANDS.items())
        print(f"usage: fused-lora COMMAND ...\n\ncommands:\n{known}", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    return COMMANDS[arguments[0]](arguments[1:])
