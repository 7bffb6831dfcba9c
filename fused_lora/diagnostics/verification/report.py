"""The result of :func:`fused_lora.verify`: numbers for each layer and the output, the causes found, and a table."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fused_lora.diagnostics.tables import dtype_name, grouped, pattern, table
from fused_lora.modules.names import some

DROPOUT = "dropout left on"
RANDOM = "not deterministic"
DOUBLE = "double merge"
BASE = "wrong base"
QUANTISED = "mismatched quantisation"
STALE = "stale merge"
SHARED = "shared weight"
UNCALLED = "layer not called"
ADAPTER = "wrong adapter"
PARAMETERS = "other parameters"
FORWARD = "unmerged forward"
MERGE = "merged weight"
MERGED_FORWARD = "merged forward"
OUTPUT = "output"
LOST = "adapter lost in rounding"


@dataclass(frozen=True)
class Finding:
    """A difference that rounding does not explain: its cause, a sentence with numbers, and its layers."""

    cause: str
    message: str
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" [{some(self.layers)}]" if self.layers else ""
        return f"{self.cause}: {self.message}{where}"


@dataclass(frozen=True)
class LayerCheck:
    """One LoRA layer, merged and unmerged on the same input rows.

    ``unmerged``, ``weight`` and ``merged`` are the largest errors over the bounds of ``fused_lora.verify``: of the
    unmerged output against float64, of the merged weight against W + D, and of the merged layer's output against
    float64 with that weight. At most 1 is rounding. ``lost`` is the delta fidelity: ||(Wm - W) - D|| / ||D||.
    ``inside`` is <W, D> / <D, D>, how many times W itself seems to hold the delta, and ``inside_std`` its standard
    deviation for a W that knows nothing of D.
    """

    path: str
    dtype: torch.dtype | str  # of the weight; "nf4" or "fp4" where it is quantised
    adapters: tuple[str, ...]
    difference: float  # largest |merged - unmerged|
    difference_rms: float
    expected_rms: float  # what rounding alone is expected to make of it
    unmerged: float
    weight: float
    merged: float
    lost: float
    inside: float
    inside_std: float

    @property
    def ratio(self) -> float:
        """The largest of the three errors over its bound."""
        return max(self.unmerged, self.weight, self.merged)

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


@dataclass(frozen=True)
class OutputCheck:
    """The distance of two outputs of the model, and the distance that rounding is expected to cause.

    ``top1_changed`` is the share of positions whose largest logit moved; of these, ``top1_margin`` is the largest
    lead that the former winner had.
    """

    difference: float
    difference_rms: float
    expected_rms: float
    top1_changed: float
    top1_margin: float
    size_rms: float

    @property
    def ok(self) -> bool:
        """Whether the difference is at most 4 times what rounding is expected to cause."""
        return self.difference_rms <= 4 * self.expected_rms

    def __str__(self) -> str:
        text = (
            f"max {self.difference:.1e}, rms {self.difference_rms:.1e} of {self.size_rms:.1e}; "
            f"rounding is expected to cause rms {self.expected_rms:.1e}"
        )
        if not self.top1_changed:
            return f"{text}; no top choice changed"
        share, lead = f"{self.top1_changed:.1%}", f"{self.top1_margin:.1e}"
        return f"{text}; top choice changed at {share} of positions (former lead at most {lead})"


@dataclass
class Verification:
    """Result of :func:`fused_lora.verify`; ``print(it)`` shows everything."""

    layers: list[LayerCheck]
    output: OutputCheck  # merged against unmerged
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # LoRA layer -> why it was left as it is
    reference: OutputCheck | None = None  # the model as given against the reference
    was_merged: bool = False  # as it was given
    reference_merged: bool = False

    @property
    def ok(self) -> bool:
        """True when every difference is rounding, a merge keeps the adapter, and no layer was left out."""
        return not self.findings and not self.skipped

    @property
    def verdict(self) -> str:
        """One word.

        "rounding", "lost" (rounding, but it takes most of the adapter), "bug", or "incomplete" (layers left out).
        """
        if self.findings:
            return "lost" if self.causes == [LOST] else "bug"
        return "incomplete" if self.skipped else "rounding"

    @property
    def survives(self) -> float:
        """The share of the adapter that a merge keeps: the mean over the layers of 1 - ``lost``, at least 0."""
        return sum(max(0.0, 1.0 - check.lost) for check in self.layers) / max(1, len(self.layers))

    @property
    def causes(self) -> list[str]:
        """Causes of the findings, each once, in the order found."""
        return list(dict.fromkeys(finding.cause for finding in self.findings))

    def __str__(self) -> str:
        head = ("layers, largest of each", "n", "dtype", "max |merged - unmerged|", "error / bound", "delta lost", "")

        def kind(check: LayerCheck) -> tuple[str, str, str]:
            judgement = "rounding" if check.ok else "BUG"
            return pattern(check.path) if check.ok else check.path, dtype_name(check.dtype), judgement

        rows: list[tuple[str, ...]] = [head]
        for (path, dtype, judgement), checks in grouped(self.layers, kind).items():
            most, ratio, lost = (max(getattr(c, name) for c in checks) for name in ("difference", "ratio", "lost"))
            rows.append((path, str(len(checks)), dtype, f"{most:.1e}", f"{ratio:.2f}", f"{lost:.2%}", judgement))
        lines = table(rows, numbers=True)
        lines.append(f"output, merged against unmerged: {self.output}")
        if self.reference is not None:
            lines.append(f"output, this model against the reference: {self.reference}")
        lines += [f"not compared: {path}: {why}" for path, why in self.skipped.items()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"{'LOST' if finding.cause == LOST else 'BUG'}: {finding}" for finding in self.findings]
        said = {
            "rounding": "every difference is rounding",
            "lost": "every difference is rounding, but it takes most of the adapter",
            "bug": f"bug ({', '.join(self.causes)})",
            "incomplete": f"every difference is rounding, but {len(self.skipped)} layers were not compared",
        }[self.verdict]
        lines.append(f"verdict: {said}; a merge keeps {self.survives:.1%} of the adapter")
        return "\n".join(lines)
