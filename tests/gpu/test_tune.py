"""On a GPU: a small layer is tuned, and later calls run as its file says."""

import pytest
import torch

import fused_lora
from fused_lora import cli
from fused_lora.diagnostics import tune
from fused_lora.kernels import config
from fused_lora.ops.linear import plan, tuned
from fused_lora.testing.layers import LayerCase

pytestmark = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32
CUDA = torch.device("cuda")
SIZES = {"linear": (512, 1024), "backward": (1024, 512)}  # results a row, contraction


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Of a file that every plan reads."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.SWITCH, str(path))
    return path


def runs(case):
    """The variants of this layer's forward and backward, after a check of their results."""
    found = case.planned()
    del found["S"]  # of 16 bits on the eager path
    case.check(found)
    K, N = case.x.shape[1], case.weight.shape[0]
    call = plan.case_of(case.x, N, K, None, case.lora_A, case.lora_B, case.dropout, case.weight)
    return plan.planned("linear", call, N, K).variant, plan.planned("backward", call, K, N).variant


def test_a_layer_is_tuned_and_runs_by_its_file(path, capsys):
    assert cli.main("tune --shapes 1024x512 --rows 16,512 --seconds 0.02".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    table = tuned.find(CUDA)
    # two numbers of rows, with dropout and without, forward and backward
    assert table is not None and table.path == path and len(table) == 8
    assert len(lines) == 9 and lines[-1].startswith(f"{path}: 8 measurements, ")
    assert tuned.describe(CUDA).startswith(f"{path}, 8 measurements, ")
    for shape, by_rows in table.found.items():
        for M, measured in by_rows.items():
            able = plan.candidates(shape.op, M, 16, BF16, shape.dropout, False, 1, config.capability(CUDA))
            assert {*measured.us} == {*able}, "a variant was dropped"
            assert all(0 < us < 1e6 for us in measured.us.values())
    for M in (16, 512):
        case = LayerCase.make(M, 512, 1024, [16], [0.1], BF16, device=CUDA)
        shapes = [tuned.shape(op, *size, 16, BF16, True, False, False) for op, size in SIZES.items()]
        assert runs(case) == tuple(table.found[shape][M].variant for shape in shapes)


def test_a_file_turns_a_layer_to_the_eager_path(path, monkeypatch):
    def times(calls):
        return {name: [0.1 if name == "eager" else 1.0] for name in calls}

    tune.tune([(1024, 512)], rows=[512], timer=times)
    case = LayerCase.make(512, 512, 1024, [16], [0.1], BF16, device=CUDA)
    shape = dict(M=512, K=1024, N=512, r=16, dropout=0.1)
    assert runs(case) == ("eager", "eager") and fused_lora.explain(**shape).forward.variant == "eager"
    monkeypatch.setenv(tuned.SWITCH, "off")
    plan.forget()
    assert "eager" not in runs(case) and fused_lora.explain(**shape).forward.variant != "eager"


@pytest.mark.parametrize("kind, adapters", [("rounded", dict(autocast=True)), ("wider", dict(adapter_dtype=FP32))])
def test_fp32_adapters_are_tuned(kind, adapters, path):
    table = tune.tune([(512, 256)], rows=[64], timer=tune.device_timer(CUDA, 0), **adapters)
    assert len(table) == 4 and {shape.adapters for shape in table.found} == {kind}
    for by_rows in table.found.values():
        assert {by_rows[64].rule, "eager"} <= {*by_rows[64].us}
