"""What a merge leaves behind so that its unmerge gives back the exact bits: data only, the kernels are in merge.py."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scan:
    """What a merge would do, all on W's device, so that the caller chooses when to wait for it.

    counts: int16 [rows, segments], corrections; totals: int64 [2], all corrections, and finite elements that would
    become infinite or NaN; fingerprint: [rows, 4], the two sums of W and the two of Wm.
    """

    counts: torch.Tensor
    totals: torch.Tensor
    fingerprint: torch.Tensor


@dataclass(frozen=True)
class Corrections:
    """The bits that ``round(Wm - D)`` gets wrong, segment by segment: counts and fingerprint of the scan, then ``cols``
    (uint8, column in the segment) and ``values`` (W's dtype), one for each correction."""

    counts: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor
    fingerprint: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.counts, self.cols, self.values, self.fingerprint))

    def matches(self, fingerprint: torch.Tensor) -> bool:
        """Whether :func:`unmerge_scan` found the merged weight that these belong to, and its way back."""
        return torch.equal(fingerprint, self.fingerprint.roll(2, dims=1))
