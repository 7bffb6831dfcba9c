"""Merge and unmerge one linear layer: PEFT, a hand-written addmm, this package, and a plain copy of the weight.

    python benchmarks/bench_merge.py

Every merge is checked against float64 first (RMS error at most 1.1 times PEFT's plus an ulp); a wrong one gets no time.
`no record` is the kernel that this package's merge ends with, on factors ready in fp32: nothing checked first and
nothing kept, so it cannot be undone to the bit. Only a device that runs our kernels has it.
All providers take turns in one run, each on its own copies of the weight, set back to the same bits before every turn.
On a CPU a turn merges four such layers one after another, as merging a model does, then unmerges them (one of PEFT's
safe_merge, which takes the longest); the times are those of one layer. (The copying between the turns leaves torch's
threads spinning for milliseconds.) Then come whole models: 120 small layers, and five layers of a decoder layer of
Llama-3-8B in bf16, on a GPU all of four decoder layers. Of these `sync` is a merge and the way back, and `switch` puts
another adapter in the place of the merged one, in PEFT and in `two calls` by an unmerge and a merge. Last come the
files of one decoder layer, by `bench_checkpoint.py`, which has larger ones. The figure has the time over the size of
the weight, where matplotlib is installed.
`floor` is the time of the bytes that a merge must move (W read and written, A and B read) at the copy's bandwidth;
`host us` the time in which the host issues a merge on a GPU, where it need not wait for the device;
`changed` the share of weights whose bits differ after merge and unmerge; `extra` the peak memory of one merge beyond
what was there before, in per cent of the weight.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bench_checkpoint
import peft
import torch
from layers import SCALING, Point, Weights, no_worse, plausible
from report import Candidate, Clock, Report, Table, begin, interleaved, parser, run_points, spread, summaries, summary

import fused_lora
from fused_lora.ops.merge import launch as merge_kernel
from fused_lora.reference import bits

SHAPES = {"cpu": [(4096, 4096), (2048, 2048), (1000, 777)], "cuda": [(4096, 4096), (4096, 1024), (4096, 14336)]}
DTYPES = {"cpu": ["float32", "bfloat16", "float16"], "cuda": ["bfloat16", "float16", "float32"]}
_LAYERS = {"cpu": 4, "cuda": 1}  # in a turn
_MEASURABLE_BYTES = 1 << 20  # below, pages and arenas outweigh the weight
_SMALL = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
_DECODER = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}  # of Llama-3-8B
_DECODER |= {"down": (14336, 4096)}  # on a CPU not all of the MLP: it must be done in two minutes
_MLP = {"gate": (4096, 14336), "up": (4096, 14336)}
_FILES = dict(layers=1, hidden=2048, vocabulary=8000, shards=3, rounds=3)
_SECONDS, _ROUNDS = 2.0, 5  # at least, of a point
_DECODER_ROUNDS = 3  # each takes PEFT seconds
_FIRST = """
import json, time, torch, fused_lora
W, A, B = torch.randn(4096, 4096), torch.randn(16, 4096), torch.randn(4096, 16) * 1e-3
seconds = []
for _ in range(2):
    start = time.perf_counter()
    record = fused_lora.functional.merge_(W, [A], [B], [1.0])
    seconds.append(time.perf_counter() - start)
    fused_lora.functional.unmerge_(W, record)
print(json.dumps(seconds))
"""
COLUMNS = [("layer", 26), ("provider", 14), ("merge ms", 22), ("speed/PEFT", 10), ("xfloor", 6)]
COLUMNS += [("xcopy", 6), ("unmerge ms", 22), ("speed/PEFT", 10), ("host us", 8), ("changed %", 9), ("extra %", 8)]
COLUMNS += [("record B/w", 10)]


@dataclass
class Merger:
    """One way to merge, on its own copy of the weight."""

    name: str
    weight: Callable[[], torch.Tensor]
    merge: Callable[[], object]
    unmerge: Callable[[], object] | None = None
    record_bytes: Callable[[], int] = lambda: 0
    exact: bool = False  # promises the old bits back


def mergers(weights: Weights) -> dict[str, Merger]:
    """PEFT (default and safe), hand-written addmm, ours, our kernel alone; PEFT first, for it is the yardstick."""

    def of_layer(name: str, layer: torch.nn.Module, **more) -> Merger:
        options = {"safe_merge": True} if name == "PEFT safe" else {}
        return Merger(
            name, lambda: layer.get_base_layer().weight.data, lambda: layer.merge(**options), layer.unmerge, **more
        )

    ours = weights.ours(weights.base_layer(copy=True), 0.0)
    by_hand = weights.weight.clone()
    found = [
        of_layer("PEFT", weights.peft(weights.base_layer(copy=True), 0.0)),
        of_layer("PEFT safe", weights.peft(weights.base_layer(copy=True), 0.0)),
        Merger("addmm", lambda: by_hand, _addmm(by_hand, weights, 1), _addmm(by_hand, weights, -1)),
        Merger(
            "fused_lora",
            lambda: ours.base_layer.weight.data,
            ours.merge,
            ours.unmerge,
            record_bytes=lambda: ours.merge_state.record.nbytes,
            exact=True,
        ),
    ]
    if merge_kernel.applies(weights.weight):
        found.append(_no_record(weights))
    return {merger.name: merger for merger in found}


def _no_record(weights: Weights) -> Merger:
    from fused_lora.kernels import merge as kernels

    W, A, B = weights.weight.clone(), weights.lora_A.float(), weights.lora_B.float() * SCALING
    return Merger("no record", lambda: W, lambda: kernels.merge_apply(W, A, B), lambda: kernels.unmerge_apply(W, A, B))


def _addmm(W: torch.Tensor, weights: Weights, sign: int) -> Callable[[], object]:
    """W += s B A by hand: in place where one dtype (or a GPU) allows it, through fp32 where a CPU would crawl."""
    A, B = weights.lora_A, weights.lora_B
    if W.dtype == A.dtype:
        return lambda: W.addmm_(B, A, alpha=sign * SCALING)
    if W.device.type == "cpu":
        return lambda: W.copy_(torch.addmm(W.to(A.dtype), B, A, alpha=sign * SCALING))
    return lambda: W.addmm_(B.to(W.dtype), A.to(W.dtype), alpha=sign * SCALING)


def restore(merger: Merger, weights: Weights) -> None:
    merger.weight().copy_(weights.weight)


def check(weights: Weights, model: dict[str, Merger]) -> dict[str, dict]:
    """{provider: {wrong: None or what, changed: share of weights not back after merge and unmerge, record_bytes}}."""
    A, B = weights.lora_A.double(), weights.lora_B.double()
    exact = torch.addmm(weights.weight.double(), B, A, alpha=SCALING)
    found, yardstick = {}, None
    for name, merger in model.items():
        merger.merge()
        merged = merger.weight().clone()
        record_bytes = merger.record_bytes()
        merger.unmerge()
        changed = (bits(merger.weight()) != bits(weights.weight)).count_nonzero().item() / weights.weight.numel()
        if yardstick is None:
            yardstick = merged
            wrong = plausible(merged, exact, 1, "merged weight")
        else:
            wrong = no_worse(merged, yardstick, exact, "merged weight")
        if merger.exact and changed:
            wrong = f"unmerge left {changed:.2%} of the weights changed"
        found[name] = dict(wrong=wrong, changed=changed, record_bytes=record_bytes)
    return found


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of one call beyond what was held before; None where the system cannot tell."""
    gc.collect(1)  # the older objects were collected before the timed rounds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays resident would hide an allocation
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one layer."""
    device = arguments.device
    weights = Weights.draw(point, device)
    models = [mergers(weights) for _ in range(_LAYERS[device.type])]
    checks = check(weights, models[0])
    layers = {name: [model[name] for model in models] for name in checks if checks[name]["wrong"] is None}
    layers |= {name: layers[name][:1] for name in layers if name == "PEFT safe"}
    source, target = weights.weight.clone(), torch.empty_like(weights.weight)
    candidates = [Candidate("copy", [lambda: target.copy_(source)])]
    candidates += [_turn(name, model, weights) for name, model in layers.items()]
    clock = Clock(device)
    times = interleaved(candidates, clock, arguments.seconds, arguments.rounds, arguments.deadline)
    for name, model in layers.items():
        times[name] = [[ms / len(model) for ms in turn] for turn in times[name]]
    host = {c.name: [clock.host_us([step]) for step in c.steps] for c in candidates}
    extra = {}
    for name, (merger, *_) in layers.items():
        restore(merger, weights)
        peak = peak_extra_bytes(merger.merge, device)
        extra[name] = None if weights.weight.nbytes < _MEASURABLE_BYTES else peak
        merger.unmerge()
    _add_rows(point, weights, report, table, checks, times, host, extra)


def _turn(name: str, model: list[Merger], weights: Weights) -> Candidate:
    """All layers merged, then all unmerged, from the same bits every time."""

    def before() -> None:
        for merger in model:
            restore(merger, weights)

    steps = [lambda: [merger.merge() for merger in model], lambda: [merger.unmerge() for merger in model]]
    return Candidate(name, steps, before)


def _add_rows(point, weights, report, table, checks, times, host, extra) -> None:
    weight_bytes = weights.weight.nbytes
    copied = summary([t[0] for t in times["copy"]])
    adapter_bytes = weights.lora_A.nbytes + weights.lora_B.nbytes
    floor = copied["median"] * (2 * weight_bytes + adapter_bytes) / (2 * weight_bytes)
    common = vars(point) | dict(benchmark="merge", floor_ms=round(floor, 5))
    report.rows.append(common | dict(provider="copy", correct=True, merge_ms=copied))
    label = f"{point.shape} r={point.r} {point.dtype}"
    table.row(label, "copy", spread(copied))
    reference = times.get("PEFT")
    for name, found in checks.items():
        row = common | dict(provider=name, correct=True, changed=found["changed"])
        if found["wrong"] is not None:
            report.add_wrong(table, row, found["wrong"], label, name)
            continue
        merge, unmerge = (summary([t[i] for t in times[name]]) for i in (0, 1))
        ratios = [None, None]
        if reference:
            medians = [summary([t[i] for t in reference])["median"] for i in (0, 1)]
            ratios = [round(theirs / own["median"], 4) for theirs, own in zip(medians, (merge, unmerge), strict=True)]
        share = None if extra[name] is None else round(extra[name] / weight_bytes, 5)
        per_weight = round(found["record_bytes"] / weights.weight.numel(), 5)
        row |= dict(merge_ms=merge, unmerge_ms=unmerge, merge_speedup=ratios[0], unmerge_speedup=ratios[1])
        row |= dict(merge_to_copy=round(merge["median"] / copied["median"], 4))
        row |= dict(merge_host_us=host[name][0], unmerge_host_us=host[name][1])
        row |= dict(extra_memory=share, record_bytes_per_weight=per_weight)
        report.rows.append(row)
        number = [None if value is None else f"{value:.2f}" for value in (*ratios, merge["median"] / floor)]
        table.row(
            label, name, spread(merge), number[0], number[2], f"{row['merge_to_copy']:.2f}", spread(unmerge), number[1],
            host[name][0] and f"{host[name][0]:.0f}",
            f"{100 * found['changed']:.3g}", None if share is None else f"{100 * share:.1f}", f"{per_weight:.3f}",
        )  # fmt: skip


def _twins(bare: torch.nn.Module, config: peft.LoraConfig, names: list[str]) -> tuple[peft.PeftModel, torch.nn.Module]:
    """PEFT's model over a copy of ``bare`` and ours over ``bare``, with the same adapters."""
    theirs, ours = peft.get_peft_model(copy.deepcopy(bare), config, names[0]), bare
    for name in names[1:]:
        theirs.add_adapter(name, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.02)  # a delta of about 1 % of the weight
    for name in names:
        ours = fused_lora.inject(ours, config, name)
    ours.load_state_dict({name.removeprefix("base_model.model."): t for name, t in theirs.state_dict().items()})
    return theirs, ours


def _frozen(model: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.base_layer.weight for layer in fused_lora.lora_layers(model).values()]


def measure_model(report: Report, arguments) -> None:
    """120 layers as small as those of a 135M model: merge and unmerge of the whole model, PEFT's calls and ours."""
    layers = {f"layer{i}": torch.nn.Linear(*_SMALL[i % len(_SMALL)], bias=False) for i in range(120)}
    bare = torch.nn.ModuleDict(layers).to(arguments.device)
    config = peft.LoraConfig(r=16, target_modules=list(layers), init_lora_weights=False)
    theirs, ours = _twins(bare, config, ["default"])
    before = [weight.clone() for weight in _frozen(ours)]
    steps = {
        "PEFT": [theirs.merge_adapter, theirs.unmerge_adapter],
        "fused_lora": [lambda: fused_lora.merge(ours), lambda: fused_lora.unmerge(ours)],
    }
    found = summaries([Candidate(name, calls) for name, calls in steps.items()], Clock(arguments.device), arguments)
    report.bar("model of 120 layers: all bits back", float(all(map(torch.equal, before, _frozen(ours)))), 1.0, True)
    for name, (merge, unmerge) in found.items():
        report.rows.append(dict(benchmark="merge_model", provider=name, layers=120, merge_ms=merge, unmerge_ms=unmerge))
        print(f"model of 120 layers, {name}: merge {spread(merge)} ms, unmerge {spread(unmerge)} ms")
    for i, (call, least) in enumerate([("merge", 1.5), ("unmerge", 1.2)]):
        speedup = found["PEFT"][i]["median"] / found["fused_lora"][i]["median"]
        report.bar(f"{call} of a model of 120 layers: times PEFT's speed", speedup, least, True)


def measure_decoder(report: Report, arguments) -> None:
    """Linear layers of Llama-3-8B in bf16: merged and taken back, as a training loop sends weights to an engine; and
    one adapter in the place of another."""
    torch.manual_seed(0)
    sizes, device = _DECODER, arguments.device
    if device.type == "cuda":
        sizes = {f"{name}{i}": size for i in range(4) for name, size in (_DECODER | _MLP).items()}
    what = f"{len(sizes)} layers of Llama-3-8B"
    layers = {n: torch.nn.Linear(*s, bias=False, dtype=torch.bfloat16, device=device) for n, s in sizes.items()}
    bare = torch.nn.ModuleDict(layers)
    config = peft.LoraConfig(r=16, target_modules=list(sizes), init_lora_weights=False)
    theirs, ours = _twins(bare, config, ["a", "b"])
    before = [weight.clone() for weight in _frozen(ours)]

    def sync() -> None:
        with fused_lora.merged(ours, ["a"]):
            pass

    merge_a, unmerge = lambda: fused_lora.merge(ours, ["a"]), lambda: fused_lora.unmerge(ours)
    steps = {
        "PEFT": [
            lambda: (theirs.merge_adapter(["a"]), theirs.unmerge_adapter()),
            lambda: theirs.merge_adapter(["a"]),
            lambda: (theirs.unmerge_adapter(), theirs.set_adapter("b"), theirs.merge_adapter(["b"])),
            theirs.unmerge_adapter,
        ],
        "fused_lora": [sync, merge_a, lambda: fused_lora.switch(ours, ["b"]), unmerge],
        "two calls": [sync, merge_a, lambda: (unmerge(), fused_lora.merge(ours, ["b"])), unmerge],
    }
    few = Namespace(**(vars(arguments) | dict(rounds=min(arguments.rounds, _DECODER_ROUNDS))))
    found = summaries([Candidate(name, calls) for name, calls in steps.items()], Clock(arguments.device), few)
    back = float(all(map(torch.equal, before, _frozen(ours))))
    report.bar(f"{what}, merged, switched and back: all bits", back, 1, True)
    for name, (there_and_back, merge, switch, unmerge) in found.items():
        row = dict(sync_ms=there_and_back, merge_ms=merge, switch_ms=switch, unmerge_ms=unmerge)
        common = dict(benchmark="merge_decoder", provider=name, dtype="bfloat16", layers=len(sizes))
        report.rows.append(common | row)
        parts = [f"{key[:-3]} {spread(value)}" for key, value in row.items()]
        print(f"{what}, bf16, {name}: {', '.join(parts)} ms")
    for i, call, theirs in ((0, "sync", "PEFT"), (2, "switch", "PEFT"), (2, "switch", "two calls")):
        speedup = found[theirs][i]["median"] / found["fused_lora"][i]["median"]
        whose = "PEFT's speed" if theirs == "PEFT" else "the speed of two calls"
        report.bar(f"{call} of {what}: times {whose}", speedup, 1.0, True)


def measure_first(report: Report) -> None:
    """The first merge of a fresh process against its next."""
    seconds = json.loads(subprocess.run([sys.executable, "-c", _FIRST], capture_output=True, check=True).stdout)
    report.rows.append(dict(benchmark="first_merge", provider="fused_lora", seconds=seconds))
    print(f"first merge of a process {seconds[0]:.3f} s, the next {seconds[1]:.3f} s")
    report.bar("first merge of a process: seconds longer than the next", seconds[0] - seconds[1], 0.3, False)


def add_bars(report: Report) -> None:
    """The package's goals for a merge, compared with the measured rows."""
    rows = [r for r in report.rows if r["benchmark"] == "merge" and r["provider"] == "fused_lora" and r["correct"]]
    timed = [row for row in rows if row["merge_speedup"] is not None]
    if rows:
        report.bar("merge, unmerge: share of weights not back", max(row["changed"] for row in rows), 0.0, False)
    if report.device.type == "cuda":
        bare = [r for r in report.rows if r["benchmark"] == "merge" and r["provider"] == "no record" and r["correct"]]
        for row in bare + rows:
            name = f"merge {row['dtype']} {row['inputs']}x{row['outputs']}"
            if row["provider"] == "no record":
                report.bar(f"{name} without a record: times a device copy", row["merge_to_copy"], 1.25, False)
                continue
            report.bar(f"{name} with its record: times a device copy", row["merge_to_copy"], 1.7, False)
            if row["merge_speedup"] is not None:
                report.bar(f"{name} with its record: times PEFT's speed", row["merge_speedup"], 3.0, True)
        return
    for row in timed:
        if (row["inputs"], row["outputs"], row["r"], row["dtype"]) == (4096, 4096, 16, "float32"):
            report.bar("merge fp32 4096x4096 r=16: times PEFT's speed", row["merge_speedup"], 3.0, True)
            report.bar("unmerge fp32 4096x4096 r=16: times PEFT's speed", row["unmerge_speedup"], 2.0, True)
            if row["extra_memory"] is not None:
                report.bar("merge fp32 4096x4096 r=16: extra memory / weight", row["extra_memory"], 0.10, False)
        elif (row["inputs"], row["outputs"], row["r"]) == (4096, 4096, 16):
            report.bar(f"merge {row['dtype']} 4096x4096 r=16: times PEFT's speed", row["merge_speedup"], 1.0, True)
    if timed:
        least = min(timed, key=lambda row: row["merge_speedup"])
        where = f"{least['inputs']}x{least['outputs']} {least['dtype']}"
        report.bar(f"merge: times PEFT's speed, least over the layers ({where})", least["merge_speedup"], 1.0, True)


def points(arguments) -> list[Point]:
    kind = arguments.device.type
    shapes = arguments.shapes or SHAPES[kind]
    dtypes = getattr(arguments, "dtypes", None) or DTYPES[kind]
    relative = getattr(arguments, "relative", 0.01)
    return [Point(*shape, r=16, dtype=dtype, relative=relative) for shape in shapes for dtype in dtypes]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__, _SECONDS)
    options.set_defaults(rounds=_ROUNDS)
    options.add_argument("--dtypes", type=lambda text: text.split(","), help="e.g. float32,bfloat16")
    options.add_argument("--relative", type=float, default=0.01, help="norm of the delta over that of the weight")
    arguments = options.parse_args(argv)
    report = begin("merge", arguments, _SECONDS)
    table = Table(COLUMNS)
    run_points(points(arguments), report, arguments.deadline, lambda point: measure(point, report, table, arguments))
    if not arguments.shapes:
        measure_model(report, arguments)
        measure_decoder(report, arguments)
    if arguments.device.type == "cpu" and not arguments.shapes:
        measure_first(report)
        bench_checkpoint.measure(report, Namespace(**(vars(arguments) | _FILES)), goals=False)
    add_bars(report)
    code = report.finish()
    report.figure("merge")
    return code


if __name__ == "__main__":
    sys.exit(main())
