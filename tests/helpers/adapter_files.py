"""A small adapter as the bytes of its two files, mutants of them, and what reading any bytes must do."""

from __future__ import annotations

import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_lora.adapters import AdapterError
from fused_lora.adapters.checkpoint import CONFIG_NAME, KEY_PREFIX, MAX_WEIGHT_BYTES, WEIGHTS_NAME, read_checked
from fused_lora.adapters.write import config_text, write_files
from helpers.seeds import shifted

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["fc1", "fc2"],
    "bias": "none",
    "lora_dropout": 0.0,
    "auto_mapping": None,
    "use_dora": False,
    "task_type": None,
}
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
DTYPE_NAMES |= {torch.int64: "I64", torch.int8: "I8", torch.bool: "BOOL", torch.complex64: "C64"}
# what mutants are made with: pieces of JSON, and of these two files
TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"0", b"-1", b"1e9", b"1e400", b"NaN", b"null", b"true", b"{}"]
TOKENS += [b"\\u0000", b"\\ud800", b"\xff", b'"r"', b'"__metadata__"', b'"F16"', b"9" * 5000, b"[" * 2000]
_ENDS = re.compile(rb'"data_offsets":\s*\[\s*\d{1,9}\s*,\s*(\d{1,6})\s*\]')


class Net(nn.Module):
    """The model that the adapter is for."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 12)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(12, 6, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc2(self.act(self.fc1(x))))


def good_tensors() -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's keys."""
    generator = torch.Generator().manual_seed(shifted(3))
    shapes = {"fc1": (8, 12), "fc2": (12, 6)}
    tensors = {}
    for name, (K, N) in shapes.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = torch.randn(4, K, generator=generator)
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = torch.randn(N, 4, generator=generator)
    return tensors


def header_and_data(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], bytes]:
    """(header dict, data bytes) of a safetensors file."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [len(data), len(data) + len(raw)]
        data += raw
    return header, data


def pack(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header, as JSON or as bytes; ``length`` is what it says its header has."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def packed(raw: bytes) -> bytes:
    """A weights file: ``raw`` itself, or around a header as text with as many zeros as it asks for."""
    if not raw.startswith(b"{"):
        return raw
    return pack(raw, bytes(max(map(int, _ENDS.findall(raw)), default=0)))


def put(folder: Path, config: bytes, weights: bytes) -> None:
    """Write both files anew."""
    folder.mkdir(exist_ok=True)
    for name, raw in ((CONFIG_NAME, config), (WEIGHTS_NAME, weights)):
        (folder / name).unlink(missing_ok=True)  # a file that is cut and rewritten may be flushed to the disk at once
        (folder / name).write_bytes(raw)


def mutated(raw: bytes, draw: random.Random, limit: int | None = None) -> bytes:
    """``raw`` after 1 to 3 changes of a place in its first ``limit`` bytes: a byte, a token, nothing, or a copy."""
    found = bytearray(raw)
    limit = limit or len(raw) or 1
    for _ in range(draw.randint(1, 3)):
        at, copied = draw.randrange(limit), draw.randrange(limit)
        copy = found[copied : copied + draw.randint(1, 40)]
        found[at : at + draw.randint(0, 9)] = draw.choice(
            [bytes([draw.randrange(256)]), draw.choice(TOKENS), b"", copy]
        )
    return bytes(found)


def is_accepted(folder: Path, config: bytes, weights: bytes) -> bool:
    """Whether an adapter of these two files is read. What is refused, is refused by an AdapterError that says why.

    What is accepted is what safetensors reads from the file, and it comes back the same after it was written again.
    Whatever else happens is an exception.
    """
    from safetensors.torch import load

    put(folder, config, weights)
    try:
        entries, tensors = _read(folder)
    except AdapterError as error:
        assert Path(error.file).parent == folder and error.expected and error.found
        assert len(str(error)) < 2000 and str(error).isprintable()
        return False
    _assert_same(tensors, load(weights))
    again = folder / "again"
    again.mkdir(exist_ok=True)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (again / name).unlink(missing_ok=True)
    write_files(str(again), config_text(entries), tensors)
    entries_again, tensors_again = _read(again)
    assert list(entries_again["rank_pattern"].items()) == list(entries["rank_pattern"].items())
    assert list(entries_again["alpha_pattern"].items()) == list(entries["alpha_pattern"].items())
    assert entries_again == entries
    _assert_same(tensors_again, tensors)
    return True


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(the config's entries, the tensors by key)."""
    adapter, plan = read_checked(folder, MAX_WEIGHT_BYTES, lambda plan: plan)
    tensors = {k: getattr(adapter.layers[path], field) for path, ks in plan.slots.items() for field, k in ks.items()}
    tensors |= {key: adapter.biases[path] for path, key in plan.biases.items()}
    return adapter.config.to_dict(), tensors


def _assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
