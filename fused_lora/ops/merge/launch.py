"""Merge and exact unmerge by the Triton kernel: the same contract as ``ops/merge.py``, one pass each way.

The kernel's delta is a chain of fused multiply-adds in a fixed order, so merge and unmerge see the same bits whatever
tiles they use. Either is one launch and one wait, for one weight or for many: every program checks what it holds before
it writes it, and if one of them refuses, a launch for each weight takes back what the others wrote, to the bit. The
first use in a process is tried on small weights, in both directions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_lora.kernels.corrections import totals_of
from fused_lora.ops import guard
from fused_lora.ops.native import CHANGED, DONE, LOST, MERGE, MERGE_AGAIN, TORN, UNMERGE
from fused_lora.reference import bits

LOST_TEXT = "NaNs or infinities detected in the merged weights: the adapter seems to be broken"
CHANGED_TEXT = (
    "weight: it is not what the merge left (changed, cast or loaded since), so the original bits cannot be restored; "
    "nothing was changed"
)
TORN_TEXT = (
    "weight: it was changed while it was merged or unmerged, by another thread perhaps, and is partly merged now: load "
    "it again"
)

# Memory for corrections, in numbers a weight: a quarter more than the last such merge of this dtype needed. A wrong
# guess costs the way back and a second merge, of a known size.
_share: dict[tuple[torch.dtype, bool], float] = {}
_way_back: set[tuple] = set()
Old = tuple[torch.Tensor, torch.Tensor, Any]  # left, right and corrections of a merge


@functools.cache
def _kernels() -> Any:
    """Not at the top: Triton may be missing."""
    from fused_lora.kernels import merge

    return merge


def applies(weight: torch.Tensor) -> bool:
    """Whether the kernel does this weight: a CUDA tensor of fp32, bf16 or fp16, and the first-use check has passed."""
    device, dtype = weight.device, weight.dtype
    if not guard.usable(device) or dtype not in guard.DTYPES:
        return False
    return guard.passes(("merge", device, dtype), lambda: _check(device, dtype))


@dataclass
class Sweep:
    """A merge, unmerge or switch of one weight, for :func:`run_together`.

    W <- round(W + left @ right), with ``dither``, the seed and the first row, at random. old: of a switch. corrections:
    of an unmerge; of the others what the run leaves, which ``record`` then has, too. kind: what the weights of a launch
    have in common.
    """

    W: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    dither: tuple[int, int] | None = None
    old: Old | None = None
    corrections: Any = None
    record: Any = None
    kind: tuple = ()
    at_once = 1 << 28  # bytes of weights a launch: room for their corrections is held meanwhile

    def alone(self, mode: int) -> bool:
        """All of it, or an error and nothing; False, and nothing, for a switch that takes two passes."""
        if not self._alike():
            return False
        outcome = run_together([self], mode)
        if outcome != DONE:
            raise error(outcome)
        return True

    def undo(self, mode: int) -> int:
        """Take back, by ``mode``, what was written; ``TORN`` where another has changed some of it meanwhile. It finds
        nothing where nothing was, nor a second time."""
        if mode == UNMERGE and self.corrections is not None and not self.corrections.is_back():
            self._go_back(UNMERGE)
            if not self.corrections.is_back():
                return TORN
        if mode == MERGE_AGAIN or self.old is not None:
            self._go_back(MERGE_AGAIN)
        return DONE

    def _go_back(self, mode: int) -> None:
        """One launch: of UNMERGE over what was merged, of MERGE_AGAIN over what was unmerged."""
        if mode == UNMERGE:
            return _kernels().unmerge(self.W, self.right, self.left, self.corrections)
        left, right, corrections = self.old or (self.left, self.right, self.corrections)
        _kernels().merge_again(self.W, right, left, corrections)

    def joins(self) -> bool:
        """Whether others of its ``kind``, which is known from here on, can be in one launch with it."""
        if not self._alike():
            return False
        kernels, pairs = _kernels(), [(self.right, self.left)]
        how, random = "merge", self.dither is not None
        if self.corrections is not None:
            how = "unmerge"
        elif self.old is not None:
            how, (left, right, _) = "switch", self.old
            pairs.append((right, left))
        group = kernels.group_of(self.W, pairs, self._form())
        if group is None:
            return False
        self.kind = how, random, *group
        key = f"{how} of many weights", *self.kind[1:]
        return guard.passes(key, lambda: _check_together(*self.kind), "launches one by one take over")

    def _form(self) -> Any:
        found = self.corrections
        return _kernels().form_of(self.W, self.dither is not None) if found is None else found.form

    def _alike(self) -> bool:
        """Whether both merges of a switch count the elements alike."""
        return self.old is None or self.old[2].form == self._form()


def run_together(sweeps: Sequence[Sweep], mode: int) -> int:
    """Merge, unmerge or switch all of these or none, which are of one kind; returns how that ended.

    One launch and one wait for each ``at_once`` bytes. A merge without room for its corrections is taken back, and done
    in a further launch with others like it.
    """
    begun: list[Sweep] = []
    finished, back = False, MERGE_AGAIN if mode == UNMERGE else UNMERGE
    try:
        for part in _parts(sweeps):
            begun += part
            outcome = _unmerge(part) if mode == UNMERGE else _merge(part)
            if outcome != DONE:
                return outcome
        for sweep in sweeps if mode == MERGE else ():
            if sweep.record is not None:
                sweep.record.device_corrections = sweep.corrections
        finished = True
        return DONE
    finally:
        if not finished and _take_back(begun, back) != DONE:
            raise error(TORN)


def _take_back(sweeps: Sequence[Sweep], mode: int) -> int:
    """Also if an interrupt comes meanwhile."""
    try:
        return max([sweep.undo(mode) for sweep in sweeps], default=DONE)
    except BaseException:
        for sweep in sweeps:
            sweep.undo(mode)
        raise


def _parts(sweeps: Sequence[Sweep]) -> Iterator[list[Sweep]]:
    part, held = [], 0
    for sweep in sweeps:
        part.append(sweep)
        held += sweep.W.nbytes
        if held >= sweep.at_once:
            yield part
            part, held = [], 0
    if part:
        yield part


def _unmerge(sweeps: Sequence[Sweep]) -> int:
    for sweep in sweeps:
        _compile_way_back(sweep, MERGE_AGAIN)
    _launch(sweeps, unmerging=True)
    totals = totals_of([sweep.corrections for sweep in sweeps])
    return CHANGED if any(refused for *_, refused in totals) else DONE


def _merge(sweeps: Sequence[Sweep]) -> int:
    kernels = _kernels()
    how = sweeps[0].W.dtype, sweeps[0].dither is not None
    share = _share.get(how, 1 / 2 if how[1] else 1 / 16)
    steps = [sweep.W.numel() // 64 + 4096 for sweep in sweeps]  # few sizes: a launch is prepared for each
    todo = [(s, int(s.W.numel() * share) // step * step + step) for s, step in zip(sweeps, steps, strict=True)]
    while todo:
        records = kernels.new_records([(sweep.W, room, sweep.dither) for sweep, room in todo])
        for (sweep, _), record in zip(todo, records, strict=True):
            sweep.corrections = record
            _compile_way_back(sweep, UNMERGE)
        _launch([sweep for sweep, _ in todo])
        totals = totals_of([*records, *[sweep.old[2] for sweep, _ in todo if sweep.old is not None]])
        if any(refused for *_, refused in totals):
            return CHANGED
        if any(lost for _, lost, _ in totals):
            return LOST
        more, shares = [], []
        for (sweep, room), (found, *_) in zip(todo, totals, strict=False):
            shares.append(found / max(sweep.W.numel(), 1))
            if found <= room:
                sweep.corrections = sweep.corrections.trimmed(found, slack=sweep.W.numel() // 64 + 4096)
            else:
                if sweep.undo(UNMERGE) != DONE:
                    return TORN
                more.append((sweep, found))
        _share[how], todo = 1.25 * max(shares), more
    return DONE


def _compile_way_back(sweep: Sweep, mode: int) -> None:
    """It is compiled and loaded before it is needed, and finds nothing to take back."""
    record, old, weight = sweep.corrections, sweep.old, sweep.W
    kind = (mode, weight.device, weight.dtype, weight.shape, weight.stride(), record.form, record.seed is None)
    factors = [sweep.left, sweep.right]
    if old is not None:
        factors, kind = [*factors, *old[:2]], (*kind, old[2].seed is None)
        old = *old[:2], replace(record, seed=old[2].seed)
    kind += tuple((t.shape, t.stride()) for t in factors)
    if kind not in _way_back:
        if mode == UNMERGE:
            sweep._go_back(UNMERGE)
        if mode == MERGE_AGAIN or old is not None:
            replace(sweep, old=old)._go_back(MERGE_AGAIN)
        _way_back.add(kind)


def _launch(sweeps: Sequence[Sweep], unmerging: bool = False) -> None:
    kernels = _kernels()
    olds = [None if s.old is None else (s.old[1], s.old[0], s.old[2]) for s in sweeps]
    if len(sweeps) > 1:
        pairs = zip(sweeps, olds, strict=True)
        members = [kernels.Member(s.W, s.right, s.left, s.corrections, old) for s, old in pairs]
        return kernels.launch_group(members, unmerging)
    (sweep,), (old,) = sweeps, olds
    new = sweep.right, sweep.left, sweep.corrections
    if unmerging:
        kernels.unmerge(sweep.W, *new)
    elif old is None:
        kernels.merge(sweep.W, *new)
    else:
        kernels.switch(sweep.W, old, new)


def error(outcome: int) -> Exception:
    """What a refused merge or unmerge raises. The weight is as it was, but where it is ``TORN``."""
    return ValueError(LOST_TEXT) if outcome == LOST else RuntimeError(TORN_TEXT if outcome == TORN else CHANGED_TEXT)


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    small, old = _small((65, 300), dtype, device), None
    W, right, merged = small.W, small.right, small.W.clone()
    for left in (small.left, small.left * -0.5):  # the second in the place of the first
        sweep = Sweep(merged, left, right, old=old)
        if not sweep.alone(MERGE):
            return "a switch of a small weight takes two passes"
        exact = W.double() + left.double() @ right.double()
        summed = 2.0**-23 * len(right) * (left.abs() @ right.abs())  # what the fp32 sums may be off by
        if ((merged.double() - exact).abs() > torch.finfo(dtype).eps * exact.abs() + summed + 1e-7).any():
            return "a small weight was merged wrongly"
        old = left, right, sweep.corrections
    changed = merged.clone()
    changed[-1, -1] += 1
    before = changed.clone()
    refused = run_together([replace(sweep, W=changed, old=None)], UNMERGE) == CHANGED
    if not refused or not torch.equal(bits(changed), bits(before)):
        return "the way back of a small changed weight was wrong"
    replace(sweep, old=None).alone(UNMERGE)
    return None if torch.equal(bits(merged), bits(W)) else "a small weight did not come back to the bit"


def _check_together(
    how: str, random: bool, tile: Any, dtype: torch.dtype, device: torch.device, even: bool
) -> str | None:
    """Two weights of different shapes in one launch, and in a launch each."""
    rows, columns = tile.ROWS, tile.COLS
    shapes = [(rows, 2 * columns), (2 * rows, columns)] if even else [(rows + 1, columns + 16), (5, 2 * columns + 48)]
    found = []
    for at_once in (2, 1):
        sweeps = [_small(shape, dtype, device, (7, 2) if random else None) for shape in shapes]
        originals = [sweep.W.clone() for sweep in sweeps]
        if how != "merge":
            for sweep in sweeps:
                run_together([sweep], MERGE)
        if how == "switch":
            olds = [(sweep.left, sweep.right, sweep.corrections) for sweep in sweeps]
            sweeps = [replace(s, left=s.left * -0.5, old=old) for s, old in zip(sweeps, olds, strict=True)]
        for i in range(0, 2, at_once):
            if run_together(sweeps[i : i + at_once], UNMERGE if how == "unmerge" else MERGE) != DONE:
                return "two small weights were refused"
        found += [[bits(s.W.clone()), s.corrections.table[:, 1:5]] for s in sweeps]
        for sweep in sweeps if how != "unmerge" else ():
            run_together([sweep], UNMERGE)
        if not all(torch.equal(bits(s.W), bits(W)) for s, W in zip(sweeps, originals, strict=True)):
            return "two small weights did not come back to the bit"
    first, second, *alone = found
    same = all(map(torch.equal, first + second, alone[0] + alone[1]))
    return None if same else "two small weights were merged otherwise than one by one"


def _small(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, dither: Any = None) -> Sweep:
    (rows, columns), r = shape, 5
    line = torch.arange(rows * columns, device=device, dtype=torch.float32)
    W = (torch.sin(line * 12.9898) * 0.1).reshape(rows, columns).to(dtype)
    left = (torch.sin(line[: rows * r] * 7.1) * 0.05).reshape(rows, r)
    return Sweep(W, left, torch.sin(line[: r * columns] * 3.3).reshape(r, columns), dither)
