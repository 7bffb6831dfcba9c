"""A base layer that is sharded over two gloo processes by columns or by rows: outputs and gradients of PEFT's layer."""

import pytest
import torch

pytest.importorskip("peft")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

from fused_lora.testing.numeric import assert_close  # noqa: E402
from helpers import processes, sharded  # noqa: E402

pytestmark = pytest.mark.slow
# how the layer runs: around the base where the adapter is whole, in PEFT's way where its half is sharded too
EXPECTED = {
    "column, gathered": "fused around the base: a hook on the base layer",
    "row, scattered": "fused around the base: a hook on the base layer",
    "column": "a hook on a part of the layer",
    "row": "a hook on a part of the layer",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = {style: dict(kind=style) for style in EXPECTED} | {"dtensor": dict(kind="dtensor")}
    return processes.run_in_processes(cases, tmp_path_factory.mktemp("sharded"), sharded.run_case)


@pytest.mark.parametrize("style", EXPECTED)
def test_results_are_those_of_the_whole_layer(results, style):
    found = results[style]
    assert found["calls"] == {EXPECTED[style]: 1}
    assert found["layer"].removeprefix("no: ") == EXPECTED[style]
    for name in ("y", "dx", "dA", "dB"):
        for part in ("ours", "stock"):
            assert_close(found[part][name], found["exact"][name], terms=sharded.TERMS, name=f"{part} {name}")


def test_a_base_layer_that_returns_a_dtensor_fails_as_in_peft(results):
    assert "DTensor" in results["dtensor"]["error"] or "shape" in results["dtensor"]["error"]
