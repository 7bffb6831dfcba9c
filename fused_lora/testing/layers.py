"""A LoRA layer with its data, its exact results and eager PEFT's results: what kernel tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_lora import reference
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear import plan

from .numeric import assert_no_worse


@dataclass
class LayerCase:
    """Inputs of one adapted linear layer and the gradient of its output; ``make`` draws them."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_A: list[torch.Tensor]
    lora_B: list[torch.Tensor]
    scaling: list[float]
    dropout: list[float]
    seeds: torch.Tensor | None
    g: torch.Tensor

    @classmethod
    def make(
        cls,
        M: int,
        N: int,
        K: int,
        ranks: Sequence[int] = (16,),
        dropout: Sequence[float] = (0.0,),
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        bias: bool = True,
        device: torch.device | str = "cpu",
    ) -> LayerCase:
        """Random values of the sizes that occur in training, drawn on the CPU from the current generator."""
        adapter_dtype = adapter_dtype or dtype

        def draw(*shape, scale=1.0, dtype=dtype):
            return (torch.randn(shape) * scale).to(dtype).to(device)

        return cls(
            x=draw(M, K),
            weight=draw(N, K, scale=0.1),
            bias=draw(N) if bias else None,
            lora_A=[draw(r, K, scale=0.1, dtype=adapter_dtype) for r in ranks],
            lora_B=[draw(N, r, scale=0.1, dtype=adapter_dtype) for r in ranks],
            scaling=[2.0 - 0.75 * i for i in range(len(ranks))],
            dropout=list(dropout),
            seeds=torch.randint(-(2**63), 2**63 - 1, (len(ranks),)).to(device) if any(dropout) else None,
            g=draw(M, N),
        )

    @property
    def ranks(self) -> list[int]:
        return [A.shape[0] for A in self.lora_A]

    @property
    def adapters(self) -> tuple:
        """The arguments that every launcher takes after the matrices: A, B, scaling, dropout, seeds."""
        return self.lora_A, self.lora_B, self.scaling, self.dropout, self.seeds

    def rows(self, index) -> LayerCase:
        """The same layer on some of the rows; only for dropout 0, whose mask does not depend on the row number."""
        return replace(self, x=self.x[index], g=self.g[index])

    def rounded(self) -> LayerCase:
        """The same layer with adapters rounded to the dtype of x."""
        dtype = self.x.dtype
        return replace(self, lora_A=[A.to(dtype) for A in self.lora_A], lora_B=[B.to(dtype) for B in self.lora_B])

    def exact(self) -> dict[str, torch.Tensor]:
        """y, S, dx, dS, dA, dB in float64; the lists of all adapters concatenated along the ranks."""
        y, S = reference.lora_linear(self.x, self.weight, self.bias, *self.adapters)
        dx, dA, dB, _, _ = reference.lora_linear_backward(self.g, self.x, self.weight, *self.adapters)
        dS = [s * (self.g.double() @ B.double()) for s, B in zip(self.scaling, self.lora_B, strict=True)]
        return dict(y=y, S=S, dx=dx, dS=torch.cat(dS, 1), dA=torch.cat(dA), dB=torch.cat(dB, 1))

    def fp32_bounds(self) -> dict[str, torch.Tensor]:
        """How far a result formed in fp32 may be from :meth:`exact`: n eps / 2 times the sum of magnitudes of n terms.

        Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1; first order, with room for the scales.
        """
        size = replace(self, x=self.x.abs(), weight=self.weight.abs(), g=self.g.abs())
        size.bias = None if self.bias is None else self.bias.abs()
        size.lora_A, size.lora_B = [A.abs() for A in self.lora_A], [B.abs() for B in self.lora_B]
        (M, K), N = self.x.shape, self.weight.shape[0]
        terms = dict(y=K + sum(self.ranks), S=K, dx=N + sum(self.ranks), dS=N, dA=M + N, dB=M + K)
        return {name: (terms[name] + 8) * 2.0**-24 * value for name, value in size.exact().items()}

    def check(self, results: dict[str, torch.Tensor]) -> None:
        """Check results: 16-bit ones by the error rule against eager, fp32 ones by the largest error of fp32 sums."""
        eager, exact, bounds = self.eager(), self.exact(), self.fp32_bounds()
        for name, tensor in results.items():
            if tensor.dtype != torch.float32:
                assert_no_worse(tensor, eager[name], exact[name], name=name)
            else:
                off = ((tensor - exact[name]).abs() - bounds[name]).max() if tensor.numel() else tensor.sum()
                assert off <= 0, f"{name}: off by {off:.3e} more than fp32 sums can be"

    def planned(self, rounded: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """y, S, dx, dA, dB by what the plan chooses, as the operators run it; rounded: as of ``plan.forward``."""
        x, W, bias, A, B, p = self.x, self.weight, self.bias, self.lora_A, self.lora_B, self.dropout
        y, S = plan.forward(x, W, bias, A, B, self.scaling, p, None, rounded)(x, W, bias, A, B, self.seeds)
        arguments = self.of_backward(S)
        needs = (True,) * (2 * len(A) + 1) + (False, False)
        dx, dA, dB, _, _ = plan.backward(self.g, x, W, A, B, self.scaling, p, needs, None, rounded)(*arguments)
        return dict(y=y, S=S, dx=dx, dA=torch.cat(dA), dB=torch.cat(dB, 1))

    def of_backward(self, S: torch.Tensor) -> tuple:
        """Arguments of ``lora_linear_backward`` for the gradients of x and the adapters."""
        each = (True,) * len(self.lora_A)
        tensors = self.g, self.x, self.weight, self.lora_A, self.lora_B, S
        return *tensors, self.scaling, self.dropout, self.seeds, True, each, each, False, False

    def by(self, variant: str, S: torch.Tensor | None = None) -> tuple:
        """(y, S) by the kernels of this variant; with the S of a forward (dx, dA, dB, None, None)."""
        chosen, forward = kernel.Plan(variant), (self.x, self.weight, self.bias, *self.adapters)
        if S is None:
            return kernel.lora_linear(chosen, *forward)(*forward)
        return kernel.lora_linear_backward(chosen, *self.of_backward(S))(*self.of_backward(S))

    def eager(self) -> dict[str, torch.Tensor]:
        """The same by eager PEFT: result + lora_B(lora_A(dropout(x))) * scaling, with the masks of these seeds.

        PEFT has no S and dS of its own; they are what its chain passes between lora_A and lora_B.
        """
        x, *rest = (t.detach().clone().requires_grad_() for t in (self.x, *self.lora_A, *self.lora_B))
        lora_A, lora_B = rest[: len(self.lora_A)], rest[len(self.lora_A) :]
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        S = []
        for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
            dropped = x.to(A.dtype)
            if self.dropout[i]:
                assert self.seeds is not None
                keep = reference.dropout_mask(self.seeds[i], x.shape, self.dropout[i], x.device)
                dropped = dropped * keep * reference.keep_scale(self.dropout[i])
            S.append(dropped @ A.t())
            S[-1].retain_grad()
            y = y + (S[-1] @ B.t()) * self.scaling[i]
        y = y.to(self.x.dtype)
        y.backward(self.g)
        grads: Any = ([t.grad for t in part] for part in ([x], S, lora_A, lora_B))
        (dx,), dS, dA, dB = grads
        return dict(y=y, S=torch.cat(S, 1), dx=dx, dS=torch.cat(dS, 1), dA=torch.cat(dA), dB=torch.cat(dB, 1))
