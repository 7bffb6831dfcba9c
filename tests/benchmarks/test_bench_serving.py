"""bench_serving.py on a tiny model: what it writes is complete and right, and a wrong step gets no time."""

import json

import pytest
import torch

from fused_lora.serving import AdapterStore
from helpers import serving
from helpers.seeds import shifted

serving.need_engine("peft", "fastapi", "uvicorn", "prometheus_client", "httpx")

GRID = "--layers 2 --rows 1,4 --distinct 1,3,T --ranks 4 --seconds 0 --rounds 2 --tokens 6 --device cpu".split()
SHAPES = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64))  # of a layer of the tiny model
LOAD = "--requests 24 --clients 4 --known 40 --held 4".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return serving.write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def run(bench, tiny, out, *options):
    code = bench.main(["--model", str(tiny), "--out", str(out), *GRID, *LOAD, *options])
    (path,) = out.glob("*.json")
    return code, json.loads(path.read_text())


@pytest.mark.slow
def test_whole_run(load, tiny, tmp_path, capsys):
    code, content = run(load("bench_serving"), tiny, tmp_path)
    printed = capsys.readouterr().out
    assert code == 0, printed
    rows = content["rows"]
    steps = [r for r in rows if r["benchmark"] == "step"]
    points = [(1, 1), (4, 1), (4, 3), (4, 4)]
    providers = ["base", "fused_lora", "PEFT", "loop", "merged"]
    assert [(r["T"], r["D"], r["provider"]) for r in steps] == [(*p, name) for p in points for name in providers]
    for row in steps:
        base = next(r for r in steps if r["provider"] == "base" and (r["T"], r["D"]) == (row["T"], row["D"]))
        assert row["share"] == pytest.approx(row["ms"]["median"] / base["ms"]["median"], rel=1e-2)
        weights, adapter = sum(K * N for K, N in SHAPES), 4 * sum(K + N for K, N in SHAPES)
        assert row["floor_share"] == pytest.approx(1 + row["D"] * adapter / weights, abs=1e-3)
        assert row["correct"] and row["ms"]["rounds"] == 2 and not row["graph"]
    spoken = [r for r in rows if r["benchmark"] == "generate"]
    assert {r["provider"] for r in spoken} == {"fused_lora", "PEFT"}
    assert all(r["same_tokens"] == 1 and r["tokens_per_second"] > 0 for r in spoken)
    served = {r["provider"]: r for r in rows if r["benchmark"] == "server"}
    assert set(served) == {"Zipf over 40", "base"}
    for row in served.values():
        assert row["requests"] == 24 and row["failed"] == 0 and 0 < row["tokens"] <= 24 * 6
        first = row["first_token_seconds"]
        assert 0 < first["p50"] <= first["p90"] <= first["p99"] <= row["seconds"]
    store = served["Zipf over 40"]["store"]
    assert store["loads"] >= served["Zipf over 40"]["adapters"] > 4 and store["evictions"] > 0
    assert served["base"]["store"]["loads"] == 0
    assert [bar["name"] for bar in content["bars"]] == ["generate under 8 adapters: times PEFT's tokens/s"]
    text = json.dumps(content)
    assert str(tmp_path) not in text and str(tiny.parent) not in text
    (figure,) = tmp_path.glob("*.png")
    assert figure.stat().st_size > 5000 and "T=4 D=3 r=4" in printed


def test_wrong_step_gets_no_time(load, tiny, tmp_path, capsys, monkeypatch):
    load("serving_steps")
    honest = AdapterStore.load

    def wrong(store, name, layers):
        """One sign in one layer, in the store alone."""
        path, (A, B, scaling) = next((p, layer) for p, layer in layers.items() if p.endswith("down_proj"))
        return honest(store, name, layers | {path: (A, -B if name == "a0" else B, scaling)})

    monkeypatch.setattr(AdapterStore, "load", wrong)
    code, content = run(load("bench_serving"), tiny, tmp_path, "--parts", "step")
    assert code == 1
    assert content["rows"] and all(not r["correct"] and "differs from PEFT" in r["wrong"] for r in content["rows"])
    assert not any("ms" in row for row in content["rows"])
    assert "WRONG" in capsys.readouterr().out


def test_step_without_peft_is_checked_against_one_at_a_time(load, tiny, tmp_path):
    code, content = run(load("bench_serving"), tiny, tmp_path, "--parts", "step", "--peft-up-to", "1")
    assert code == 0
    assert {r["D"] for r in content["rows"] if r["provider"] == "PEFT"} == {1}
    assert {r["D"] for r in content["rows"] if r["provider"] == "loop"} == {1, 3, 4}


def test_adapters_one_at_a_time_are_what_a_step_is_compared_with(load):
    module, draw = load("serving_steps"), torch.Generator().manual_seed(shifted(0))
    base, y = (torch.randn(20, 1, 8, generator=draw) for _ in range(2))
    groups = [torch.arange(i, 20, 10) for i in range(10)]

    def verdict(ours):
        made = {"base": module.Step(lambda: base), "fused_lora": module.Step(lambda: ours)}
        return module.disagreement(module.Trial(made, groups, lambda i: y[groups[i]]))

    assert verdict(y) is None
    for i in (0, 8):
        assert "differs from one at a time" in verdict(torch.where(torch.arange(20)[:, None, None] % 10 == i, base, y))


def test_what_takes_too_long_is_left_out_and_named(load, tiny, tmp_path):
    code, content = run(load("bench_serving"), tiny, tmp_path, "--parts", "step", "--loop-up-to", "3", "--ranks", "4,2")
    assert code == 0
    steps = {(r["T"], r["D"], r["r"], r["provider"]) for r in content["rows"]}
    assert {D for _, D, _, name in steps if name in ("loop", "merged")} == {1, 3}
    assert {(T, D, r) for T, D, r, name in steps if name == "fused_lora"} == {
        (T, D, r) for T, D in ((1, 1), (4, 1), (4, 3), (4, 4)) for r in (4, 2)
    }
    assert content["skipped"] == [
        "loop and merged at 2 points with more than 3 adapters: they run the model once per adapter"
    ]


def test_grid_that_is_cut_short_has_all_ranks(load, tiny, tmp_path, monkeypatch):
    bench, done = load("bench_serving"), []
    real = bench.Steps.measure

    def measure(self, point):
        if len(done) == 3:
            raise torch.OutOfMemoryError("cut short here")
        done.append(point)
        real(self, point)

    monkeypatch.setattr(bench.Steps, "measure", measure)
    _, content = run(bench, tiny, tmp_path, "--parts", "step", "--ranks", "4,2,3")
    assert {row["r"] for row in content["rows"]} == {2, 3, 4}
    assert len(content["skipped"]) == 3 * 4 - 3


def test_zipf_is_drawn_by_its_law(load):
    names = load("serving_load").zipf(100, 1.0, 50_000)
    counts = torch.bincount(torch.tensor([int(name[1:]) for name in names]), minlength=100).double()
    wanted = 1 / torch.arange(1, 101).double()
    wanted *= len(names) / wanted.sum()
    assert ((counts - wanted) ** 2 / wanted).sum() < 149  # chi-squared, 99 degrees of freedom: p = 0.001


@pytest.mark.parametrize("option", ["--rows", "--ranks", "--distinct", "--layers", "--known", "--parts"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1,,2", ""])
def test_options_are_checked(load, option, value, capsys):
    with pytest.raises(SystemExit):
        load("bench_serving").options().parse_args([f"{option}={value}"])
    assert f"argument {option}: expected" in capsys.readouterr().err


def test_grid(load):
    bench = load("bench_serving")
    arguments = bench.options().parse_args([])
    found = bench.points(arguments)
    assert len(found) == len(set(found)) == 3 * 15
    assert {(p.T, p.D) for p in found if p.T == 64} == {(64, 1), (64, 4), (64, 32), (64, 64)}
    assert all(p.D <= p.T for p in found) and {p.r for p in found[:3]} == {8, 16, 64}
    assert [p.T for p in found] == sorted(p.T for p in found)
