"""A server with many adapters, clients that choose them by Zipf's law, and the clients' measurements."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

DISTINCT_FILES = 32
TARGETS = ("q_proj", "v_proj")
WORDS = "the a of model adapter answer question text code list table river mountain blue fast small".split()


@dataclass
class Load:
    """What is asked: requests of about ``prompt`` tokens and ``tokens`` to generate, ``clients`` at a time."""

    requests: int
    clients: int
    prompt: int
    tokens: int
    exponent: float


def write_adapters(folder: Path, model: Path, count: int, r: int) -> int:
    """``count`` folders with an adapter each, their files links to a few: 1,000 would fill the disk. Bytes of one."""
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    wide = {"q_proj": heads * head, "v_proj": config.get("num_key_value_heads", heads) * head}
    card = dict(peft_type="LORA", task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=list(TARGETS))
    draw = torch.Generator().manual_seed(0)
    sources = []
    for i in range(min(DISTINCT_FILES, count)):
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for target, out in wide.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(r, hidden, generator=draw) * hidden**-0.5
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, r, generator=draw) * 0.05
        sources.append(folder / f"source{i}.safetensors")
        save_file(tensors, sources[-1])
    for i in range(count):
        place = folder / "adapters" / f"a{i}"
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text(json.dumps(card))
        os.link(sources[i % len(sources)], place / "adapter_model.safetensors")
    return sum(t.nbytes for t in tensors.values())


@contextlib.contextmanager
def server(model: Path, adapters: Path, capacity: int, device: str, log: Path) -> Iterator[str]:
    """``fused-lora serve`` in a process of its own; its address."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = dict(model=model, adapters=adapters, port=port, capacity=capacity, device=device)
    options["served-model-name"] = "base"
    command = [sys.executable, "-m", "fused_lora.cli", "serve"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def zipf(count: int, exponent: float, requests: int, seed: int = 0) -> list[str]:
    """Names of adapters, adapter k with a probability that falls as (k+1) ** -exponent."""
    draw = random.Random(seed)
    weights = [(k + 1) ** -exponent for k in range(count)]
    return [f"a{k}" for k in draw.choices(range(count), weights, k=requests)]


def ask(url: str, names: list[str], load: Load, deadline: float) -> dict:
    """Put the requests to the server, ``load.clients`` at a time, none after ``deadline``; what the clients saw."""
    return asyncio.run(_ask(url, names, load, deadline))


async def _ask(url: str, names: list[str], load: Load, deadline: float) -> dict:
    import httpx

    queue, first, tokens, failed = list(enumerate(names)), [], [], []
    queue.reverse()

    async def client(http: httpx.AsyncClient) -> None:
        while queue and time.monotonic() < deadline:
            number, name = queue.pop()
            draw = random.Random(number)
            body = dict(model=name, prompt=" ".join(draw.choices(WORDS, k=load.prompt)), max_tokens=load.tokens)
            body |= dict(temperature=0, stream=True, stream_options={"include_usage": True})
            start, came, used, said = time.monotonic(), None, 0, ""
            async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    said = line or said
                    chunk = json.loads(line[6:]) if line.startswith("data: {") else {}
                    if chunk.get("choices") and came is None:
                        came = time.monotonic() - start
                    used = (chunk.get("usage") or {}).get("completion_tokens", used)
            if came is None or not used:
                failed.append(f"{name}: {answer.status_code} {said}")
            else:
                first.append(came)
                tokens.append(used)

    start = time.monotonic()
    limits = httpx.Limits(max_connections=load.clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(load.clients)))
    seconds = time.monotonic() - start
    cuts = statistics.quantiles(first, n=100, method="inclusive") if len(first) > 1 else first * 99
    return dict(
        requests=len(first),
        failed=len(failed),
        first_failure=failed[0][:300] if failed else None,
        seconds=round(seconds, 3),
        tokens=sum(tokens),
        tokens_per_second=round(sum(tokens) / seconds, 2),
        first_token_seconds={f"p{p}": round(cuts[p - 1], 4) for p in (50, 90, 99)} if cuts else None,
        adapters=len(set(names[: len(first)]) - {"base"}),
    )


def counters(url: str) -> dict[str, float]:
    """The store's counters as the server shows them."""
    import httpx

    page = httpx.get(f"{url}/metrics").text
    found = dict(re.findall(r"^fused_lora_adapter_(\w+?)(?:_total)? ([0-9.e+]+)$", page, re.MULTILINE))
    return {name: float(found[name]) for name in ("hits", "loads", "evictions", "waits", "bytes_used")}
