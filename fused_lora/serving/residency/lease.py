"""A hold on one version of an adapter that outlives the batch."""

from __future__ import annotations

from torch import nn

from fused_lora.serving.residency.residency import Residency, Version


class Lease:
    """One version of one adapter, kept while a request runs: an entry of a batch that a reload does not change.

    ``identity``, ``name`` and ``version`` say which. Release it, or use it as a context manager.

    Args:
        version: held by the caller, who leaves that to the lease. residency: what has it.
    """

    def __init__(self, version: Version, residency: Residency):
        self.held: Version | None = version
        self._residency = residency
        self.name, self.version, self.identity = version.name, version.number, version.identity

    def adapts(self, layer: nn.Module) -> bool:
        """Whether the adapter changes the output of this layer. Raises RuntimeError after the release."""
        if self.held is None:
            raise RuntimeError(f"the lease of {self.identity!r} has been released")
        return any(part.site.module is layer for part in self.held.parts)

    def belongs_to(self, residency: Residency) -> bool:
        """Whether the version is one of those."""
        return self._residency is residency

    def release(self) -> None:
        """Let go of the version; a second call does nothing."""
        version, self.held = self.held, None
        if version is not None:
            self._residency.release([version])

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def __str__(self) -> str:
        return self.identity
