"""Serving many unmerged adapters: the cost of a step as a share of the base, generation, and a server under load.

    python benchmarks/bench_serving.py

step      a decode step of T sequences under D adapters of rank r, as a share of the base model's step; beside it the
          floor, the bytes of base and adapters over those of the base. Inside CUDA graphs on a GPU. On a CPU the first
          layers of the quickstart model stand for all.
generate  a batch of 8 sequences under 8 adapters with model.generate, against PEFT's adapter_names.
server    `fused-lora serve` with 1,000 adapters of which it holds 32: tokens per second and time to the first token,
          requests drawn by Zipf's law, and the same requests to the base model.

A point whose result differs from PEFT's (from one adapter at a time, where PEFT is left out) gets no time.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import serving_load
import torch
from report import ROOT, Clock, Report, Table, begin, parser, run_points, spread, times_of
from serving_steps import Adapters, Step, StepPoint, disagreement, steps
from torch import nn

ROWS, DISTINCT, RANKS = (1, 8, 32, 64, 256), ("1", "4", "32", "T"), (16, 64, 8)
CPU_LAYERS, CPU_BUDGET, CPU_SECONDS, CPU_ROUNDS = 4, 2.5, 0.15, 3
PEFT_UP_TO = {"cpu": 8, "cuda": 64}
LOOP_UP_TO = {"cpu": 8, "cuda": 256}
PARTS = ("step", "generate", "server")
PROVIDERS = ("base", "fused_lora", "PEFT", "loop", "merged")
LLAMA_3_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)
STEP_COLUMNS = [("step", 20), ("base ms", 24), ("fused_lora", 10), ("floor", 8)]
STEP_COLUMNS += [("PEFT", 8), ("loop", 8), ("merged", 8)]
SERVER_COLUMNS = [("server", 24), ("tok/s", 8), ("first token s, p50 p90 p99", 28), ("hits", 7), ("loads", 6)]
SERVER_COLUMNS += [("evicted", 8), ("failed", 7)]


def points(arguments: argparse.Namespace) -> list[StepPoint]:
    """The grid, ranks innermost: wherever it is cut short, it has points of all of them."""
    found = []
    for T in sorted(arguments.rows):
        distinct = {T if d == "T" else int(d) for d in arguments.distinct}
        found += [StepPoint(T, D, r) for D in sorted(distinct) if D <= T for r in arguments.ranks]
    return found


def load_decoder(arguments: argparse.Namespace) -> tuple[nn.Module, str]:
    """(decoder without an output layer, what it is)."""
    device = arguments.device
    if arguments.model is None and device.type == "cuda":
        from transformers import LlamaConfig, LlamaModel

        with torch.device(device):
            decoder = LlamaModel(LlamaConfig(**LLAMA_3_8B, vocab_size=1024)).to(torch.bfloat16)
        name = "Llama-3-8B's layers with random weights"
    else:
        decoder = _quickstart().load(arguments.model, device, torch.float32)[0].model
        name = Path(arguments.model).name if arguments.model else "SmolLM2-135M-Instruct"
    count, total = arguments.layers or len(decoder.layers), len(decoder.layers)
    decoder.layers = decoder.layers[:count]
    decoder.config = copy.deepcopy(decoder.config)
    decoder.config.num_hidden_layers = count
    return decoder.eval().requires_grad_(False), name if count >= total else f"{name}, {count} of {total} layers"


def _quickstart():
    sys.path.insert(0, str(ROOT / "examples"))
    import quickstart_model

    return quickstart_model


class Steps:
    """Measures the grid; the adapters of a rank stay until its last point."""

    def __init__(self, report: Report, arguments: argparse.Namespace):
        self.report, self.arguments = report, arguments
        self.decoder, name = load_decoder(arguments)
        report.settings["model"] = name
        print(f"share of the base's step: {name}, {next(self.decoder.parameters()).dtype}")
        self.table = Table(STEP_COLUMNS)
        self.adapters: dict[int, Adapters] = {}
        self.left = Counter(point.r for point in points(arguments))

    def measure(self, point: StepPoint) -> None:
        """Check, time and add the rows of one point."""
        arguments, r = self.arguments, point.r
        if r not in self.adapters:
            self.adapters[r] = Adapters(self.decoder, r)
        ids = torch.arange(1, point.T + 1, device=arguments.device)[:, None]
        try:
            with steps(self.adapters[r], point, ids, arguments.peft_up_to, arguments.loop_up_to) as trial:
                wrong = disagreement(trial)
                if wrong is None:
                    calls = {name: step.call for name, step in trial.steps.items()}
                    self._add(point, trial.steps, times_of(calls, Clock(arguments.device), arguments))
                    return
        finally:
            self.left[r] -= 1
            if not self.left[r]:
                self.adapters.pop(r).close()
        self.report.add_wrong(self.table, vars(point) | dict(benchmark="step", provider="fused_lora"), wrong, point)

    def _add(self, point: StepPoint, found: dict[str, Step], times: dict[str, dict]) -> None:
        adapters = self.adapters[point.r]
        floor = 1 + point.D * adapters.bytes_each() / adapters.bytes_of_base()
        share = {name: round(t["median"] / times["base"]["median"], 4) for name, t in times.items()}
        for name, step in found.items():
            row = vars(point) | dict(benchmark="step", provider=name, correct=True, ms=times[name])
            self.report.rows.append(row | dict(share=share[name], floor_share=round(floor, 4), graph=step.graphed))
        cells = [f"{share[name]:.2f}" if name in share else None for name in PROVIDERS[1:]]
        self.table.row(point, spread(times["base"]), cells[0], f"{floor:.2f}", *cells[1:])

    def close(self) -> None:
        """Free the adapters, and report the providers that were left out."""
        for adapters in self.adapters.values():
            adapters.close()
        self.adapters.clear()
        done = {(row["T"], row["D"], row["r"]) for row in self.report.rows if row["benchmark"] == "step"}
        for name, limit, why in (
            ("PEFT", self.arguments.peft_up_to, "its modules grow by one per adapter and layer"),
            ("loop and merged", self.arguments.loop_up_to, "they run the model once per adapter"),
        ):
            if above := [D for _, D, _ in done if D > limit]:
                self.report.skipped.append(f"{name} at {len(above)} points with more than {limit} adapters: {why}")


def generate(report: Report, arguments: argparse.Namespace) -> None:
    """8 sequences under 8 adapters, ours and PEFT's generate in turns: tokens per second, and the tokens' equality."""
    parts = _quickstart()
    model, tokenizer = parts.load(arguments.model, arguments.device, torch.float32)
    model.requires_grad_(False)
    adapters, D, new = Adapters(model.model, 16), 8, min(arguments.tokens, 8)
    names = [adapters.name(i) for i in range(D)]
    served, theirs = parts.share(model), parts.share(model)
    served.model = adapters.store.model
    wrapped = adapters.with_peft(D)
    theirs.model = wrapped.base_model.model
    prompts = [" ".join(serving_load.WORDS[i : i + 6]) for i in range(D)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(arguments.device)
    more = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = {}

    def ours() -> None:
        with adapters.store.batch(names):
            answers["fused_lora"] = served.generate(**inputs, **more)

    def peft_s() -> None:
        # model.generate with PEFT's hooks for a mixed batch on its decoder
        with wrapped.base_model._enable_peft_forward_hooks(adapter_names=names):
            answers["PEFT"] = theirs.generate(**inputs, **more)

    twice = argparse.Namespace(seconds=2, rounds=2, deadline=arguments.deadline)
    times = times_of({"fused_lora": ours, "PEFT": peft_s}, Clock(arguments.device), twice)
    same = (answers["fused_lora"] == answers["PEFT"]).float().mean().item()
    speed = {}
    for name, ms in times.items():
        speed[name] = D * new / ms["median"] * 1e3
        row = dict(benchmark="generate", provider=name, T=D, D=D, r=16, correct=same > 0.9, ms=ms)
        report.rows.append(row | dict(tokens_per_second=round(speed[name], 2), same_tokens=round(same, 4)))
        print(f"generate, 8 sequences under 8 adapters: {name:11} {speed[name]:8.1f} tok/s")
    if arguments.device.type == "cpu":
        report.bar("generate under 8 adapters: times PEFT's tokens/s", speed["fused_lora"] / speed["PEFT"], 1.5, True)
    adapters.close()


def serve(report: Report, arguments: argparse.Namespace) -> None:
    """The server under load: Zipf over all adapters, then the same requests to the base model."""
    model = Path(arguments.model) if arguments.model else _quickstart().cached_smollm2()
    load = serving_load.Load(arguments.requests, arguments.clients, 12, arguments.tokens, 1.0)
    known, held, r = arguments.known, arguments.held, 8
    table = Table(SERVER_COLUMNS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = serving_load.write_adapters(folder, model, known, r)
        capacity, log = int(size * held * 1.02), folder / "log"
        with serving_load.server(model, folder / "adapters", capacity, arguments.device.type, log) as url:
            serving_load.ask(url, ["base", "a0"], load, time.monotonic() + 60)
            for provider, names in (
                (f"Zipf over {known}", serving_load.zipf(known, load.exponent, load.requests)),
                ("base", ["base"] * load.requests),
            ):
                before, now = serving_load.counters(url), time.monotonic()
                # however late it is, some requests are put
                until = now + max((arguments.deadline - now) * (0.6 if provider != "base" else 1.0), 8)
                seen = serving_load.ask(url, names, load, until)
                after = serving_load.counters(url)
                moved = {key: after[key] - before[key] for key in ("hits", "loads", "evictions", "waits")}
                correct = seen["failed"] == 0 and seen["requests"] > 0 and after["bytes_used"] <= capacity
                row = dict(benchmark="server", provider=provider, known=known, held=held, r=r, correct=correct)
                report.rows.append(row | vars(load) | seen | dict(store=moved))
                first = " ".join(f"{value:.3f}" for value in (seen["first_token_seconds"] or {}).values())
                cells = (moved[key] for key in ("hits", "loads", "evictions"))
                if not correct:
                    print(f"  {seen['first_failure']}\n{log.read_text()[-2000:]}")
                table.row(provider, seen["tokens_per_second"], first, *(f"{c:g}" for c in cells), seen["failed"])


def add_bars(report: Report) -> None:
    """The package's goals for serving on a GPU, compared with the measured points."""
    rows = [r for r in report.rows if r["benchmark"] == "step" and r["provider"] == "fused_lora" and r["correct"]]
    if report.device.type != "cuda":
        return
    if single := [r["share"] for r in rows if r["D"] == 1 and r["T"] <= 64]:
        report.bar("step, one adapter, T <= 64: share of the base, most", max(single), 1.05, False)
    if many := [r["share"] / r["floor_share"] for r in rows if r["D"] == 32]:
        report.bar("step, 32 adapters: share over the floor, most", max(many), 1.3, False)


def _number(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text!r}")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(_number, text.split(",")))


def _distinct(text: str) -> tuple[str, ...]:
    return tuple(part if part == "T" else str(_number(part)) for part in text.split(","))


def _parts(text: str) -> list[str]:
    if not set(text.split(",")) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {text!r}")
    return text.split(",")


def options() -> argparse.ArgumentParser:
    """The options of every benchmark and this one's."""
    found = parser(__doc__)
    found.add_argument("--model", help="folder of a Llama-like model (default: the quickstart's)")
    found.add_argument("--layers", type=_number, help=f"layers of it for the steps (default on a CPU: {CPU_LAYERS})")
    found.add_argument("--rows", type=_numbers, default=ROWS, metavar="T,T", help="sequences in a step")
    found.add_argument("--distinct", type=_distinct, default=DISTINCT, metavar="D,T")
    found.add_argument("--ranks", type=_numbers, default=RANKS, metavar="r,r")
    found.add_argument("--peft-up-to", type=_number, metavar="D", help="adapters in PEFT's model at most")
    found.add_argument("--loop-up-to", type=_number, metavar="D", help="adapters one at a time and merged, at most")
    found.add_argument("--requests", type=_number, default=64, help="to the server, at most")
    found.add_argument("--clients", type=_number, default=8)
    found.add_argument("--tokens", type=_number, default=16, help="to generate per sequence")
    found.add_argument("--known", type=_number, default=1000, help="adapters of the server")
    found.add_argument("--held", type=_number, default=32, help="adapters that its store has room for")
    found.add_argument("--parts", type=_parts, default=PARTS, metavar="PART,PART", help=f"of: {','.join(PARTS)}")
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = options().parse_args(argv)
    on_cpu = arguments.device.type == "cpu"
    if on_cpu:
        arguments.budget = arguments.budget or CPU_BUDGET
        arguments.layers = arguments.layers or CPU_LAYERS
        arguments.seconds = CPU_SECONDS if arguments.seconds is None else arguments.seconds
        arguments.rounds = min(arguments.rounds, CPU_ROUNDS)
    arguments.peft_up_to = arguments.peft_up_to or PEFT_UP_TO[arguments.device.type]
    arguments.loop_up_to = arguments.loop_up_to or LOOP_UP_TO[arguments.device.type]
    report = begin("serving", arguments)
    start, end, parts = time.monotonic(), arguments.deadline, arguments.parts
    if "step" in parts:
        # the grid is cut short in favour of the parts that follow
        arguments.deadline = start + (end - start) * (0.45 if len(parts) > 1 else 1.0)
        measured = Steps(report, arguments)
        run_points(points(arguments), report, arguments.deadline, measured.measure)
        measured.close()
    arguments.deadline = end
    if "generate" in parts:
        generate(report, arguments)
        report.write()
    if "server" in parts:
        serve(report, arguments)
    add_bars(report)
    code = report.finish()
    report.figure("serving", report.settings.get("model"))
    return code


if __name__ == "__main__":
    sys.exit(main())
