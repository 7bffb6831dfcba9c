"""Merging an adapter into a checkpoint's files against copying the same files, and the memory that it takes.

    python benchmarks/bench_checkpoint.py
    python benchmarks/bench_checkpoint.py --layers 16 --vocabulary 128256 --shards 30 --limit 3 --budget 20

The second writes a checkpoint of 8 GB in 30 shards, bf16, with the shapes of Llama-3-8B, and an adapter of rank 16 on
all linear layers. `copy` is shutil.copyfile of each shard, then fsync, as the merge does it. `PEFT` loads model and
adapter, calls merge_and_unload and saves the model, as mergekit does, too; then its files are synced. All write new
files on the same disk and take turns. `warm`: the base is in the page cache; `cold`: it was dropped before
(posix_fadvise). The memory is that of a process of its own under --limit GB of address space (RLIMIT_AS), which also
verifies what it wrote: it is the most that was resident, torch and the interpreter included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench_memory import decoder
from peft import PeftModel
from report import Candidate, Clock, Report, Table, begin, interleaved, parser, summary
from transformers import AutoModelForCausalLM

import fused_lora
from fused_lora.adapters.tensorfile import header_bytes

COLUMNS = [("base", 6), ("provider", 11), ("s", 9), ("MB/s", 8), ("of copy", 8)]
LEAST_SPEED, MOST_TENSORS, MOST_FURTHER = 0.7, 2.2, 200e6
_BLOCK = 1 << 24  # numbers that are drawn once


def write_base(folder: Path, layers: int, vocabulary: int, hidden: int, shards: int) -> dict[str, tuple[int, int]]:
    """A checkpoint of Llama's shapes; returns {path of a linear layer: (K, N)}."""
    folder.mkdir()
    scale = hidden / 4096
    linear = {
        f"model.layers.{i}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}": (k, n)
        for i in range(layers)
        for name, (_, k, n) in decoder(hidden, int(1024 * scale), int(14336 * scale)).items()
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {f"{path}.weight": (n, k) for path, (k, n) in linear.items()}
    norms = [f"layers.{i}.{name}" for i in range(layers) for name in ("input_layernorm", "post_attention_layernorm")]
    shapes |= {f"model.{norm}.weight": (hidden,) for norm in (*norms, "norm")}
    block = memoryview(torch.randn(_BLOCK).mul_(0.02).bfloat16().view(torch.uint8).numpy().data)
    (_, *rest), names = shapes, {}
    parts = [
        list(shapes)[:1],
        *(rest[len(rest) * i // (shards - 1) : len(rest) * (i + 1) // (shards - 1)] for i in range(shards - 1)),
    ]
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        names |= dict.fromkeys(part, file)
        with open(folder / file, "wb") as out:
            out.write(header_bytes([(name, torch.bfloat16, shapes[name]) for name in part], {"format": "pt"}))
            for nbytes in (2 * math.prod(shapes[name]) for name in part):
                for first in range(0, nbytes, len(block)):
                    out.write(block[: nbytes - first])
            out.flush()
            os.fsync(out.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=hidden, vocab_size=vocabulary)
    config |= dict(intermediate_size=int(14336 * scale), num_hidden_layers=layers, num_attention_heads=32)
    config |= dict(num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    return linear


def write_adapter(folder: Path, linear: dict[str, tuple[int, int]], r: int) -> None:
    """Of rank r, in fp32, as PEFT saves it by default."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for path, (k, n) in linear.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(r, k) / k**0.5
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(n, r) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def copy(base: Path, out: Path) -> None:
    """The same files on the same disk, synced."""
    out.mkdir()
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, out / file.name)
        sync(out / file.name)


def sync(file: Path) -> None:
    """Onto the disk."""
    with open(file, "rb") as held:
        os.fsync(held.fileno())


def merge_by_peft(base: Path, adapter: Path, out: Path) -> None:
    """The model in memory, merged and saved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    for file in out.iterdir():
        sync(file)


def drop(base: Path) -> None:
    """Out of the page cache."""
    for file in base.iterdir():
        with open(file, "rb") as held:
            os.fsync(held.fileno())
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(base: Path) -> None:
    """Into the page cache."""
    buffer = bytearray(1 << 24)
    for file in base.iterdir():
        with open(file, "rb", buffering=0) as held:
            while held.readinto(buffer):
                pass


def child(base: str, adapter: str, out: str, limit: float) -> None:
    """Merge and verify under a limit of address space; print what it took."""
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit * 1e9), int(limit * 1e9)))
    start = time.perf_counter()
    report = fused_lora.merge_checkpoint(base, adapter, out, verify=True)
    status = Path("/proc/self/status").read_text()
    space = int(status.split("VmPeak:")[1].split()[0]) * 1024 if "VmPeak:" in status else None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps(dict(peak_bytes=resident, address_space_bytes=space, seconds=seconds, checked=report.checked)))


def speed(base: Path, adapter: Path, out: Path, report: Report, arguments: argparse.Namespace, goals: bool) -> None:
    """Copy and merge in turns, over a warm and a cold base."""
    table = Table(COLUMNS)
    nbytes = sum(file.stat().st_size for file in base.iterdir())

    for state, before in (("warm", warm), ("cold", drop)):

        def prepare(before: Callable = before) -> None:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            before(base)

        candidates = [
            Candidate("copy", [lambda: copy(base, out)], prepare),
            Candidate("PEFT", [lambda: merge_by_peft(base, adapter, out)], prepare),
            Candidate("fused_lora", [lambda: fused_lora.merge_checkpoint(base, adapter, out)], prepare),
        ]
        found = interleaved(candidates, Clock(torch.device("cpu")), 0, arguments.rounds, arguments.deadline)
        ms = {name: summary([ms for (ms,) in rounds]) for name, rounds in found.items()}
        for name, times in ms.items():
            share, rate = ms["copy"]["median"] / times["median"], nbytes / times["median"] / 1e3
            row = dict(benchmark="checkpoint", base=state, provider=name, ms=times, nbytes=nbytes)
            report.rows.append(row | dict(mb_per_s=round(rate, 1), of_copy=round(share, 3)))
            table.row(state, name, f"{times['median'] / 1e3:.2f}", f"{rate:.0f}", f"{share:.2f}")
        ours, theirs, copied = (ms[name]["median"] for name in ("fused_lora", "PEFT", "copy"))
        print(f"{state}: {theirs / ours:.2f} times PEFT's speed")
        if goals:
            report.bar(f"speed of copying the same files, {state}", copied / ours, LEAST_SPEED, True)
        report.write()


def memory(base: Path, adapter: Path, folder: Path, report: Report, largest: int, limit: float) -> None:
    """The most that a process of its own held."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    call = [sys.executable, __file__, "--child", str(base), str(adapter), str(folder / "out"), "--limit", str(limit)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        wrong = dict(correct=False, wrong=done.stderr[-400:])
        report.rows.append(dict(benchmark="memory", provider="fused_lora", limit_gb=limit) | wrong)
        return
    found = json.loads(done.stdout.splitlines()[-1])
    row = dict(benchmark="memory", provider="fused_lora", limit_gb=limit, largest_tensor_bytes=largest, correct=True)
    report.rows.append(row | found)
    held, most = found["peak_bytes"], MOST_TENSORS * largest + MOST_FURTHER
    space = f", {found['address_space_bytes'] / 1e9:.2f} GB of address space" if found["address_space_bytes"] else ""
    print(f"memory: {held / 1e6:.0f} MB resident at most{space}; the largest tensor has {largest / 1e6:.0f} MB")
    report.bar("resident memory, of 2.2 largest tensors and 200 MB", held / most, 1, False)


def measure(report: Report, arguments: argparse.Namespace, parent: str | None = None, goals: bool = True) -> None:
    """Write a checkpoint and an adapter, then merge: the memory, and the speed. ``arguments``: as of :func:`main`.

    goals: False for files so small that opening them counts, and in a process larger than a merge: the speed alone.
    """
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        base, adapter = folder / "base", folder / "adapter"
        linear = write_base(base, arguments.layers, arguments.vocabulary, arguments.hidden, arguments.shards)
        write_adapter(adapter, linear, 16)
        files = list(base.glob("*.safetensors"))
        gigabytes = sum(file.stat().st_size for file in files) / 1e9
        print(f"{gigabytes:.2f} GB in {len(files)} shards, bf16, rank 16 on {len(linear)} layers")
        largest = 2 * max(arguments.vocabulary * arguments.hidden, *(k * n for k, n in linear.values()))
        if goals:
            memory(base, adapter, folder, report, largest, arguments.limit)
        speed(base, adapter, folder / "out", report, arguments, goals)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 when a result was wrong."""
    options = parser(__doc__)
    options.set_defaults(rounds=3)
    options.add_argument("--layers", type=int, default=2, help="decoder layers (default: 2)")
    options.add_argument("--hidden", type=int, default=4096, help="width of the model (default: 4096)")
    options.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding (default: 32000)")
    options.add_argument("--shards", type=int, default=4, help="files (default: 4)")
    options.add_argument("--limit", type=float, default=0, metavar="GB", help="address space of the process; 0: any")
    options.add_argument("--folder", help="where the files go (default: a temporary folder)")
    options.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = options.parse_args(arguments)
    if options.child:
        child(*options.child, options.limit)
        return 0
    parent = vars(options).pop("folder")
    report = begin("checkpoint", options)
    measure(report, options, parent)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
