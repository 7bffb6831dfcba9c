"""Which sequence each row of a layer's input belongs to, found by following the batch through a model's operators."""

from fused_lora.rows.finder import Call, Entries, RowFinder, Running, checked_dim
from fused_lora.rows.layout import Layout, rows_of_names, rows_of_owners
from fused_lora.rows.trace import NESTED, same_rows, why_rows_meet

__all__ = [
    "NESTED",
    "Call",
    "Entries",
    "Layout",
    "RowFinder",
    "Running",
    "checked_dim",
    "rows_of_names",
    "rows_of_owners",
    "same_rows",
    "why_rows_meet",
]
