"""Read a compiled kernel: registers, spills, the instructions that matter, and a wgmma that may read too late."""

from __future__ import annotations

import bisect
import functools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_INSTRUCTIONS = {  # name in the report -> (what it cannot do without, its opcode in the disassembly)
    "HGMMA": ("HGMMA", r"\bHGMMA\b"),
    "tcgen05": ("UTC", r"\bUTC[A-Z]*MMA\b"),
    "HMMA": ("HMMA", r"\bHMMA\b"),
    "MFMA": ("v_mfma", r"\bv_mfma\w*"),
    "copy16": ("", r"\bLDG(?:STS)?\.E\S*\.128\b|\b(?:global|buffer)_load_(?:dwordx4|b128)\b"),
    "TMA": ("UTMALDG", r"\bUTMALDG\b"),
}
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]+)\*/")
_WGMMA_FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{")
_WGMMA_WAIT = re.compile(r"wgmma\.wait_group\S*\s+(\d+)")
_CONTROL_FLOW = re.compile(r"\bbra\b|^\s*\$L__BB\w+:|\bret\b")


def instructions(text: str) -> dict[str, int]:
    """How often each instruction of the report occurs in a disassembly; those that do not occur are left out."""
    counts = {name: len(re.findall(code, text)) for name, (part, code) in _INSTRUCTIONS.items() if part in text}
    return {name: n for name, n in counts.items() if n}


def loose_wgmma(ptx: str) -> int:
    """The wgmmas with the left operand in registers that may still run when their registers are written again.

    Such a wgmma is safe where a wait for all of them comes next. One that is still in flight at a branch or after a
    wait for others is one that ptxas before 13.3 can miscompile (triton-lang/triton#9433), whatever this ptxas does.
    """
    loose = in_flight = 0
    for line in ptx.splitlines():
        wait = _WGMMA_WAIT.search(line)
        if _WGMMA_FROM_REGISTERS.search(line):
            in_flight += 1
        elif in_flight and (wait or _CONTROL_FLOW.search(line)):
            if not wait or int(wait[1]):
                loose += in_flight
            in_flight = 0
    return loose


def disassemble(cubins: Sequence[bytes], capability: int) -> list[str]:
    """The SASS of kernels for one chip; in one file, because the disassembler takes longer to start than to read."""
    parts = [_machine_code(cubin) for cubin in cubins]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))
    architecture = f"SM{capability}" + ("a" if capability >= 90 else "")
    lines: list[list[str]] = [[] for _ in parts]
    for line in _tool("nvdisasm", b"".join(parts), "--binary", architecture).splitlines():
        address = _ADDRESS.match(line)
        if address:
            lines[bisect.bisect_right(starts, int(address[1], 16)) - 1].append(line)
    return ["\n".join(part) for part in lines]


def resources_nvidia(cubin: bytes) -> dict[str, int]:
    """registers, and spills: bytes of stack and local memory a thread."""
    usage = _tool("cuobjdump", cubin, "-res-usage")
    value = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": value["REG"], "spills": value["STACK"] + value["LOCAL"]}


def resources_amd(assembly: str) -> dict[str, int]:
    """registers, and spills: bytes of scratch memory a lane. Scalars that move to vector registers are no spill."""
    value = {name: int(n) for name, n in re.findall(r"\.(\w+_count|private_segment_fixed_size): +(\d+)", assembly)}
    spills = max(4 * value["vgpr_spill_count"], value["private_segment_fixed_size"])
    return {"registers": value["vgpr_count"] + value["agpr_count"], "spills": spills}


def _machine_code(cubin: bytes) -> bytes:
    """The section .text.* of an ELF file of one kernel."""
    table = struct.unpack_from("<Q", cubin, 40)[0]
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            return cubin[offset : offset + length]
    raise ValueError("cubin: no section .text in it")


@functools.cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _tool(name: str, data: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(data)
        f.flush()
        command = [_tools() / name, *options, f.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
