"""vLLM's own tests of its LoRA layers and their manager, from the source archive of its version, with our wrapper."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import vllm

from helpers.waiting import HANG

TESTS = "tests/lora"
HELPERS = Path(__file__).resolve().parents[2]
# of the cases of each test those with two adapters and the smaller vocabularies: the others differ in numbers alone
CASES = [
    "test_layers.py::test_embeddings[True-512-cpu-2]",
    "test_layers.py::test_lm_head_logits_processor[None-True-64000-cpu-2]",
    "test_layers.py::test_lm_head_logits_processor[head_dtype1-True-64000-cpu-2]",
    "test_layers.py::test_linear_replicated[True-cpu-2]",
    "test_layers.py::test_linear_parallel[True-cpu-True-row-2]",
    "test_layers.py::test_linear_parallel[True-cpu-True-column-2]",
    "test_layers.py::test_linear_parallel[True-cpu-False-row-2]",
    "test_layers.py::test_linear_parallel[False-cpu-False-column-2]",
    "test_layers.py::test_column_parallel_packed[True-cpu-True-2-2]",
    "test_layers.py::test_column_parallel_packed[True-cpu-True-3-2]",
    "test_layers.py::test_column_parallel_packed[True-cpu-False-3-2]",
    "test_layers.py::test_merged_column_parallel_variable_slice[True-cpu-3-2]",
    "test_layers.py::test_deepseek_fused_qkv_a_proj_lora_preserves_base_forward[True-True-cpu]",
    "test_layers.py::test_replicated_lora_preserves_base_forward_for_subclasses[True-cpu]",
    "test_lora_manager.py::test_dedup_shared_module_across_paths",
    "test_lora_manager.py::test_lora_model_manager[cpu]",
    "test_lora_manager.py::test_lora_lru_cache_model_manager[cpu]",
    "test_lora_manager.py::test_lru_lora_model_manager[cpu]",
    "test_lora_manager.py::test_set_adapter_mapping_refreshes_after_slot_reassignment[cpu]",
    "test_lora_manager.py::test_packed_loras[cpu]",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tests of the version that is installed, unpacked; skipped where no archive can be had."""
    folder, version = tmp_path_factory.mktemp("source"), vllm.__version__.partition("+")[0]
    archive = folder / f"vllm-{version}.tar.gz"
    # pip asks an archive for its metadata, for which vLLM's setup needs no compiler if no device is its target
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", folder]
    command += ["--no-binary", "vllm", f"vllm=={version}"]
    environment = os.environ | dict(VLLM_TARGET_DEVICE="empty", VLLM_VERSION_OVERRIDE=version)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    if not archive.exists():
        pytest.skip(f"no source archive of vLLM {version}: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(archive) as opened:
        wanted = [m for m in opened.getmembers() if m.name.startswith(f"vllm-{version}/tests/")]
        opened.extractall(folder, wanted, filter="data")
    return folder / f"vllm-{version}"


def test_vllms_own_tests_pass_with_our_wrapper(source):
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "helpers.vllm_upstream", "--tb=short"]
    command += [f"{TESTS}/{case}" for case in CASES]
    path = os.pathsep.join([str(HELPERS), str(source)])
    done = subprocess.run(
        command, cwd=source, env=os.environ | dict(PYTHONPATH=path), capture_output=True, text=True, timeout=10 * HANG
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"{len(CASES)} passed" in done.stdout
