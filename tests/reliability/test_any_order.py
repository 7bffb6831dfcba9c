"""Goal A9: whatever the order of calls, outputs are those of the reference, and unmerging everything gives the first
bits."""

import shutil
import tempfile
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import fused_lora
from fused_lora import AdapterStore, LoraConfig
from fused_lora.reference import bits
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

NAMES = ["one", "two", "three"]
WIDTHS = (12, 20, 12)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
names = st.sampled_from(NAMES)


class Machine(RuleBasedStateMachine):
    """One model under all calls, a store over another with the same weights, and what both must hold."""

    @initialize(dtype=st.sampled_from(DTYPES), number=st.integers(0, 2**31))
    def start(self, dtype, number):
        torch.manual_seed(number)
        self.dtype, self.folder = dtype, tempfile.mkdtemp()
        self.model = nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.Tanh(), nn.Linear(*WIDTHS[1:])).to(dtype).eval()
        served = nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.Tanh(), nn.Linear(*WIDTHS[1:])).to(dtype).eval()
        served.load_state_dict(self.model.state_dict())
        self.store = AdapterStore(served)
        self.first = [bits(t).clone() for t in self.model.state_dict().values()]
        self.x = torch.randn(3, WIDTHS[0]).to(dtype)
        self.adapters: dict[str, dict] = {}  # name -> {layer: (A, B, scaling)}
        self.active: list[str] = []
        self.merged: dict[str, dict] | None = None  # what is in the weights: frozen at the merge
        self.saved: dict[str, dict] = {}
        self.served: dict[str, dict] = {}

    def teardown(self):
        shutil.rmtree(self.folder)
        super().teardown()

    def copy_of(self, name):
        found = {}
        for path, layer in fused_lora.lora_layers(self.model).items():
            A, B = (part[name].weight.detach().double().clone() for part in (layer.lora_A, layer.lora_B))
            found[path] = (A, B, layer.scaling[name])
        return found

    def free_name(self):
        return next((n for n in NAMES if n not in self.adapters), None)

    @rule(r=st.integers(1, 9), alpha=st.integers(1, 16), dropout=st.sampled_from([0.0, 0.3]))
    def inject(self, r, alpha, dropout):
        name = self.free_name()
        if name is None:
            return
        config = LoraConfig(
            r=r, lora_alpha=alpha, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False
        )
        fused_lora.inject(self.model, config, name)
        self.model.eval()
        self.adapters[name] = self.copy_of(name)
        self.active = self.active or [name]

    @precondition(lambda self: self.active)
    @rule()
    def train(self):
        """One step of gradient descent; what is merged stays in the weights as it was."""
        layers = fused_lora.lora_layers(self.model).values()
        parts = [part[name] for layer in layers for part in (layer.lora_A, layer.lora_B) for name in self.active]
        parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
        if self.merged is not None or not parameters:
            return
        self.model.train()
        self.model(self.x).square().mean().backward()
        with torch.no_grad():
            for p in parameters:
                assert p.grad is not None and p.grad.isfinite().all()
                p -= 0.01 * p.grad / (1e-6 + p.grad.norm())
                p.grad = None
        self.model.eval()
        for name in self.active:
            self.adapters[name] = self.copy_of(name)

    @precondition(lambda self: self.adapters)
    @rule(chosen=st.lists(names, min_size=1, max_size=3, unique=True))
    def set_adapter(self, chosen):
        if not set(chosen) <= set(self.adapters):
            with pytest.raises(fused_lora.AdapterNotFound):
                fused_lora.set_adapter(self.model, chosen)
            return
        fused_lora.set_adapter(self.model, chosen)
        self.active, self.merged = list(chosen), None

    @precondition(lambda self: self.adapters)
    @rule(chosen=st.lists(names, max_size=3, unique=True))
    def merge(self, chosen):
        chosen = [n for n in chosen if n in self.adapters] or self.active
        fused_lora.merge(self.model, chosen)
        self.merged = {**{n: self.adapters[n] for n in chosen}, **(self.merged or {})}

    @precondition(lambda self: self.adapters)
    @rule()
    def unmerge(self):
        fused_lora.unmerge(self.model)
        self.merged = None

    @precondition(lambda self: self.adapters)
    @rule(name=names, factor=st.sampled_from([-0.5, -1.0]))
    def edit(self, name, factor):
        """Somebody changes lora_B in place; what was merged before is taken out as it was put in."""
        if name in self.adapters:
            for layer in fused_lora.lora_layers(self.model).values():
                layer.lora_B[name].weight.data.mul_(factor)
            self.adapters[name] = self.copy_of(name)

    @precondition(lambda self: self.adapters)
    @rule(name=names)
    def save(self, name):
        if name in self.adapters:
            fused_lora.save_adapter(self.model, f"{self.folder}/{name}", name)
            self.saved[name] = self.adapters[name]

    @precondition(lambda self: self.saved)
    @rule(name=names)
    def load(self, name):
        if name not in self.saved:
            return
        if name in self.adapters:
            with pytest.raises(ValueError, match="taken"):
                fused_lora.load_adapter(self.model, f"{self.folder}/{name}", name)
            return
        fused_lora.load_adapter(self.model, f"{self.folder}/{name}", name, is_trainable=True)
        self.model.eval()
        self.adapters[name] = self.saved[name]
        self.active = self.active or [name]

    @precondition(lambda self: self.adapters)
    @rule(name=names)
    def delete(self, name):
        if name not in self.adapters:
            return
        if name in (self.merged or {}):
            with pytest.raises(ValueError, match="merged"):
                fused_lora.delete_adapter(self.model, name)
            return
        fused_lora.delete_adapter(self.model, name)
        del self.adapters[name]
        self.active = fused_lora.active_adapters(self.model)
        assert name not in self.active and bool(self.active) == bool(self.adapters)

    @precondition(lambda self: self.adapters)
    @rule()
    def disable(self):
        with fused_lora.disable_adapters(self.model):
            self.compare(self.model(self.x), {})
        self.merged = None  # it unmerges first

    @precondition(lambda self: self.saved)
    @rule(name=names)
    def serve(self, name):
        if name in self.saved:
            self.store.load(name, f"{self.folder}/{name}")
            self.served[name] = self.saved[name]

    @precondition(lambda self: self.served)
    @rule(name=names)
    def stop_serving(self, name):
        if name in self.served:
            self.store.unload(name)
            del self.served[name]

    @precondition(lambda self: self.served)
    @rule(rows=st.lists(st.one_of(st.none(), names), min_size=3, max_size=3))
    def mixed_batch(self, rows):
        rows = [n if n in self.served else None for n in rows]
        with self.store.batch(rows), torch.no_grad():
            y = self.store.model(self.x)
        for row, name in enumerate(rows):
            self.compare(y[row], {} if name is None else {name: self.served[name]}, row)

    def compare(self, y, adapters, row=slice(None)):
        """Against float64 on the first weights, within the rounding of the sums of these magnitudes."""
        x = self.x[row].double()
        size = x.abs()
        weights = [first.view(self.dtype).double() for first in self.first]
        for path, W, b in (("0", *weights[:2]), ("2", *weights[2:])):
            parts = [layers[path] for layers in adapters.values()]
            x = x @ W.T + b + sum(s * x @ A.T @ B.T for A, B, s in parts)
            terms = sum(abs(s) * size @ A.abs().T @ B.abs().T for A, B, s in parts)
            size = size @ W.abs().T + b.abs() + terms
            x = torch.tanh(x) if path == "0" else x  # tanh changes no more than its argument does
        assert_close(y, x, terms=100, size=size.max().item())

    @invariant()
    def right_output(self):
        if not hasattr(self, "model"):
            return
        with torch.no_grad():
            found = self.merged if self.merged is not None else {n: self.adapters[n] for n in self.active}
            self.compare(self.model(self.x), found)

    @invariant()
    def first_bits(self):
        if not hasattr(self, "model") or self.merged is not None:
            return
        for t, first in zip(base_tensors(self.model), self.first, strict=True):
            assert torch.equal(bits(t), first)
        for t, first in zip(base_tensors(self.store.model), self.first, strict=True):
            assert torch.equal(bits(t), first)


def base_tensors(model):
    return [t for name, t in model.state_dict().items() if "lora_" not in name]


@pytest.mark.experiment("A9", full=500, quick=12)
@pytest.mark.parametrize("part", range(4))
def test_any_order(part, count):
    """Sequences of 30 random calls (inject, train, set_adapter, merge, unmerge, save, load, delete, a store's).

    After every call outputs are the reference's, and whenever nothing is merged the weights have their first bits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # merging twice, unmerging first
        run_state_machine_as_test(
            seed(shifted(part))(Machine),
            settings=settings(
                max_examples=count,
                stateful_step_count=30,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink],
            ),
        )
