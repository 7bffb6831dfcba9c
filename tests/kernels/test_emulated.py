"""Kernels as they are compiled for a chip: the PTX of some of the tests' launches runs in tests/helpers/emulated.

The interpreter runs what a kernel says, this what the compiler made of it: layouts, hints that it believed, barriers,
copies through shared memory, tensor cores. ``make test-emulated`` runs all of the kernels' tests so.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent
# files, and of each some tests that are short
CHOSEN = {
    "layers": (
        "test_lora_linear test_lora_backward test_lora_grad test_lora_expand",
        "bfloat16 and (test_dtypes and bfloat16-torch.bfloat16 or rounded) or test_tensor_descriptors"
        " or test_split_k and 3",
    ),
    "merges": (
        "test_merge test_merge_group",
        "bfloat16 and (round_trip and 70x300 or rows and 33 or its_launches and True and switch and not random)",
    ),
    "masks and many adapters": (
        "test_dropout test_dropped test_dequant_4bit test_linear_4bit test_row_norms test_grouped",
        "not float32 and (number_of_rows or bound_of_1 or not_finite or other_bits or several_adapters_with"
        " or the_operator or a_mix_of or every_row)",
    ),
}


def emulated(chip: int, *arguments, warps: bool = False) -> int:
    """How many tests passed in a process whose kernels are emulated; none may fail."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"FUSED_LORA_EMULATE": str(chip), "FUSED_LORA_EMULATE_ORDER": "0" if warps else ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, which needs no emulation")
@pytest.mark.parametrize(
    "chip", [pytest.param(80, marks=pytest.mark.thorough), 90, pytest.param(100, marks=pytest.mark.thorough)]
)
def test_what_the_emulated_gpu_finds_and_gets_right(chip):
    assert emulated(chip, HERE / "emulated_checks.py") > 30


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, which needs no emulation")
@pytest.mark.parametrize("name", CHOSEN)
def test_compiled_kernels(name):
    """Those of sm_90; warps run one after the other, in any order."""
    files, tests = CHOSEN[name]
    assert emulated(90, *[HERE / f"{file}.py" for file in files.split()], "-k", tests, warps=True) > 2
