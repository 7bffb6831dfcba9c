"""Reading compiled kernels: spills, instructions of a batch, and the wgmmas that read registers while in flight."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compile_report import binaries

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def compiled(code: str, *arguments: str, path: Path = ROOT):
    """What ``code`` prints as JSON, in a process whose kernels are compiled and come from ``path``."""
    paths = os.pathsep.join([str(path), os.environ["PYTHONPATH"]])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", "import json, sys\n" + code, *arguments]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WGMMA = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1, %f2}, "
FROM_REGISTERS, FROM_MEMORY = WGMMA + "{%r1, %r2, %r3, %r4}, %rd1, 1, 1, 1;", WGMMA + "%rd2, %rd1, 1, 1, 1;"
WAIT = "wgmma.wait_group.sync.aligned "


@pytest.mark.parametrize(
    "lines, loose",
    [
        ([FROM_REGISTERS, FROM_REGISTERS, WAIT + "0;", "@%p1 bra $L__BB0_1;"], 0),
        ([FROM_REGISTERS, FROM_REGISTERS, WAIT + "1;", WAIT + "0;"], 2),
        ([FROM_REGISTERS, "@%p1 bra $L__BB0_1;", WAIT + "0;"], 1),
        ([FROM_REGISTERS, "$L__BB0_3:", WAIT + "0;"], 1),
        ([FROM_REGISTERS, "$L__tmp3:", WAIT + "0;"], 0),
        ([FROM_MEMORY, "@%p1 bra $L__BB0_1;", WAIT + "1;"], 0),
    ],
    ids=["waited_for", "others_waited_for", "branch", "block", "debug_label", "memory"],
)
def test_what_is_a_loose_wgmma(lines, loose):
    assert binaries.loose_wgmma("\n".join(lines)) == loose


def test_the_watch_finds_a_pipelined_wgmma_that_reads_registers():
    code = (
        "from helpers.register_wgmma import ptx; from compile_report.binaries import loose_wgmma;"
        "print(json.dumps({n: [t.count('wgmma.mma_async'), loose_wgmma(t)] for n in (1, 3) for t in [ptx(n)]}))"
    )
    counts = compiled(code)
    assert counts["1"][0] > 0 and counts["1"][1] == 0
    assert counts["3"][0] == counts["3"][1] > 0


# every form of the expand, whose left operand is computed in registers
EXPANDS = """
from compile_report.compiling import cases, compile_batch
wanted = ("linear split bf16 64x128", "linear recompute bf16 64x64x64 r32", "expand bf16 mask 64x128x16 r32")
some = [next(c for c in cases(90) if c.label.startswith(name)) for name in wanted]
print(json.dumps({label: r.get("loose", 0) for label, r in compile_batch(some, "sm_90").items()}))
"""


def test_no_expand_reads_registers_in_a_pipeline():
    counts = compiled(EXPANDS)
    assert len(counts) == 3 and not any(counts.values())


def test_a_term_after_the_loop_keeps_the_rules():
    """As bench_launches.py measures it; the rules are those of the compile report."""
    code = (
        "import torch; sys.path.insert(0, 'benchmarks'); from bench_launches import alternatives;"
        "from compile_report import cases, compiling, report; from fused_lora.kernels.config import pick;"
        "chosen = pick('linear', 8192, 4096, 4096, 16, torch.bfloat16, False, 90, variant='split');"
        "every = [(c, *cases._linear_case(c, torch.bfloat16, False, False, 'tf32x3'))"
        " for c in alternatives('linear', chosen) if c.late];"
        "made = [cases.make_case(str(c), 'linear', c, torch.bfloat16, *rest, c.options()) for c, *rest in every];"
        "print(json.dumps([len(made), report.problems({'sm_90': compiling.compile_batch(made, 'sm_90')}, {})]))"
    )
    assert compiled(code) == [3, []]


def test_an_expand_in_a_pipeline_is_found(tmp_path):
    """The same kernels with the one line changed that keeps the expand out of the pipeline."""
    for folder in ("fused_lora", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fused_lora" / "kernels").symlink_to(tmp_path / "kernels")
    expand = tmp_path / "kernels" / "lora_expand.py"
    text = expand.read_text(encoding="utf-8")
    assert text.count("BLOCK_R, num_stages=1)") == 1
    expand.write_text(text.replace("BLOCK_R, num_stages=1)", "BLOCK_R, num_stages=3)"), encoding="utf-8")
    counts = compiled(EXPANDS, path=tmp_path)
    assert len(counts) == 3 and all(counts.values())


def test_a_batch_is_disassembled_as_its_kernels_one_by_one():
    code = (
        "from compile_report.compiling import cases, compile_batch;"
        "some = [c for c in cases(90) if c.label.startswith(('shrink bf16 mask 16', 'merge bf16'))];"
        "alone = {}; [alone.update(compile_batch([c], 'sm_90')) for c in some];"
        "print(json.dumps([alone, compile_batch(some, 'sm_90')]))"
    )
    alone, together = compiled(code)
    assert alone == together and len(alone) >= 3
    assert len({r["copy16"] for r in alone.values()}) > 1


def test_spills_are_read_from_the_binary():
    """With 32 registers a thread the merge kernel must spill."""
    code = (
        "import dataclasses; from compile_report.compiling import cases, compile_batch;"
        "case = next(c for c in cases(90) if c.label.startswith('merge bf16'));"
        "case = dataclasses.replace(case, options=case.options | dict(maxnreg=32));"
        "print(json.dumps(compile_batch([case], 'sm_90')[case.label]))"
    )
    record = compiled(code)
    assert record["registers"] <= 32 and record["spills"] > 0
