"""The benchmarks on tiny layers: what they write is complete and right, and a wrong result gets no time."""

import argparse
import dataclasses
import importlib.util
import json
import math
import statistics
import types
import warnings
from pathlib import Path

import pytest
import torch

from fused_lora.ops import guard
from fused_lora.testing import clock
from helpers.thorough import sampled

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytest.importorskip("peft")

QUICK = ["--device", "cpu", "--seconds", "0", "--rounds", "3"]


def run(bench, out, *options, code=0):
    assert bench.main([*QUICK, "--out", str(out), *options]) == code
    (path,) = out.glob("*.json")
    assert not list(out.glob("*.tmp"))
    return json.loads(path.read_text())


def wrong_rows(bench, out, *options):
    """Of a run that says that something is wrong."""
    return [row for row in run(bench, out, *options, code=1)["rows"] if not row["correct"]]


@pytest.fixture
def report(load, tmp_path):
    return load("report").Report("a benchmark", torch.device("cpu"), tmp_path, {})


def assert_times(found, rounds):
    assert 0 < found["min"] <= found["p20"] <= found["median"] <= found["p80"]
    assert found["rounds"] == rounds


def assert_complete(content, kind):
    assert content["benchmark"] == kind
    machine = content["machine"]
    assert machine["cpu"] and machine["cores"] >= 1 and machine["threads"] >= 1 and machine["gpu"] is None
    assert content["versions"]["torch"] == torch.__version__
    assert set(content["versions"]) == {"python", "torch", "triton", "peft", "fused_lora"}
    assert all(content["versions"][name] for name in ("python", "peft", "fused_lora"))
    assert "commit" in content and content["date"].startswith("20")
    assert content["settings"]["rounds"] == 3 and content["settings"]["device"] == "cpu"
    text = json.dumps(content)
    assert str(Path.home()) not in text and str(BENCHMARKS.parent) not in text


def test_bench_merge(load, tmp_path, capsys):
    content = run(load("bench_merge"), tmp_path, "--shapes", "96x64,31x17")
    assert_complete(content, "merge")
    rows = content["rows"]
    names = ["copy", "PEFT", "PEFT safe", "addmm", "fused_lora"]
    assert [row["provider"] for row in rows] == names * 6
    points = {(row["inputs"], row["outputs"], row["dtype"]) for row in rows}
    assert points == {(*shape, d) for shape in ((96, 64), (31, 17)) for d in ("float32", "bfloat16", "float16")}
    for row in rows:
        assert row["correct"] and row["floor_ms"] > 0
        assert_times(row["merge_ms"], 3)
        if row["provider"] == "copy":
            continue
        assert_times(row["unmerge_ms"], 3)
        assert 0 <= row["changed"] <= 1
        assert (row["record_bytes_per_weight"] > 0) == (row["provider"] == "fused_lora")
    ours = [row for row in rows if row["provider"] == "fused_lora"]
    theirs = [row for row in rows if row["provider"] == "PEFT"]
    assert all(row["changed"] == 0 for row in ours) and any(row["changed"] > 0 for row in theirs)
    for own, peft in zip(ours, theirs, strict=True):
        for step in ("merge", "unmerge"):
            ratio = peft[f"{step}_ms"]["median"] / own[f"{step}_ms"]["median"]
            assert own[f"{step}_speedup"] == pytest.approx(ratio, rel=1e-3, abs=1e-4)
    assert all(row["merge_host_us"] is None for row in rows if row["provider"] != "copy")
    screen = capsys.readouterr().out
    assert "96x64 r=16 bfloat16" in screen and "share of weights not back" in screen
    if importlib.util.find_spec("matplotlib") is None:
        assert "no figure: No module named 'matplotlib'" in screen
    else:
        (figure,) = tmp_path.glob("*-merge.png")
        assert figure.read_bytes().startswith(b"\x89PNG") and f"figure: {figure.name}" in screen


def test_bench_merge_of_models_and_files(load, tmp_path, monkeypatch):
    """What follows the single layers by default, small: PEFT, one pass and two calls; a process of its own; files."""
    bench = load("bench_merge")
    monkeypatch.setattr(bench, "SHAPES", {"cpu": [(31, 17)]})
    monkeypatch.setattr(bench, "_SMALL", [(48, 40), (56, 48)])
    monkeypatch.setattr(bench, "_FIRST", bench._FIRST.replace("4096", "64"))
    monkeypatch.setattr(bench, "_DECODER", {"q": (48, 40), "down": (56, 48)})
    monkeypatch.setattr(bench, "_FILES", dict(layers=2, hidden=64, vocabulary=96, shards=3, rounds=3))
    content = run(bench, tmp_path)
    found = {(row["benchmark"], row["provider"]) for row in content["rows"]}
    assert found >= {("merge_decoder", name) for name in ("PEFT", "fused_lora", "two calls")}
    assert found >= {("checkpoint", "copy"), ("checkpoint", "fused_lora"), ("first_merge", "fused_lora")}
    for row in content["rows"]:
        if row["benchmark"] == "merge_decoder":
            for step in ("sync", "merge", "switch", "unmerge"):
                assert_times(row[f"{step}_ms"], 3)
    bars = {bar["name"]: bar["passed"] for bar in content["bars"]}
    assert (
        bars["2 layers of Llama-3-8B, merged, switched and back: all bits"]
        and bars["model of 120 layers: all bits back"]
    )
    assert "switch of 2 layers of Llama-3-8B: times the speed of two calls" in bars


def test_bench_checkpoint(load, tmp_path, monkeypatch, capsys):
    bench, taken = load("bench_checkpoint"), []

    def memory(base, adapter, folder, report, largest, limit):  # in this process, which has its own limits
        bench.child(str(base), str(adapter), str(folder / "out"), 0)
        taken.append(json.loads(capsys.readouterr().out.splitlines()[-1]))

    monkeypatch.setattr(bench, "memory", memory)
    sizes = ["--layers", "2", "--hidden", "64", "--vocabulary", "96", "--shards", "3", "--folder", str(tmp_path)]
    content = run(bench, tmp_path / "results", *sizes)
    assert [(row["base"], row["provider"]) for row in content["rows"]] == [
        (state, name) for state in ("warm", "cold") for name in ("copy", "PEFT", "fused_lora")
    ]
    assert taken[0]["checked"]["rows"] > 0 and taken[0]["peak_bytes"] > 0
    assert {bar["at_least"] for bar in content["bars"]} == {True}


def test_bench_merge_with_the_kernel(load, tmp_path, device, kernels_on):
    """The kernel without a record is measured, too, and promises nothing."""
    options = "--shapes", "48x40", "--dtypes", "bfloat16", "--rounds", "1", "--device", device.type
    content = run(load("bench_merge"), tmp_path, *options)
    rows = {row["provider"]: row for row in content["rows"]}
    assert list(rows) == ["copy", "PEFT", "PEFT safe", "addmm", "fused_lora", "no record"]
    bare, ours, copied = rows["no record"], rows["fused_lora"], rows["copy"]["merge_ms"]["median"]
    assert bare["changed"] > 0 == ours["changed"] and bare["record_bytes_per_weight"] == 0
    assert bare["merge_to_copy"] == pytest.approx(bare["merge_ms"]["median"] / copied, rel=1e-3, abs=1e-4)


def test_goals_of_a_merge_on_a_gpu(load, report):
    bench = load("bench_merge")
    report.device = torch.device("cuda")
    row = dict(benchmark="merge", dtype="bfloat16", inputs=8, outputs=8, correct=True, changed=0.0)
    report.rows = [
        row | dict(provider="fused_lora", merge_to_copy=1.6, merge_speedup=2.9),
        row | dict(provider="no record", merge_to_copy=1.3, merge_speedup=9.0, changed=0.1),
        row | dict(provider="no record", correct=False),
    ]
    bench.add_bars(report)
    assert [(bar["value"], bar["limit"], bar["passed"]) for bar in report.bars] == [
        (0.0, 0.0, True),
        (1.3, 1.25, False),
        (1.6, 1.7, True),
        (2.9, 3.0, False),
    ]


def test_bench_linear(load, tmp_path, capsys):
    content = run(load("bench_linear"), tmp_path, "--shapes", "96x64,33x17", "--rows", "40")
    assert_complete(content, "linear")
    rows = content["rows"]
    assert [row["provider"] for row in rows] == ["bare", "PEFT", "addmm", "fused_lora"] * 4
    assert [row["dropout"] for row in rows] == [0.1] * 8 + [0.0] * 8
    for row in rows:
        assert row["correct"] and row["M"] == 40
        assert_times(row["forward_ms"], 3)
        assert_times(row["both_ms"], 3)
        assert row["both_ms"]["min"] > row["forward_ms"]["min"]
        assert row["x_bytes"] == 40 * row["inputs"] * 4
        saved = {"bare": 0, "PEFT": None, "addmm": None, "fused_lora": row["x_bytes"] + 40 * 16 * 4}[row["provider"]]
        if row["provider"] == "fused_lora" and row["dropout"]:
            saved += 8  # the seed
        assert saved is None or row["saved_bytes"] == saved
        if row["provider"] == "PEFT":  # the dropped copy and the mask, or x itself without dropout
            assert row["saved_bytes"] >= (2 if row["dropout"] else 1) * row["x_bytes"]
        assert math.isclose(
            row["both_speedup"] * row["both_ms"]["median"], _peft(rows, row)["both_ms"]["median"], rel_tol=1e-2
        )
    assert any("geometric mean" in bar["name"] for bar in content["bars"])
    assert "33x17" in capsys.readouterr().out


def _peft(rows, row):
    same = [r for r in rows if all(r[k] == row[k] for k in ("inputs", "outputs", "dropout"))]
    return next(r for r in same if r["provider"] == "PEFT")


def test_bench_variants_without_a_kernel(load, tmp_path):
    content = run(load("bench_variants"), tmp_path, "--shapes", "48x40", "--rows", "80")
    assert_complete(content, "variants")
    assert [(r["op"], r["provider"]) for r in content["rows"]] == [
        (op, provider) for op in ("forward", "backward") for provider in ("bare", "eager")
    ]
    assert all(row["chosen"] == (row["provider"] == "eager") and row["ms"]["median"] > 0 for row in content["rows"])


def test_bench_variants_with_kernels(load, tmp_path, device, kernels_on, monkeypatch):
    """A variant that computes something else gets no time."""
    from fused_lora.ops.linear import launch as kernel

    honest = kernel.lora_linear

    def wrong_split(chosen, *arguments):
        run = honest(chosen, *arguments)
        return lambda *args: tuple(t * 1.01 for t in run(*args)) if chosen.variant == "split" else run(*args)

    monkeypatch.setattr(kernel, "lora_linear", wrong_split)
    options = "--shapes", "48x40", "--rows", "8", "--device", device.type, "--rounds", "1"
    content = run(load("bench_variants"), tmp_path, *options, code=1)
    correct = {(row["op"], row["provider"]): row["correct"] for row in content["rows"]}
    assert not correct.pop(("forward", "split")) and all(correct.values())
    assert {provider for _, provider in correct} == {"bare", "recompute", "library", "passes", "eager"}
    assert sum(row["chosen"] for row in content["rows"]) == 2


def test_bench_linear_over_4_bits(load, tmp_path):
    """A file of its own, without the provider that reads a dense weight."""
    pytest.importorskip("bitsandbytes")
    content = run(load("bench_linear"), tmp_path, "--base", "nf4", "--shapes", "64x48")
    assert content["benchmark"] == "quantised" and all(row["correct"] for row in content["rows"])
    assert {(row["provider"], row["base"]) for row in content["rows"]} == {
        (name, "nf4") for name in ("bare", "dense", "PEFT", "fused_lora")
    }


def test_bench_kinds(load, tmp_path, monkeypatch):
    bench = load("bench_kinds")
    monkeypatch.setattr(bench, "DORA", {"cpu": (48, 8)})
    monkeypatch.setattr(bench, "TOKENS", {"cpu": 12})
    small = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_experts=4, head_dim=8)
    monkeypatch.setattr(bench, "MOE", bench.MOE | small | dict(num_attention_heads=4, num_key_value_heads=2))
    content = run(bench, tmp_path)
    assert_complete(content, "kinds")
    rows = content["rows"]
    cases = {"dora, p=0.0": "our LoRA", "dora, p=0.1": "our LoRA", "experts": "frozen"}
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, name) for case, floor in cases.items() for name in (floor, "fused_lora", "PEFT")
    ]
    for row in rows:
        assert_times(row["ms"], 3)
        assert row["to_floor"] > 0 and row["to_peft"] > 0
    ms = {row["case"]: row["ms"]["min"] for row in rows if row["provider"] == "fused_lora"}
    floors = {row["case"]: row["ms"]["min"] for row in rows if row["provider"] in ("our LoRA", "frozen")}
    assert [bar["limit"] for bar in content["bars"]] == [1.25, 1.5, 1.4, 1.8]
    for bar, case in zip(content["bars"][::2], ("dora, p=0.0", "experts"), strict=True):
        assert bar["value"] == pytest.approx(ms[case] / floors[case], abs=1e-4) and not bar["at_least"]


def test_bench_quantised(load, tmp_path, monkeypatch):
    """Every kind of base in training, decoding and merges; who is wrong gets no time, and the others do."""
    for package in ("bitsandbytes", "torchao", "transformers"):
        pytest.importorskip(package)
    bench = load("bench_quantised")
    arguments = "--shapes", "64x96", "--rows", "9"
    content = run(bench, tmp_path / "right", *arguments)
    assert content["benchmark"] == "quantised"
    found = {}
    for row in content["rows"]:
        assert row["correct"]
        found.setdefault((row["benchmark"], row["base"]), set()).add(row["provider"])
    called = {"nf4", "fp4", "int8", "torchao int8", "torchao int4", "torchao fp8"}
    own = {"bare", "dense", "PEFT", "fused_lora"}
    assert {base: names for (kind, base), names in found.items() if kind == "linear"} == dict.fromkeys(called, own)
    decoded = {base: names for (kind, base), names in found.items() if kind == "decode_quantised"}
    assert decoded == dict.fromkeys(called, own) | dict.fromkeys(("nf4", "fp4"), own | {"dequantised"})
    merged = {base: names for (kind, base), names in found.items() if kind == "merge_quantised"}
    both = {"PEFT", "fused_lora"}
    expected = dict.fromkeys(called - {"torchao int4"}, both)
    assert merged == expected | {"torchao int4": {"PEFT"}, "fp8 blocks": {"fused_lora"}}
    assert all(r["changed"] == 0 for r in content["rows"] if r["provider"] == "fused_lora" and "changed" in r)
    assert len(content["skipped"]) == 3 and "needs a GPU" in content["skipped"][0]

    original = bench.providers
    monkeypatch.setattr(bench, "providers", lambda w: (f := original(w)) | {"fused_lora": lambda x: f["dense"](x)})
    wrong = wrong_rows(bench, tmp_path / "wrong", *arguments, "--bases", "nf4,int8")
    assert [(row["provider"], row["base"]) for row in wrong] == [("fused_lora", "nf4"), ("fused_lora", "int8")]


@pytest.mark.filterwarnings("ignore:.*merge lora module")
def test_bench_train(load, tmp_path, monkeypatch):
    """PEFT and ours take turns over one model; an accelerated model that computes something else gets no time."""
    bench = load("bench_train")
    content = run(bench, tmp_path / "right", "--rounds", "1")
    assert [row["provider"] for row in content["rows"]] == ["base", "PEFT", "fused_lora"]
    for row in content["rows"]:
        assert row["correct"] and row["tokens_per_second"] == round(32 / row["ms"]["median"] * 1e3)
    accelerate = bench.fused_lora.accelerate

    def wrong(model):
        for module in accelerate(model).modules():
            if "lora_A" in module._modules:
                module.scaling["default"] = 3.0
        return model

    monkeypatch.setattr(bench.fused_lora, "accelerate", wrong)
    rows = run(bench, tmp_path / "wrong", "--rounds", "1", code=1)["rows"]
    found = [(row["provider"], row["correct"]) for row in rows]
    assert found == [("fused_lora", False), ("base", True), ("PEFT", True)]


def test_bench_launches(load, tmp_path, device, kernels_on, monkeypatch):
    """Every launch of a layer, one configuration that is wrong among them."""
    bench = load("bench_launches")
    honest = bench.lora_expand

    def wrong(S, Q, scales, dropout, seeds, bias, dtype, config):
        return honest(S, Q, scales, dropout, seeds, bias, dtype, config) * (1.1 if config.BLOCK_M == 64 else 1.0)

    small = bench.LaunchConfig("expand", 32, 64, 16, 16)
    monkeypatch.setattr(bench, "lora_expand", wrong)
    monkeypatch.setattr(bench, "alternatives", lambda op, c: [c, small] if op == "expand" and c != small else [c])
    options = "--shapes", "64x48", "--rows", "40", "--device", device.type, "--rounds", "1"
    rows = run(bench, tmp_path, *options, code=1)["rows"]
    wrong = [row for row in rows if not row["correct"]]
    assert {row["provider"] for row in wrong} == {"expand to dx", "expand to y"} and all("us" not in r for r in wrong)
    passes = [row for row in rows if row["provider"].startswith("backward over") and row["dropout"] == 0.1]
    assert {row["config"]["variant"] for row in passes} == {"backward_g", "backward_x"}
    assert all(row["us"]["rounds"] >= 1 and row["bytes"] > 0 for row in passes)


def test_bench_decode(load, tmp_path):
    content = run(load("bench_decode"), tmp_path, "--shapes", "48x40,40x33", "--rows", "9")
    assert_complete(content, "decode")
    rows, weights = content["rows"], 48 * 40 + 40 * 33
    points = [(8, "16"), (1, "16"), (8, "mixed")]
    assert [(r["D"], r["ranks"], r["provider"]) for r in rows] == [
        (*point, name) for point in points for name in ("base", "fused_lora")
    ]
    for row in rows:
        assert row["correct"] and row["mode"] == "eager" and row["M"] == 9
        assert_times(row["ms"], 3)
        ranks = {"16": [16] * row["D"], "mixed": [8, 16, 32, 64] * 2}[row["ranks"]]
        assert row["floor_share"] == pytest.approx(1 + sum(ranks) * (48 + 40 + 40 + 33) / weights, abs=1e-3)


def test_decode_in_a_graph(load, tmp_path, device, kernels_on, monkeypatch):
    """A capture takes adapters from row_buffers alone; those of rank 16 and of mixed ranks do not meet in a store."""
    bench, report, inside = load("bench_decode"), load("report"), []
    monkeypatch.setattr(guard, "capturing", lambda device: bool(inside))

    def capture(call):
        call()  # the kernels' first use
        inside.append(True)
        try:
            return types.SimpleNamespace(replay=lambda: None, reset=lambda: None), call()
        finally:
            inside.clear()

    monkeypatch.setattr(report, "capture", capture)
    monkeypatch.setattr(bench, "Clock", lambda _: report.Clock(torch.device("cpu")))
    decode, table = bench.Decode([(48, (40,))], device, torch.float32), report.Table(bench.COLUMNS)
    found = report.Report("decode", device, tmp_path, {})
    arguments = argparse.Namespace(device=torch.device("cuda"), seconds=0, rounds=1, deadline=math.inf)
    for point in (4, 4, "16"), (4, 4, "mixed"), (1, 1, "16"):
        bench.measure(bench.DecodePoint(*point), decode, found, table, arguments)
    assert [(row["provider"], row["mode"], row["correct"]) for row in found.rows] == [
        (name, mode, True) for mode in ("eager", "graph") for name in ("base", "fused_lora")
    ] * 3


def test_a_wrong_decode_step_gets_no_time(load, tmp_path, monkeypatch, capsys):
    bench = load("bench_decode")
    honest = bench.Decode.names

    def names(decode, point):
        found = honest(decode, point)
        if point.D == 1:
            path, (A, B, scaling) = next(reversed(decode.adapters[found[0]].items()))
            decode.adapters[found[0]][path] = (A, B * 1.001, scaling)
        return found

    monkeypatch.setattr(bench.Decode, "names", names)
    wrong = wrong_rows(bench, tmp_path, "--shapes", "48x40,40x33", "--rows", "9")
    assert [(row["D"], row["provider"]) for row in wrong] == [(1, "fused_lora")]
    assert "ms" not in wrong[0] and wrong[0]["wrong"].startswith("groups.1.0") and "WRONG" in capsys.readouterr().out


def test_a_wrong_merge_gets_no_time(load, tmp_path, monkeypatch, capsys):
    bench = load("bench_merge")
    honest = bench._addmm

    def off_by_half(W, weights, sign):
        run = honest(W, weights, sign)
        return lambda: (run(), W.view(-1)[0].add_(0.5))

    monkeypatch.setattr(bench, "_addmm", off_by_half)
    wrong = wrong_rows(bench, tmp_path, "--shapes", "96x64", "--dtypes", "float32")
    assert [row["provider"] for row in wrong] == ["addmm"]
    assert "merge_ms" not in wrong[0] and "merged weight" in wrong[0]["wrong"]
    assert "WRONG" in capsys.readouterr().out


def test_an_inexact_unmerge_is_wrong_for_who_promises_it(load, tmp_path, monkeypatch):
    bench = load("bench_merge")
    honest = bench.mergers

    def promising(weights):
        found = honest(weights)
        found["PEFT safe"].exact = True
        return found

    monkeypatch.setattr(bench, "mergers", promising)
    (wrong,) = wrong_rows(bench, tmp_path, "--shapes", "96x64", "--dtypes", "float32")
    assert wrong["provider"] == "PEFT safe" and "unmerge" in wrong["wrong"]


@pytest.mark.parametrize("result", ["y", "dx", "dA", "dB"])
def test_a_wrong_gradient_gets_no_time(load, tmp_path, monkeypatch, result):
    bench = load("bench_linear")
    honest = bench.results

    def slightly_off(provider, x, g):
        found = honest(provider, x, g)
        if provider.name == "fused_lora":
            found[result] = found[result] * 1.0001
        return found

    monkeypatch.setattr(bench, "results", slightly_off)
    wrong = wrong_rows(bench, tmp_path, "--shapes", "96x64", "--rows", "40")
    assert [row["provider"] for row in wrong] == ["fused_lora"] * 2
    assert all(row["wrong"].startswith(f"{result}:") and "both_ms" not in row for row in wrong)


def test_a_point_that_fails_is_recorded_and_the_others_run(load, tmp_path, monkeypatch):
    bench = load("bench_linear")
    honest = bench.saved_bytes

    def failing(provider, x):
        warnings.warn("fused_lora: a kernel is dropped", stacklevel=1)
        if x.shape[1] == 96:
            raise RuntimeError("no kernel image in /home/someone/.cache/k-1/a.cubin")
        return honest(provider, x)

    monkeypatch.setattr(bench, "saved_bytes", failing)
    content = run(bench, tmp_path, "--shapes", "96x64,33x17", "--rows", "8", code=1)
    failed = [row for row in content["rows"] if row["benchmark"] == "failed"]
    assert len(failed) == 2 and all(row["wrong"].endswith("no kernel image in a.cubin") for row in failed)
    assert sum(row["benchmark"] == "linear" for row in content["rows"]) == 8
    assert content["warnings"] == ["fused_lora: a kernel is dropped"]


def test_interleaved_takes_turns_and_times_only_the_steps(load):
    report, order = load("report"), []

    def candidate(name):
        steps = [lambda i=i: order.append(f"{name}{i}") for i in (1, 2)]
        return report.Candidate(name, steps, lambda: order.append(f"{name}0"))

    clock = iter(range(100))
    timer = lambda step: (step(), next(clock))[1]  # noqa: E731
    times = report.interleaved([candidate("a"), candidate("b")], timer, seconds=0, rounds=2)
    assert order == ["a0", "a1", "a2", "b0", "b1", "b2"] * 3
    assert times == {"a": [[4, 5], [8, 9]], "b": [[6, 7], [10, 11]]}  # the first round warms up


class FakeGpu:
    """A host and a device in simulated ms: the host issues and goes on, the device works in order of issue."""

    class Event:
        def __init__(self, gpu):
            self.gpu, self.at = gpu, None

        def record(self):
            self.at = max(self.gpu.device, self.gpu.host)

        def query(self):
            return self.at <= self.gpu.host

        def synchronize(self):
            self.gpu.host = max(self.gpu.host, self.at)

        def elapsed_time(self, end):
            return end.at - self.at

    def __init__(self):
        self.host = self.device = 0.0
        self.begin, self.end = self.Event(self), self.Event(self)
        self.slept = []

    def work(self, ms):
        self.device = max(self.device, self.host) + ms

    def flush(self):
        self.work(0.07)

    def sleep(self, ms):
        self.slept.append(ms)
        self.work(ms)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def perf_counter(self):
        return self.host / 1e3

    def step(self, launches, issue_ms, work_ms, waits=False):
        def call():
            for _ in range(launches):
                self.host += issue_ms
                self.work(work_ms)
            if waits:
                self.synchronize()

        return call


@pytest.fixture
def fake_gpu(load, monkeypatch):
    report, gpu = load("report"), FakeGpu()
    monkeypatch.setattr(clock, "_Cuda", lambda device: gpu)
    monkeypatch.setattr(clock.time, "perf_counter", gpu.perf_counter)
    return report, gpu, report.Clock(torch.device("cuda"))


def test_clock_times_the_device_and_the_host_apart(fake_gpu):
    report, gpu, clock = fake_gpu
    slow, fast = gpu.step(10, 0.05, 0.01), gpu.step(1, 0.05, 2.0)
    times = report.interleaved([report.Candidate("a", [slow, fast])], clock, seconds=0, rounds=3)
    assert [t for turn in times["a"] for t in turn] == pytest.approx([0.1, 2.0] * 3)  # not 0.5 of Python
    assert clock.host_us([slow]) == pytest.approx(500) and clock.host_us([slow, fast]) == pytest.approx(550)
    assert clock.measure(slow) == pytest.approx((0.1, 0.5)) and clock.measure(fast) == pytest.approx((2.0, 0.05))


def test_a_first_call_that_compiles_keeps_no_long_lead(fake_gpu):
    _, gpu, clock = fake_gpu
    issue = iter([60_000.0, 0.2, 0.2, 0.2])

    def step():
        gpu.host += next(issue)
        gpu.work(0.01)

    for _ in range(4):
        last = clock(step)
    assert last == pytest.approx(0.01) and clock.host_us([step]) == pytest.approx(200)
    assert gpu.slept == pytest.approx([100, 0.45, 0.45])


def test_a_step_that_waits_for_the_device_has_no_host_time(fake_gpu):
    _, gpu, clock = fake_gpu
    waiting, other = gpu.step(2, 0.05, 1.0, waits=True), gpu.step(1, 0.05, 1.0)
    for _ in range(3):
        clock(other)
        assert clock(waiting) == pytest.approx(2.0, abs=0.2)
    assert clock.host_us([waiting]) is None and clock.host_us([other, waiting]) is None
    assert clock.host_us([other]) == pytest.approx(50)
    assert max(gpu.slept) < 10  # the waiting does not feed itself


def test_graphs_of_the_providers_that_can_be_captured(load, monkeypatch):
    bench = load("bench_linear")
    replays = []

    class Graph:
        def replay(self):
            replays.append(1)

    def capture(call):
        result = call()
        assert len(result) == 3 and all(t is not None for t in result)  # dx, dA, dB
        if last["name"] == "PEFT":
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        return Graph(), result

    point = bench.Point(32, 48, dropout=0.1, M=8, relative=0.5)
    weights = bench.Weights.draw(point, torch.device("cpu"))
    x, g = bench.draw_inputs(point, weights)
    x.requires_grad_()
    layers = {name: p for name, p in bench.providers(weights, 0.1).items() if name != "bare"}
    last = {}
    for name, provider in layers.items():
        provider.call = lambda x, name=name, call=provider.call: (last.update(name=name), call(x))[1]
    monkeypatch.setattr(bench, "capture", capture)
    arguments = argparse.Namespace(seconds=0, rounds=2, deadline=float("inf"))
    times, failed = bench.graph_times(layers, x, g, load("report").Clock(x.device), arguments)
    assert {name: ms["rounds"] for name, ms in times.items()} == {"addmm": 2, "fused_lora": 2}
    assert failed == {"PEFT": "RuntimeError: operation not permitted when stream is capturing"}
    assert len(replays) == 2 * 3


def test_graph_and_host_columns(load, report, capsys):
    """Rows as a GPU would give them: a replay, or None and why."""
    bench, table = load("bench_linear"), load("report").Table
    more = dict(host_us=123.4, forward_host_us=50.0, saved_bytes=0, saved_beyond_x=0, x_bytes=1 << 20)
    extra = {"PEFT": {"graph_ms": None, "graph_error": "no"}, "fused_lora": {"graph_ms": dict(median=0.25)}}
    times = {name: [[1.0, 2.0]] for name in extra}
    rows = {name: more | entry for name, entry in extra.items()}
    bench._add_rows(bench.Point(8, 8, M=4), report, table(bench.COLUMNS), dict.fromkeys(extra), times, rows)
    assert [row["graph_ms"] for row in report.rows] == [None, dict(median=0.25)]
    assert report.rows[0]["graph_error"] == "no" and report.rows[1]["host_us"] == 123.4
    screen = capsys.readouterr().out
    assert "PEFT, no graph: no" in screen and "0.25" in screen and "123" in screen


def test_goals_of_a_layer_on_a_gpu(load, report):
    bench, report.device = load("bench_linear"), torch.device("cuda")
    table = load("report").Table(bench.COLUMNS)
    ms = {"bare": 0.8, "PEFT": 1.2, "PEFT default": 1.8, "fused_lora": 1.0, "fused default": 0.9}
    times = {name: [[t / 2, t / 2]] for name, t in ms.items()}

    def add(point, ours_host):
        more = {name: dict(host_us=100.0, graph_ms=None, saved_bytes=1, saved_beyond_x=0, x_bytes=1) for name in ms}
        more["fused_lora"]["host_us"] = ours_host
        bench._add_rows(point, report, table, dict.fromkeys(ms), times, more)

    add(bench.LORAFUSION_POINTS[0], 500.0)
    add(dataclasses.replace(bench.LORAFUSION_POINTS[0], adapter_dtype="float32"), 500.0)
    add(bench.Point(8, 8, M=512), 1500.0)
    bench.add_bars(report)
    expected = [("saved", 0, True), ("bare", 1.25, False), ("PEFT's", 1.2, False)]
    expected += [("fp32 adapters under autocast", 2.0, True), ("(1 of 75)", 1.2, False)]
    expected += [("longer of device and host", 0.8, False)]  # 1.2 ms of PEFT's device, 1.5 ms of our host
    assert len(report.bars) == len(expected)
    for bar, (part, value, passed) in zip(report.bars, expected, strict=True):
        assert part in bar["name"] and bar["passed"] == passed and bar["value"] == pytest.approx(value)
    assert "8x8 r=16 float32 M=512" in report.bars[-1]["name"]


def test_points_of_bench_linear(load):
    bench = load("bench_linear")

    def points(chosen, shapes=None, device="cuda"):
        return bench.points(argparse.Namespace(device=torch.device(device), shapes=shapes, rows=None, points=chosen))

    lorafusion = points("lorafusion")
    assert len(set(lorafusion)) == 75 and {p.M for p in lorafusion} == set(range(2048, 8193, 256))
    assert {(p.inputs, p.outputs, p.r, p.dropout) for p in lorafusion} == {(n, n, 16, 0.1) for n in (4096, 5120, 8192)}
    assert {(28672, 8192), (5120, 27648), (4096, 1024)} <= {(p.inputs, p.outputs) for p in points("models")}
    assert points(None) == points("first") and points("first")[0].M == 8192
    assert set(points("all")) == {p for name in ("first", "models", "lorafusion") for p in points(name)}
    assert {p.shape for p in points("models", [(64, 32)])} == {"64x32"}
    assert {p.dtype for p in points(None, device="cpu")} == {"float32"}


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_linear_over_a_16_bit_base(load, report, adapter_dtype, dropout):
    bench, table = load("bench_linear"), load("report").Table
    point = bench.Point(96, 64, 16, "bfloat16", adapter_dtype, dropout, M=40, relative=0.5)
    arguments = argparse.Namespace(device=torch.device("cpu"), seconds=0, rounds=1, deadline=float("inf"))
    bench.measure(point, report, table(bench.COLUMNS), arguments)
    found = {row["provider"]: row for row in report.rows}
    assert list(found) == ["bare", "PEFT", "PEFT default", "addmm", "fused_lora", "fused default"]
    assert all(row["correct"] and row["host_us"] is None and row["graph_ms"] is None for row in report.rows)
    assert found["PEFT default"]["saved_bytes"] > found["fused default"]["saved_bytes"]


def test_compiled_peft_is_a_provider_where_asked_for(load, tmp_path, monkeypatch):
    bench = load("bench_linear")
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: layer.forward)
    content = run(bench, tmp_path, "--shapes", "33x17", "--rows", "8", "--compile")
    names = ["bare", "PEFT", "PEFT compiled", "addmm", "fused_lora"]
    assert [row["provider"] for row in content["rows"]] == names * 2


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654"),
        ("Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", "intel-xeon-platinum-8480"),
        ("NVIDIA H200", "nvidia-h200"),
        ("", "unknown"),
    ],
)
def test_machine_names(load, model, name):
    assert load("report")._sanitised(model) == name


def test_summary_is_the_median_and_quantiles(load):
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 100.0]
    found = load("report").summary(values)
    assert found["median"] == statistics.median(values) and found["min"] == 1.0
    assert (found["p20"], found["p80"]) == (2.0, 5.0)


def test_peak_memory_sees_what_a_call_allocates(load):
    bench, size = load("bench_merge"), 64 << 20
    peak = bench.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.int8), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.9 * size < peak < 1.5 * size


def test_saved_bytes_count_each_storage_once_and_no_parameter(load):
    bench = load("bench_linear")
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8, requires_grad=True)

    def call(x):
        h = torch.sin(x) * torch.cos(x)  # keeps x twice, sin(x), cos(x)
        return h @ weight  # keeps h and weight

    provider = bench.Provider("test", call, [weight], [weight])
    assert bench.saved_bytes(provider, x) == (4 * x.nbytes, 3 * x.nbytes)


def test_readme_table(load, tmp_path, capsys):
    for name, options in (("bench_merge", []), ("bench_linear", ["--rows", "40"])):
        load(name).main([*QUICK, "--out", str(tmp_path), "--shapes", "96x64", *options])
    table, readme = load("readme_table"), tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{table.BEGIN}\nold\n{table.END}\n\nThe end.\n")
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    assert table.main([*arguments, "--check"]) == 1
    assert table.main(arguments) == 0
    assert table.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\n\nThe end.\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| 96x64")]
    assert len(rows) == 2 + 2  # p = 0.1 and 0; fp32 and bf16, whose figures fp16 repeats
    (path,) = tmp_path.glob("*-linear.json")
    ours = [row for row in json.loads(path.read_text())["rows"] if row["provider"] == "fused_lora"]
    assert f"{ours[0]['both_ms']['median']:.3g} | {ours[0]['both_speedup']:.2f}x" in rows[0]


def test_serving_in_the_readme_table(load):
    table = load("readme_table")
    ms = {name: dict(median=median) for name, median in (("base", 80.0), ("PEFT", 240.0), ("fused_lora", 120.0))}
    rows = [dict(benchmark="step", provider=name, correct=True, T=8, D=8, r=16, ms=ms[name]) for name in ms]
    rows += [
        dict(benchmark="generate", provider=name, correct=True, T=8, D=8, r=16, tokens_per_second=speed)
        for name, speed in (("PEFT", 10.0), ("fused_lora", 18.0))
    ]
    server = dict(benchmark="server", correct=True, known=1000, held=32, r=8)
    rows += [server | dict(provider="Zipf over 1000", tokens_per_second=25.0)]
    rows += [server | dict(provider="base", tokens_per_second=26.0)]
    lines = table._serving_table(dict(rows=rows, settings=dict(model="SmolLM2, 6 of 30 layers")))
    assert lines[0] == "| serving, SmolLM2 | base | PEFT | fused_lora | over PEFT |"
    assert lines[2:] == [
        "| decode step, sequences: 8, adapters: 8, r=16, ms (6 of 30 layers) | 80 | 240 | 120 | 2.00x |",
        "| generate, sequences: 8, adapters: 8, r=16, tokens/s | - | 10 | 18 | 1.80x |",
        "| server, 1000 adapters, room for 32, r=8, tokens/s | 26 | - | 25 | - |",
    ]


def test_rows_that_check_nothing_are_no_wrong_results(report):
    report.rows += [dict(benchmark="first_merge"), dict(correct=True)]
    assert report.finish() == 0
    report.rows.append(dict(correct=False))
    assert report.finish() == 1


def test_readme_table_takes_the_newest_file_and_needs_its_markers(load, tmp_path):
    table = load("readme_table")
    row = dict(benchmark="merge", provider="fused_lora")
    for name, date, commit in (("a", "2026-01-01", "old"), ("b", "2026-02-01", "new")):
        content = dict(machine=dict(name="m"), date=date, commit=commit, rows=[row])
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "c.json").write_text('{"other": "results"}')
    assert table.load(tmp_path)["m"]["merge"]["commit"] == "new"
    (tmp_path / "d.json").write_text(json.dumps({**content, "rows": []}))
    with pytest.raises(ValueError, match=r"d\.json: expected rows of a benchmark, found none"):
        table.load(tmp_path)
    with pytest.raises(ValueError, match="README.md: expected the lines"):
        table.insert("# no markers", "table")


def test_bench_host(load, tmp_path):
    content = run(load("bench_host"), tmp_path)
    assert content["benchmark"] == "host" and len(content["bars"]) == 18
    providers = ["PEFT", "accelerated", "fused_lora"]
    assert [row["provider"] for row in content["rows"]] == ["bare", *providers] * 9 + providers * 4
    for row in content["rows"]:
        trained = row["dropout"] is not None
        assert row["correct"] and row["forward_us"] > 0 and trained == (row["both_us"] is not None)
        assert row["provider"] != "PEFT" or row["forward_to_peft"] == 1.0


def test_bench_store_host(load, tmp_path):
    content = run(load("bench_store_host"), tmp_path)
    assert content["benchmark"] == "store-host" and len(content["bars"]) == 2
    assert [row["provider"] for row in content["rows"]] == ["base", "PEFT", "fused_lora"] * 3
    for row in content["rows"]:
        assert row["correct"] and row["us"] > 0 and (row["provider"] != "PEFT" or row["to_peft"] == 1.0)
        assert (row["calls_a_linear"] > 0) == (row["provider"] != "base")
        assert row["provider"] != "fused_lora" or row["calls_a_linear"] < 47  # 36 to 46


def test_a_store_that_adds_nothing_is_a_wrong_result(load, tmp_path, monkeypatch):
    bench = load("bench_store_host")
    monkeypatch.setattr("fused_lora.serving.batch.batch.Batch.add", lambda *args: None)
    assert [row["provider"] for row in wrong_rows(bench, tmp_path)] == ["fused_lora"] * 3


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing needs a stub")
@pytest.mark.parametrize("name, count", sampled([("bench_store_host", 9), ("bench_host", 32)], 2))
def test_host_times_by_the_kernels_without_a_gpu(name, count, load, tmp_path):
    """Whoever fails a launch ends it: the rows are of the kernel route."""
    pytest.importorskip("triton")
    stub_driver = importlib.import_module("stub_driver")
    if stub_driver.COMPILER is None:
        pytest.skip("no C compiler, with which Triton builds its launchers")
    arguments = ["--stub", "--seconds", "0", "--rounds", "1", "--out", str(tmp_path)]
    assert load(name).main(arguments) == 0
    (path,) = tmp_path.glob("*-host-stub.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == count and all(row["correct"] and row["stub"] for row in rows)
