"""The `fused-lora` command. Each subcommand is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fused_lora._version import __version__

# name -> where its function is, below fused_lora, and what it does
COMMANDS = {
    "combine": ("cli.adapters:combine", "make one adapter out of several"),
    "convert": ("cli.adapters:convert", "write another program's LoRA file as a PEFT adapter"),
    "diff": ("cli.adapters:diff", "compare two adapters"),
    "doctor": ("diagnostics.doctor:main", "check that this machine computes right results, and how fast"),
    "extract": ("cli.adapters:extract", "make an adapter out of a base and a fine-tuned model"),
    "inspect": ("cli.adapters:inspect", "tell what an adapter holds"),
    "merge": ("cli.merge:merge", "merge adapters into a model's files, without a model"),
    "run": ("cli.run:main", "run a script with every LoRA layer that PEFT builds in it accelerated"),
    "serve": ("cli.serve:main", "answer OpenAI's API for a model and a folder of adapters"),
    "shrink": ("cli.adapters:shrink", "make the nearest adapter of a lower rank"),
    "tune": ("diagnostics.tune:main", "time every way to compute a model's layers on this GPU, and keep the fastest"),
    "unmerge": ("cli.merge:unmerge", "write the files from before a merge with --record"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status, 2 for an unknown one."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"fused-lora {__version__}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        known = "\n".join(f"  {name:16} {text}" for name, (_, text) in COMMANDS.items())
        asked = arguments in (["-h"], ["--help"])
        print(f"usage: fused-lora COMMAND ...\n\ncommands:\n{known}", file=sys.stdout if asked else sys.stderr)
        if asked:
            return 0
        if arguments:
            print(f"\nfused-lora: unknown command {arguments[0]!r}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[arguments[0]][0].partition(":")
    return getattr(importlib.import_module(f"fused_lora.{module}"), function)(arguments[1:])
