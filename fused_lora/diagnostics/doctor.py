"""`fused-lora doctor`: versions, GPU, which path runs, checks of all results, and one layer's time.

Every kernel runs on small layers of odd sizes against float64. If no kernel can run, the operators do. The first call
on a GPU compiles about a hundred kernels. Exit code: 1 if a result is wrong or a kernel was dropped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout, linear

import fused_lora
from fused_lora.ops import guard, native
from fused_lora.ops.linear import tuned
from fused_lora.testing import smoke
from fused_lora.testing.layers import LayerCase

PACKAGES = ("torch", "triton", "peft", "transformers")
SWITCHES = ("FUSED_LORA_PLAN", "FUSED_LORA_CHECK", tuned.SWITCH, "TRITON_INTERPRET")
# a layer of an 8B model in training, and one that a CPU does in a fraction of a second
TIMED: dict[str, dict[str, Any]] = {
    "cuda": dict(M=8192, K=4096, N=4096, r=16, dropout=0.1, dtype=torch.bfloat16),
    "cpu": dict(M=512, K=1024, N=1024, r=16, dropout=0.1, dtype=torch.float32),
}
ROUNDS, STEPS = 7, {"cuda": 20, "cpu": 2}
OURS = ("fused_lora",)  # how this package's warnings begin


def examine(device: torch.device) -> Iterator[tuple[str, Any]]:
    """Run all checks; yields (title, content) section by section. A content is a dict of values or a list of lines.

    The last section is ``wrong``: a list, empty where all is right. ``device``: a CPU or a CUDA device.
    """
    torch.manual_seed(0)
    wrong: list[str] = []

    def tried(name: str, call: Callable[[], dict]) -> dict:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises is the answer
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            return {name: "WRONG"}

    own = {"python": platform.python_version(), "fused_lora": fused_lora.__version__}
    yield "versions", own | {name: _version(name) for name in PACKAGES}
    yield "GPU", gpu(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = fused_lora.explain(**TIMED[device.type], device=str(device))
        kernels = plan.forward.variant != "eager" or not plan.notes  # without a note it was measured to be faster
        path: dict[str, str | None] = {"runs": "kernels" if kernels else plan.notes[0].partition(";")[0]}
        path |= {"forward": plan.forward.variant, "backward": plan.backward.variant}
        path["CPU loops"] = native.describe()
        path["tuned plans"] = tuned.describe(device) if kernels else None
        if device.type == guard.DEVICE and (why := guard.why_not(device)) and why == guard.no_driver():
            wrong.append(why)  # the other reasons are a choice
        yield "path", path | {name: os.environ.get(name) for name in SWITCHES}
        parts = smoke.PARTS if kernels else (operators, smoke.merges)
        checks: dict[str, object] = {}
        for part in parts:
            name = part.__name__
            checks |= tried(name, lambda n=name, part=part: {n: f"{sum(1 for _ in part(device))} cases right"})
        yield "kernels" if kernels else "no kernels", checks
        label = " ".join(f"{name}={value}" for name, value in TIMED[device.type].items())
        yield "one layer", {"layer": label} | tried("forward + backward", lambda: times(device))
    texts = dict.fromkeys(str(warning.message) for warning in caught)
    yield "warnings", [text for text in texts if text.startswith(OURS)]
    dropped = [key for key, passed in guard.verdicts().items() if not passed]
    yield "first uses", {"passed": len(guard.verdicts()) - len(dropped), "dropped": len(dropped)}
    wrong += [f"dropped, the eager path takes over: {key[0]} {getattr(key[1], 'variant', key[1])}" for key in dropped]
    yield "wrong", wrong


def gpu(device: torch.device) -> dict[str, object]:
    """Name, capability, memory and driver. For a CPU the name is None, and ``why`` gives the reason."""
    if device.type == "cpu":
        built = "torch finds no GPU" if torch.backends.cuda.is_built() else "torch is built without CUDA"
        return {"name": None, "why": "the CPU was asked for" if torch.cuda.is_available() else built}
    properties, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
    cuda = torch.version.cuda
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        "driver": f"for CUDA {tuned.driver_version()}" if cuda else None,
        "torch": f"for CUDA {cuda}" if cuda else f"for ROCm {torch.version.hip}",
    }


def operators(device: torch.device) -> Iterator[str]:
    """Forward and backward without kernels on the layers of the smoke run. AssertionError if wrong."""
    for (M, N, K, r), dtypes, p in product(smoke.LAYERS, smoke.DTYPES, (0.0, 0.25)):
        case = LayerCase.make(M, N, K, [r], [p], *dtypes, device=device)
        found = case.planned()
        del found["S"]  # of 16 bits on a GPU without kernels
        case.check(found)
        yield f"M={M} N={N} K={K} r={r} p={p} {dtypes}"


def times(device: torch.device) -> dict[str, float]:
    """Milliseconds of forward and backward of one layer by this package and by PEFT's operations: medians, in turns."""
    M, K, N, r, p, dtype = TIMED[device.type].values()
    base = nn.Linear(K, N, device=device, dtype=dtype)
    layer = fused_lora.LoraLinear(base, r, lora_dropout=p, init_lora_weights=False, autocast_adapter_dtype=False)
    A, B = (part["default"].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    x, g = (torch.randn(M, size, device=device, dtype=dtype) for size in (K, N))
    x.requires_grad_()

    def eager(x: torch.Tensor) -> torch.Tensor:
        return base(x) + linear(linear(dropout(x, p), A), B) * layer.scaling["default"]

    def step(call: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Milliseconds of a step among many in a row, as in a training loop: host or device, whichever takes longer."""
        start = time.perf_counter()
        for _ in range(STEPS[device.type]):
            torch.autograd.grad([call(x)], [x, A, B], [g])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / STEPS[device.type] * 1e3

    rounds = [(step(layer), step(eager)) for _ in range(1 + ROUNDS)][1:]  # the first compiles
    names = ("forward + backward, ms", "eager, ms")
    return {name: round(statistics.median(t[i] for t in rounds), 3) for i, name in enumerate(names)}


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__  # with the build, which the metadata of PyPI's wheels leave out
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(name: str) -> torch.device | None:
    """The device; None where it is none that can be examined."""
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # what torch raises where it was built without CUDA
        return None
    return found if found.type in TIMED else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine the machine and print a table, or JSON."""
    style = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser("fused-lora doctor", description=__doc__, formatter_class=style)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    chosen = options.parse_args(arguments)
    device = _device(chosen.device)
    if device is None:
        options.error(f"--device: expected cpu or a GPU that torch finds, got {chosen.device!r}")
    found = {}
    for title, content in examine(device):
        found[title] = content
        if not chosen.json:
            rows = content.items() if isinstance(content, dict) else [("", text) for text in content or ["none"]]
            for i, (name, value) in enumerate(rows):
                print(f"{'' if i else title:14}{name:24}{'-' if value is None else value}", flush=True)
    if chosen.json:
        print(json.dumps(found, indent=1))
    return 1 if found["wrong"] else 0
