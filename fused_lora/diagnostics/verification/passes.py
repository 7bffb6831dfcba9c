"""Forward passes of a model with its LoRA layers merged or unmerged. Everything is restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.diagnostics.verification.layers import Layer, keep
from fused_lora.modules.outputs import main_output


@dataclass
class Pass:
    """The model's output, and for every LoRA layer some rows of its first input and output: path -> [rows, K or N]."""

    output: Tensor
    x: dict[str, Tensor] = field(default_factory=dict)
    y: dict[str, Tensor] = field(default_factory=dict)


def run(
    model: nn.Module,
    inputs: object,
    layers: Sequence[Layer],
    merged: bool | None,
    seed: int,
    rows: int = 0,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> Pass:
    """One forward under ``torch.manual_seed(seed)``; ``change(path, y)`` may replace a layer's output.

    ``merged`` puts every layer into that state during its own call. None leaves it as it is. ``rows`` evenly spaced
    rows of each layer's input and output are kept.
    """
    found, me = Pass(torch.empty(0, device="cpu")), threading.get_ident()
    open_states: dict[str, list[ExitStack]] = {layer.path: [] for layer in layers}

    def enter(layer: Layer):
        def hook(module, args):
            if threading.get_ident() != me:
                return  # a forward of another thread, which waits for the end of the verification
            state = ExitStack()
            state.enter_context(layer.shown(layer.merged if merged is None else merged))
            open_states[layer.path].append(state)

        return hook

    def leave(layer: Layer):
        def hook(module, args, kwargs, y):
            if threading.get_ident() != me:
                return None
            open_states[layer.path].pop().close()
            x = layer.kept(args, kwargs) if rows and layer.path not in found.x else None
            if x is not None:
                found.x[layer.path], found.y[layer.path] = sample(x, rows), sample(layer.results(y), rows)
            return y if change is None else change(layer.path, y)

        return hook

    handles = []

    def end() -> None:
        """Does nothing the second time."""
        for handle in handles:
            handle.remove()
        for states in open_states.values():
            while states:
                states.pop().close()

    try:
        for layer in layers:
            handles.append(layer.module.register_forward_pre_hook(enter(layer)))
            handles.append(layer.module.register_forward_hook(leave(layer), with_kwargs=True))
        torch.manual_seed(seed)
        result = _call(model, inputs)
        output = main_output(result)
        if output is None:
            wanted = "an output with a floating-point tensor"
            raise TypeError(f"model: expected {wanted}, got {type(result).__name__}")
        found.output = output.detach().clone()
    finally:
        try:
            end()
        except BaseException:  # an interrupt
            end()
            raise
    return found


def sample(tensor: Tensor, rows: int) -> Tensor:
    """At most ``rows`` of the rows of [..., n], evenly spaced, as a copy [rows, n]."""
    flat = tensor.detach().reshape(-1, tensor.shape[-1])
    step = max(1, -(-flat.shape[0] // rows))
    return flat[::step].clone()


def check_inputs(inputs: object) -> None:
    """Raise TypeError unless ``inputs`` is a tensor, a mapping of keyword arguments or a sequence of arguments."""
    if isinstance(inputs, str) or not isinstance(inputs, (Tensor, Mapping, Sequence)):
        wanted = "a tensor, a mapping (model(**inputs)) or a tuple (model(*inputs))"
        raise TypeError(f"inputs: expected {wanted}, got {type(inputs).__name__}")


def _call(model: nn.Module, inputs: Any) -> object:
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


@contextmanager
def restored(*models: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Eval mode without gradients. Afterwards training flags, buffers, quantised weights and RNG states are restored.

    ``layers``: what is left of them where an interrupt came into the end of a ``Layer.shown`` is restored, too.

    Compiled modules run eagerly inside, because hooks do not work in compiled code.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    quantised = {module for model in models for module in model.modules() if base_of(module).bits}
    quantised -= {layer.base for layer in layers}
    kept = [*(layer.keep() for layer in layers), *map(keep, quantised)]

    def put_back() -> None:
        """Any number of times."""
        for put_one_back in kept:
            put_one_back()
        for module, training in flags:
            module.training = training
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)

    devices = {p.device for model in models for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU generator
        for kind in sorted({device.type for device in devices}):
            indices = list(range(torch.get_device_module(kind).device_count()))
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        stack.enter_context(torch.inference_mode(False))  # a weight that is shown must remain an ordinary tensor
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for base in quantised:
                base_of(base).copy_weight(base)  # calls may repack it
            for model in models:
                model.eval()
            yield
        finally:
            try:
                put_back()
            except BaseException:  # an interrupt
                put_back()
                raise
