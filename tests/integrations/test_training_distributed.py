"""DDP and FSDP2 with two gloo processes: the losses and gradients of one process on the whole batch."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import processes
from helpers.training import ROUTES, largest_relative  # noqa: E402

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

pytestmark = pytest.mark.slow
KINDS = ("ddp", "fsdp2")
INNER = {"fsdp2 linears": "fused", "fsdp2 parts": "a hook"}  # what is sharded by itself -> how its calls run
LAYERS = 14
EQUAL = 8 * torch.finfo(torch.float32).eps  # models in float64, whose losses transformers forms in fp32


def cases():
    found = {}
    for route in ("peft", *ROUTES):
        for kind in KINDS:
            found[f"{kind} {route}"] = {"kind": kind, "route": route}
        if route != "peft":
            found[f"fsdp2 {route} checkpointing"] = {"kind": "fsdp2", "route": route, "checkpointing": True}
            found[f"ddp {route} checkpointing"] = {"kind": "ddp", "route": route, "checkpointing": True}
            for kind in INNER:
                found[f"{kind} {route}"] = {"kind": kind, "route": route}
            found[f"ddp {route} dropout"] = {"kind": "ddp", "route": route, "lora_dropout": 0.5}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run_in_processes(cases(), tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone():
    """One process on the whole batch: in float64, which is what all others are compared with."""
    return {route: processes.run_case("one", route) for route in ("peft", *ROUTES)}


@pytest.mark.parametrize("checkpointing", ["", " checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_losses_and_gradients_are_those_of_one_process(results, alone, route, kind, checkpointing):
    found, expected = results[f"{kind} {route}{checkpointing}"], alone[route]
    assert found["losses"].tolist() == pytest.approx(expected["losses"].tolist(), rel=EQUAL)
    assert largest_relative(found["gradients"], expected["gradients"]) < EQUAL
    assert found["explained"] == {"fused"}  # between the calls, too, when FSDP2 has sharded the weights
    if route != "inject":
        assert found["calls"] == {"fused": processes.STEPS * LAYERS * (2 if checkpointing else 1)}


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("route", ROUTES)
def test_linears_that_are_sharded_by_themselves(results, alone, route, kind):
    found, expected = results[f"{kind} {route}"], alone[route]
    assert found["losses"].tolist() == pytest.approx(expected["losses"].tolist(), rel=EQUAL)
    assert largest_relative(found["gradients"], expected["gradients"]) < EQUAL
    if route != "inject":
        assert len(found["calls"]) == 1 and INNER[kind] in next(iter(found["calls"])), found["calls"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_losses_and_weights_are_pefts(results, route, kind):
    ours, theirs = results[f"{kind} {route}"], results[f"{kind} peft"]
    assert ours["losses"].tolist() == pytest.approx(theirs["losses"].tolist(), rel=EQUAL)
    assert largest_relative(ours["gradients"], theirs["gradients"]) < EQUAL
    assert largest_relative(ours["final"], theirs["final"]) < 1e-4


@pytest.mark.parametrize("route", ROUTES)
def test_dropout_under_ddp_acts_and_keeps_the_processes_together(results, route):
    dropped, plain = results[f"ddp {route} dropout"], results[f"ddp {route}"]
    assert largest_relative(dropped["gradients"], plain["gradients"]) > 1e-2
    assert dropped["apart"] == plain["apart"] == 0.0
