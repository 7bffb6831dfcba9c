"""The smoke run: what fails costs its part, and a kernel that is dropped is a failure."""

import pytest

pytest.importorskip("triton")
from fused_lora.ops import guard
from fused_lora.testing import smoke


def test_the_parts_after_a_failure_run(device, monkeypatch, capsys):
    def wrong(device, subset):
        yield "a case"
        raise AssertionError("y is off")

    def right(device, subset):
        yield f"another on {device}, subset {subset}"

    monkeypatch.setattr(smoke, "PARTS", (wrong, right))
    assert smoke.main([device.type, "--subset"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["a case", f"another on {device}, subset True"] and "y is off" in said.err
    monkeypatch.setattr(smoke, "PARTS", (right,))
    assert smoke.main([device.type]) == 0


def test_a_dropped_kernel_is_a_failure(device, monkeypatch, capsys):
    """Its results are right: the eager path computes them."""

    def drops(device, subset):
        guard.passes(("merge", "of this test"), lambda: "wrong on a small tile")
        yield "right"

    monkeypatch.setattr(guard, "_state", {})
    monkeypatch.setattr(smoke, "PARTS", (drops,))
    assert smoke.main([device.type]) == 1
    assert "is dropped" in capsys.readouterr().err
