"""`fused-lora run`: run an unchanged script and accelerate every LoRA Linear that PEFT builds in it."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fused_lora.integrations.peft import ACCELERATED, BUILT, install, uninstall

USAGE = "usage: fused-lora run script.py [arguments ...]\n       fused-lora run -m module [arguments ...]"


def main(arguments: Sequence[str]) -> int:
    """Run a script or module as ``python`` would, then report on stderr how many LoRA layers and calls were fused.

    Returns:
        0 if the script ends, or for --help; 2 for a wrong command line, or where there is no such module. What the
        script raises passes through, SystemExit too.
    """
    arguments = list(arguments)
    as_module = arguments[:1] == ["-m"]
    target = arguments[int(as_module) : int(as_module) + 1]
    if not target or (target[0].startswith("-") and not as_module):
        asked = arguments in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if not as_module and not Path(target[0]).is_file():
        print(f"fused-lora run: there is no file {target[0]!r}", file=sys.stderr)
        return 2
    report, built = install(), Counter(BUILT)
    argv, path, before = sys.argv, list(sys.path), sys.modules.get("__mp_main__")
    world = os.environ.get("WORLD_SIZE", "1")
    sys.argv = arguments[int(as_module) :]
    sys.path.insert(0, os.getcwd() if as_module else str(Path(target[0]).resolve().parent))
    sys.modules["__mp_main__"] = _main_of_children()
    ran = True
    try:
        if as_module:
            runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target[0], run_name="__main__")
    except ImportError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ran = frame.f_globals.get("__name__") != "runpy"  # which found no such module
        if ran:
            raise
        print(f"fused-lora run: {error}", file=sys.stderr)
        return 2
    finally:
        sys.argv, sys.path[:] = argv, path
        if before is None:
            del sys.modules["__mp_main__"]
        else:
            sys.modules["__mp_main__"] = before
        uninstall()
        if ran:
            # Lightning starts the other ranks as plain scripts, and says so in the environment
            _tell(report, BUILT - built, alone=os.environ.get("WORLD_SIZE", "1") in ("1", world))
    return 0


def _main_of_children() -> types.ModuleType:
    """What multiprocessing calls ``__mp_main__``: classes of the script, in what spawned processes send back.

    multiprocessing sets it once, to the main module at its first import: here that is this command.
    """
    module = types.ModuleType("__mp_main__")
    vars(module)["__getattr__"] = lambda name: getattr(sys.modules["__main__"], name)
    return module


def _tell(report: Callable[[], dict[str, Any]], built: Counter[str], alone: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # one voice per launch
    calls = report()
    around, fallback = (sum(calls[way].values()) for way in ("around", "fallback"))
    line = f"fused_lora: {built[ACCELERATED]} of {built.total()} LoRA layers accelerated"
    for reason, count in built.most_common():
        line += f"\n  {count:10} {reason}" * (reason != ACCELERATED)
    line += f"\nfused_lora: {calls['fused']} LoRA calls ran fused"
    line += f", {around} fused around their base" * (around > 0) + f", {fallback} in PEFT's own way"
    for reason, count in (*calls["around"].items(), *calls["fallback"].items()):
        line += f"\n  {count:10} {reason}"
    if built[ACCELERATED] and not (calls["fused"] or around or fallback):
        line += (
            "\nfused_lora: no accelerated layer was called. Merged and compiled models call none, and neither do "
            "trainers whose own kernels compute with lora_A and lora_B (axolotl's run unless lora_mlp_kernel: false)"
        )
    if not (alone and built):
        line += (
            "\nfused_lora: processes that the script starts itself are not counted, and run PEFT's own code unless "
            "they are forked. Start them with torchrun -m fused_lora.cli run, or call fused_lora.accelerate in the "
            "script"
        )
    print(line, file=sys.stderr)
