"""DDP and FSDP2 with two gloo processes: the losses and gradients of one process on the whole batch."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import processes
from helpers.training import DOORS, largest_relative  # noqa: E402

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

pytestmark = pytest.mark.slow
KINDS = ("ddp", "fsdp2")
INNER = {"fsdp2 linears": "fused", "fsdp2 parts": "a hook"}  # what is sharded by itself -> how its calls run
LAYERS = 14


def cases():
    found = {}
    for door in ("peft", *DOORS):
        for kind in KINDS:
            found[f"{kind} {door}"] = {"kind": kind, "door": door}
        if door != "peft":
            found[f"fsdp2 {door} checkpointing"] = {"kind": "fsdp2", "door": door, "checkpointing": True}
            found[f"ddp {door} checkpointing"] = {"kind": "ddp", "door": door, "checkpointing": True}
            for kind in INNER:
                found[f"{kind} {door}"] = {"kind": kind, "door": door}
            found[f"ddp {door} dropout"] = {"kind": "ddp", "door": door, "lora_dropout": 0.5}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run_in_processes(cases(), tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone():
    """One process on the whole batch: PEFT in float32, which is what all others are compared with."""
    return {door: processes.run_case("one", door) for door in ("peft", *DOORS)}


@pytest.mark.parametrize("checkpointing", ["", " checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_losses_and_gradients_are_those_of_one_process(results, alone, door, kind, checkpointing):
    found, expected = results[f"{kind} {door}{checkpointing}"], alone[door]
    assert found["losses"].tolist() == pytest.approx(expected["losses"].tolist(), rel=1e-6)
    theirs = largest_relative(results[f"{kind} peft"]["gradients"], alone["peft"]["gradients"])
    ours = largest_relative(found["gradients"], expected["gradients"])
    assert ours <= max(2 * theirs, 1e-6), f"gradients differ by {ours:.1e}, PEFT's by {theirs:.1e}"
    if door != "inject":
        assert found["calls"] == {"fused": processes.STEPS * LAYERS * (2 if checkpointing else 1)}


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("door", DOORS)
def test_linears_that_are_sharded_by_themselves(results, alone, door, kind):
    found, expected = results[f"{kind} {door}"], alone[door]
    assert found["losses"].tolist() == pytest.approx(expected["losses"].tolist(), rel=1e-6)
    assert largest_relative(found["gradients"], expected["gradients"]) < 1e-5
    if door != "inject":
        assert len(found["calls"]) == 1 and INNER[kind] in next(iter(found["calls"])), found["calls"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_losses_and_weights_are_pefts(results, door, kind):
    ours, theirs = results[f"{kind} {door}"], results[f"{kind} peft"]
    assert ours["losses"].tolist() == pytest.approx(theirs["losses"].tolist(), rel=1e-5)
    assert largest_relative(ours["gradients"], theirs["gradients"]) < 1e-5
    assert largest_relative(ours["final"], theirs["final"]) < 1e-4


@pytest.mark.parametrize("door", DOORS)
def test_dropout_under_ddp_acts_and_keeps_the_processes_together(results, door):
    dropped, plain = results[f"ddp {door} dropout"], results[f"ddp {door}"]
    assert largest_relative(dropped["gradients"], plain["gradients"]) > 1e-2
    assert dropped["apart"] == plain["apart"] == 0.0
