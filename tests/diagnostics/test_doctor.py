"""`fused-lora doctor`: what it says of this machine, and its exit code where something is wrong."""

import contextlib
import importlib
import itertools
import json

import pytest
import torch

import fused_lora
from fused_lora import cli
from fused_lora.diagnostics import doctor
from fused_lora.ops import guard
from fused_lora.ops.linear import eager as cpu
from fused_lora.ops.linear import tuned
from fused_lora.ops.linear.plan import Plan
from fused_lora.testing import smoke

CPU = ["--device", "cpu"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Little to check and to time, and nothing used or dropped before."""
    monkeypatch.setattr(guard, "_state", {})
    monkeypatch.setattr(doctor, "ROUNDS", 1)
    monkeypatch.setitem(doctor.TIMED, "cpu", dict(M=9, K=32, N=24, r=4, dropout=0.1, dtype=torch.float32))
    for name, size in (("LAYERS", 1), ("DTYPES", 2), ("DENSE", 1), ("GROUPED", 1)):
        monkeypatch.setattr(smoke, name, getattr(smoke, name)[:size])


def found(capsys, code, *options):
    assert cli.main(["doctor", "--json", *options]) == code
    return json.loads(capsys.readouterr().out)


def test_a_cpu(capsys):
    report = found(capsys, 0, *CPU)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["fused_lora"] == fused_lora.__version__
    assert report["GPU"]["name"] is None and "CPU path" in report["path"]["runs"]
    assert report["no kernels"] == {"operators": "4 cases right", "merges": "1 cases right"} and "kernels" not in report
    assert report["one layer"]["layer"] == "M=9 K=32 N=24 r=4 dropout=0.1 dtype=torch.float32"
    assert set(report["one layer"]) == {"layer", "forward + backward, ms", "eager, ms"}
    assert report["path"]["tuned plans"] is None and report["warnings"] == report["wrong"] == []


def test_the_table_shows_what_the_json_has(capsys):
    assert cli.main(["doctor", *CPU]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["versions", "python", found(capsys, 0, *CPU)["versions"]["python"]]
    assert lines[-1].split() == ["wrong", "none"]
    assert any("operators" in line and "4 cases right" in line for line in lines)


def test_the_switches_are_shown(capsys, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_CHECK", "0")
    assert found(capsys, 0, *CPU)["path"]["FUSED_LORA_CHECK"] == "0"


def test_a_wrong_result_is_an_exit_code(capsys, monkeypatch):
    right = cpu.lora_linear

    def off(*arguments):
        y, S = right(*arguments)
        return y * 1.01, S

    monkeypatch.setattr(cpu, "lora_linear", off)
    report = found(capsys, 1, *CPU)
    assert report["no kernels"] == {"operators": "WRONG", "merges": "1 cases right"}
    (text,) = report["wrong"]
    assert text.startswith("operators: AssertionError: y")
    assert "forward + backward, ms" in report["one layer"]  # the rest is still looked at


def test_a_dropped_kernel_is_an_exit_code(capsys, monkeypatch):
    def times(device):
        guard._drop(("linear", Plan("split")), "result 0 is off")
        return {}

    monkeypatch.setattr(doctor, "times", times)
    report = found(capsys, 1, *CPU)
    assert report["wrong"] == ["dropped, the eager path takes over: linear split"]
    assert len(report["warnings"]) == 1 and "result 0 is off" in report["warnings"][0]
    assert report["first uses"] == {"passed": 0, "dropped": 1}


def test_the_kernels(capsys, device, monkeypatch):
    """On the GPU, or in the interpreter as if it were one."""
    pytest.importorskip("triton")
    if device.type == "cpu":
        explain = fused_lora.explain
        monkeypatch.setattr(fused_lora, "explain", lambda **shape: explain(**shape | dict(device="H100")))
    monkeypatch.setenv("FUSED_LORA_TUNED", "nothing.json")
    report = found(capsys, 0, "--device", device.type)
    assert report["path"]["runs"] == "kernels" and report["path"]["backward"] != "eager"
    assert report["path"]["tuned plans"].startswith("rules: ") and "nothing.json" in report["path"]["tuned plans"]
    assert [*report["kernels"]] == ["layers", "merges", "switches", "grouped", "others"] and not report["wrong"]


def test_a_layer_that_was_measured_to_be_faster_without_kernels(device, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    layer = doctor.TIMED[device.type]
    M, N, K, r, dtype = (layer[name] for name in ("M", "N", "K", "r", "dtype"))
    shape = tuned.shape("linear", N, K, r, dtype, True, False, False)
    measured = {shape: {M: tuned.Measured("eager", "library", {"eager": 1.0, "library": 2.0})}}
    table = tuned.Table(tmp_path / "tuned.json", tuned.key_of(device), measured)
    table.write()
    monkeypatch.setenv(tuned.SWITCH, str(table.path))
    if device.type == "cpu":
        module = importlib.import_module("fused_lora.diagnostics.explain")
        monkeypatch.setattr(module, "_place", lambda *_: ("a chip", 90, (), tuned.table(device)))
    with contextlib.closing(doctor.examine(device)) as sections:
        path = dict(itertools.islice(sections, 3))["path"]
    assert (path["runs"], path["forward"], path["backward"]) == ("kernels", "eager", "passes")
    assert path["tuned plans"] == f"{table.path}, 1 measurements, 1 of them change the rules' choice"


@pytest.mark.gpu
def test_a_gpu_with_its_kernels_switched_off(capsys, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_PLAN", "eager")
    report = found(capsys, 0)
    assert report["GPU"]["name"] == torch.cuda.get_device_name() and "driver" in report["GPU"]
    assert "FUSED_LORA_PLAN=eager" in report["path"]["runs"]
    assert report["no kernels"]["operators"] == "4 cases right"
    assert report["first uses"] == {"passed": 0, "dropped": 0}


@pytest.mark.parametrize("name", ["meta", "gpu", "", "cuda:77", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_here(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--device", name])
    assert stop.value.code == 2 and "--device" in capsys.readouterr().err
