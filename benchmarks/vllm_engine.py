"""One engine of bench_vllm.py: answers each line of requests with a line of times. It has a process of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

for name, value in dict(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
).items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapters(folder: Path, model: str, count: int, r: int) -> None:
    """Random PEFT adapters on all linear layers of a Llama; what is there stays."""
    config = AutoConfig.from_pretrained(model)
    hidden, wide, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    keys = head * config.num_key_value_heads
    sizes = dict(zip(TARGETS, [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden),
                               (hidden, wide), (hidden, wide), (wide, hidden)], strict=True))  # fmt: skip
    entries = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=model, r=r, lora_alpha=r, bias="none"
    )
    for number in range(count):
        path, draw = folder / str(number), torch.Generator().manual_seed(number)
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(exist_ok=True)
        tensors = {}
        for layer in range(config.num_hidden_layers):
            for target, (K, N) in sizes.items():
                part = "self_attn" if target[0] in "qkvo" else "mlp"
                prefix = f"base_model.model.model.layers.{layer}.{part}.{target}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(r, K, generator=draw) * K**-0.5
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(N, r, generator=draw) * 0.1 * r**-0.5
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(entries | dict(target_modules=list(TARGETS))))


def main() -> None:
    """Serve until stdin ends."""
    settings = json.loads(sys.argv[1])
    folder, sequences = Path(settings["adapters"]), settings["sequences"]
    lora = dict(enable_lora=True, max_loras=sequences, max_cpu_loras=settings["count"], max_lora_rank=settings["rank"])
    llm = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        enforce_eager=torch.get_default_device().type == "cpu" and not torch.cuda.is_available(),
        max_model_len=1024,
        max_num_seqs=sequences,
        enable_prefix_caching=False,  # every round has the same prompts
        disable_log_stats=False,
        **(lora if settings["lora"] else {}),
    )
    if settings["lora"]:
        write_adapters(folder, settings["model"], settings["count"], settings["rank"])
    for line in sys.stdin:
        question = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=question["tokens"], ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [(7 * i + 13 * j) % 1000 + 1 for j in range(question["prompt"])]}
            for i in range(len(question["adapters"]))
        ]
        requests = [LoRARequest(f"a{n}", 1 + n, str(folder / str(n))) for n in question["adapters"]]
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=requests if settings["lora"] else None, use_tqdm=False)
        seconds = time.perf_counter() - start
        answer = dict(
            tokens_per_s=sum(len(o.outputs[0].token_ids) for o in outputs) / seconds,
            first_token_s=[o.metrics.first_token_latency for o in outputs],
        )
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
