"""The wrappers of both platforms side by side over vLLM's own layers; that of CUDA with its kernels interpreted."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper import punica_gpu
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondModelRunner
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker, _TokenIdScores

from fused_lora.integrations.vllm.cpu import GroupedWrapperCPU
from fused_lora.integrations.vllm.cuda import GroupedWrapperGPU, grouped_wrapper_gpu
from fused_lora.ops import guard
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
ROWS, SLOTS, RANK, K, N, VOCAB = 24, 3, 16, 40, (48, 16, 16), 50
CONFIG = SimpleNamespace(
    max_loras=SLOTS,
    max_lora_rank=RANK,
    lora_dtype=torch.float32,
    specialize_active_lora=False,
    fully_sharded_loras=False,
)
IDS = [7, None, 9]  # of the adapters in the slots


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # which it sets for good where nothing else has
    return importlib.import_module("bench_vllm")


@pytest.fixture
def no_sorts(monkeypatch):
    """vLLM's tables for its own kernels are made by Triton's side of vLLM, which a CPU lacks; nothing may fill them."""

    class Meta:
        @classmethod
        def make(cls, *args, **kwargs):
            return cls()

    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", Meta, raising=False)
    monkeypatch.setattr(punica_gpu, "get_captured_lora_counts", lambda *args: [], raising=False)


def adopted(bench, wrapper, seed):
    """A layer of three outputs whose adapters have ranks 4 and 16, the second without the first output."""
    draw = torch.Generator().manual_seed(shifted(seed))
    A = [torch.zeros(SLOTS, 1, RANK, K) for _ in N]
    B = [torch.zeros(SLOTS, 1, n, RANK) for n in N]
    layer = bench.Layer(A, B)
    layer.set_mapping(wrapper)
    for slot, r in ((0, 4), (2, 16)):
        pairs = [(torch.randn(r, K, generator=draw), torch.randn(n, r, generator=draw)) for n in N]
        if slot == 2:
            pairs[0] = (None, None)
        layer.set_lora(slot, *map(list, zip(*pairs, strict=True)))
    return layer


def test_the_cuda_wrapper_adds_what_the_cpu_wrapper_adds(bench, no_sorts, device, kernels_on):
    wrappers = [cls(64, 8, device, lora_config=CONFIG) for cls in (GroupedWrapperCPU, GroupedWrapperGPU)]
    layers = [adopted(bench, wrapper, seed=3) for wrapper in wrappers]
    logits = [bench.Layer([torch.zeros(SLOTS, 1, RANK, K)], [torch.zeros(SLOTS, 1, VOCAB, RANK)]) for _ in wrappers]
    for layer, wrapper in zip(logits, wrappers, strict=True):
        layer.lora_a_stacked, layer.lora_b_stacked = layer.lora_a_stacked[0], layer.lora_b_stacked[0]
        layer.set_lora = lambda index, a, b, layer=layer: (
            layer.lora_a_stacked[index, 0].copy_(a), layer.lora_b_stacked[index, 0].copy_(b)
        )  # fmt: skip
        layer.set_mapping(wrapper)
        layer.set_lora(2, torch.ones(RANK, K) / 9, torch.ones(VOCAB, RANK) / 7)
    for tokens, prompts in (([7] * 5 + [0] * 3 + [9] * 9, [7, 0, 9]), ([9, 9, 0, 7], [9, 9, 0, 7])):
        x, rows = torch.randn(ROWS, K), len(prompts)
        found = []
        for wrapper, layer, head in zip(wrappers, layers, logits, strict=True):
            wrapper.update_metadata(LoRAMapping(tokens, prompts, is_prefill=True), IDS, SLOTS, VOCAB)
            y, z = torch.zeros(ROWS, sum(N)), torch.ones(rows, VOCAB + 6)  # padded logits
            wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, N)
            buffers = torch.zeros(3, ROWS, RANK)
            wrapper.add_shrink(buffers, x, layer.lora_a_stacked, 1.0)
            again = torch.zeros_like(y)
            wrapper.add_expand(again, buffers, layer.lora_b_stacked, N)
            assert_close(again, y, terms=1000)
            wrapper.add_lora_logits(z, x[:rows], head.lora_a_stacked, head.lora_b_stacked, 1.0)
            wrapper.add_lora_embedding(embedded := torch.zeros(ROWS, VOCAB), x[:, :RANK], head.lora_b_stacked)
            found.append((y, z, embedded))
        for ours, theirs in zip(*found, strict=True):
            assert_close(ours, theirs, terms=1000)
        y, z, _ = found[1]
        assert y[:2].any() and not y[len(tokens) :].any() and (z[:, VOCAB:] == 1).all()
    assert all(guard.verdicts().values()) and guard.verdicts()


class Enough(Exception):
    """Of the model runner no more is run than this."""


@pytest.mark.parametrize("cls", [GroupedWrapperCPU, GroupedWrapperGPU])
def test_the_second_model_runner_says_whose_the_rows_of_logits_are(cls, bench, no_sorts, device, kernels_on):
    """A request that drafts has several rows, and the rows of prompts are tokens."""
    tokens, starts, draw = (
        [7] * 5 + [0] * 3 + [9] * 4,
        np.array([0, 5, 8, 12]),
        torch.Generator().manual_seed(shifted(4)),
    )
    wrapper, hidden = cls(64, 8, device, lora_config=CONFIG), torch.randn(12, K, generator=draw)
    head = bench.Layer([torch.zeros(SLOTS, 1, RANK, K)], [torch.zeros(SLOTS, 1, VOCAB, RANK)])
    head.lora_a_stacked, head.lora_b_stacked = head.lora_a_stacked[0], head.lora_b_stacked[0]
    head.set_mapping(wrapper)
    for slot in (0, 2):
        head.lora_a_stacked[slot] = torch.randn(1, RANK, K, generator=draw) / 9
        head.lora_b_stacked[slot] = torch.randn(1, VOCAB, RANK, generator=draw) / 7
        head.fused_lora_slots.set_ranks(slot, [RANK])
    wrapper.update_metadata(LoRAMapping(tokens, [7, 0, 9], is_prefill=True), IDS, SLOTS, VOCAB)
    terms = torch.zeros(12, VOCAB)
    for i, adapter in enumerate(tokens):
        if adapter:
            slot = IDS.index(adapter)
            terms[i] = head.lora_b_stacked[slot, 0] @ (head.lora_a_stacked[slot, 0] @ hidden[i])

    def logits_of(x):
        y = torch.zeros(len(x), VOCAB)
        wrapper.add_lora_logits(y, x, head.lora_a_stacked, head.lora_b_stacked, 1.0)
        return y

    def stop(x):
        raise Enough(logits_of(x))

    runner = SimpleNamespace(batch_sharder=None, model=SimpleNamespace(compute_logits=stop))
    for rows in ([3, 4, 7, 9, 10, 11], [4, 7, 11]):
        batch = SimpleNamespace(
            logits_indices=torch.tensor(rows), num_draft_tokens=len(rows) - 3, query_start_loc_np=starts,
            cu_num_logits_np=np.searchsorted(rows, starts))  # fmt: skip
        with pytest.raises(Enough) as enough:
            SecondModelRunner.sample(runner, hidden, batch, None)
        assert_close(enough.value.args[0], terms[rows], terms=1000)

    worker, ids = PromptLogprobsWorker(3, torch.device(device), "raw_logits"), torch.arange(VOCAB).expand(3, -1)
    worker.token_id_scores = {name: _TokenIdScores(ids[:n], ids[:n] < 0, 0) for name, n in (("b", 2), ("c", 3))}
    batch = SimpleNamespace(
        req_ids=["a", "b", "c"], idx_mapping_np=np.arange(3), num_computed_prefill_tokens_np=np.zeros(3, int),
        num_scheduled_tokens=np.diff(starts), prefill_len_np=np.diff(starts), query_start_loc_np=starts)  # fmt: skip
    found = worker.compute_prompt_token_id_logprobs(logits_of, hidden, batch, np.diff(starts))
    assert_close(found["c"], terms[8:11], terms=1000)
    assert terms[8:11].any() and not found["b"].any()


def test_a_compiled_graph_finds_the_wrapper_of_a_layer(bench, device):
    """It comes from a cache, and was compiled for another wrapper."""
    wrappers = [GroupedWrapperCPU(64, 8, device, lora_config=CONFIG) for _ in "ab"]
    layers = [adopted(bench, wrapper, seed) for seed, wrapper in enumerate(wrappers)]
    x = torch.randn(ROWS, K)
    for wrapper, layer in zip(wrappers, layers, strict=True):
        wrapper.update_metadata(LoRAMapping([7] * ROWS, [7], is_prefill=True), IDS, SLOTS, VOCAB)
        y, expected = torch.zeros(2, ROWS, sum(N))
        wrapper.add_lora_linear(expected, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, N)
        torch.ops.fused_lora.vllm_lora_(y, x, layer.lora_b_stacked[0], "linear", 0)
        assert torch.equal(y, expected) and y.any()


def test_zeros_of_any_size_are_loaded_and_other_sizes_are_refused(bench, device):
    """vLLM warms up with an adapter of zeros. It has the rows of the first output alone where a model's checkpoint has
    one matrix for all of them, such as a Mamba mixer's in_proj."""

    class Mixer(bench.Layer):
        loaded = ()

        def set_lora(self, index, lora_a, lora_b):
            self.loaded += (index,)

    wrapper = GroupedWrapperCPU(64, 8, device, lora_config=CONFIG)
    layer = Mixer([torch.zeros(SLOTS, 1, RANK, K) for _ in N], [torch.zeros(SLOTS, 1, n, RANK) for n in N])
    layer.set_mapping(wrapper)
    layer.set_lora(1, torch.zeros(8, K), torch.zeros(N[0], 8))
    with pytest.raises(ValueError, match="of another base model"):
        layer.set_lora(2, torch.zeros(8, K), torch.ones(N[0], 8))
    assert layer.loaded == (1,)


# of each class: K and the columns of each output on one of two ranks, those of the whole layer, and what slices need
SHARDED = {
    ColumnParallelLinearWithLoRA: ((K, [48]), (K, [96]), dict(is_merged_col_linear=False, output_size=48)),
    RowParallelLinearWithLoRA: ((K, [48]), (2 * K, [48]), dict(input_size=K, output_size=48)),
    ReplicatedLinearWithLoRA: ((K, [48]), (K, [48]), {}),  # which has the ranks' number, too
    MergedColumnParallelLinearWithLoRA: ((K, [48, 16]), (K, [96, 32]), dict(output_slices=(48, 16), output_ids=(1, 1))),
    MergedQKVParallelLinearWithLoRA: (  # both ranks have the one head of k and v
        (K, [48, 16, 16]), (K, [96, 16, 16]), dict(output_slices=(48, 16, 16), output_ids=(1, 0, 0))),
    QKVParallelLinearWithLoRA: (
        (K, [80]), (K, [128]), dict(
            q_proj_total_size=96, kv_proj_total_size=16, q_proj_shard_size=48, kv_proj_shard_size=16)),
}  # fmt: skip


@pytest.mark.parametrize("cls", SHARDED)
def test_a_rank_takes_its_part_of_a_whole_adapter_and_of_no_other(cls, device):
    (K_here, here), (K_whole, whole), attributes = SHARDED[cls]
    wrapper = GroupedWrapperCPU(64, 8, device, lora_config=CONFIG)
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    layer.base_layer = torch.nn.Identity()
    if "QKV" in cls.__name__:
        layer.base_layer.num_kv_head_replicas = 2
    for name, value in dict(tp_size=2, tp_rank=1, n_slices=len(here), **attributes).items():
        setattr(layer, name, value)
    layer.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, K_here) for _ in here)
    layer.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, n, RANK) for n in here)
    layer.set_mapping(wrapper)

    def load(K, N, B=torch.ones):
        pairs = [(torch.ones(4, K), B(n, 4)) for n in N]
        layer.set_lora(0, *(pairs[0] if len(pairs) == 1 else map(list, zip(*pairs, strict=True))))

    load(K_whole, whole)
    assert all(b[0, 0, :, :4].all() and not b[0, 0, :, 4:].any() for b in layer.lora_b_stacked)
    for K_other, others in ((K_whole + 8, whole), (K_whole, [n + 16 for n in whole])):
        with pytest.raises(ValueError, match="of another base model"):
            load(K_other, others)
    load(K_here, here, torch.zeros)  # as vLLM warms up


def test_an_embedding_of_another_width_is_refused_on_each_rank(device):
    wrapper = GroupedWrapperCPU(64, 8, device, lora_config=CONFIG)
    layer = VocabParallelEmbeddingWithLoRA.__new__(VocabParallelEmbeddingWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.base_layer, layer.tp_size = torch.nn.Identity(), 2
    layer.lora_a_stacked, layer.lora_b_stacked = torch.zeros(SLOTS, VOCAB, RANK), torch.zeros(SLOTS, 1, K, RANK)
    layer.set_mapping(wrapper)
    layer.set_lora(0, torch.ones(4, VOCAB), torch.ones(K, 4))
    assert layer.lora_b_stacked[0, 0, :, :4].all()
    with pytest.raises(ValueError, match=rf"lora_B of \[{K}\] rows, got \[{K - 8}\]: is it of another base model"):
        layer.set_lora(1, torch.ones(4, VOCAB), torch.ones(K - 8, 4))
    assert not layer.lora_b_stacked[1].any()


def test_an_adapter_for_which_no_slot_is_free_stays_loaded(device):
    GroupedWrapperCPU(64, 8, device, lora_config=CONFIG)
    manager = object.__new__(LoRAModelManager)
    manager.lora_index_to_id, manager._active_adapters, manager._registered_adapters = [7], {7: None}, {5: None}
    with pytest.raises(ValueError, match="No free lora slots"):
        manager.activate_adapter(5)
    assert 5 in manager._registered_adapters


def test_what_vllm_compiled_for_its_own_wrapper_is_not_taken_for_ours(device):
    ours, theirs = (LoRAConfig(lora_dtype=torch.float32) for _ in "ab")
    assert ours.compute_hash() == theirs.compute_hash()
    GroupedWrapperCPU(64, 8, device, lora_config=ours)
    assert ours.compute_hash() != theirs.compute_hash()


def test_a_compiled_token_classifier_multiplies_by_its_whole_head(bench, device):
    wrapper, rows = GroupedWrapperCPU(64, 8, device, lora_config=CONFIG), [7, 7, 9, 9, 9]
    layer = bench.Layer([torch.zeros(SLOTS, 1, RANK, K)], [torch.zeros(SLOTS, 1, 5, RANK)])
    layer.full_weight_stacked = torch.randn(SLOTS, 1, 5, K)
    layer.set_mapping(wrapper)
    wrapper.update_metadata(LoRAMapping(rows, rows, is_prefill=True), IDS, SLOTS, VOCAB)

    def head(x):
        y = torch.zeros(1, len(rows), 5)
        wrapper.add_shrink(y, x, (layer.full_weight_stacked,), 1.0)
        return y * 2

    x = torch.randn(len(rows), K)
    expected = torch.stack([layer.full_weight_stacked[IDS.index(row), 0] @ x[i] for i, row in enumerate(rows)]) * 2
    for computed in (head(x), torch.compile(head, fullgraph=True, backend="aot_eager")(x)):
        assert_close(computed[0], expected, terms=K)


def test_where_the_kernels_cannot_run_vllm_keeps_its_wrapper_on_a_gpu(no_sorts, monkeypatch, device, kernels_on):
    ranks = SimpleNamespace(**vars(CONFIG) | dict(max_lora_rank=1024))
    assert type(grouped_wrapper_gpu(64, 8, device, lora_config=CONFIG)) is GroupedWrapperGPU
    assert type(grouped_wrapper_gpu(64, 8, device, lora_config=ranks)) is punica_gpu.PunicaWrapperGPU
    monkeypatch.setenv("FUSED_LORA_PLAN", "eager")
    assert type(grouped_wrapper_gpu(64, 8, device, lora_config=CONFIG)) is punica_gpu.PunicaWrapperGPU


def test_the_benchmark_of_operators_is_complete_and_right(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "GRID", [(16, 2, 4, 32, (24, 8), True), (4, 4, 4, 32, (24, 8), False)])
    options = ["--parts", "operator", "--device", "cpu", "--seconds", "0", "--rounds", "2", "--out", str(tmp_path)]
    assert bench.main(options) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * 2 * 3 and all(row["correct"] and row["ms"]["median"] > 0 for row in rows)
