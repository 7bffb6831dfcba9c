"""Find layers that read the same input, as q, k and v do: in the first step. Every later call is checked.

An input is the same if it is the same tensor object with the same autograd version, so that nothing was written to it.
The object is kept until the last layer has read it, so no other object can have its id. On a GPU the stream must be the
same too, and the capture, if there is one. Inference tensors have no version. A layer that reads one is computed alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_lora.rows import Running
from fused_lora.serving.batch.finite import Order
from fused_lora.serving.batch.gradients import GradientsOff
from fused_lora.serving.batch.prepared import Rows, Step
from fused_lora.serving.residency.packing import Site


def state_of(x: Tensor) -> Any:
    """A value that differs when results for x must not be shared any more. None: sharing is not possible."""
    if x.is_inference():
        return None
    if x.is_cuda:
        return x._version, torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()
    return x._version


class Shared:
    """What was computed from one input for several layers.

    Args:
        x: the input, and its :func:`state_of`. first: the layer whose call computed. waiting: the others. formed: what
            ``step.form`` gave.
    """

    def __init__(self, x: Tensor, state: Any, first: int, waiting: set[int], step: Step, formed: Any):
        self.first, self.waiting = first, waiting
        self._x, self._state, self._step, self._formed = x, state, step, formed

    def add(self, site: int, x: Tensor, y: Tensor) -> bool:
        """y += the layer's terms, if it waits for them and ``x`` is the input that they were computed of."""
        if site not in self.waiting or x is not self._x or state_of(x) != self._state:
            return False
        self.waiting.discard(site)
        return self._step.add(self._formed, self._step.places[site], y)


class Trace:
    """The latest calls of one thread inside one batch.

    Attributes:
        shared: what the next layers may use. seen: the layers called last, as far as they had one input. running: the
            call of the model. case: of the last call. rows: and their order, by a layer's number and the shape of its
            input. arranged: the same by the layout of an input and its shape.
        offsets: in this call: an aLoRA's identity -> of each sequence, how many rows at its end are the adapter's.
        tokens: of each sequence in this call, if there are such. changed: of each sequence, how many of them an adapter
            changes.
        sums: of the values in each row of the layers' outputs, by the number of rows and their order: not finite if one
            of them is not.
        sequences: that the latest layer in compiled code has shown.
        gradients: what has switched them off for this call, in a thread that the batch was handed to.
    """

    def __init__(self, running: Running):
        self.shared: Shared | None = None
        self.seen: list[Site] = []
        self.x: Tensor | None = None
        self.state: Any = None
        self.running = running
        self.case: tuple | None = None
        self.rows: dict[tuple, tuple[Rows, Order]] = {}
        self.arranged: dict[tuple, tuple[Rows, Order]] = {}
        self.sums: dict[tuple[int, Order], Tensor] = {}
        self.gradients: GradientsOff | None = None
        self.offsets: dict[str, list[int | None]] = {}
        self.sequences: int | None = None
        self.tokens = 0
        self.changed: tuple[int, ...] = ()

    def look(self, y: Tensor, order: Order) -> None:
        """Keep what tells whether the rows of a layer's output y [rows, N] are finite, layer by layer."""
        sums = y.sum(-1, dtype=torch.promote_types(y.dtype, torch.float32))
        known = self.sums.setdefault((len(sums), order), sums)
        if known is not sums:
            known.add_(sums)


class Siblings:
    """Which layers of a store's model share an input. Thread-safe.

    Attributes:
        settled: numbers of the layers about which that is known.
    """

    def __init__(self):
        self._groups: dict[int, tuple[int, ...]] = {}
        self.settled: set[int] = set()

    def of(self, first: int) -> tuple[int, ...]:
        """This layer and those that will be called after it with the same input."""
        return self._groups.get(first) or (first,)

    def watch(self, trace: Trace, site: Site, x: Tensor) -> None:
        """Note a call of a layer. If its input is new, the layers called before it form a group, or stay alone."""
        if site.index in self.settled and not trace.seen:
            return
        state = state_of(x)
        if trace.x is x and state is not None and state == trace.state and self._alike(trace.seen[-1], site):
            if site not in trace.seen:
                trace.seen.append(site)
            return
        self.close(trace)
        if state is not None and site.index not in self.settled:
            trace.x, trace.state, trace.seen = x, state, [site]

    def close(self, trace: Trace) -> None:
        """End the group of the layers called last."""
        indices = {site.index for site in trace.seen}
        if indices and not indices & self.settled:
            if len(indices) > 1:
                # the first of them may have no adapter in a batch; those after it still share
                order = tuple(site.index for site in trace.seen)
                self._groups.update({index: order[i:] for i, index in enumerate(order)})
            self.settled |= indices
        trace.x, trace.state, trace.seen = None, None, []

    def forget(self, first: int) -> None:
        """Dissolve a group whose layers had different inputs. Each is computed alone from now on."""
        self._groups.pop(first, None)

    @staticmethod
    def _alike(one: Site, other: Site) -> bool:
        return one.K == other.K and one.path.rpartition(".")[0] == other.path.rpartition(".")[0]
