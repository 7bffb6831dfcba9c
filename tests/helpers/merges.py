"""Weights and adapters for merges by the kernel, and what records say."""

import torch

from fused_lora.reference import bits


def make_weight(N, K, dtype, device, *, special=True):
    """Normal weights with signed zeros, subnormals, very large values, infinities and NaN payloads among them."""
    W = (torch.randn(N, K) * 0.02).to(dtype)
    if special and W.numel() >= 100:
        info = torch.finfo(dtype)
        values = [0.0, -0.0, info.smallest_normal / 2, -info.smallest_normal / 4, info.max / 2, -info.max / 2]
        values += [float("inf"), -float("inf"), float("nan")]
        for i, value in enumerate(values):
            W.view(-1)[i::101] = value
        bits(W).view(-1)[11::101] = bits(torch.tensor([float("nan")], dtype=dtype)) + 5
    return W.to(device)


def make_factors(N, K, R, device, *, size=0.1):
    """A [R, K] and B [N, R] with a delta of about ``size`` times the weights of make_weight."""
    A, B = torch.randn(R, K), torch.randn(N, R)
    return A.to(device), (B * (0.02 * size / R**0.5)).to(device)


def corrections_of(record, N, K, dtype):
    """All corrections: row, first column and content of a word, in the order of the weight's words."""
    rows, cols = record.unit
    each = 1 if dtype == torch.float32 else 2
    strips, words = -(-K // cols), cols // each
    found = []
    for unit, (begin, count) in enumerate(record.table[:-1, :2].tolist()):
        assert begin > 0
        part = slice(begin - 1, begin - 1 + count)
        number = record.places[part].long() - 1
        assert (number.diff() > 0).all()
        row, col = unit // strips * rows + number // words, unit % strips * cols + number % words * each
        found.append(torch.stack([row * K + col, record.values[part].long()]))
    number, value = torch.cat(found, 1)
    order = number.argsort()
    return number[order] // K, number[order] % K, value[order]


def unit_by_unit(units):
    """The corrections in the order of the units, or the copy: in C that order depends on the threads."""
    parts = [units.corrections[start : start + n] for n, start, _ in units.notes.t().tolist()]
    return torch.cat(parts) if units.copy is None else units.copy
