"""The plug-in inside a real vLLM: `make test-vllm`. Without vLLM nothing here is collected."""

import importlib.util
import os
from pathlib import Path

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["*"]

# a small engine inside this process: read when vllm is imported
SETTINGS = dict(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
    HF_HUB_OFFLINE="1",
)
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of one token for each byte."""
    from helpers import tiny_vllm as tiny

    return tiny.write_model(tmp_path_factory.mktemp("vllm") / "tiny")


@pytest.fixture(scope="session")
def adapters(model) -> dict[str, Path]:
    """Eight adapters of mixed ranks and targets, by name."""
    from helpers import tiny_vllm as tiny

    return {
        name: tiny.write_adapter(model.parent / name, seed, *kind)
        for seed, (name, kind) in enumerate(tiny.KINDS.items())
    }
