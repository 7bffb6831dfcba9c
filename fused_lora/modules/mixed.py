"""Rows of one batch under different adapters of a model's own layers: which row uses which."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fused_lora.modules.frames import generator_around, is_running
from fused_lora.modules.names import some
from fused_lora.ops import guard
from fused_lora.rows import Entries, Layout, RowFinder, Running, checked_dim, rows_of_names, rows_of_owners

_CAPTURED = (
    "adapter_batch: a CUDA graph would read the rows of this batch after its end; capture outside of it, or serve the "
    "adapters by an AdapterStore and its row_buffers"
)
_T = TypeVar("_T")
Rows = dict[Any, Tensor | slice]  # of each name, which rows of a batch
# finders by model: what one has found holds for the next batch
_finders: WeakKeyDictionary[nn.Module, RowFinder] = WeakKeyDictionary()


def _break_graph() -> None:
    if torch.compiler.is_compiling():
        why = "adapter_batch breaks graphs: compile without fullgraph=True, or serve the adapters by an AdapterStore"
        torch._dynamo.graph_break(msg=why)


def check_eval(model: nn.Module) -> None:
    """Raise RuntimeError if ``model`` trains, as PEFT does for a mixed batch."""
    if model.training:
        raise RuntimeError("adapter_batch needs model.eval(): a mixed batch is for inference")


def made_once(make: Callable[..., _T], device: torch.device, *args: Hashable) -> _T:
    """``make(device, *args)``: tensors that nobody may change, of which all layers of a call have the same.

    They are kept by stream, for another one may be quicker than what fills them. Where torch compiles or follows they
    are made anew, in a torch.func transform, which wraps them, and in a capture, in which nothing is written before the
    replay.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return make(device, *args)
    if torch._C._are_functorch_transforms_active():
        return make(device, *args)
    stream = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make(device, *args)
        stream = torch.cuda.current_stream(device).cuda_stream
    return _kept(make, device, stream, *args)


@lru_cache(16)
def _kept(make: Callable[..., Any], device: torch.device, stream: int | None, *args: Hashable) -> Any:
    with torch.inference_mode(False):  # of use in training, too
        return make(device, *args)


def rows_by_name(adapter_names: Sequence[str | None], x: Tensor) -> Rows:
    """Each name's rows of x [..., K], whose first dimension the names share out.

    A slice where they lie together, else their numbers, int64, on x's device, for which the host does not wait.

    Raises:
        ValueError: the length of x is no multiple of the number of names.
        RuntimeError: a CUDA graph is being captured, and the rows of a name lie apart.
    """
    names, rows = tuple(adapter_names), x.shape[:-1].numel()
    count = len(names)
    if (len(x) % count or rows % count) if count else len(x):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs (or divide it, for beams), but "
            f"got {count} and {len(x)} respectively."
        )
    return made_once(_rows_of_names, x.device, names, rows)


def _rows_of_names(device: torch.device, names: tuple[str | None, ...], rows: int) -> Rows:
    return {name: _on(device, own) for name, own in rows_of_names(names, rows).items()}


def _rows_in(device: torch.device, names: tuple[str, ...], layout: Layout | None, shape: Any, sequences: int) -> Rows:
    if layout is None:
        return {names[0]: slice(0, shape.numel())}
    owners = layout.sequence_of_row((*shape, 1), sequences) * len(names) // sequences
    return {name: _on(device, own) for name, own in rows_of_owners(names, owners).items()}


def _on(device: torch.device, numbers: Any) -> Tensor | slice:
    if isinstance(numbers, slice):
        return numbers
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.from_numpy(numbers).to(device)
    if guard.capturing(device):  # a replay would copy from memory that is free by then
        raise RuntimeError("adapter_names: a CUDA graph of a mixed batch needs an AdapterStore and its row_buffers")
    return torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)


def numbers_of(rows: Tensor | slice, x: Tensor) -> Tensor:
    """Rows as their numbers, int64, on x's device."""
    return torch.arange(rows.start, rows.stop, device=x.device) if isinstance(rows, slice) else rows


class Context:
    """What a layer holds inside of a context, which a copy of the layer would hold for ever: copies are refused.

    Args:
        call: the function that opened the context.
    """

    def __init__(self, call: str):
        self._call = call

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{self._call}: a model cannot be copied, pickled or saved whole inside of this context; leave it first"
        )


class MixedBatch(Context):
    """One entered ``fused_lora.adapter_batch``.

    Args:
        model: whose calls are batches. layers: its LoRA layers by path. names: the adapter of each entry.
        dim: dimension of the model's inputs that holds the sequences.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        names: Sequence[str],
        dim: int,
    ):
        super().__init__("adapter_batch")
        self.names = tuple(names)
        self._thread, self._generator = threading.get_ident(), generator_around()
        finder = _finders.get(model)
        if finder is None or dict(finder.layers) != dict(layers):
            finder = _finders[model] = RowFinder(model, layers)
        self._finder, self._paths = finder, {layer: path for path, layer in layers.items()}
        self._entries = Entries(len(names), checked_dim(dim), uniform=len(set(names)) == 1)
        self._under_way = finder.calls_under_way()
        self._running: dict[int, Running] = {}  # by thread
        self._handles: list[Any] = []

    def check_around(self) -> None:
        """Raise RuntimeError unless what runs now is inside of this batch, so that another may be entered in it."""
        text = f"adapter_batch: a batch of {some(self.names)} is open in another"
        if self._thread != threading.get_ident():
            raise RuntimeError(f"{text} thread, and acts on all of them; use an AdapterStore, or take turns")
        if self._generator is not None and not is_running(self._generator):
            raise RuntimeError(f"{text} generator, and acts outside of it, too; use an AdapterStore, or end it first")

    def attach(self) -> None:
        """Note the calls of the model and of what is in it."""
        for path, module in self._finder.callers.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._before, path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))

    def detach(self) -> None:
        """End :meth:`attach`."""
        for handle in self._handles:
            handle.remove()
        if (running := self._running.pop(threading.get_ident(), None)) is not None:
            running.close()

    def _before(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        _break_graph()
        self._enter(path, module, args, kwargs)

    # what follows operators is nothing that Dynamo can trace; while it does, torch runs compiled code as it is written
    @_disable_dynamo
    def _enter(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._acts():
            self._of_thread().enter(path, module, args, kwargs)

    @_disable_dynamo
    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._acts():
            self._of_thread().leave(module, output is not None)

    def _acts(self) -> bool:
        """Whether no other batch was entered inside this one."""
        layer: Any = next(iter(self._paths), None)
        return layer is not None and layer.mixed_batch is self

    def _of_thread(self) -> Running:
        return self._running.setdefault(threading.get_ident(), Running(self._finder, self._entries, self._under_way))

    def rows(self, layer: nn.Module, x: Tensor, why_not_alone: str | None = None) -> Rows:
        """The rows of x [..., K] that each adapter has, as of :func:`rows_by_name`, over all dimensions but the last.

        why_not_alone: why they are not known where the layer itself is called, if they are not.

        Raises:
            ValueError: the rows are not known, or are not the batch's.
            RuntimeError: the model is in training mode, or a CUDA graph is being captured.
        """
        _break_graph()
        check_eval(self._finder.callers[""])
        if guard.capturing(x.device):  # the rows live as long as the batch, a graph longer
            raise RuntimeError(_CAPTURED)
        if layer not in self._paths:  # added since: it has none of these adapters
            return {}
        running, path = self._of_thread(), self._paths[layer]
        direct = running.call is None
        if direct:  # the layer itself was called
            running.enter_layer(path, layer, x, why_not_alone)
        try:
            call = running.call
            assert call is not None
            call.note(path, x)
            layout = call.layout(path, x)
            return made_once(_rows_in, x.device, self.names, layout, x.shape[:-1], call.sequences)
        finally:
            if direct:
                running.leave(layer, True)
