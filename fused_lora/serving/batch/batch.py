"""Which rows of the running batch use which adapters.

The state belongs to the thread (or task) that runs the model, never to the layers. So several threads can run one model
with different adapters at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_lora.modules.activated import cache_of, note_offsets, offsets_of, token_ids
from fused_lora.modules.experts import form_of
from fused_lora.modules.frames import generator_around, is_running
from fused_lora.modules.names import some
from fused_lora.modules.outputs import main_output
from fused_lora.ops import guard
from fused_lora.rows import NESTED, Call, Entries, Layout, RowFinder, Running
from fused_lora.serving.batch.finite import Order, bad_positions, by_sequence, unless_padding
from fused_lora.serving.batch.gradients import GradientsOff
from fused_lora.serving.batch.prepared import Group, Prepared, Rows, members_of
from fused_lora.serving.batch.siblings import Shared, Siblings, Trace, state_of
from fused_lora.serving.batch.static import RowBuffers
from fused_lora.serving.residency.packing import Site, why_not_experts
from fused_lora.serving.residency.refusal import NonFiniteOutput

_running: ContextVar[Batch | None] = ContextVar("fused_lora_batch", default=None)
_INPUTS = 4096  # inputs of layers whose rows are kept
# a replay would read rows and slots of this batch, when both are others'
_CAPTURED = "batch: a trace or a graph would keep these adapters for ever; use torch.export, or row_buffers"


def running(store: Any) -> Batch | None:
    """The innermost batch of this store that this thread is in."""
    batch = _running.get()
    while batch is not None and (batch.store is not store or batch._ended or batch._apart and batch.is_elsewhere()):
        batch = batch.outer  # asked at every layer
    return batch


class Batch:
    """One entered ``store.batch(...)``.

    Args:
        store: whose batch this is.
        groups: the (version, weight) pairs of each group. group_of_entry: integers, -1 for the base model.
        entry_of_row: the entry of each token row. None: the rows of the model's batch are divided equally.
        prepared: for these groups. siblings: layers of the store's model that share an input.
        finder: of the rows of the model's layers. buffers: for a step in a CUDA graph; ``entry_of_row`` is given then.
        dim: dimension of the model's inputs that holds the sequences.

    Attributes:
        identities: the identity of each entry's adapter, a key for prefix caches. None for the base model. A
            combination is joined by "+" with its weights.
        check_outputs: whether the rows of adapters must be finite. True unless set otherwise.
    """

    def __init__(
        self,
        store: Any,
        groups: Sequence[Group],
        group_of_entry: np.ndarray,
        entry_of_row: np.ndarray | None,
        prepared: Prepared,
        siblings: Siblings,
        finder: RowFinder,
        buffers: RowBuffers | None,
        dim: int = 0,
    ):
        self.store, self.groups, self.outer = store, groups, None
        self._group_of_entry, self._entry_of_row = group_of_entry, entry_of_row
        self._prepared, self._siblings = prepared, siblings
        self._traces: dict[int, Trace] = {}  # by thread: asyncio.to_thread hands a batch on
        arrivals = {version.arrival for group in groups for version, _ in group} - {None}
        self._arriving = [arrival for arrival in arrivals if not arrival.done()]
        self.check_outputs = True
        self._unread: list[tuple[Tensor, np.ndarray | None]] = []
        self._streams: set[torch.cuda.Stream] = set()  # that layers were computed on
        self._ended = False
        self._entered, self._gradients = False, GradientsOff()
        self._generator: FrameType | None = None  # that entered it
        self._apart: list[Batch] = []  # of generators that were suspended when this one was entered
        self._buffers = buffers
        self.acts = bool(groups) or buffers is not None  # a graph of base rows is replayed with others
        if buffers is not None and entry_of_row is not None:
            self._fill(buffers, entry_of_row)
        # a graph is replayed with other groups, so one group does not make it uniform
        groups_of_rows = group_of_entry if entry_of_row is None else self._group_of_row()
        self._invocations = {v.identity: v.invocation for group in groups for v, _ in group if v.invocation}
        if entry_of_row is not None:  # the rows before are the base's already
            self._invocations = {}
        uniform = buffers is None and not self._invocations and len(set(groups_of_rows.tolist())) <= 1
        count = len(group_of_entry) if self._entry_of_row is None else len(self._entry_of_row)
        self._finder, self._entries = finder, Entries(count, dim, self._entry_of_row is not None, uniform)
        self._before = () if uniform else finder.calls_under_way()

    def _fill(self, buffers: RowBuffers, entry_of_row: np.ndarray) -> None:
        """Copy everything that a replay reads, on the current stream."""
        spare = buffers.rows - len(entry_of_row)
        if spare < 0:
            raise ValueError(f"rows: {len(entry_of_row)}, the buffers hold {buffers.rows}")
        if self._prepared.max_rank > buffers.max_rank:
            raise ValueError(
                f"names: rank {self._prepared.max_rank}, the buffers are made for {buffers.max_rank} at most"
            )
        if not buffers.free.acquire(blocking=False):
            raise RuntimeError("buffers: a batch that has not ended uses them; expected one batch at a time for each")
        try:
            self._entry_of_row = np.pad(entry_of_row, (0, spare), constant_values=-1)
            buffers.fill(self._group_of_row(), members_of(self.groups))
            for arrival in self._arriving:
                arrival.wait_for_all()
        except BaseException:
            buffers.free.release()
            raise
        self._arriving = []

    @property
    def has_run(self) -> bool:
        """Whether anything of the model was called in it."""
        return bool(self._traces)

    @property
    def identities(self) -> list[str | None]:
        """The identity of each entry's adapter."""
        labels = [
            "+".join(v.identity if w == 1.0 and len(group) == 1 else f"{w!r}*{v.identity}" for v, w in group)
            for group in self.groups
        ]
        return [None if g < 0 else labels[g] for g in self._group_of_entry]

    def __enter__(self) -> Batch:
        if self._entered:
            raise RuntimeError("batch: it was entered already; call store.batch again")
        self._entered = True
        self.outer = _running.get()
        while self.outer is not None and self.outer._ended:  # another context has ended it
            self.outer = self.outer.outer
        self._generator = generator_around()
        outer = self.outer
        while outer is not None:
            if outer._generator is not None and not is_running(outer._generator):
                self._apart.append(outer)
            outer = outer.outer
        try:
            _running.set(self)
            self._gradients.begin()
        except BaseException:  # an interrupt: nobody would leave it
            self.leave()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.leave()
        for trace in list(self._traces.values()):
            self._siblings.close(trace)
        me, traces = threading.get_ident(), self._traces
        try:
            if exception[0] is None and self.check_outputs:
                self._unread += map(self._with_groups, self._bad_sums())  # of layers called without the model
                self._read_checks()
            if exception[0] is None and any(t.running.call for thread, t in list(traces.items()) if thread != me):
                raise RuntimeError("batch: it has ended while another thread runs the model in it; wait for its call")
        finally:
            self._traces = {}
            try:
                self._join_streams()
            finally:
                if self._buffers is not None:  # the next fill comes after all that read this one's
                    self._buffers.release()

    def leave(self) -> None:
        """Take this one out of the batches of this context: those inside of it may go on after it, in generators.

        Does nothing the second time.
        """
        trace = self._traces.get(threading.get_ident())
        if trace is not None:
            trace.running.close()  # a call that an interrupt has broken off
            if trace.gradients is not None:
                trace.gradients.end()
        self._gradients.end()
        self._ended, self._generator, self._apart = True, None, []
        inner = _running.get()
        if inner is self:
            _running.set(self.outer)
        while inner is not None:
            if inner.outer is self:
                inner.outer = self.outer
            inner = inner.outer

    def is_elsewhere(self) -> bool:
        """Whether a generator entered it that is suspended, while that of a batch around it runs."""
        return any(b._generator is not None and is_running(b._generator) for b in self._apart)

    def called(self, path: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before a module of the model: find out which rows are whose, if nothing around it was called.

        Raises:
            ValueError: the model's batch is not a multiple of the entries.
        """
        trace = self._trace()
        if trace.running.call is None:
            trace.shared = None  # of a step that was broken off
            self._siblings.close(trace)
            self._read_checks()
        call = trace.running.enter(path, module, args, kwargs)
        if call is not None and torch.is_grad_enabled() and self._gradients.of_another_thread:
            trace.gradients = GradientsOff()
            trace.gradients.begin()  # until the call returns
        if call is not None:
            if self._invocations:
                self._find_invocations(trace, call, args, kwargs)
            self._keep_rows(trace, call)

    def _find_invocations(self, trace: Trace, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Which rows of this call the aLoRA adapters change."""
        ids = token_ids(args, kwargs)
        if ids is None or len(ids) != call.sequences:
            return
        trace.offsets = offsets_of(ids, self._invocations, cache_of(kwargs))
        trace.tokens = ids.shape[1]
        offsets = [self._offsets_of_group(trace, g) for g in range(len(self.groups))]
        trace.changed = tuple(
            trace.tokens if g < 0 or offsets[g] is None else min(offsets[g][i] or 0, trace.tokens)
            for i, g in enumerate(self._group_of_sequence(call.sequences).tolist())
        )

    def _offsets_of_group(self, trace: Trace, group: int) -> Any:
        """Of a group that is an aLoRA; None of another."""
        return trace.offsets.get(self.groups[group][0][0].identity)

    def _keep_rows(self, trace: Trace, call: Call) -> None:
        """Keep what is known of the rows if it holds for this call, too, and note the stream that it runs on."""
        stream = None
        if self.store.device.type == "cuda":
            stream = torch.cuda.current_stream(self.store.device)
            self._streams.add(stream)
        case = call.case, trace.tokens, trace.changed, stream  # what a stream has copied another may not have yet
        if case != trace.case or len(trace.rows) >= _INPUTS:
            trace.case, trace.rows, trace.arranged = case, {}, {}

    def returned(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        """After it: raise NonFiniteOutput if rows under adapters are not finite. output: None after an exception.

        On a GPU the check is queued. It is read at the model's next call or at the end of the batch, so that nothing
        waits for it. A graph that is being captured is not checked.
        """
        trace = self._trace()
        call = trace.running.leave(module, output is not None)
        if call is not None and trace.gradients is not None:
            trace.gradients.end()
            trace.gradients = None
        if call is not None and trace.tokens:
            if output is not None:
                note_offsets(kwargs, output, trace.offsets)
            trace.offsets, trace.tokens, trace.changed = {}, 0, ()
        if call is None or output is None or not (self.check_outputs and self.groups):
            return
        count, dim = call.sequences, self._entries.dim
        bad = [each if each.dim() > 1 else by_sequence(each, count, dim) for each in self._bad_sums()]
        found = main_output(output, dims=2)  # a dimension for rows
        if found is not None and not guard.capturing(found.device):
            bad.append(by_sequence(bad_positions(found), count, dim))
        self._unread += [self._with_groups(unless_padding(each, kwargs)) for each in bad]
        if found is None or not found.is_cuda:
            self._read_checks()

    def bad_rows(self) -> list[int]:
        """The rows of a packed batch in which the output of an adapted layer was not finite. CPU only; a second call
        returns none."""
        return sorted({row for bad in self._bad_sums() for row, *_ in bad.nonzero().tolist()})

    def _bad_sums(self) -> list[Tensor]:
        """Bool [sequences, positions] of layers' rows; [rows] in the order of a layer where that is not known."""
        trace, found = self._trace(), []
        sums, trace.sums = trace.sums, {}
        for (_, order), values in sums.items():
            bad = torch.isfinite(values).logical_not_()
            found.append(bad if order is None else bad.view(-1, *order).transpose(0, 1).flatten(1))
        return found

    def _with_groups(self, bad: Tensor) -> tuple[Tensor, np.ndarray | None]:
        """Bool [n], and the group of each of the n rows or sequences. None if the model returned other rows."""
        count, packed = len(self._group_of_entry), self._entry_of_row
        if packed is not None and bad.numel() == len(packed):  # [1, rows], too
            return bad.reshape(-1), self._group_of_row()
        if len(bad) % count if packed is None else len(bad) != len(packed):
            return bad.reshape(-1), None
        groups = np.repeat(self._group_of_entry, len(bad) // count) if packed is None else self._group_of_row()
        return bad.flatten(1).any(-1) if bad.dim() > 1 else bad, groups

    def _read_checks(self) -> None:
        if not self._unread or guard.capturing(self.store.device):
            return  # nothing may wait for the device now; the next call or the end of the batch reads them
        self._join_streams()
        hit: set[int] = set()
        for bad, groups in self._unread:
            if groups is not None:
                hit |= set(groups[bad.cpu().numpy()].tolist())
            elif bad.any():
                hit |= set(range(len(self.groups)))
        self._unread = []
        identities = dict.fromkeys(version.identity for g in sorted(hit - {-1}) for version, _ in self.groups[g])
        if identities:
            raise NonFiniteOutput(
                f"batch: the output has values that are not finite in the rows of {some([*identities])}: their terms "
                "overflow, or the model does on these inputs",
                [*identities],
            )

    def _join_streams(self) -> None:
        """Let the current stream wait for the others of this batch: what is read, or noted as its end, is after all."""
        current = torch.cuda.current_stream(self.store.device) if self._streams else None
        for stream in self._streams - {current}:
            current.wait_stream(stream)
        self._streams.clear()

    def add(self, site: Site, x: Tensor, y: Tensor) -> None:
        """y += the LoRA terms of x at this layer, in place. x of an embedding: its tokens [..., 1].

        y: [..., N], or an empty tensor where the layer gives something else, to which nothing can be added.
        """
        trace, linear, index = self._trace(), site.kind == "linear", site.index
        call = trace.running.call
        if x.is_nested:
            if index in self._prepared.sites:
                raise ValueError(f"batch: {site.path!r} expected [..., features], got {NESTED}")
            return
        if call is None:
            return self._called_alone(site, x, lambda: self.add(site, x, y))
        if call.followed is not None:
            call.note(site.place, x, y)
        if linear and (trace.seen or index not in self._siblings.settled):
            self._siblings.watch(trace, site, x)
        if index not in self._prepared.sites and (self._buffers is None or not linear):
            return
        if y.shape[-1] != site.N or not linear and getattr(site.module, "num_embeddings", site.K) != site.K:
            if index in self._prepared.sites:
                why = "was resized since the store was made" if y.shape[-1] else "gets or returns no tensor"
                raise RuntimeError(f"batch: adapters of {site.path!r} cannot be added: it {why}")
            return
        call.pause(True)
        try:
            if torch.is_autocast_enabled(x.device.type):
                with torch.autocast(x.device.type, enabled=False):
                    order = self._add(site, x, y, trace, _autocast_dtype(x))
            else:
                order = self._add(site, x, y, trace, x.dtype)
            if not y.is_cuda:
                trace.look(y.view(-1, site.N), order)
        finally:
            call.pause(False)

    def add_experts(self, sites: tuple[Site, ...], inputs: Sequence[Any], y: Any) -> None:
        """Put the experts' results under adapters into y [rows, K], in place; base rows keep their bits.

        inputs: of the experts, such as hidden [tokens, K], top_k_index and top_k_weights [tokens, top_k]. A module with
        an adapted matrix gets x [..., K] first, and y may be several tensors.

        Raises:
            RuntimeError: the experts run in a way that is not known. ValueError: other inputs, or unknown rows.
        """
        call, site, acts = self._trace().running.call, sites[0], self._acts_at(sites)
        if not acts and call is not None and call.followed is None:
            return
        form = form_of(site.module)
        x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else torch.empty(0, device="cpu")
        if not (x.dim() > 1 or acts):  # any module with a matrix may get anything
            return
        if call is None:
            why_not = form.why_not_alone(site.module)
            return self._called_alone(site, x, lambda: self.add_experts(sites, inputs, y), why_not)
        if call.followed is not None:  # what a module makes of its rows has been followed
            call.note(site.place, x, None if form.calls_module else y)
        if not acts:
            return
        several = y if isinstance(y, (tuple, list)) else [y]
        self._check(x, *(t for t in several if isinstance(t, Tensor)))
        for each in sites:
            if why := why_not_experts(each) or form.fault_of_rows(site.module, inputs):
                raise RuntimeError(f"batch: the adapters of {each.path!r} cannot be computed: {why}")
        call.pause(True)
        try:
            trace = self._trace()
            for arrival in self._arriving:
                for each in sites:
                    arrival.wait(each.index)
            rows, order = trace.rows.get((site.index, x.shape)) or self._rows(trace, site, x, x)
            self._prepared.experts_(rows, sites, inputs, y)
            if isinstance(y, Tensor) and not (x.is_cuda or form.calls_module):
                trace.look(y, order)
        finally:
            call.pause(False)

    def compiled(self, sites: tuple[Site, ...], x: Tensor, add: Callable[[], None]) -> None:
        """``add`` (:meth:`add` or :meth:`add_experts`) from compiled code, where the model's own call is not seen.

        Raises:
            ValueError: the rows of the layer are not known. RuntimeError: a graph without buffers is being captured.
        """
        if self._buffers is None and guard.capturing(x.device):
            raise RuntimeError(_CAPTURED)
        trace, site = self._trace(), sites[0]
        shown = None if self._entries.uniform or self._entries.packed else self._finder.sequences_of(site.place, x)
        trace.sequences = shown or trace.sequences
        if not self._acts_at(sites):
            return
        before = trace.running.call
        trace.running.call = self._finder.in_compiled_code(site.place, site.module, x, self._entries, trace.sequences)
        try:
            self._keep_rows(trace, trace.running.call)
            add()
        finally:
            trace.running.call = before

    def _acts_at(self, sites: tuple[Site, ...]) -> bool:
        """Whether adapters change one of these; in a graph's buffers those of linear layers alone may."""
        held = self._prepared.sites
        return any(s.index in held for s in sites) or (self._buffers is not None and sites[0].kind == "linear")

    def _called_alone(self, site: Site, x: Tensor, add: Callable[[], None], why_not: str | None = None) -> None:
        """``add`` in a call of the layer by itself. why_not: why its rows are not the batch's in their order."""
        trace = self._trace()
        call = trace.running.enter_layer(site.place, site.module, x, why_not)
        self._keep_rows(trace, call)
        try:
            add()
        finally:
            trace.running.leave(site.module, True)

    def _check(self, x: Tensor, *outputs: Tensor) -> None:
        if torch.is_grad_enabled() and any(y.requires_grad for y in outputs):
            raise RuntimeError("batch: a store serves, it does not train: gradients were enabled inside the batch")
        if torch._C._is_tracing() or self._buffers is None and guard.capturing(x.device):
            raise RuntimeError(_CAPTURED)

    def _add(self, site: Site, x: Tensor, y: Tensor, trace: Trace, dtype: torch.dtype) -> Order:
        """Returns the order of the rows. dtype: that x takes first, as in the base layer."""
        index = site.index
        self._check(x, y)
        if site.kind == "embedding":
            for arrival in self._arriving:
                arrival.wait(index)
            rows, order = trace.rows.get((index, x.shape)) or self._rows(trace, site, x, y)
            self._prepared.embed_(rows, site, x.reshape(-1), y.view(-1, site.N))
            return order
        if not y.numel():
            return None
        y, shared = y.view(-1, site.N), trace.shared
        if shared is not None:
            trace.shared = None
            if shared.add(index, x, y):
                trace.shared = shared if shared.waiting else None
                return trace.rows.get((shared.first, x.shape), (None, None))[1]
            self._siblings.forget(shared.first)
        rows, order = trace.rows.get((index, x.shape)) or self._rows(trace, site, x, y)
        flat = x.reshape(-1, site.K).to(dtype)
        if self._prepared.by_kernels and self._launch(rows, index, x, flat, y, trace):
            return order
        for arrival in self._arriving:
            arrival.wait(index)
        self._prepared.eager_(rows, index, flat, y)
        return order

    def _launch(self, rows: Rows, index: int, x: Tensor, flat: Tensor, y: Tensor, trace: Trace) -> bool:
        """``_add`` by the kernels, together with layers that read x if there are such; False: not done."""
        state = state_of(x)
        together, alone = () if state is None else self._siblings.of(index), (index,)
        for sites in (together, alone) if len(together) > 1 else (alone,):
            step = self._prepared.step(rows, self._buffers, sites, flat, y)
            if step is None:
                continue
            for arrival in self._arriving:
                for each in step.places:
                    arrival.wait(each)
            formed = step.form(flat)
            if formed is not None and step.add(formed, step.places[index], y):
                if len(step.places) > 1:
                    trace.shared = Shared(x, state, index, step.places.keys() - {index}, step, formed)
                return True
        return False

    def _trace(self) -> Trace:
        """The calls of this thread."""
        thread = threading.get_ident()
        trace = self._traces.get(thread)
        if trace is None:
            trace = self._traces[thread] = Trace(Running(self._finder, self._entries, self._before))
        return trace

    def _rows(self, trace: Trace, site: Site, x: Tensor, y: Tensor) -> tuple[Rows, Order]:
        call, here = trace.running.call, self.store.device
        assert call is not None
        if x.device != here or y.device != here:  # a kernel would follow addresses of another device
            raise RuntimeError(
                f"batch: expected {site.path!r} to compute on {here}, where the store's adapters are, got {x.device} "
                f"and {y.device}"
            )
        layout = call.layout(site.place, x)
        found = trace.arranged.get((layout, x.shape))
        if found is None:
            order = None
            if layout is None:
                one = self._group_of_sequence(len(self._group_of_entry))[:1]
                groups = np.repeat(one, x.shape[:-1].numel())
            else:
                sequences = layout.sequence_of_row(x.shape, call.sequences)
                groups = self._group_of_sequence(call.sequences)[sequences]
                order = call.sequences, layout.stride(x.shape)
                if self._invocations:
                    groups = np.where(self._changed(trace, site, layout, x.shape, sequences), groups, -1)
            found = trace.arranged[layout, x.shape] = self._prepared.rows(groups, x.device), order
        trace.rows[site.index, x.shape] = found
        return found

    def _changed(self, trace: Trace, site: Site, layout: Layout, shape: Sequence[int], of: np.ndarray) -> np.ndarray:
        """Whether an adapter changes each row of a layer's input [sequences, tokens, K] or [sequences * tokens, K].

        of: the sequence of each. The tokens may be the last ones of the call alone.
        """
        tokens = layout.inner * int(np.prod(shape[1:-1]))
        if layout.dim or layout.outer > 1 or not (len(shape) == 2 or len(shape) == 3 and layout.inner == 1):
            tokens = 0
        if not 0 < tokens <= trace.tokens:
            raise ValueError(
                f"batch: {site.path!r} got an input of shape {tuple(shape)}; for {some([*self._invocations])}, aLoRA, "
                "expected [sequences, tokens, features] in a call of the model with token ids"
            )
        return np.arange(len(of)) % tokens >= tokens - np.array(trace.changed)[of]

    def _group_of_sequence(self, sequences: int) -> np.ndarray:
        """The group of each sequence of the model's batch, or of each row of a packed one."""
        if self._entry_of_row is None:
            return np.repeat(self._group_of_entry, sequences // len(self._group_of_entry))
        return self._group_of_row()

    def _group_of_row(self) -> np.ndarray:
        return np.append(self._group_of_entry, -1)[self._entry_of_row]


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What x is cast to in a linear layer under autocast."""
    casts = x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype
