"""LoraLinear: a drop-in for nn.Linear that adds LoRA adapters, with PEFT's attributes, keys, draws and rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.bases.dense import is_conv1d
from fused_lora.modules.changes import CHANGING, alone, wait_for_change
from fused_lora.modules.config import LayerTensors
from fused_lora.modules.layer import LoraLayer, check_options, check_tensors
from fused_lora.modules.mixin import Later
from fused_lora.modules.offload import execution_device
from fused_lora.modules.targets import LINEAR, adapter_dtype, in_out_features, why_not_linear
from fused_lora.modules.variants import Magnitude
from fused_lora.ops import native
from fused_lora.ops.checks import span_of
from fused_lora.ops.merge import op as merging
from fused_lora.ops.merge.launch import TORN_TEXT
from fused_lora.ops.native import MERGE, MERGE_AGAIN, UNMERGE


class LoraLinear(LoraLayer):
    """y = x W^T + b + sum over active adapters of scaling * D(x) lora_A^T lora_B^T.

    In ``train()`` mode the input of A goes through dropout (mask drawn anew per adapter and call, regenerated in the
    backward, never stored); in ``eval()`` it does not. Neither mode merges or unmerges anything. A merged layer
    computes the base layer alone; a disabled one unmerges first.

    State-dict keys are PEFT's: ``base_layer.weight``, ``lora_A.<name>.weight``, ``lora_B.<name>.weight``.

    Args:
        base_layer: nn.Linear, transformers' Conv1D (weight stored [in, out]), a quantised Linear4bit or Linear8bitLt
            of bitsandbytes, an nn.Linear over a tensor of torchao, FP8Linear of transformers, or a packed layer of GPTQ
            or AWQ; it is frozen and kept, not copied.
        r: rank. lora_alpha: numerator of the scaling, lora_alpha / r.
        adapter_name: the first adapter's name. lora_dropout: probability in [0, 1].
        use_rslora: scaling is lora_alpha / sqrt(r). lora_bias: lora_B has a bias.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/r, B zero), "orthogonal"
            (even ranks), or False (both as nn.Linear draws them). Same seed, same draws as PEFT.
        autocast_adapter_dtype: hold adapters in fp32 over a 16-bit base (PEFT's default), else in the base's dtype.
        tensors: A, B, the bias of B and the magnitude instead of drawn ones.
        use_dora: DoRA: the rows of W + s B A are scaled to a trained magnitude, which starts as their norms.

    Raises:
        TypeError: base_layer is not a supported linear layer, or an argument has the wrong type.
        ValueError: r, lora_alpha, lora_dropout or the adapter's name is out of range, or tensors do not fit.
    """

    base_layer: Any
    kinds_of_parts = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        adapter_name: str = "default",
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        autocast_adapter_dtype: bool = True,
        tensors: LayerTensors | None = None,
        use_dora: bool = False,
    ):
        super().__init__()
        reason = "LoRA over LoRA" if isinstance(base_layer, LoraLayer) else why_not_linear(base_layer)
        if reason:
            raise TypeError(f"base_layer: expected one of {LINEAR}, got {type(base_layer).__name__}: {reason}")
        self.base_layer = base_layer
        self.in_features, self.out_features = in_out_features(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self._start()
        options = (lora_dropout, use_rslora, init_lora_weights, lora_bias, autocast_adapter_dtype)
        self.add_adapter(adapter_name, r, lora_alpha, *options, tensors=tensors, use_dora=use_dora)
        base_layer.requires_grad_(False)
        self.train(base_layer.training)
        self.set_adapter(adapter_name)

    @alone
    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        autocast_adapter_dtype: bool = True,
        tensors: LayerTensors | None = None,
        use_dora: bool = False,
    ) -> None:
        """Add an adapter, inactive and frozen until :meth:`set_adapter`. Arguments as for the class.

        ``tensors`` gives A [r, in], B [out, r], the bias of B [out] and the magnitude [out] instead of drawing them;
        their dtype stays.

        Raises RuntimeError for DoRA while an adapter is merged: the magnitude starts from the weight's own norms.
        """
        flags = dict(use_rslora=use_rslora, lora_bias=lora_bias, autocast_adapter_dtype=autocast_adapter_dtype)
        check_options(r, lora_alpha, lora_dropout, init_lora_weights, **flags, use_dora=use_dora)
        if use_dora:
            self._check_dora(lora_bias)
        self._check_new(adapter_name)
        device, dtype = execution_device(self.base_layer), adapter_dtype(self.base_layer)
        A, B = draw(self.in_features, self.out_features, r, init_lora_weights, lora_bias, tensors, use_dora)
        A = self._placed(A, device, dtype, autocast_adapter_dtype, tensors is None)
        B = self._placed(B, device, dtype, autocast_adapter_dtype, tensors is None)
        self.lora_A[adapter_name] = A.requires_grad_(False)
        self.lora_B[adapter_name] = B.requires_grad_(False)
        self._note(adapter_name, r, lora_alpha, lora_dropout, use_rslora)
        if use_dora:
            magnitude: Any = None if tensors is None else tensors.lora_magnitude
            if magnitude is None:  # rounded as A and B are
                magnitude = (
                    self._row_norms(adapter_name).to(self._drawn_dtype()).to(self.lora_A[adapter_name].weight.dtype)
                )
            self.lora_magnitude_vector[adapter_name] = Magnitude(magnitude.to(device)).requires_grad_(False)

    def _check_dora(self, lora_bias: bool) -> None:
        if lora_bias:
            raise ValueError("use_dora: expected False with lora_bias=True")
        if why := base_of(self.base_layer).why_not_dense(self.base_layer):
            raise ValueError(f"use_dora: the norms of the base weight cannot be read, {why}")
        if self.merged_adapters:
            raise RuntimeError(f"adapters {self.merged_adapters} are merged: unmerge before DoRA is added")

    def forward(self, x: Tensor, *, adapter_names: Sequence[str | None] | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]. ``adapter_names`` names one adapter per row (None: base)."""
        if CHANGING:
            wait_for_change(self)
        own = self.__dict__  # past nn.Module's __getattr__, which slows every attribute down
        batch = own["mixed_batch"]
        if batch is None and adapter_names is None and not (own["disable_adapters"] or own["activated"]):
            y = self._remembered_forward(x, own["active_adapters"])
            if y is not None:
                return y
        if isinstance(adapter_names, str):  # its letters would pass for names
            raise TypeError(f"adapter_names: expected one entry per row, got the str {adapter_names!r}")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if adapter_names is not None or batch is not None:
            return self._mixed_forward(x, adapter_names, batch)
        return self.base_layer(x) if self.merged_adapters else self._active_forward(x)

    def file_tensors(self, name: str) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        """Of one adapter: end of its key in a file -> (tensor, shape of the whole)."""
        r, K, N, held = self.r[name], self.in_features, self.out_features, self.lora_magnitude_vector
        magnitude: Any = held[name].weight if name in held else None
        return {
            ".lora_A.weight": (self.lora_A[name].weight, (r, K)),
            ".lora_B.weight": (self.lora_B[name].weight, (N, r)),
            ".lora_B.bias": (self.lora_B[name].bias, (N,)),
            ".lora_magnitude_vector": (magnitude, (N,)),
        }

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, active={self.active_adapters}"


_INTERRUPTS = 9  # so many do not stop a way back
Snapshot = list[tuple[Any, Any, list[str]]]  # layers, their merge_state and merged_adapters


def snapshot(layers: Iterable[Any]) -> Snapshot:
    """What is merged in each layer, for :func:`go_back`."""
    return [(layer, layer.merge_state, list(layer.merged_adapters)) for layer in layers]


def go_back(before: Snapshot) -> None:
    """Merge and unmerge the layers to the bits, names and records that they had.

    A further interrupt, or a layer that cannot go back, is raised when the others are back.
    """
    waiting, stopped = list(before), []
    while waiting and len(stopped) < len(before) + _INTERRUPTS:
        try:
            while waiting:
                layer, state, names = waiting[-1]
                if layer.merge_state is not state:
                    if layer.merged:
                        layer.unmerge()
                    if names:
                        layer.restore_merge(state, names)
                waiting.pop()
        except Exception as error:
            stopped.append(error)
            waiting.pop()
        except BaseException as error:  # an interrupt: the same layer again
            stopped.append(error)
    if stopped:
        raise stopped[0]


def unmerge_all(layers: Mapping[str, Any]) -> None:
    """Unmerge all of these layers or none.

    Raises:
        RuntimeError: a weight was changed while merged; the message begins with its layer's path.
    """
    before = snapshot(layers.values())
    merged = {path: layer for path, layer in layers.items() if layer.merged}
    try:
        together({p: layer._unmerge_later for p, layer in merged.items() if isinstance(layer, LoraLayer)}, UNMERGE)
        for path, layer in merged.items():
            if layer.merged:
                with naming(path):
                    layer.unmerge()
    except BaseException:
        go_back(before)
        raise


@contextmanager
def naming(path: str) -> Iterator[None]:
    """What goes wrong inside names the layer."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def together(prepare: Mapping[str, Callable[[], Later | None]], mode: int) -> None:
    """Merge or unmerge many layers in a few calls of the C loops, or launches of the kernel.

    Python is slow after each call, for the caches are cold, and waits after each launch. A layer that its function
    gives None for is not touched, nor are those of a call where a weight refuses or that a device has no memory for,
    nor one whose weight may overlap another's. What their own methods do then, or say.
    """
    kinds: dict[tuple, dict[str, Later]] = {}
    held: dict[tuple, int] = {}
    for path, function in prepare.items():
        try:
            with naming(path):
                job = function()
        except torch.OutOfMemoryError:  # what is held for others will be free
            job = None
        if job is not None:
            kind = job.sweep.kind
            kinds.setdefault(kind, {})[path] = job
            held[kind] = held.get(kind, 0) + job.sweep.W.nbytes
            if held[kind] >= job.sweep.at_once:
                _run(kinds.pop(kind), mode)
                held[kind] = 0
    for jobs in kinds.values():
        _run(jobs, mode)


def _run(jobs: dict[str, Later], mode: int) -> None:
    alone = _overlapping(jobs)
    jobs = {path: job for path, job in jobs.items() if path not in alone}
    if not jobs:
        return
    try:
        outcome = merging.run_together([job.sweep for job in jobs.values()], mode)
        if outcome == native.TORN:
            raise RuntimeError(TORN_TEXT)
        if outcome == native.DONE:
            for job in jobs.values():
                # without a call, see FusedLoraBehaviour._write
                job.layer.__dict__["merge_state"], job.layer.merged_adapters[:] = job.state, job.names
    except BaseException as error:
        back = UNMERGE if mode == MERGE else MERGE_AGAIN
        open_jobs = {path: job for path, job in jobs.items() if job.layer.merge_state is not job.state}
        torn = [path for path, job in open_jobs.items() if job.sweep.undo(back) != native.DONE]
        if torn:
            raise RuntimeError(f"{torn[0]}: {TORN_TEXT}") from None
        if not isinstance(error, torch.OutOfMemoryError):
            raise


def _overlapping(jobs: Mapping[str, Later]) -> set[str]:
    """Paths of weights within whose memory another of them begins: threads would write both."""
    found, last = set(), (0, "")
    for (begin, end), path in sorted((span_of(job.sweep.W), path) for path, job in jobs.items()):
        if begin < last[0]:
            found |= {path, last[1]}
        last = max(last, (end, path))
    return found


def draw(
    K: int,
    N: int,
    r: int,
    init: bool | str,
    lora_bias: bool = False,
    tensors: LayerTensors | None = None,
    use_dora: bool = False,
    experts: int = 1,
) -> tuple[nn.Linear, nn.Linear]:
    """lora_A and lora_B as modules, drawn in PEFT's order (both default draws come before A's own).

    r: of all ``experts`` together, where the weight is a stack of matrices.
    """
    if tensors is not None:
        A, B = (nn.Linear(*shape, bias=b, device="meta") for shape, b in (((K, r), False), ((r, N), lora_bias)))
        check_tensors(tensors, (r, K), (N, r), (N,) if lora_bias else None, (N,) if use_dora else None)
        A.weight, B.weight = nn.Parameter(tensors.lora_A), nn.Parameter(tensors.lora_B)
        if tensors.lora_bias is not None:
            B.bias = nn.Parameter(tensors.lora_bias)
        return A, B
    if init == "eva":
        raise ValueError(
            "init_lora_weights: 'eva' draws lora_A from data; let peft.initialize_lora_eva_weights draw it, save the "
            "PEFT model, and load the folder with fused_lora.load_adapter"
        )
    if init == "orthogonal" and r % 2:
        raise ValueError(f"init_lora_weights: 'orthogonal' needs an even rank, got {r}")
    A, B = nn.Linear(K, r, bias=False), nn.Linear(r, N, bias=lora_bias)
    if init is False:
        return A, B
    if init == "orthogonal":
        Q, _ = torch.linalg.qr(torch.randn(r, r))
        A.weight = nn.Parameter((torch.randn(K, r // 2).mm(Q[0::2]).T / 10.0).contiguous())
        B.weight = nn.Parameter((torch.randn(r // 2, N).T.mm(Q[1::2]) / 10.0).contiguous())
        return A, B
    if init == "gaussian":
        nn.init.normal_(A.weight, std=experts / r)
    else:
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
    nn.init.zeros_(B.weight)
    if lora_bias:
        nn.init.zeros_(B.bias)
    return A, B
