"""The Triton cache that is filled here and carried: the keys of a launch find what was packed, and nothing compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stub_driver
from helpers.versions import since
from helpers.waiting import HANG

pytest.importorskip("triton")
pytestmark = since("triton", "3.5")  # as the tool
TOOL = Path(__file__).resolve().parents[2] / "tools" / "precompile.py"
STUB = Path(__file__).resolve().parents[1] / "kernels" / "stub_cuda.c"
LAUNCH = """
import sys
import precompile
precompile.install(90)
if sys.argv[1] == "no compiler":
    from triton.compiler import ASTSource

    def compiled(*_):
        raise RuntimeError("compiled again")

    ASTSource.make_ir = compiled
import torch
from fused_lora.kernels.dropout import dropout_mask
dropout_mask(torch.zeros(1, dtype=torch.int64), 40, 64, 0.1)
"""


def run(*command, cache, **others):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    environment |= others
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=HANG)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: a launch would compute")
@pytest.mark.skipif(stub_driver.COMPILER is None, reason="no C compiler, with which Triton builds its launchers")
def test_a_packed_cache_is_found_by_the_keys_of_another_folder(tmp_path):
    filled, other, packed = tmp_path / "filled", tmp_path / "other", tmp_path / "cache.tar.xz"
    found = run("-c", LAUNCH, "compile", cache=filled)
    assert found.returncode == 0, found.stderr
    stub = stub_driver.environment(STUB, tmp_path)["TRITON_LIBCUDA_PATH"]  # triton 3.6 links launchers to it
    for command in (("pack", "--cache", str(filled), str(packed)), ("unpack", str(packed))):
        found = run(str(TOOL), *command, cache=other, TRITON_LIBCUDA_PATH=stub)
        assert found.returncode == 0 and found.stdout.startswith("1 binaries"), found.stdout + found.stderr
    assert packed.stat().st_size < 48 << 20
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    found = run(str(TOOL), "unpack", str(cut), cache=tmp_path / "untouched")
    assert found.returncode == 1 and "cut.tar.xz: expected a whole file" in found.stderr
    assert not (tmp_path / "untouched").exists()
    found = run("-c", LAUNCH, "no compiler", cache=other)
    assert found.returncode == 0, found.stderr
    found = run("-c", LAUNCH, "no compiler", cache=tmp_path / "empty")
    assert found.returncode != 0 and "compiled again" in found.stderr


def test_the_kernels_own_tests_fill_the_cache(tmp_path):
    code = """
import precompile
assert all(path.is_file() for path in precompile.TESTS)
precompile.TESTS = [path for path in precompile.TESTS if path.stem == "test_sync"]
precompile.fill_tests(90)
"""
    found = run("-c", code, cache=tmp_path)
    assert found.returncode == 0 and "passed" in found.stdout, found.stdout + found.stderr
    assert (tmp_path / "parts.jsonl").stat().st_size > 0


def test_filling_goes_on_after_a_merge(tmp_path):
    """Nothing is computed; still each merge is followed by its switch and unmerge, in every dtype."""
    code = """
import triton.compiler
triton.compiler.compile = lambda *_, **__: None
import precompile
precompile.install(90)
precompile.ignore_results()
from fused_lora.testing import smoke
smoke.PARTS = smoke.merges, smoke.switches
precompile.fill_smoke()
"""
    found = run("-c", code, cache=tmp_path)
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 9, found.stdout + found.stderr


def test_a_decode_step_is_filled_as_a_gpu_launches_it(tmp_path):
    """The store of a CPU would keep its adapters in fp32."""
    pytest.importorskip("peft")
    code = """
import sys
import triton.compiler
triton.compiler.compile = lambda src, **_: print(src.name, *src.constants.values())
import precompile
precompile.install(90)
precompile.ignore_results()
sys.path.insert(0, str(precompile.ROOT / "benchmarks"))
import bench_decode
bench_decode.LLAMA_3_8B = [(48, (40, 32)), (40, (48,))]
precompile.fill_decode()
"""
    found = run("-c", code, cache=tmp_path)
    assert found.returncode == 0, found.stderr
    launched = [line for line in found.stdout.splitlines() if line.startswith("_grouped")]
    assert {line.split()[0] for line in launched} == {"_grouped_shrink_kernel", "_grouped_expand_kernel"}
    assert all("bf16" in line and "fp32" not in line for line in launched)


def test_a_cache_of_another_release_is_refused(tmp_path):
    import io
    import json
    import tarfile

    packed = tmp_path / "cache.tar.xz"
    with tarfile.open(packed, "w:xz") as tar:
        data = json.dumps(dict(entries=[], launchers=[], triton="0.0")).encode()
        info = tarfile.TarInfo("manifest.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    found = run(str(TOOL), "unpack", str(packed), cache=tmp_path)
    assert found.returncode == 1 and "packed with triton 0.0" in found.stderr
