"""Compile every configuration of every kernel ahead of time, for chips that need not be present, and read the binaries.

A case's result depends only on its kernel's code, its arguments, its options and the compiler. Together they are its
``key``. A recorded result with the same key is still valid, so only what has changed is compiled.
"""

from __future__ import annotations

import ast
import atexit
import functools
import gc
import hashlib
import inspect
import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING

from compile_report import binaries

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

    from compile_report.cases import CompileCase


@dataclass(frozen=True)
class Chip:
    """What the rules and the occupancy estimate need; sizes in bytes."""

    capability: int  # as in kernels/config.py
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    registers_per_sm: int = 65536
    warp_size: int = 32


CHIPS = {
    "sm_80": Chip(80, 163 << 10, 164 << 10, 64),
    "sm_90": Chip(90, 227 << 10, 228 << 10, 64),
    "sm_100": Chip(100, 227 << 10, 228 << 10, 64),
    "sm_120": Chip(120, 99 << 10, 100 << 10, 48),
    # CDNA3: per SIMD 512 vector registers a lane and 8 waves, four SIMDs a compute unit
    "gfx942": Chip(0, 64 << 10, 64 << 10, 32, registers_per_sm=4 * 512 * 64, warp_size=64),
}
_BATCH = 24  # cases that a process compiles at a time: nvdisasm takes as long to start as half a case to compile


def cases(capability: int, every_dtype: bool = False) -> list[CompileCase]:
    """The compilations for a chip, in a fixed order; ``every_dtype``: fp16 of training and merge on every chip, too."""
    from compile_report import cases as aot
    from compile_report import dequant_cases as dequant_aot
    from compile_report import grouped_cases as grouped_aot
    from compile_report import merge_cases as merge_aot
    from compile_report import row_norms_cases as norms_aot

    dtypes = aot.DTYPES if every_dtype else aot.dtypes_on(capability)
    modules = aot, merge_aot, dequant_aot, norms_aot
    found = [case for module in modules for case in module.compile_cases(capability, dtypes)]
    return [*found, *grouped_aot.compile_cases(capability)]


def required(case: CompileCase, capability: int) -> list[str]:
    """The instructions that a case must contain."""
    needed = ["copy16"] if case.op != "mask" else []
    if case.config is not None and case.config.tma:
        needed.append("TMA")
    if case.op in ("linear", "linear_4bit", "backward_g", "backward_x") and case.dtype.itemsize == 2:
        # the passes of the backward multiply 16 or 32 ranks: too few rows for a warp group
        large = case.op.startswith("linear") and case.config.BLOCK_M >= 64
        wide = {90: "HGMMA", 100: "tcgen05"}.get(capability) if large else None
        needed.append(wide or ("HMMA" if capability else "MFMA"))
    if case.op.startswith("grouped") and case.dtype.itemsize == 2:
        needed.append("HMMA" if capability else "MFMA")
    return needed


@functools.cache
def _code(kernel) -> str:
    """The kernel's code and that of the jit functions that it uses, without comments and docstrings."""
    from triton.runtime import JITFunction

    def tree(fn):
        node = ast.parse(textwrap.dedent(inspect.getsource(fn.fn))).body[0]
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return ast.unparse(node), {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}

    todo, found = [kernel], {}
    while todo:
        fn = todo.pop()
        found[fn.__name__], names = tree(fn)
        used = {n: fn.fn.__globals__.get(n) for n in names}
        found |= {n: repr(v) for n, v in used.items() if type(v).__name__ == "constexpr"}
        todo += [v for v in used.values() if isinstance(v, JITFunction) and v.__name__ not in found]
    return json.dumps(found, sort_keys=True)


def fingerprint(case: CompileCase, chip: str) -> str:
    """What a result depends on: compiler, chip, code, arguments and options."""
    parts = (toolchain(), chip, _code(case.kernel), case.signature, case.constexprs, case.attrs, case.options)
    return hashlib.sha256("\n".join(str(p) for p in parts).encode()).hexdigest()[:16]


@functools.cache
def toolchain() -> str:
    """The compilers' versions; sm_100 may have a ptxas of its own."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    chips = [[CHIPS[c].capability] for c in ("sm_90", "sm_100")]
    if not inspect.signature(get_ptxas_version).parameters:
        chips = [[]]  # triton 3.4 has one ptxas for all chips
    versions = [get_ptxas_version(*chip).splitlines()[-1] for chip in chips]
    return f"triton {triton.__version__}, ptxas {' / '.join(dict.fromkeys(versions))}"


def compile_batch(batch: Sequence[CompileCase], chip: str) -> dict[str, dict]:
    """Compile cases for one chip and read what the binaries say.

    Returns:
        for each label: registers, spills (bytes a thread), shared (bytes a block), warps, blocks (resident blocks a
        multiprocessor), the counts of instructions that occur, ``loose`` if there are wgmmas to beware of, ``needs``
        and ``key``; or ``error`` in place of what the binary would have said.
    """
    spec, records, done = CHIPS[chip], {}, {}
    for case in batch:
        variant = case.config.variant if case.config else case.op
        records[case.label] = {"op": case.op, "variant": variant, "dtype": str(case.dtype)[6:]}
        records[case.label] |= {"key": fingerprint(case, chip), "needs": required(case, spec.capability)}
        compiled = _compile(case, chip)
        if isinstance(compiled, str):
            records[case.label]["error"] = compiled
        else:
            done[case.label] = compiled
    if spec.capability:
        texts = binaries.disassemble([k.asm["cubin"] for k in done.values()], spec.capability)
    else:
        texts = [k.asm["amdgcn"] for k in done.values()]
    for (label, k), text in zip(done.items(), texts, strict=True):
        resources = binaries.resources_nvidia(k.asm["cubin"]) if spec.capability else binaries.resources_amd(text)
        record = records[label] | resources | {"shared": k.metadata.shared, "warps": k.metadata.num_warps}
        record["blocks"] = resident_blocks(spec, record["registers"], record["shared"], record["warps"])
        loose = binaries.loose_wgmma(k.asm.get("ptx", ""))
        records[label] = record | binaries.instructions(text) | ({"loose": loose} if loose else {})
    return records


def _compile(case: CompileCase, chip: str) -> CompiledKernel | str:
    """The compiled kernel, or the compiler's error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_lora.kernels.launch import DEFAULTS

    nvidia = CHIPS[chip].capability > 0
    target = GPUTarget("cuda", CHIPS[chip].capability, 32) if nvidia else GPUTarget("hip", chip, 64)
    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    try:
        return triton.compile(source, target=target, options=DEFAULTS | case.options)
    except Exception as e:  # whatever the compiler raises is the result of this case
        return f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"


def resident_blocks(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit a multiprocessor by warps, registers (in units of 8 a thread) and shared memory (plus 1 KiB)."""
    per_warp = -(-registers // 8) * 8 * chip.warp_size
    limits = [chip.warps_per_sm // warps, chip.registers_per_sm // (per_warp * warps)]
    return min(*limits, chip.shared_per_sm // (shared + (1024 if chip.capability else 1) if shared else 1))


def _start_process() -> None:
    """Import what compiling needs, and keep it out of every garbage collection but the last (4 % of the time)."""
    cases(0)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def _compile_by_labels(job: tuple[str, list[str]]) -> tuple[str, dict[str, dict]]:
    chip, labels = job
    known = labelled(CHIPS[chip].capability, True)
    return chip, compile_batch([known[label] for label in labels], chip)


@functools.cache
def labelled(capability: int, every_dtype: bool = False) -> dict[str, CompileCase]:
    """The :func:`cases` of a chip by their labels, in their order."""
    every = cases(capability, every_dtype)
    labelled = {case.label: case for case in every}
    if len(labelled) < len(every):
        raise ValueError(f"cases of capability {capability}: labels are not unique")
    return labelled


def collect(
    recorded: dict[str, dict[str, dict]],
    chips: Iterable[str] = tuple(CHIPS),
    only: str = "",
    everything: bool = False,
    processes: int | None = None,
    every_dtype: bool = False,
) -> Iterator[tuple[int, int, dict[str, dict[str, dict]]]]:
    """Compile the cases that ``recorded`` lacks. Yields (done, to do, results so far) after each batch.

    The results hold only the current :func:`cases`; with ``only``, those whose label contains it.

    Raises:
        RuntimeError: the kernels of this process are interpreted, so there is nothing to compile.
        ValueError: an unknown chip, or two cases with one label.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")
    results, jobs = {}, []
    for chip in chips:
        if chip not in CHIPS:
            raise ValueError(f"chip: expected one of {', '.join(CHIPS)}, got {chip!r}")
        results[chip], todo = {}, []
        for label, case in labelled(CHIPS[chip].capability, every_dtype).items():
            if only not in label:
                continue
            known = recorded.get(chip, {}).get(label)
            if known is not None and not everything and known["key"] == fingerprint(case, chip):
                results[chip][label] = known | {"needs": required(case, CHIPS[chip].capability)}
            else:
                todo.append(label)
        jobs += [(i, chip, todo[i : i + _BATCH]) for i in range(0, len(todo), _BATCH)]
    jobs.sort(key=lambda job: job[0])  # each chip's list begins with its longest, the GEMMs
    done, total = 0, sum(len(labels) for *_, labels in jobs)
    yield done, total, results
    if not jobs:
        return
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start_process) as pool:
        for chip, records in pool.map(_compile_by_labels, [job[1:] for job in jobs]):
            results[chip] |= records
            done += len(records)
            yield done, total, results
