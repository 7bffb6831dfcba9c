"""Serve many adapters over one model: the store, the engine, the server."""

from fused_lora.serving.residency.lease import Lease
from fused_lora.serving.residency.refusal import NonFiniteOutput
from fused_lora.serving.residency.residency import StoreFull
from fused_lora.serving.store import AdapterStore

__all__ = ["AdapterStore", "Lease", "NonFiniteOutput", "StoreFull"]
