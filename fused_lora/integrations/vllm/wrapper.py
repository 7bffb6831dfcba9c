"""The wrapper that the LoRA layers of vLLM 0.32 and 0.33 call.

vLLM calls ``update_metadata`` before a step, and its layers call the ``add_`` methods. In a compiled model each of
these calls is one custom operator, so that the rows of the step are looked up when the graph runs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    FusedMoEWithLoRA,
    LogitsProcessorWithLoRA,
    LoRAMapping,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.model_manager import LoRAModelManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondModelRunner
from vllm.v1.worker.gpu.model_states.encoder_decoder import EncoderDecoderModelState
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from fused_lora._version import __version__
from fused_lora.integrations.vllm.slots import Slots
from fused_lora.integrations.vllm.terms import EagerTerms, KernelTerms

log = init_logger("vllm.fused_lora")
# by the addresses of their layers' A and B: a compiled graph may be of another process, or of an engine before
_wrappers: weakref.WeakValueDictionary[int, Grouped] = weakref.WeakValueDictionary()
# of which tokens of the step the rows of logits are, where they are not one for each entry of vLLM's prompt mapping
_tokens_of_logits: ContextVar[np.ndarray | None] = ContextVar("tokens_of_logits", default=None)


class Grouped:
    """What the wrappers of all platforms share. The other base class is vLLM's own wrapper of the platform, which
    computes what :meth:`adopt` leaves to it.

    Attributes:
        leaves_some: whether a layer needs vLLM's own tables of the rows.
        token_of_input: of each input that an encoder-decoder model encodes in a step, a token of its request.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any):
        wrapper: Any = super()  # vLLM's
        wrapper.__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.lora_config: Any = kwargs["lora_config"]
        self.lora_config.fused_lora = __version__
        self._slots: dict[int, Slots] = {}  # by the address of a layer's first A and of its first B
        self.leaves_some, self._samples = False, False
        self._tokens, self._prompts = self.new_terms(), self.new_terms()
        self._slot_of_token = self._slot_of_sample = np.zeros(0, np.int32)
        self.token_of_input = np.zeros(0, np.int32)
        self._encoded = EagerTerms(torch.device(device))
        _hook_vllm()
        log.info_once("fused_lora %s computes the LoRA terms: %s, %s", __version__, type(self).__name__, self.kernels)

    kernels: str  # what computes the terms, for the log

    def new_terms(self) -> EagerTerms | KernelTerms:
        """The terms of one kind of rows."""
        raise NotImplementedError

    def update_own(self, *args: Any, **kwargs: Any) -> None:
        """What vLLM's own wrapper does for a step."""
        super().update_metadata(*args, **kwargs)

    def adopt(self, layer: BaseLayerWithLoRA) -> None:
        """Take over the adapters of a layer: its A and B are replaced, once, by those of a :class:`Slots`, and each
        adapter that it loads says its rank. Experts stay vLLM's, and so do whole heads of classifiers."""
        name = type(layer).__name__
        if isinstance(layer, FusedMoEWithLoRA) or "full_weight_stacked" in vars(layer):
            self.leaves_some = True
            what = "the adapters" if isinstance(layer, FusedMoEWithLoRA) else "whole heads"
            log.info_once("fused_lora leaves %s of %s to vLLM's own operators", what, name)
        if isinstance(layer, FusedMoEWithLoRA):
            return
        slots = vars(layer).get("fused_lora_slots")
        if slots is None:
            slots = layer.fused_lora_slots = _replace(layer, self.adapter_dtype)
        head = vars(layer).get("full_weight_stacked")
        self._samples |= not isinstance(layer.lora_b_stacked, tuple) or head is not None
        for side in filter(None, (slots.A, slots.B)):
            self._slots[side[0].data_ptr()] = slots
            _wrappers[side[0].data_ptr()] = self
        if head is not None:  # a compiled token classifier multiplies by it through this wrapper, too
            _wrappers[head.data_ptr()] = self

    def adapter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What adapters of this dtype are held in."""
        return dtype

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """The adapters of the next step: of each token and of each sampled row, 0 for the base model."""
        self.update_own(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots = {lora: slot for slot, lora in enumerate(lora_index_to_id) if lora is not None} | {0: -1}
        self._slot_of_token = _slots_of(mapping.index_mapping, slots)
        self._tokens.step(self._slot_of_token)
        if self._samples:
            self._slot_of_sample = _slots_of(mapping.prompt_mapping, slots)
            self._prompts.step(self._slot_of_sample)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y [rows, sum of N] += B A x, one output beside the other."""
        if not add_inputs:  # y has a stream of its own, and the caller adds it to the base output
            self._clear(y)
        self._add("linear", y, x, lora_b_stacked[0], scale)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y [outputs, rows, rank] += A x, in fp32."""
        self._add("shrink", y, x, lora_a_stacked[0], scale)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y [rows, columns] += B x of each output, from the column ``offset_start`` on; x: [outputs, rows, rank]."""
        if not add_inputs:
            self._clear(y.narrow(-1, offset_start, sum(output_slices)))
        x = x if isinstance(x, Tensor) else torch.stack(x)
        self._add("expand", y, x, lora_b_stacked[0], offset=offset_start)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y [rows, N] += B x; x: [rows, rank], the rows of A that the tokens have."""
        if not add_inputs:
            self._clear(y)
        self._add("embedding", y, x, lora_b_stacked)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """y [sampled rows, N or more] += B A x."""
        self._add("logits", y, x, lora_b_stacked, scale)

    def _clear(self, y: Tensor) -> None:
        """Zero the rows that have adapters."""
        y.masked_fill_((self._token_lora_indices[: len(y)] >= 0).unsqueeze(1), 0)

    def _add(
        self, kind: str, y: Tensor | tuple[Tensor, ...], x: Tensor, key: Tensor, scale: float = 1.0, offset: int = 0
    ) -> None:
        if scale != 1.0:
            raise ValueError(f"scale: expected 1.0, for vLLM multiplies B by an adapter's scaling, got {scale}")
        if torch.compiler.is_compiling():
            torch.ops.fused_lora.vllm_lora_(y, x, key, kind, offset)
        else:
            self.run(kind, y, x, key, offset)

    def run(self, kind: str, y: Any, x: Tensor, key: Tensor, offset: int) -> None:
        """Add the terms of the layer that has ``key`` as its first A or B. A whole head is vLLM's to multiply."""
        if kind == "shrink" and key.data_ptr() not in self._slots:
            own: Any = super()
            own.add_shrink(y, x, (key,), 1.0)
            return
        slots, terms = self._slots[key.data_ptr()], self._prompts if kind == "logits" else self._tokens
        x = x if x.dim() == 2 or kind == "expand" else x.view(-1, x.shape[-1])
        if slots.encodes and len(self.token_of_input):
            terms = self._of_inputs(x.shape[-2])
        if kind == "shrink":
            terms.shrink_(list(y), x, slots)
            return
        y = y if y.dim() == 2 else y.view(-1, y.shape[-1])
        if offset + slots.columns > y.shape[1]:
            raise ValueError(f"y: expected {offset + slots.columns} columns or more, got {y.shape[1]}")
        if kind == "expand":
            terms.expand_(slots.split(y[:, offset:]), x.unbind(0), slots)
        elif kind == "logits" and (tokens := _tokens_of_logits.get()) is not None:
            terms.step(self._slot_of_token[tokens])
            terms.linear_(y, x, slots)
            terms.step(self._slot_of_sample)
        else:
            terms.linear_(y, x, slots, "expand" if kind == "embedding" else "linear")

    def _of_inputs(self, rows: int) -> EagerTerms:
        """The terms of an encoder's rows, as many of each input."""
        slots = self._slot_of_token[self.token_of_input]
        if rows % len(slots):
            raise ValueError(f"x: expected as many rows of each of {len(slots)} encoded inputs, got {rows}")
        self._encoded.step(np.repeat(slots, rows // len(slots)))
        return self._encoded


@torch.library.custom_op("fused_lora::vllm_lora_", mutates_args=["y"])
def _vllm_lora_(y: Tensor, x: Tensor, key: Tensor, kind: str, offset: int) -> None:
    _wrappers[key.data_ptr()].run(kind, y, x, key, offset)


@_vllm_lora_.register_fake
def _(y: Tensor, x: Tensor, key: Tensor, kind: str, offset: int) -> None:
    return None


def _slots_of(mapping: Sequence[int], slots: dict[int, int]) -> np.ndarray:
    return np.fromiter((slots[lora] for lora in mapping), np.int32, len(mapping))


@functools.cache  # once
def _hook_vllm() -> None:
    """vLLM tells each layer its wrapper, and no wrapper its layers: from now on ``set_mapping`` does. And an adapter of
    which a layer refuses its part is forgotten, where vLLM 0.32 would go on with the layers before it. And what vLLM
    compiles for one wrapper and keeps on disk is not taken for the other: the hash of its configuration says whose."""
    set_mapping, activate = BaseLayerWithLoRA.set_mapping, LoRAModelManager.activate_adapter
    compute_hash = LoRAConfig.compute_hash

    @functools.wraps(set_mapping)
    def and_adopt(self: BaseLayerWithLoRA, punica_wrapper: Any) -> None:
        set_mapping(self, punica_wrapper)
        if isinstance(punica_wrapper, Grouped):
            punica_wrapper.adopt(self)

    @functools.wraps(activate)
    def or_forget(self: LoRAModelManager, lora_id: int) -> bool:
        had_room = None in self.lora_index_to_id  # without a free slot nothing is wrong with the adapter
        try:
            return activate(self, lora_id)
        except Exception:
            if had_room:
                self.remove_adapter(lora_id)
            raise

    @functools.wraps(compute_hash)
    def and_ours(self: LoRAConfig) -> str:
        ours = vars(self).get("fused_lora")
        return compute_hash(self) + (f" fused_lora {ours}" if ours else "")

    BaseLayerWithLoRA.set_mapping, LoRAModelManager.activate_adapter = and_adopt, or_forget
    LoRAConfig.compute_hash = and_ours
    _hook_logits()
    _hook_encoders()


def _hook_encoders() -> None:
    """vLLM's mapping is of the decoder's tokens. The layers of an encoder, and those that make keys and values of its
    output, have rows of inputs: from now on both model runners say whose."""
    first, second = GPUModelRunner._execute_mm_encoder, EncoderDecoderModelState.prepare_inputs_embeds

    @functools.wraps(first)
    def of_inputs(self: GPUModelRunner, scheduler_output: Any) -> list[Tensor]:
        if self.model_config.is_encoder_decoder:
            inputs = self._batch_mm_inputs_from_scheduler(scheduler_output)[2]
            requests = [self.input_batch.req_id_to_index[request] for request, _ in inputs]
            _tell_inputs(self.get_model(), self.query_start_loc.np[requests])
        return first(self, scheduler_output)

    @functools.wraps(second)
    def of_requests(self: Any, scheduled_encoder_inputs: dict[str, list[int]], input_batch: Any, *args: Any) -> None:
        inputs = [len(scheduled_encoder_inputs.get(request, ())) for request in input_batch.req_ids]
        _tell_inputs(self.model, np.repeat(input_batch.query_start_loc_np[: len(inputs)], inputs))
        return second(self, scheduled_encoder_inputs, input_batch, *args)

    GPUModelRunner._execute_mm_encoder, EncoderDecoderModelState.prepare_inputs_embeds = of_inputs, of_requests


def _tell_inputs(model: Any, tokens: np.ndarray) -> None:
    manager = vars(model).get("lora_manager")
    for wrapper in manager.punica_wrapper_mapping.values() if manager else ():
        if isinstance(wrapper, Grouped):
            wrapper.token_of_input = tokens


def _hook_logits() -> None:
    """vLLM's mapping has one row of logits for each sampled token. The rows of a prompt's log-probabilities are its
    tokens, and the second model runner has one row for each drafted token: from now on both say whose they are."""
    prompts, drafts = GPUModelRunner._get_prompt_logprobs_dict, SecondModelRunner.sample

    @functools.wraps(prompts)
    def of_prompts(self: GPUModelRunner, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict:
        if not self.num_prompt_logprobs:
            return prompts(self, hidden_states, num_scheduled_tokens)
        own = vars(self.model).get("compute_logits")
        self.model.compute_logits = _of_tokens(self.model.compute_logits, hidden_states)
        try:
            return prompts(self, hidden_states, num_scheduled_tokens)
        finally:
            del self.model.compute_logits
            if own is not None:
                self.model.compute_logits = own

    def and_tokens(compute: Callable[..., dict]) -> Callable[..., dict]:
        @functools.wraps(compute)
        def of_slices(
            self: Any, logits_fn: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
        ) -> dict:
            return compute(self, _of_tokens(logits_fn, hidden_states), hidden_states, *args, **kwargs)

        return of_slices

    @functools.wraps(drafts)
    def of_drafts(self: SecondModelRunner, hidden_states: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not input_batch.num_draft_tokens:
            return drafts(self, hidden_states, input_batch, *args, **kwargs)
        rows = np.diff(input_batch.cu_num_logits_np)
        before = _tokens_of_logits.set(np.repeat(input_batch.query_start_loc_np[: len(rows)], rows))
        try:
            return drafts(self, hidden_states, input_batch, *args, **kwargs)
        finally:
            _tokens_of_logits.reset(before)

    GPUModelRunner._get_prompt_logprobs_dict, SecondModelRunner.sample = of_prompts, of_drafts
    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        setattr(PromptLogprobsWorker, name, and_tokens(getattr(PromptLogprobsWorker, name)))


def _of_tokens(compute_logits: Callable[..., Any], hidden_states: Tensor) -> Callable[..., Any]:
    """The same function for slices of ``hidden_states``, the tokens of a step, by the adapters of these tokens."""

    @functools.wraps(compute_logits)
    def of_tokens(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        first = int(x.storage_offset() - hidden_states.storage_offset()) // hidden_states.stride(0)
        before = _tokens_of_logits.set(np.arange(first, first + len(x)))
        try:
            return compute_logits(x, *args, **kwargs)
        finally:
            _tokens_of_logits.reset(before)

    return of_tokens


def _replace(layer: BaseLayerWithLoRA, adapter_dtype: Any) -> Slots:
    """Put the memory of a new Slots into the layer, which then tells it the rank of what it loads."""
    B, several = layer.lora_b_stacked, isinstance(layer.lora_b_stacked, tuple)
    A: Any = () if isinstance(layer, VocabParallelEmbeddingWithLoRA) else layer.lora_a_stacked
    A, B = (side if isinstance(side, tuple) else (side,) for side in (A, B))
    slots = Slots(A, B, adapter_dtype(B[0].dtype))
    name = getattr(layer.base_layer, "prefix", "")
    slots.encodes = ".encoder." in name or name.endswith("encoder_attn.kv_proj")
    if A:
        layer.lora_a_stacked = tuple(slots.A) if several else slots.A[0]
    layer.lora_b_stacked = tuple(slots.B) if several else slots.B[0]
    set_lora, reset_lora = layer.set_lora, layer.reset_lora

    @functools.wraps(set_lora)
    def set_lora_and_rank(index: int, lora_a: Any, lora_b: Any) -> None:
        _check(layer, slots, *(_parts(side) for side in (lora_a, lora_b)))
        set_lora(index, lora_a, lora_b)
        slots.set_ranks(index, _ranks(lora_b, len(B)))

    @functools.wraps(reset_lora)
    def reset_lora_and_rank(index: int) -> None:
        reset_lora(index)
        slots.set_ranks(index, [0] * len(B))

    layer.set_lora, layer.reset_lora = set_lora_and_rank, reset_lora_and_rank
    return slots


def _check(layer: BaseLayerWithLoRA, slots: Slots, A: list[Tensor | None], B: list[Tensor | None]) -> None:
    """ValueError for an adapter of other sizes, of which vLLM would copy what fits."""
    K, N = _whole(layer, slots)
    rows = [None if b is None else b.shape[0] for b in B]
    if isinstance(layer, LogitsProcessorWithLoRA):  # a model's vocabulary may be padded
        fits = (rows[0] or 0) <= N[0]
    elif len(rows) == len(N):
        fits = all(n in (None, size) for n, size in zip(rows, N, strict=True))
    else:  # one B of several outputs
        fits = not N or None in rows or sum(n or 0 for n in rows) == sum(N)
    wrong = "" if fits else f"expected lora_B of {N} rows, got {rows}"
    for a in A if slots.A else ():  # vLLM checks the vocabulary of embeddings
        if a is not None and a.shape[1] != K:
            wrong = f"expected lora_A [r, {K}], got {list(a.shape)}"
    # vLLM warms up with zeros, of the sizes of one rank and one output
    if wrong and any(b is not None and b.any() for b in B):
        where = getattr(layer.base_layer, "prefix", type(layer).__name__)
        raise ValueError(f"{where}: {wrong}: is it of another base model?")


def _whole(layer: Any, slots: Slots) -> tuple[int, list[int]]:
    """K and the columns of each output before tensor parallelism, none where a layer of one model shards its own way:
    vLLM loads adapters whole and takes the rank's part."""
    K, N, ranks = slots.A[0].shape[3] if slots.A else 0, slots.N, getattr(layer, "tp_size", 1)
    whole = ReplicatedLinearWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
    if ranks == 1 or isinstance(layer, whole):  # each rank has all of it
        return K, N
    if isinstance(layer, RowParallelLinearWithLoRA):
        return K * ranks, [layer.output_size]
    if isinstance(layer, QKVParallelLinearWithLoRA):  # q, k and v in one matrix
        return K, [layer.q_proj_total_size + 2 * layer.kv_proj_total_size]
    copies = getattr(layer.base_layer, "num_kv_head_replicas", 0)  # of k and v, where ranks have no head of their own
    if not copies:
        return K, [n * ranks for n in N]
    return K, [n * ranks // (copies if g else 1) for g, n in enumerate(N)] if len(N) == 3 else []


def _ranks(lora_b: Tensor | Iterable[Tensor | None], outputs: int) -> list[int]:
    """The rank at each output. One tensor may be of several outputs, and one B of a list, too."""
    ranks = [0 if b is None else b.shape[1] for b in _parts(lora_b)]
    return ranks if len(ranks) == outputs else [max(ranks)] * outputs


def _parts(side: Tensor | Iterable[Tensor | None]) -> list[Tensor | None]:
    return [side] if isinstance(side, Tensor) else list(side)
