"""vLLM computes its LoRA terms by the grouped operators of this package.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. It keeps
the scheduler, the cache of adapters and its own LoRA layers; the wrapper that those layers call is ours.
"""

from __future__ import annotations

import os

from fused_lora._version import __version__

VERSIONS = ("0.32", "0.33")  # of vLLM, whose LoRA layers were read and tested


def register() -> None:
    """Make vLLM build our LoRA wrapper on CPUs and NVIDIA GPUs, in this process. A second call does nothing.

    ``FUSED_LORA_VLLM=0`` leaves vLLM as it is, and so does ``VLLM_PLUGINS`` without ``fused_lora``. Of another version
    than ``VERSIONS``, or on another platform, vLLM keeps its own wrapper, and its log has one warning.

    ``FUSED_LORA_ADAPTERS`` is a folder in which vLLM's server looks for adapters by name.

    Raises:
        ValueError: that folder does not exist.
    """
    if os.environ.get("FUSED_LORA_VLLM") == "0":
        return
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    log = init_logger("vllm.fused_lora")  # a logger below vLLM's own, so that it has its handlers and level
    release = ".".join(vllm.__version__.split(".")[:2])
    if release not in VERSIONS:
        log.warning(
            "fused_lora %s works with vLLM %s; this is %s, which keeps its own LoRA wrapper",
            __version__, " and ".join(VERSIONS), vllm.__version__,
        )  # fmt: skip
        return
    if current_platform.is_cpu():
        name = "cpu.GroupedWrapperCPU"
    elif current_platform.is_cuda():
        name = "cuda.grouped_wrapper_gpu"
    else:
        log.warning(
            "fused_lora has no LoRA wrapper for the platform %s, vLLM keeps its own", current_platform.device_name
        )
        return
    path = f"{__name__}.{name}"
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: path)
    if root := os.environ.get("FUSED_LORA_ADAPTERS"):
        from fused_lora.integrations.vllm.resolver import register_resolver

        register_resolver(root, log)
