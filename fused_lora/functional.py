"""The operators under one name: what the modules are made of, for layers of your own.

    lora_linear            y = x W^T + b + sum_i s_i D_i(x) A_i^T B_i^T, one operator
    lora_term              the same sum onto a y that any other layer computed
    dropout_mask           the keep mask that a seed stands for
    merge_ / unmerge_      W <- round(W + sum_i s_i B_i A_i) in place, and the exact bits back
    switch_                other adapters in the place of those that are merged
    lora_grouped_          rows of one batch under adapters of their own, added in place

The first two are differentiable; ``merge_``, ``unmerge_`` and ``switch_`` change the weight itself. Shapes, dtypes and
errors are in the functions' docstrings.
"""

from fused_lora.ops.grouped.op import lora_grouped_
from fused_lora.ops.linear.op import lora_linear
from fused_lora.ops.merge.op import merge_, switch_, unmerge_
from fused_lora.ops.term.op import lora_term
from fused_lora.reference import dropout_mask

__all__ = ["dropout_mask", "lora_grouped_", "lora_linear", "lora_term", "merge_", "switch_", "unmerge_"]
