"""What a backward needs is counted without memory: as hooks count it on real tensors, and by hand."""

import json

import pytest
import torch

pytest.importorskip("peft")

M, R, HIDDEN, KV, MLP = 10, 4, 48, 16, 80
INPUTS = 3 * HIDDEN + MLP  # columns of the four inputs of a decoder layer
READ = 3 * HIDDEN + HIDDEN + 2 * HIDDEN + MLP  # and of the inputs of its seven layers
LAYERS = 7
ADAPTERS = R * (READ + 2 * HIDDEN + 2 * KV + 2 * MLP + HIDDEN)


@pytest.fixture
def bench(load, monkeypatch):
    found = load("bench_memory")
    monkeypatch.setattr(found, "STACKS", {"small": (found.decoder(HIDDEN, KV, MLP), 3)})
    return found


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float32 autocast"])
@pytest.mark.parametrize("provider", ["PEFT", "fused_lora"])
def test_without_memory_as_hooks_count_on_real_tensors(bench, provider, kind, p):
    point = bench.Point("small", kind, p, M, R)
    real = bench.Training(point, provider, torch.device("cpu"))
    assert type(real.inputs[0]) is torch.Tensor and not any(y.isnan().any() for y in real.forward())
    assert bench.computed(point, provider) == real.saved()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_this_package_keeps_the_inputs_and_s(bench, p):
    beyond = LAYERS * (4 * M * R + (8 if p else 0))  # S in fp32, a seed
    for kind in ("bfloat16", "float32", "float32 autocast"):
        saved = bench.computed(bench.Point("small", kind, p, M, R), "fused_lora")
        assert saved == (2 * M * INPUTS + beyond, beyond)


def test_peft_keeps_a_copy_of_its_input_for_each_layer(bench):
    def computed(kind, p):
        return bench.computed(bench.Point("small", kind, p, M, R), "PEFT")

    S, masks = LAYERS * M * R, M * READ
    assert computed("bfloat16", 0.0) == (2 * M * INPUTS + 2 * S, 2 * S)
    for kind, p, total in [
        ("bfloat16", 0.1, 2 * M * READ + masks + 2 * S),
        ("float32", 0.0, 4 * M * READ + 4 * S),
        ("float32", 0.1, 4 * M * READ + masks + 4 * S),
        ("float32 autocast", 0.1, 2 * M * READ + masks + 2 * S + 2 * ADAPTERS),
    ]:
        assert computed(kind, p) == (total, total), (kind, p)


def run(bench, out, device, *options):
    code = bench.main(["--device", device, "--out", str(out), "--rows", "64", *options])
    (path,) = out.glob("*-memory.json")
    return code, json.loads(path.read_text())


def test_the_results_file_has_all_rows(bench, tmp_path, capsys):
    code, content = run(bench, tmp_path, "cpu")
    assert code == 0 and not content["skipped"]
    rows = content["rows"]
    assert {row["layers"] for row in rows} == {"4096x4096", "4096x14336", "14336x4096", "4096x1024", "small"}
    assert len(rows) == 2 * 3 * 2 * (4 + 2)  # a model has two rows: a decoder layer, and all of them
    for row in rows:
        assert row["correct"] and row["M"] == 64 and row["held_bytes"] is None and row["copies"] in (1, 3)
    one, whole = ([r for r in rows if r["layers"] == "small" and r["copies"] == n] for n in (1, 3))
    assert [3 * r["saved_bytes"] for r in one] == [r["saved_bytes"] for r in whole]
    assert all(r["of_peft"] < 1 for r in one if r["provider"] == "fused_lora" and r["dropout"])
    assert "small r=16 M=64, 3 layers" in capsys.readouterr().out


def test_shapes_from_the_command_line(bench, tmp_path):
    code, content = run(bench, tmp_path, "cpu", "--shapes", "96x64")
    assert code == 0 and {row["layers"] for row in content["rows"]} == {"96x64"}


def test_what_is_allocated_and_not_as_computed_is_wrong(bench, load, tmp_path, monkeypatch):
    """As on a GPU, whose allocator says that a provider holds a copy of x more than its hooks."""
    report = load("report").Report("memory", torch.device("cpu"), tmp_path, {})
    report.device = torch.device("cuda")
    point = bench.Point("96x64", "bfloat16", 0.1, 1000, R)
    more = iter((0, 2 * 96 * 1000))

    def allocated(point, provider, device):
        return bench.computed(point, provider)[1] + next(more), 1 << 20

    monkeypatch.setattr(bench, "allocated", allocated)
    bench.measure(point, report, load("report").Table(bench.COLUMNS), None)
    assert [(row["provider"], row["correct"]) for row in report.rows] == [("PEFT", True), ("fused_lora", False)]


@pytest.mark.gpu
def test_a_gpu_holds_what_was_computed(load, tmp_path):
    code, content = run(load("bench_memory"), tmp_path, "cuda", "--rows", "1024")
    assert code == 0 and not content["skipped"], [row.get("wrong") for row in content["rows"] if not row["correct"]]
    single = [row for row in content["rows"] if row["copies"] == 1]
    assert all(row["peak_bytes"] > row["held_bytes"] > 0 for row in single)
