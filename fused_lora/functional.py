"""The operators under one name: what the modules are made of, for layers of your own.

    lora_linear            y = x W^T + b + sum_i s_i D_i(x) A_i^T B_i^T, one operator
    lora_term              the same sum onto a y that any other layer computed
    dropout_mask           the keep mask that a seed stands for
    merge_ / unmerge_      W <- round(W + sum_i s_i B_i A_i) in place, and the exact bits back
    lora_grouped_          rows of one batch under adapters of their own, added in place

All but the last are differentiable where gradients make sense; ``merge_`` and ``unmerge_`` change the weight itself.
Shapes, dtypes and errors are in the functions' docstrings.
"""

from fused_lora.ops.grouped.op import lora_grouped_
from fused_lora.ops.linear.op import lora_linear
from fused_lora.ops.merge.op import merge_, unmerge_
from fused_lora.ops.term.op import lora_term
from fused_lora.reference import dropout_mask

__all__ = ["dropout_mask", "lora_grouped_", "lora_linear", "lora_term", "merge_", "unmerge_"]
