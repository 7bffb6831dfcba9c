"""What training keeps for the backward: bytes of a linear layer, a decoder layer and a model, by PEFT and this package.

    python benchmarks/bench_memory.py

`saved` is every storage that autograd keeps, once, parameters excepted; `beyond x` leaves out the layers' inputs. In a
decoder layer q, k and v read one input, gate and up another, o and down one each; a model is its decoder layers. What
attention, norms and activations keep is not counted. The base is bf16 and frozen. Adapters are bf16, fp32, or fp32
under torch.autocast, as trainers run PEFT's default.

The bytes are those of a GPU, counted by autograd's hooks on tensors without memory, so a CPU finds them, too. On a GPU
the layers also run: `held` is what is allocated after the forward beyond inputs and outputs, `peak` the most that
forward and backward had allocated at once, gradients included. `held` must be the computed `beyond x`.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from dataclasses import dataclass

import peft
import torch
from bench_linear import LLAMA_3_8B
from layers import kept_by
from report import Report, Table, parser, run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_lora
from fused_lora.ops.linear.op import lora_linear

PROVIDERS = ("PEFT", "fused_lora")
KINDS = {"bfloat16": ("bfloat16", False), "float32": ("float32", False), "float32 autocast": ("float32", True)}
COLUMNS = [("layers", 36), ("adapters", 17), ("p", 4), ("provider", 11), ("saved MiB", 10), ("beyond x", 10)]
COLUMNS += [("of PEFT", 8), ("held MiB", 9), ("peak MiB", 9)]
_TOLERANCE = 0.01  # the allocator rounds each tensor up to 512 bytes


def decoder(hidden: int, key_value: int, intermediate: int) -> dict[str, tuple[int, int, int]]:
    """{name: (which input it reads, in_features, out_features)} of a Llama decoder layer."""
    attention = dict(q_proj=(0, hidden, hidden), k_proj=(0, hidden, key_value), v_proj=(0, hidden, key_value))
    mlp = dict(gate_proj=(2, hidden, intermediate), up_proj=(2, hidden, intermediate))
    return attention | dict(o_proj=(1, hidden, hidden)) | mlp | dict(down_proj=(3, intermediate, hidden))


STACKS = {"Llama-3-8B": (decoder(4096, 1024, 14336), 32)}  # a decoder layer and how many a model has


@dataclass(frozen=True)
class Point:
    """``layers``: a name of STACKS, or ``INxOUT`` for one layer."""

    layers: str
    kind: str
    dropout: float
    M: int
    r: int = 16

    @property
    def linears(self) -> dict[str, tuple[int, int, int]]:
        if self.layers in STACKS:
            return STACKS[self.layers][0]
        inputs, outputs = map(int, self.layers.split("x"))
        return {"layer": (0, inputs, outputs)}

    def __str__(self) -> str:
        return f"{self.layers} r={self.r} M={self.M}"


class _FusedDropout(nn.Dropout):
    """F.dropout as it is on CUDA, with a mask of a byte an element; a CPU's keeps one in x's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]


class Training:
    """The adapted layers of a point in train mode and their inputs: on ``device``, or without memory where it is None.

    Off a GPU, too, :meth:`saved` is what a GPU keeps.
    """

    def __init__(self, point: Point, provider: str, device: torch.device | None):
        self._point, self._fake = point, device is None
        self._mode = FakeTensorMode() if self._fake else contextlib.nullcontext()
        self._device = device or torch.device("cpu")
        adapter_dtype, self._autocast = KINDS[point.kind]
        linears = {name: nn.Linear(K, N, bias=False, device="meta") for name, (_, K, N) in point.linears.items()}
        self._layers, self._ours = nn.ModuleDict(linears).train(), provider == "fused_lora"
        config = dict(r=point.r, lora_dropout=point.dropout, target_modules=list(linears))
        if self._ours:
            fused_lora.inject(self._layers, fused_lora.LoraConfig(**config))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a model without a config: it has none
                peft.get_peft_model(self._layers, peft.LoraConfig(**config))
        with self._mode:
            self._allocate(getattr(torch, adapter_dtype))
            shape = dict(dtype=torch.bfloat16, device=self._device, requires_grad=True)
            self.inputs = {i: torch.zeros(point.M, K, **shape) for i, K, _ in point.linears.values()}
        self.parameters = list(self._layers.parameters())
        self.trained = [p for p in self.parameters if p.requires_grad]

    def _allocate(self, adapter_dtype: torch.dtype) -> None:
        for module in list(self._layers.modules()):
            for name, old in list(module.named_parameters(recurse=False)):
                dtype = adapter_dtype if old.requires_grad else torch.bfloat16
                value = torch.zeros(old.shape, dtype=dtype, device=self._device)
                setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
            for name, child in list(module.named_children()):
                if type(child) is nn.Dropout and not self._ours and self._device.type == "cpu":
                    setattr(module, name, _FusedDropout(child.p))

    def forward(self) -> list[torch.Tensor]:
        """The outputs of all layers."""
        with self._mode, torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            return [self._call(self._layers[name], self.inputs[i]) for name, (i, *_) in self._point.linears.items()]

    def _call(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not (self._fake and self._ours):
            return layer(x)
        # its operator: the layer itself leaves tensors without memory to PEFT's sequence of calls
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return lora_linear(x, layer.base_layer.weight, None, [A], [B], [1.0], [self._point.dropout])

    def saved(self) -> tuple[int, int]:
        """(all bytes that a forward keeps for the backward, those that are no input)."""
        kept = kept_by(self.forward, self.parameters)
        total = sum(kept.values())
        return total, total - sum(kept.get(x.untyped_storage()._cdata, 0) for x in self.inputs.values())


def computed(point: Point, provider: str) -> tuple[int, int]:
    """(saved bytes, those beyond the inputs) on a GPU, without one and without memory."""
    return Training(point, provider, None).saved()


def allocated(point: Point, provider: str, device: torch.device) -> tuple[int, int]:
    """(bytes held after the forward beyond inputs and outputs, most bytes of forward and backward at once) on a GPU."""
    training = Training(point, provider, device)
    gradients = [torch.zeros_like(y) for y in training.forward()]
    wanted = [*training.inputs.values(), *training.trained]
    torch.autograd.grad(training.forward(), wanted, gradients)  # compiles, and allocates the library's workspaces
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = training.forward()
    held = torch.cuda.memory_allocated(device) - before - sum(y.nbytes for y in outputs)
    torch.autograd.grad(outputs, wanted, gradients)
    return held, torch.cuda.max_memory_allocated(device) - before


def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Count and add the rows of one point: each provider, and the whole model where the layers are a model's."""
    theirs = None
    for provider in PROVIDERS:
        saved, beyond = computed(point, provider)
        theirs = theirs or saved
        row = vars(point) | dict(benchmark="memory", provider=provider, correct=True, copies=1)
        row |= dict(saved_bytes=saved, saved_beyond_x=beyond, of_peft=round(saved / theirs, 4))
        row |= dict(held_bytes=None, peak_bytes=None)
        if report.device.type == "cuda":
            row["held_bytes"], row["peak_bytes"] = held, peak = allocated(point, provider, report.device)
            if abs(held - beyond) > _TOLERANCE * beyond + 4096:
                row |= dict(correct=False, wrong=f"{provider} holds {held} bytes, computed are {beyond}; peak {peak}")
        _add(row, f"{point}", report, table)
        if point.layers in STACKS:
            copies = STACKS[point.layers][1]
            whole = dict(copies=copies, saved_bytes=copies * saved, saved_beyond_x=copies * beyond)
            _add(row | whole | dict(held_bytes=None, peak_bytes=None), f"{point}, {copies} layers", report, table)


def _add(row: dict, label: str, report: Report, table: Table) -> None:
    report.rows.append(row)
    keys = "saved_bytes", "saved_beyond_x", "held_bytes", "peak_bytes"
    saved, beyond, *real = (None if row[key] is None else f"{row[key] / 2**20:.1f}" for key in keys)
    of_peft = f"{row['of_peft']:.3f}"
    table.row(label, row["kind"], f"{row['dropout']:g}", row["provider"], saved, beyond, of_peft, *real)
    if "wrong" in row:
        print(f"  WRONG: {row['wrong']}")


def points(arguments) -> list[Point]:
    """The layers of Llama-3-8B one by one, then a decoder layer; each with both dropouts and all kinds of adapters."""
    rows = getattr(arguments, "rows", None) or 8192
    names = [f"{K}x{N}" for K, N in arguments.shapes or LLAMA_3_8B] + ([] if arguments.shapes else [*STACKS])
    return [Point(name, kind, p, rows) for name in names for p in (0.1, 0.0) for kind in KINDS]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x: tokens (default: 8192)")
    arguments = options.parse_args(argv)
    return run("memory", arguments, COLUMNS, points, measure)


if __name__ == "__main__":
    sys.exit(main())
