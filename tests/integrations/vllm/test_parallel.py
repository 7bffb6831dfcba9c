"""Tokens of engines with several workers, and of engines that guess tokens, against each adapter merged alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny_vllm as tiny

TWO = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
NGRAM = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)


@pytest.mark.parametrize(
    "kind",
    [TWO, TWO | dict(fully_sharded_loras=True), dict(speculative_config=NGRAM)],
    ids=["two ranks", "two ranks, shards of A", "n-gram drafts"],
)
def test_tokens_are_those_of_each_adapter_merged_alone(model, adapters, kind, tmp_path):
    names = [*adapters, None] * 2
    prompts = [[*tiny.SHARED, *((11 * i + 5 * j) % 150 + 1 for j in range(3 + 5 * (i % 4)))] for i in range(len(names))]
    numbers = {name: i for i, name in enumerate(adapters, start=1)}
    given = dict(
        engine=tiny.ENGINE | dict(model=str(model), disable_log_stats=False) | kind,
        new_tokens=16,
        prompts=prompts,
        adapters=[name and (name, numbers[name], str(adapters[name])) for name in names],
    )
    command = [sys.executable, Path(tiny.__file__).with_name("vllm_child.py"), json.dumps(given), tmp_path / "out"]
    environment = os.environ | dict(VLLM_ENABLE_V1_MULTIPROCESSING="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "computes the LoRA terms: GroupedWrapperCPU" in done.stdout + done.stderr
    tokens, drafts = json.loads((tmp_path / "out").read_text())
    for name, prompt, found in zip(names, prompts, tokens, strict=True):
        alone = tiny.merged(model, name and adapters[name])
        assert (wrong := tiny.differs(found, prompt, alone)) is None, f"{name}, {wrong}"
    if "speculative_config" in kind:  # steps with several rows of a request were taken
        assert drafts["vllm:spec_decode_num_accepted_tokens"] > 0
