"""Small matrices about a delta D = s B A, without D: norms, singular values, the best approximation of lower rank.

A delta of stacked experts is one matrix for each of them, in a first dimension of all that follows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.checkpoints.adapter_file import AdapterFile

_EXACT = 1024  # a dense matrix with no more rows or columns is decomposed whole
_FURTHER, _PASSES = 16, 4  # columns and passes of a random projection beyond the rank


class Layer(NamedTuple):
    """A delta left [N, r] right [r, K] in fp32, the scaling in ``left``. Of an embedding [V, D]: of its transpose."""

    left: Tensor
    right: Tensor


class Parts(NamedTuple):
    """U [N, n], the singular values [n] in falling order, Vh [n, K]."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def layer_of(adapter: AdapterFile, path: str) -> Layer:
    """One layer of an adapter by experts, one where it is no stack."""
    A, B = (adapter.experts(path, part).float() for part in ("lora_A", "lora_B"))
    return Layer(B * adapter.scaling(path), A)


def joined(layers: list[Layer]) -> Layer:
    """The sum of deltas, of the sum of their ranks."""
    return Layer(torch.cat([layer.left for layer in layers], 1), torch.cat([layer.right for layer in layers]))


def decompose(layer: Layer) -> Parts:
    """The singular value decomposition of the delta, from QR decompositions of its factors, in fp64."""
    Q, R = torch.linalg.qr(layer.left.double())
    P, T = torch.linalg.qr(layer.right.double().mT)
    U, S, Vh = torch.linalg.svd(R @ T.mT)
    return Parts(Q @ U, S, Vh @ P.mT)


def product(a: Layer, b: Layer) -> float:
    """The sum of the products of the elements of two deltas."""
    left = a.left.double().mT @ b.left.double()
    return (left * (a.right.double() @ b.right.double().mT)).sum().item()


def norm(layer: Layer) -> float:
    """The Frobenius norm."""
    return max(0.0, product(layer, layer)) ** 0.5


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy, Vetterli 2007); 0 of a delta that is 0. Of stacked
    experts their mean."""
    total = S.sum(-1, keepdim=True)
    shares = S / torch.where(total > 0, total, 1)
    found = torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0)
    return found.mean().item()


def largest_parts(delta: Tensor, rank: int, draw: torch.Generator) -> Parts:
    """The ``rank`` largest singular values of a dense matrix [N, K] in fp32 and their vectors.

    Of a large matrix by random projection with passes over it (Halko, Martinsson, Tropp 2011).
    """
    if min(delta.shape) <= max(_EXACT, rank + _FURTHER):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        start = torch.randn(delta.shape[1], rank + _FURTHER, generator=draw, dtype=delta.dtype, device="cpu")
        Q = torch.linalg.qr(delta @ start)[0]
        for _ in range(_PASSES):
            Q = torch.linalg.qr(delta @ torch.linalg.qr(delta.t() @ Q)[0])[0]
        U, S, Vh = torch.linalg.svd(Q.t() @ delta, full_matrices=False)
        U = Q @ U
    return Parts(U[:, :rank], S[:rank], Vh[:rank])
