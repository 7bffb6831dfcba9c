"""The benchmarks on tiny layers: what they write is complete and right, and a wrong result gets no time."""

import importlib
import json
import math
import statistics
import warnings
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not beside tests/", allow_module_level=True)
pytest.importorskip("peft")

QUICK = ["--device", "cpu", "--seconds", "0", "--rounds", "3"]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark by name as running it by path does: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(bench, out, *options):
    code = bench.main([*QUICK, "--out", str(out), *options])
    (path,) = out.glob("*.json")
    assert not list(out.glob("*.tmp"))
    return code, json.loads(path.read_text())


def assert_times(found, rounds):
    assert 0 < found["min"] <= found["p20"] <= found["median"] <= found["p80"]
    assert found["rounds"] == rounds


def assert_complete(content, kind):
    assert content["benchmark"] == kind
    machine = content["machine"]
    assert machine["cpu"] and machine["cores"] >= 1 and machine["threads"] >= 1 and machine["gpu"] is None
    assert content["versions"]["torch"] == torch.__version__
    assert set(content["versions"]) == {"python", "torch", "triton", "numba", "peft", "fused_lora"}
    assert all(content["versions"][name] for name in ("python", "peft", "fused_lora"))
    assert "commit" in content and content["date"].startswith("20")
    assert content["settings"]["rounds"] == 3 and content["settings"]["device"] == "cpu"
    text = json.dumps(content)
    assert str(Path.home()) not in text and str(BENCHMARKS.parent) not in text


def test_bench_merge(load, tmp_path, capsys):
    code, content = run(load("bench_merge"), tmp_path, "--shapes", "96x64,31x17")
    assert code == 0
    assert_complete(content, "merge")
    rows = content["rows"]
    names = ["copy", "PEFT", "PEFT safe", "addmm", "fused_lora"]
    assert [row["provider"] for row in rows] == names * 6
    assert {(row["inputs"], row["outputs"], row["dtype"]) for row in rows} == {
        (*shape, dtype) for shape in ((96, 64), (31, 17)) for dtype in ("float32", "bfloat16", "float16")
    }
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
            assert own[f"{step}_speedup"] == pytest.approx(ratio, rel=1e-3)
    screen = capsys.readouterr().out
    assert "96x64 r=16 bfloat16" in screen and "share of weights not back" in screen


def test_bench_linear(load, tmp_path, capsys):
    code, content = run(load("bench_linear"), tmp_path, "--shapes", "96x64,33x17", "--rows", "40")
    assert code == 0
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
    code, content = run(load("bench_variants"), tmp_path, "--shapes", "48x40", "--rows", "80")
    assert code == 0
    assert_complete(content, "variants")
    assert [(r["op"], r["provider"]) for r in content["rows"]] == [
        (op, provider) for op in ("forward", "backward") for provider in ("bare", "eager")
    ] * 2
    assert all(row["chosen"] == (row["provider"] == "eager") and row["ms"]["median"] > 0 for row in content["rows"])


def test_bench_variants_with_kernels(load, tmp_path, device, kernels_on, monkeypatch):
    """A variant that computes something else gets no time."""
    from fused_lora.ops import kernel

    honest = kernel.lora_linear

    def wrong_split(variant):
        run = honest(variant)
        return lambda *args: tuple(t * 1.01 for t in run(*args)) if variant == "split" else run(*args)

    monkeypatch.setattr(kernel, "lora_linear", wrong_split)
    code, content = run(load("bench_variants"), tmp_path, "--shapes", "48x40", "--rows", "8", "--device", device.type)
    assert code == 1
    correct = {(row["op"], row["provider"]): row["correct"] for row in content["rows"]}
    assert not correct.pop(("forward", "split")) and all(correct.values())
    assert {provider for _, provider in correct} == {"bare", "split", "recompute", "cublas", "eager"}
    assert sum(row["chosen"] for row in content["rows"]) == 2


def test_run_all_leaves_one_file(load, tmp_path, monkeypatch):
    bench = load("run_all")
    monkeypatch.setattr(bench, "SMOKE_DTYPES", [("bfloat16", "float32")])
    code, content = run(bench, tmp_path, "--shapes", "48x40", "--rows", "24", "--budget", "5")
    assert code == 0
    assert_complete(content, "all")
    assert {row["benchmark"] for row in content["rows"]} == {"smoke", "linear", "merge", "variants"}
    assert all(row["correct"] for row in content["rows"])
    assert not content["skipped"]


def test_without_budget_left_only_the_smoke_runs(load, tmp_path, monkeypatch):
    bench = load("run_all")
    monkeypatch.setattr(bench, "SMOKE_DTYPES", [("float32", "float32")])
    _, content = run(bench, tmp_path, "--shapes", "48x40", "--budget", "0")
    assert {row["benchmark"] for row in content["rows"]} == {"smoke"}
    assert len(content["skipped"]) == 2 + 3 + 3 and all("out of time" in text for text in content["skipped"])


def test_a_wrong_merge_gets_no_time(load, tmp_path, monkeypatch, capsys):
    bench = load("bench_merge")
    honest = bench._addmm

    def off_by_half(W, weights, sign):
        run = honest(W, weights, sign)
        return lambda: (run(), W.view(-1)[0].add_(0.5))

    monkeypatch.setattr(bench, "_addmm", off_by_half)
    code, content = run(bench, tmp_path, "--shapes", "96x64", "--dtypes", "float32")
    assert code == 1
    wrong = [row for row in content["rows"] if not row["correct"]]
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
    code, content = run(bench, tmp_path, "--shapes", "96x64", "--dtypes", "float32")
    assert code == 1
    (wrong,) = (row for row in content["rows"] if not row["correct"])
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
    code, content = run(bench, tmp_path, "--shapes", "96x64", "--rows", "40")
    assert code == 1
    wrong = [row for row in content["rows"] if not row["correct"]]
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
    code, content = run(bench, tmp_path, "--shapes", "96x64,33x17", "--rows", "8")
    assert code == 1
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


def test_readme_table_takes_the_newest_file_and_needs_its_markers(load, tmp_path):
    table = load("readme_table")
    row = dict(benchmark="merge", provider="fused_lora")
    for name, date, commit in (("a", "2026-01-01", "old"), ("b", "2026-02-01", "new")):
        content = dict(machine=dict(name="m"), date=date, commit=commit, rows=[row])
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "c.json").write_text('{"other": "results"}')
    assert table.load(tmp_path)["m"]["merge"]["commit"] == "new"
    with pytest.raises(ValueError, match="README.md: expected the lines"):
        table.insert("# no markers", "table")
