"""A hold on one version of an adapter that outlives the batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from fused_lora.serving.residency.residency import Residency, Version


class Lease:
    """One version of one adapter, held on the device until the release, through loads and unloads of its name.

    A batch takes it in place of a name. ``identity``, ``name`` and ``version`` say which version it is, and
    ``invocation`` the tokens that an aLoRA begins at. Release it, or use it as a context manager.

    Args:
        holds: one version, already held; the lease takes the hold over. residency: the residency it belongs to.
    """

    def __init__(self, holds: list[Version], residency: Residency):
        self._holds, self._residency = holds, residency
        version = holds[0]
        self.name, self.version, self.identity = version.name, version.number, version.identity
        self.invocation = version.invocation

    @property
    def held(self) -> Version | None:
        """The version, or None after the release."""
        return next(iter(self._holds), None)

    def adapts(self, layer: nn.Module) -> bool:
        """Whether the adapter changes the output of this layer. Raises RuntimeError after the release."""
        version = self.held
        if version is None:
            raise RuntimeError(f"the lease of {self.identity!r} has been released")
        return any(part.site.module is layer for part in version.parts)

    def belongs_to(self, residency: Residency) -> bool:
        """Whether the version is one of this residency."""
        return self._residency is residency

    def release(self) -> None:
        """End the hold. A second call does nothing."""
        try:
            self._residency.release(self._holds)
        except BaseException:  # an interrupt
            self._residency.release(self._holds)
            raise

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"the lease of {self.identity!r} cannot be copied: the hold would end twice; take another one")

    def __str__(self) -> str:
        return self.identity
