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


def combine(arguments: Sequence[str]) -> int:
    """make one adapter out of several"""
    from fused_lora.cli.adapters import combine as main

    return main(arguments)


def convert(arguments: Sequence[str]) -> int:
    """write another program's LoRA file as a PEFT adapter"""
    from fused_lora.cli.adapters import convert as main

    return main(arguments)


def diff(arguments: Sequence[str]) -> int:
    """compare two adapters"""
    from fused_lora.cli.adapters import diff as main

    return main(arguments)


def extract(arguments: Sequence[str]) -> int:
    """make an adapter out of a base and a fine-tuned model"""
    from fused_lora.cli.adapters import extract as main

    return main(arguments)


def inspect(arguments: Sequence[str]) -> int:
    """tell what an adapter holds"""
    from fused_lora.cli.adapters import inspect as main

    return main(arguments)


def shrink(arguments: Sequence[str]) -> int:
    """make the nearest adapter of a lower rank"""
    from fused_lora.cli.adapters import shrink as main

    return main(arguments)


COMMANDS = {
    f.__name__: f for f in (combine, convert, diff, doctor, extract, inspect, merge, run, serve, shrink, unmerge)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status, 2 for an unknown one."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        known = "\n".join(f"  {name:16} {command.__doc__}" for name, command in COMMANDS.items())
        print(f"usage: fused-lora COMMAND ...\n\ncommands:\n{known}", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    return COMMANDS[arguments[0]](arguments[1:])
