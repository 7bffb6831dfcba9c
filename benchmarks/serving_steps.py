"""One decode step of a model under many adapters, by five providers: what bench_serving.py times.

A step is the decoder of a model (no output layer) on T sequences of one token each, row i under adapter i mod D.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from report import replayed
from torch import nn

import fused_lora

_SIDES = ("lora_A", "lora_B")
_POOL, _STRIDE = 1 << 22, 7919  # random numbers that all adapters are windows of, and how far those lie apart
_COMPARED = 8  # adapters of a point that are compared one at a time


@dataclass(frozen=True)
class StepPoint:
    """T sequences of one token, D distinct adapters of rank r among them."""

    T: int
    D: int
    r: int

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} r={self.r}"


@dataclass
class Step:
    """A provider's step: ``call`` gives [T, 1, hidden]; ``graphed`` says whether a CUDA graph replays it."""

    call: Callable[[], torch.Tensor]
    graphed: bool = False


@dataclass
class Trial:
    """The steps of one point by provider; ``groups[i]``: the rows of adapter i, ``alone(i)``: what it gives them."""

    steps: dict[str, Step]
    groups: list[torch.Tensor]
    alone: Callable[[int], torch.Tensor]


class Adapters:
    """D random adapters of rank r on every linear layer of a decoder, in a store and, as far as asked for, in PEFT.

    The model's weights are shared by all copies; every adapter has tensors of its own.
    """

    def __init__(self, decoder: nn.Module, r: int):
        self.r, self.plain = r, decoder
        self.paths = [path for path, module in decoder.named_modules() if isinstance(module, nn.Linear)]
        self.store = fused_lora.AdapterStore(_share(decoder))
        self.peft: nn.Module | None = None
        self._loaded: set[str] = set()
        self._in_peft = 0
        weight = next(decoder.parameters())
        longest = max(max(m.in_features, m.out_features) for m in map(decoder.get_submodule, self.paths))
        draw = torch.Generator().manual_seed(r)
        self._pool = torch.randn(_POOL + r * longest, generator=draw).to(weight.device, weight.dtype)

    def close(self) -> None:
        """Free the memory."""
        self.store.detach()
        self.peft = None

    def name(self, i: int) -> str:
        """The adapter of number ``i``, loaded into the store if it is not there."""
        name = f"a{i}"
        if name not in self._loaded:
            self.store.load(name, {path: (*self.factors(i, path), 2.0) for path in self.paths})
            self._loaded.add(name)
        return name

    def factors(self, i: int, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, K] and B [N, r] of adapter ``i`` at a layer: the same numbers whenever they are asked for."""
        layer, number = self.plain.get_submodule(path), i * len(self.paths) + self.paths.index(path)

        def window(start: int, *shape: int) -> torch.Tensor:
            return self._pool[start % _POOL :][: shape[0] * shape[1]].view(shape)

        A = window(2 * number * _STRIDE, self.r, layer.in_features) * layer.in_features**-0.5
        return A, window((2 * number + 1) * _STRIDE, layer.out_features, self.r) * 0.02

    def with_peft(self, D: int) -> nn.Module:
        """PEFT's model with the first ``D`` adapters."""
        import peft

        config = peft.LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules=self.paths)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many adapters on one module
            for i in range(self._in_peft, D):
                if self.peft is None:
                    self.peft = peft.get_peft_model(_share(self.plain), config, "a0", autocast_adapter_dtype=False)
                else:
                    self.peft.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
                self._fill(i)
        self._in_peft = max(self._in_peft, D)
        return self.peft.eval()

    def _fill(self, i: int) -> None:
        for path in self.paths:
            layer = self.peft.base_model.model.get_submodule(path)
            for side, values in zip(_SIDES, self.factors(i, path), strict=True):
                getattr(layer, side)[f"a{i}"].weight.data.copy_(values)

    def bytes_each(self) -> int:
        """Bytes of one adapter."""
        layers = [self.plain.get_submodule(path) for path in self.paths]
        return sum(self.r * (m.in_features + m.out_features) * m.weight.element_size() for m in layers)

    def bytes_of_base(self) -> int:
        """Bytes of the linear layers' weights: what every step reads."""
        return sum(self.plain.get_submodule(path).weight.nbytes for path in self.paths)


def _share(decoder: nn.Module) -> nn.Module:
    return copy.deepcopy(decoder, memo={id(p): p for p in decoder.parameters()})


@contextlib.contextmanager
def steps(adapters: Adapters, point: StepPoint, ids: torch.Tensor, peft_up_to: int, loop_up_to: int) -> Iterator[Trial]:
    """The providers at one point, ready to be timed; on a GPU inside CUDA graphs where they can be captured.

    base: no adapter. fused_lora: one batch. PEFT: one batch with ``adapter_names``. loop: a batch per adapter.
    merged: a forward per adapter, each on the plain weights: a merged model costs what the plain one costs. On a GPU
    PEFT, which cannot be captured, and the loop run eagerly; the rows say so.
    """
    names = [adapters.name(i % point.D) for i in range(point.T)]
    served, plain, store = adapters.store.model, adapters.plain, adapters.store
    groups = [torch.arange(i, point.T, point.D, device=ids.device) for i in range(point.D)]

    def run(model: nn.Module, rows: torch.Tensor, **more) -> torch.Tensor:
        return model(input_ids=rows, use_cache=False, **more).last_hidden_state

    def ours() -> torch.Tensor:
        with store.batch(names):
            return run(served, ids)

    def alone(i: int) -> torch.Tensor:
        with store.batch([names[i]] * len(groups[i])):
            return run(served, ids[groups[i]])

    calls = {"base": lambda: run(plain, ids)}
    if not ids.is_cuda:
        calls["fused_lora"] = ours
    if point.D <= peft_up_to:
        peft_model = adapters.with_peft(point.D)
        calls["PEFT"] = lambda: run(peft_model, ids, adapter_names=names)
    if point.D <= loop_up_to:
        calls["loop"] = lambda: torch.cat([alone(i) for i in range(point.D)])
        calls["merged"] = lambda: torch.cat([run(plain, ids[group]) for group in groups])
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if not ids.is_cuda:
            yield Trial({name: Step(call) for name, call in calls.items()}, groups, alone)
            return
        found = {name: Step(call) if name == "loop" else _graph(call, stack) for name, call in calls.items()}
        # what the batch copies to the device is copied when it is entered, not at every replay
        buffers = store.row_buffers(point.T, point.D, adapters.r)
        stack.enter_context(store.batch_rows(names, [1] * point.T, buffers))
        found["fused_lora"] = _graph(lambda: run(served, ids), stack)
        yield Trial(found, groups, alone)


def _graph(call: Callable[[], torch.Tensor], stack: contextlib.ExitStack) -> Step:
    """``call`` as the replay of a CUDA graph, or itself where it cannot be captured."""
    try:
        return Step(replayed(call, stack), graphed=True)
    except RuntimeError:  # PEFT indexes with lists of this host: its step cannot be captured
        torch.cuda.synchronize()
        return Step(call)


def disagreement(trial: Trial) -> str | None:
    """None, or what is wrong: ours against PEFT's step where there is one, else against adapters one at a time."""
    found, D = trial.steps, len(trial.groups)
    ours, base = found["fused_lora"].call(), found["base"].call()
    limit = 1e-3 if base.dtype == torch.float32 else 0.1
    if "PEFT" in found:
        name, theirs = "PEFT", found["PEFT"].call()
    else:
        some = range(0, D, -(-D // _COMPARED))
        rows = torch.cat([trial.groups[i] for i in some])
        name, theirs = "one at a time", torch.cat([trial.alone(i) for i in some])
        ours, base = ours[rows], base[rows]
    error = (ours.double() - theirs.double()).norm() / (theirs.double() - base.double()).norm()
    return None if error <= limit else f"differs from {name} by {error:.2e} of what the adapters change"
