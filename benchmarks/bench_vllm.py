"""LoRA inside vLLM: its own wrapper against this package's, operator by operator and through the engine.

    .venv-vllm/bin/python benchmarks/bench_vllm.py          (make test-vllm makes the environment)

operator  what the LoRA layers of vLLM call, over T rows under D adapters of rank r: a prefill has the rows of a request
          side by side, a decode step one row of each. Beside it the base product. Inside CUDA graphs on a GPU. Each
          result is checked against float64 first.
engine    requests to SmolLM2-135M, three for each of the sequences that run at once: tokens per second and time to the
          first token of the base model, of vLLM's LoRA and of this package's, over eight adapters in equal shares and
          over 32 by Zipf's law. The three engines are processes that take turns; the machine must be quiet, for
          OpenMP's threads spin, as they do for users.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from report import ROOT, Clock, Report, Table, begin, parser, run_points, spread, summary, times_of
from torch import Tensor
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping

from fused_lora.testing.numeric import errors, ulp

QKV, ATTENTION, GATE_UP = (2048, 512, 512), (576, 192, 192), (1536, 1536)
GRID = [  # rows, adapters, rank, in, out, prefill
    (512, 4, 16, 2048, QKV, True),
    (512, 4, 16, 576, ATTENTION, True),
    (8, 4, 16, 2048, QKV, False),
    (8, 8, 16, 2048, QKV, False),
    (8, 4, 16, 576, ATTENTION, False),
    (8, 8, 16, 576, ATTENTION, False),
    (8, 8, 16, 576, GATE_UP, False),
    (8, 8, 64, 2048, QKV, False),
    (32, 8, 16, 4096, (4096,), False),
    (32, 32, 16, 2048, QKV, False),
]
PROVIDERS = ("base", "vllm", "fused_lora")
MIXES = {"8 adapters": (8, False), "zipf over 32": (32, True)}
COLUMNS = [("operator", 42), ("base ms", 24), ("vllm ms", 24), ("fused_lora ms", 24), ("over vllm", 10), ("of base", 8)]
ENGINE_COLUMNS = [("engine", 22), ("provider", 11), ("tokens/s", 24), ("first token s", 24), ("of base", 8)]


@dataclass(frozen=True)
class OperatorPoint:
    """T rows under D adapters of rank r, through the outputs N of one layer."""

    T: int
    D: int
    r: int
    K: int
    N: tuple[int, ...]
    prefill: bool
    dtype: str

    def __str__(self) -> str:
        phase = "prefill" if self.prefill else "decode"
        return f"{phase} {self.T}x{self.K} N={sum(self.N)}/{len(self.N)} D={self.D} r={self.r} {self.dtype}"


class Layer(BaseLayerWithLoRA):
    """No more of a LoRA layer than the memory of its adapters."""

    def __init__(self, A: list[Tensor], B: list[Tensor]):
        super().__init__()
        self.lora_a_stacked, self.lora_b_stacked = (tuple(torch.zeros_like(t) for t in side) for side in (A, B))
        self.base_layer = torch.nn.Identity()

    def set_lora(self, index: int, lora_a: list[Tensor | None], lora_b: list[Tensor | None]) -> None:
        """As vLLM's layers with several outputs do."""
        for stacked, side in ((self.lora_a_stacked, lora_a), (self.lora_b_stacked, lora_b)):
            for memory, matrix in zip(stacked, side, strict=True):
                memory[index].zero_()
                if matrix is not None:
                    memory[index, 0, : matrix.shape[0], : matrix.shape[1]].copy_(matrix)

    def reset_lora(self, index: int) -> None:
        raise NotImplementedError


def wrappers(device: torch.device, rows: int, slots: int, rank: int, dtype: torch.dtype) -> dict:
    """vLLM's wrapper and ours."""
    if device.type == "cuda":
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as Theirs

        from fused_lora.integrations.vllm.cuda import GroupedWrapperGPU as Ours
    else:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Theirs

        from fused_lora.integrations.vllm.cpu import GroupedWrapperCPU as Ours
    config = SimpleNamespace(
        max_loras=slots, max_lora_rank=rank, lora_dtype=dtype, specialize_active_lora=False, fully_sharded_loras=False
    )
    return {
        "vllm": Theirs(rows, rows, device, lora_config=config),
        "fused_lora": Ours(rows, rows, device, lora_config=config),
    }


@torch.no_grad()
def measure_operator(point: OperatorPoint, report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one point."""
    device, dtype = arguments.device, getattr(torch, point.dtype)
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=draw)

    T, D, r, K, N = point.T, point.D, point.r, point.K, point.N
    A = [normal(D, 1, r, K, std=K**-0.5) for _ in N]
    B = [normal(D, 1, n, r, std=r**-0.5) for n in N]
    x, y, W = normal(T, K), normal(T, sum(N)), normal(sum(N), K, std=K**-0.5)
    ids = [1 + (i * D // T if point.prefill else i % D) for i in range(T)]
    slots = torch.tensor(ids, device=device) - 1
    narrow = [torch.einsum("tk,trk->tr", x.double(), a[slots, 0].double()) for a in A]
    terms = [torch.einsum("tr,tnr->tn", S, b[slots, 0].double()) for S, b in zip(narrow, B, strict=True)]
    exact = torch.cat(terms, 1) + y.double()
    calls, results = {"base": lambda: torch.nn.functional.linear(x, W)}, {}
    for name, wrapper in wrappers(device, T, D, r, dtype).items():
        layer = Layer(A, B)
        layer.set_mapping(wrapper)
        for slot in range(D):
            layer.set_lora(slot, [a[slot, 0] for a in A], [b[slot, 0] for b in B])
        wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [*range(1, D + 1)], D, 1000)
        results[name] = y.clone()

        def call(wrapper=wrapper, layer=layer, out=results[name]) -> None:
            wrapper.add_lora_linear(out, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, N)

        call()
        if device.type == "cuda":
            from fused_lora.testing.graphs import capture

            calls[name] = capture(call)[0].replay
        else:
            calls[name] = call
    off = {name: errors(result, exact)[0] for name, result in results.items()}
    limit = 1.1 * off["vllm"] + ulp(exact.abs().max().item(), dtype)
    wrong = f"off by {off['fused_lora']:.2e}, vLLM's by {off['vllm']:.2e}" if off["fused_lora"] > limit else None
    right = {name: call for name, call in calls.items() if name != "fused_lora" or wrong is None}
    ms = times_of(right, Clock(device), arguments)
    for name in calls:
        row = vars(point) | dict(benchmark="operator", provider=name, correct=name != "fused_lora" or wrong is None)
        report.rows.append(row | (dict(ms=ms[name], error=off.get(name)) if name in ms else dict(wrong=wrong)))
    if wrong is not None:
        table.row(point, None, None, "WRONG", None, None)
        return
    median = {name: found["median"] for name, found in ms.items()}
    over, share = median["vllm"] / median["fused_lora"], median["fused_lora"] / median["base"]
    table.row(point, *(spread(ms[name]) for name in PROVIDERS), f"{over:.2f}x", f"{share:.3f}")
    if device.type == "cpu":
        if point.prefill and N == QKV:
            report.bar(f"{point}: of the base product", share, 0.3, at_least=False)
            report.bar(f"{point}: over vLLM", over, 10, at_least=True)
        elif not point.prefill and r == 16 and D <= 8:
            report.bar(f"{point}: over vLLM", over, 3 if T >= 32 else 1, at_least=True)


class Engine:
    """A process with one engine, which answers a line with a line."""

    def __init__(self, provider: str, settings: dict):
        environment = os.environ | dict(FUSED_LORA_VLLM=str(int(provider == "fused_lora")), VLLM_LOGGING_LEVEL="ERROR")
        command = [sys.executable, str(ROOT / "benchmarks" / "vllm_engine.py"), json.dumps(settings)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **question) -> dict:
        """The answer to one batch of requests."""
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the engine ended with {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def adapters_of(mix: str, requests: int) -> list[int]:
    """The adapter of each request, the same for all providers."""
    count, zipf = MIXES[mix]
    if not zipf:
        return [i % count for i in range(requests)]
    weights = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    return torch.multinomial(weights, requests, True, generator=torch.Generator().manual_seed(0)).tolist()


def measure_engine(sequences: int, report: Report, table: Table, arguments) -> None:
    """Rounds of all mixes over three engines that run so many sequences at once, in turns."""
    sys.path.insert(0, str(ROOT / "examples"))
    import quickstart_model

    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(quickstart_model.cached_smollm2())
        settings = dict(model=model, adapters=folder, count=32, rank=16, sequences=sequences, dtype=arguments.dtype)
        engines = {name: Engine(name, settings | dict(lora=name != "base")) for name in PROVIDERS}
        try:
            answers: dict[tuple[str, str], list[dict]] = {}
            for timed in range(-1, arguments.engine_rounds):
                for mix in MIXES:
                    adapters = adapters_of(mix, 3 * sequences)
                    for name, engine in engines.items():
                        tokens = arguments.tokens if timed >= 0 else 2
                        found = engine.ask(adapters=adapters, prompt=arguments.prompt, tokens=tokens)
                        if timed >= 0:
                            answers.setdefault((mix, name), []).append(found)
                            speed = f"{found['tokens_per_s']:.3g} tokens/s"
                            print(f"  round {timed}, {sequences} sequences, {mix}, {name}: {speed}", flush=True)
        finally:
            for engine in engines.values():
                engine.close()
    speeds = {key: summary([a["tokens_per_s"] for a in found]) for key, found in answers.items()}
    for (mix, name), found in answers.items():
        share = speeds[mix, name]["median"] / speeds[mix, "base"]["median"]
        first = summary([t for a in found for t in a["first_token_s"]])
        row = dict(benchmark="engine", sequences=sequences, mix=mix, provider=name, correct=True, share=round(share, 4))
        report.rows.append(row | dict(tokens_per_s=speeds[mix, name], first_token_s=first))
        table.row(f"{sequences} of {mix}", name, spread(speeds[mix, name]), spread(first), f"{share:.3f}")
    for mix, setting in ((mix, f"{sequences} sequences of {mix}") for mix in MIXES):
        ours = speeds[mix, "fused_lora"]["median"]
        report.bar(f"{setting}: of the base model's tokens/s", ours / speeds[mix, "base"]["median"], 0.8, at_least=True)
        report.bar(f"{setting}: over vLLM's tokens/s", ours / speeds[mix, "vllm"]["median"], 1, at_least=True)
    report.write()


def main(arguments: list[str] | None = None) -> int:
    """Both parts; the exit code: 1 when a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=("operator", "engine"), default=["operator", "engine"])
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--model", help="of the engine part; default: the quickstart's SmolLM2")
    options.add_argument("--dtype", default="float32", help="of the engine part")
    options.add_argument("--sequences", type=int, nargs="+", default=[8, 32], help="that an engine runs at once")
    options.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    options.add_argument("--tokens", type=int, default=32, help="of an answer")
    options.add_argument("--engine-rounds", type=int, default=3)
    arguments = options.parse_args(arguments)
    report = begin("vllm", arguments)
    if "operator" in arguments.parts:
        table = Table(COLUMNS)
        points = [OperatorPoint(*row[:5], row[5], dtype) for dtype in arguments.dtypes for row in GRID]
        run_points(points, report, arguments.deadline, lambda p: measure_operator(p, report, table, arguments))
    if "engine" in arguments.parts:
        table = Table(ENGINE_COLUMNS)
        for sequences in arguments.sequences:
            measure_engine(sequences, report, table, arguments)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
