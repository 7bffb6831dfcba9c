"""A PEFT model and its accelerated copy doing the same things: what comes out, what is said, and what state is left."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fused_lora
from fused_lora.reference import bits
from fused_lora.testing.numeric import DRAWS, assert_no_worse
from helpers.seeds import shifted
from helpers.unchanged import assert_bits, parameter_bits

TOKENS, ROWS, LENGTH = 20, 4, 5
K, N = 24, 17  # features of :func:`pair`'s layer


class Net(nn.Module):
    """Embedding, linear layers with and without a bias, a Conv1D [in, out] and a head; exact in any dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = nn.Embedding(TOKENS, 24)
        self.lin0 = nn.Linear(24, 40)
        self.lin1 = nn.Linear(40, 24, bias=False)
        self.conv1d = Conv1D(32, 24)
        self.head = nn.Linear(32, 12)
        nn.init.normal_(self.conv1d.weight, std=0.2)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.emb(ids)
        hidden = hidden + self.lin1(torch.tanh(self.lin0(hidden)))
        return self.head(torch.tanh(self.conv1d(hidden)))


ALL = ["lin0", "lin1", "conv1d", "head"]


def wrap(model: nn.Module, adapters: Mapping[str, Mapping] | None = None, **fields: Any) -> nn.Module:
    """``model`` under PEFT, random adapters: name -> further LoraConfig fields. The first one is active."""
    import peft

    wrapped = None
    for name, own in (adapters or {"default": {}}).items():
        config = peft.LoraConfig(**{"target_modules": ALL, "r": 4, "lora_alpha": 6, **fields, **own})
        with quiet():
            if wrapped is None:
                wrapped = peft.get_peft_model(model, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return wrapped


class quiet(warnings.catch_warnings):
    """A context without warnings: PEFT warns of fan_in_fan_out, which it sets by itself."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")


class SideBySide:
    """``theirs`` (PEFT), ``ours`` (its accelerated copy), ``exact`` (PEFT in float64): led through the same steps."""

    def __init__(self, theirs: nn.Module):
        self.theirs, self.exact = theirs, copy.deepcopy(theirs).double()
        self.ours = fused_lora.accelerate(copy.deepcopy(theirs))
        self.assert_same_state()

    @property
    def models(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.ours, self.theirs, self.exact

    def do(self, step: Callable[[nn.Module], Any], raises: type[Exception] | None = None) -> None:
        """One step on every model: the same errors, warnings and state; a module that it returns takes over."""
        outcomes, results = [], []
        for model in self.models:
            torch.manual_seed(shifted(3))
            error = result = None
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    result = step(model)
                except Exception as e:  # noqa: BLE001 - compared below
                    error = e
            outcomes.append((type(error), str(error), [(w.category, str(w.message)) for w in caught]))
            results.append(result)
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][0] is (raises or type(None)), outcomes[0][1]
        if isinstance(results[0], nn.Module):
            self.ours, self.theirs, self.exact = results
        self.assert_same_state()

    def assert_same_state(self) -> None:
        """Names, order, dtypes, shapes, flags and adapter values alike, and reprs to the letter."""
        ours, theirs = dict(self.ours.named_parameters()), dict(self.theirs.named_parameters())
        assert list(self.ours.state_dict()) == list(self.theirs.state_dict())
        assert list(ours) == list(theirs) and repr(self.ours) == repr(self.theirs)
        exact = dict(self.exact.named_parameters())
        for name, parameter in theirs.items():
            mine = ours[name]
            assert (mine.dtype, mine.shape, mine.requires_grad, mine.device) == (
                parameter.dtype, parameter.shape, parameter.requires_grad, parameter.device
            ), name  # fmt: skip
            if "lora_" in name:
                assert torch.equal(bits(mine), bits(parameter)), name
                exact[name].data.copy_(parameter.data)  # drawn in another dtype there
        for (path, a), b in zip(self.ours.named_modules(), self.theirs.modules(), strict=True):
            assert a.training == b.training, path
            if not hasattr(a, "base_layer"):
                continue
            for key in ("active_adapters", "merged_adapters", "disable_adapters", "scaling", "r", "lora_alpha"):
                assert getattr(a, key, None) == getattr(b, key, None), (path, key)

    def assert_same_results(self, ulps: float = 1.0, draws: int = DRAWS, **kwargs: Any) -> None:
        """Outputs and all gradients of random batches as close to float64 as PEFT's own, and in the same dtypes.

        ``ulps``: allowed on top of PEFT's error; 2 for merged models, whose few weights round one way once
        and for all. ``kwargs`` go to the models.
        """
        ours, theirs, exact = {}, {}, {}
        embeddings = [next(m for m in model.modules() if isinstance(m, nn.Embedding)).weight for model in self.models]
        before = [weight.detach().clone() for weight in embeddings]
        for _ in range(draws):
            ids = torch.randint(0, TOKENS, (ROWS, LENGTH))
            # new embeddings too: draws of a few tokens alone would not be independent
            copy_into(embeddings, [torch.randn_like(before[0]) * before[0].std()] * 3)
            g = None
            for found, model in ((ours, self.ours), (theirs, self.theirs), (exact, self.exact)):
                y = model(ids, **kwargs)
                y = getattr(y, "logits", y)
                g = torch.randn_like(y) if g is None else g
                model.zero_grad()
                if y.requires_grad:
                    y.backward(g.to(y.dtype))
                grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                for name, tensor in {"y": y.detach(), **grads}.items():
                    found.setdefault(name, []).append(tensor.clone())
        copy_into(embeddings, before)
        assert ours.keys() == theirs.keys() == exact.keys()
        for name in ours:
            assert [t.dtype for t in ours[name]] == [t.dtype for t in theirs[name]], name
            results = [torch.stack(found[name]) for found in (ours, theirs, exact)]
            assert_no_worse(*results, name=name, draws=True, ulps=ulps)


def merge_and_back(both: SideBySide, cycles: int, compare: Callable[[], Any] | None = None) -> None:
    """Adapters "a" and "b" into a model and out again: a alone ``cycles`` times, then a and b one after another.

    Every bit of every parameter is back. ``compare`` is called while both are merged.
    """
    before = parameter_bits(both.ours)
    for _ in range(cycles):
        both.ours.merge_adapter()
        both.ours.unmerge_adapter()
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: m.merge_adapter(["b"]))
    if compare is not None:
        compare()
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, before)


@torch.no_grad()
def copy_into(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Each value into its weight, in the weight's dtype."""
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def pair(
    dtype: torch.dtype = torch.float32, adapters: Mapping | None = None, base: nn.Module | None = None, **fields: Any
) -> SideBySide:
    """One linear layer, or ``base``, as the only layer of the models."""
    net = nn.Sequential(nn.Linear(K, N) if base is None else base).to(dtype).eval()
    return SideBySide(wrap(net, adapters, **{"target_modules": ["0"], **fields}))


def layers(both: SideBySide) -> list[Any]:
    """The LoRA layer of each model of :func:`pair`."""
    return [model.base_model.model[0] for model in both.models]
