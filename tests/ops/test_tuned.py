"""Measured plans: which file holds, what it says of shapes and rows, and that plans follow it where they can."""

import itertools
import json
import os
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fused_lora.ops.linear import plan, tuned  # noqa: E402
from fused_lora.testing.layers import LayerCase  # noqa: E402

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
SHAPE = tuned.shape("linear", 40, 48, 4, FP32, False, False, False)


def measured(variant, rule="library"):
    return tuned.Measured(variant, rule, {variant: 2.5, rule: 5.0})


@pytest.fixture
def table(tmp_path):
    """Of this machine, with two measurements."""
    found = {SHAPE: {8: measured("eager"), 512: measured("split")}}
    return tuned.Table(tmp_path / "folder" / "tuned.json", tuned.key_of(CPU), found)


@pytest.fixture
def used(table, monkeypatch, device, kernels_on):
    """The same, read by every plan."""
    table.key = tuned.key_of(device)
    table.write()
    monkeypatch.setenv(tuned.SWITCH, str(table.path))
    return table


def chosen(table, op="linear", M=8, N=40, K=48, r=4, dtype=FP32, dropout=False, adapters=1, **others):
    return plan.plan(op, M, N, K, r, dtype, dropout, False, adapters, 90, table=table, **others).variant


def test_the_nearest_number_of_rows_decides(table):
    by_rows = {M: measured(name) for M, name in ((1, "recompute"), (16, "split"), (512, "library"), (2048, "eager"))}
    table.found[SHAPE] = by_rows
    asked = {1: "recompute", 4: "recompute", 5: "split", 64: "split", 65: None, 127: None, 128: "library"}
    asked |= {1023: "library", 1025: "eager", 8192: "eager", 8193: None}
    assert {M: table.variant(M, SHAPE) for M in asked} == asked
    assert table.variant(16, SHAPE._replace(N=41)) is None


def test_ranks_up_to_a_power_of_2_share_a_measurement():
    found = {r: tuned.shape("linear", 1, 1, r, BF16, False, True, False).r for r in (1, 16, 17, 32, 33, 64, 100)}
    assert found == {1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 100: 128}


def test_adapters_are_told_apart():
    kinds = [tuned.shape("linear", 1, 1, 4, BF16, False, *kind).adapters for kind in ((0, 0), (1, 0), (1, 1))]
    assert tuple(kinds) == tuned.ADAPTERS


def test_a_plan_follows_the_table_where_it_was_measured(table):
    assert chosen(None) == "recompute" and chosen(table) == "eager"
    assert chosen(table, M=512) == "split"
    for other in (dict(M=64), dict(N=41), dict(K=64), dict(r=17), dict(dtype=BF16), dict(rounds=True)):
        assert chosen(table, **other) == chosen(None, **other), other
    assert chosen(table, adapters=2) == chosen(None, adapters=2) == "library"
    assert chosen(table, dropout=True) == chosen(None, dropout=True)
    assert chosen(table, variant="recompute") == "recompute"


def test_what_cannot_run_there_is_not_taken(table):
    backward = tuned.shape("backward", 48, 40, 64, FP32, False, False, False)
    masked = SHAPE._replace(dropout=True)
    table.found = {masked: {8: measured("recompute")}, backward: {8: measured("passes")}}
    assert chosen(table, dropout=True) == "library"
    assert chosen(table, "backward", N=48, K=40, r=64) == "library"
    table.found = {backward._replace(r=16): {8: measured("eager", "passes")}}
    assert chosen(table, "backward", N=48, K=40) == "eager"
    assert chosen(table, "backward", N=48, K=40, whole=False) == "library"


def test_the_rules_choose_one_of_the_candidates():
    sizes = (1, 64, 65, 8192), (16, 64, 512), (FP32, BF16), (False, True), (False, True), (1, 2), (0, 80, 90)
    for op, (M, *rest) in itertools.product(("linear", "linear_4bit", "term", "backward"), itertools.product(*sizes)):
        able = plan.candidates(op, M, *rest)
        assert plan.choose(op, M, 4096, *rest) in able and able[-1] == "eager"


def test_a_layer_runs_as_the_file_says(used, device):
    case = LayerCase.make(8, 40, 48, [4], [0.0], FP32, bias=False, device=device)
    call = plan.case_of(case.x, 40, 48, None, case.lora_A, case.lora_B, case.dropout, case.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan.planned("linear", call, 40, 48).variant == "eager"
        assert plan.planned("backward", call, 48, 40).variant == "passes"
        case.check(case.planned())
    used.found[SHAPE][8] = measured("split")
    used.write()
    assert plan.planned("linear", call, 40, 48).variant == "eager"  # read once
    plan.forget()
    assert plan.planned("linear", call, 40, 48).variant == "split"
    case.check(case.planned())


@pytest.mark.parametrize("name", ["gpu", "driver", "torch", "triton", "fused_lora"])
def test_a_file_of_another_machine_is_one_warning(name, used, device):
    used.key[name] = "another"
    used.write()
    with pytest.warns(UserWarning, match=f"the rules choose: .*measured under {name} another, here .*tune again"):
        assert tuned.table(device) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.table(device) is None
    assert tuned.describe(device).startswith("rules: ") and f"{name} another" in tuned.describe(device)


def test_a_file_that_is_not_there_is_one_warning(used, device):
    used.path.unlink()
    with pytest.warns(UserWarning, match="the rules choose: .*tuned.json"):
        assert tuned.table(device) is None


def test_a_file_has_what_was_written(table):
    table.write()
    again = tuned.read(table.path)
    assert again == table and len(again) == again.changes == 2
    assert os.listdir(table.path.parent) == ["tuned.json"]


def test_a_write_that_fails_leaves_the_file(table, monkeypatch):
    table.write()
    before = table.path.read_bytes()
    table.found[SHAPE][8] = measured("split")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tuned.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        table.write()
    assert table.path.read_bytes() == before and os.listdir(table.path.parent) == ["tuned.json"]


BROKEN = {
    "no JSON": lambda content: "{",
    "a list": lambda content: [content],
    "no entries": lambda content: {name: content[name] for name in ("format", "key")},
    "another format": lambda content: content | dict(format=2),
    "a key of text": lambda content: content | dict(key="H100"),
    "an entry of text": lambda content: content | dict(entries=["linear"]),
    "too deep": lambda content: "[" * 100_000,
    "too many rows": lambda content: content | dict(entries=[content["entries"][0] | dict(M=10**400)]),
    "too long a time": lambda content: content | dict(entries=[content["entries"][0] | dict(us=dict(eager=10**400))]),
}
ENTRIES = dict(op="merge", variant="fastest", rule="", adapters="", M=0, K=True, dropout=1, us={"slow": 1.0}, r="16")
for _name, _value in ENTRIES.items():
    BROKEN[_name] = lambda content, name=_name, value=_value: (
        content | dict(entries=[content["entries"][0] | {name: value}])
    )


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_named(how, table):
    table.write()
    content = BROKEN[how](json.loads(table.path.read_text()))
    table.path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="tuned.json is no file of tuned plans: ."):
        tuned.read(table.path)


def test_where_the_file_is(table, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "shipped_path", lambda device: tmp_path / "shipped.json")
    monkeypatch.delenv(tuned.SWITCH)
    assert tuned.own_path(CPU) == tmp_path / "cache" / "fused_lora" / "tuned" / "cpu.json"
    assert tuned.find(CPU) is None and tuned.describe(CPU) == "rules"
    home = Path.home() / ".cache" / "fused_lora" / "tuned" / "cpu.json"
    for cache in ("", "cache"):  # a relative folder would be another one in every working directory
        with monkeypatch.context() as other:
            other.setenv("XDG_CACHE_HOME", cache)
            assert tuned.own_path(CPU) == home
    table.path, table.key = tmp_path / "shipped.json", {"gpu": "cpu"}
    table.write()
    assert tuned.find(CPU) == table  # what came with the package holds under any torch
    table.key["gpu"] = "H100"
    table.write()
    with pytest.raises(ValueError, match="gpu H100, here cpu"):
        tuned.find(CPU)
    table.path, table.key = tuned.own_path(CPU), tuned.key_of(CPU)
    table.write()
    assert tuned.find(CPU) == table
    assert tuned.describe(CPU) == f"{table.path}, 2 measurements, 2 of them change the rules' choice"
    monkeypatch.setenv(tuned.SWITCH, "off")
    assert tuned.find(CPU) is None and tuned.describe(CPU) == "rules: FUSED_LORA_TUNED=off"
    monkeypatch.setenv(tuned.SWITCH, str(tmp_path / "named.json"))
    with pytest.raises(OSError, match="named.json"):
        tuned.find(CPU)


def test_the_package_has_a_place_for_its_own(monkeypatch):
    from fused_lora.kernels import config

    monkeypatch.setattr(tuned, "_name", lambda device: "NVIDIA H100 80GB HBM3")
    path = tuned.shipped_path(CPU)
    assert path.name == "nvidia-h100-80gb-hbm3.json" and path.parents[1] == type(path)(config.__file__).parent


def test_the_driver_says_its_version_itself(monkeypatch):
    class Library:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, number):
            number._obj.value = 13010

    monkeypatch.setattr(tuned.ctypes, "CDLL", Library)
    assert tuned.driver_version() == "13.1"
