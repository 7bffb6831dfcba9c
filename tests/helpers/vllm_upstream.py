"""A pytest plug-in for vLLM's own tests on a CPU: our wrapper in the place of vLLM's, and what they lack there."""

import sys
import types

import torch
from vllm.lora.punica_wrapper import punica_cpu
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from fused_lora.integrations.vllm import register


def _linear(x, weight, bias):
    """In fp32, which a CPU multiplies faster than fp16."""
    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)


register()
from fused_lora.integrations.vllm.cpu import GroupedWrapperCPU  # noqa: E402 - after register, as vLLM does it

punica_cpu.PunicaWrapperCPU = GroupedWrapperCPU  # the tests ask for exactly this class
for layer in (LinearBase, VocabParallelEmbedding):
    layer.cpu_linear = staticmethod(_linear)  # what loading a model sets, and these tests load none
if "ray" not in sys.modules:
    sys.modules["ray"] = types.ModuleType("ray")  # their fixtures shut it down
    sys.modules["ray"].shutdown = lambda: None
