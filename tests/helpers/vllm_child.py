"""An engine in a process of its own: torch.distributed is set up once in a process.

python vllm_child.py JSON OUT: the arguments of LLM, prompts and (name, number, path) of their adapters. It writes JSON:
the tokens, and the numbers that vLLM counted about drafts.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given = json.loads(sys.argv[1])
    engine = LLM(**given["engine"])
    greedy = SamplingParams(temperature=0, max_tokens=given["new_tokens"], ignore_eos=True, detokenize=False)
    requests = [adapter and LoRARequest(*adapter) for adapter in given["adapters"]]
    prompts = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
    outputs = engine.generate(prompts, greedy, lora_request=requests, use_tqdm=False)
    drafts = {m.name: m.value for m in engine.get_metrics() if m.name.startswith("vllm:spec") and hasattr(m, "value")}
    Path(sys.argv[2]).write_text(json.dumps([[list(o.outputs[0].token_ids) for o in outputs], drafts]))


if __name__ == "__main__":  # vLLM's workers import this module
    main()
