"""Tokens of an engine whose requests have different adapters, against each request alone with its adapter merged."""

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

from fused_lora.integrations.vllm.cpu import GroupedWrapperCPU
from fused_lora.testing.numeric import assert_close
from helpers import tiny_vllm as tiny

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def engine(model):
    """Four slots for eight adapters; prompts longer than a step, so that prefills are cut and mixed with decodes."""
    return LLM(model=str(model), **tiny.ENGINE)


def wrapper(engine):
    """The wrapper that the engine's layers call."""
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return next(iter(runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()))


def request(name, adapters, number=None, **kind):
    """A LoRARequest, or None for the base model."""
    if name is None:
        return None
    return LoRARequest(name, number or 1 + list(adapters).index(name), str(adapters[name]), **kind)


def run(engine, prompts, requests):
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        list(o.outputs[0].token_ids) for o in engine.generate(prompts, GREEDY, lora_request=requests, use_tqdm=False)
    ]


def test_the_engine_has_our_wrapper_and_ranks(engine, adapters):
    ours = wrapper(engine)
    assert type(ours) is GroupedWrapperCPU
    run(engine, [tiny.SHARED], [request("keys", adapters)])
    qkv = next(s for s in ours._slots.values() if len(s.N) == 3)
    assert sorted(max(slot) for slot in zip(*qkv.ranks, strict=True)) == [0, 0, 0, 5]
    assert {r for r in zip(*qkv.ranks, strict=True) if any(r)} == {(0, 5, 5)}  # q has no term, not one of zeros


def test_tokens_are_those_of_each_request_alone_with_its_adapter_merged(engine, model, adapters):
    names = [*adapters, None] * 3
    prompts = [[*tiny.SHARED, *((11 * i + 5 * j) % 150 + 1 for j in range(3 + 5 * (i % 4)))] for i in range(len(names))]
    for _ in range(2):  # the second time every prefix is cached
        tokens = run(engine, prompts, [request(name, adapters) for name in names])
        for name, prompt, found in zip(names, prompts, tokens, strict=True):
            alone = tiny.merged(model, name and adapters[name])
            assert (wrong := tiny.differs(found, prompt, alone)) is None, f"{name}, {wrong}"
    for name, prompt, found in zip(names[:9], prompts, tokens, strict=False):
        others = [other for other in (*adapters, None) if other not in (name, "all_1")]
        wrong = [tiny.differs(found, prompt, tiny.merged(model, other and adapters[other])) for other in others]
        assert None not in wrong, f"{name} looks like {others[wrong.index(None)]}"
    base = [found for name, found in zip(names, tokens, strict=True) if name is None]
    assert base == run(engine, prompts[8::9], None)


def test_log_probabilities_of_prompts_have_the_terms_of_adapted_heads(engine, model, adapters):
    """A prompt's rows of logits are its tokens. The prompts are longer than a step, and a base prompt lies between."""
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    names, prompts = ["head", None, "head"], [tiny.SHARED + tiny.SHARED[:n] for n in (5, 20, 12)]
    engine.llm_engine.reset_prefix_cache()
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    requests = [request(name, adapters) for name in names]
    for name, output in zip(names, engine.generate(given, asked, use_tqdm=False, lora_request=requests), strict=True):
        prompt, rows = output.prompt_token_ids, output.prompt_logprobs
        ours = torch.tensor([row[token].logprob for token, row in zip(prompt[1:], rows[1:], strict=True)])
        with torch.no_grad():
            logits = tiny.merged(model, name and adapters[name])(torch.tensor([prompt])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:]).unsqueeze(1))[:, 0]
        assert_close(ours, expected, terms=1000)


def test_adapters_are_loaded_reloaded_in_place_and_removed_while_requests_run(engine, model, adapters, tmp_path):
    core, prompt = engine.llm_engine, tiny.SHARED[:20]
    moving = {"moving": tiny.write_adapter(tmp_path / "moving", 100, 8, tiny.ALL)}
    core.add_lora(request("moving", moving, 50))
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    core.add_request("steady", {"prompt_token_ids": prompt}, long, lora_request=request("all_8", adapters))
    core.add_request("base", {"prompt_token_ids": prompt}, long)
    done, steps = {}, 0
    while core.has_unfinished_requests():
        steps += 1
        if steps == 5:
            core.add_request("first", {"prompt_token_ids": prompt}, GREEDY, lora_request=request("moving", moving, 50))
        if "first" in done and "second" not in done and steps < 1000:
            first = tiny.merged(model, moving["moving"])
            assert tiny.differs(done["first"], prompt, first) is None
            tiny.write_adapter(moving["moving"], 101, 3, tiny.ALL)  # another rank
            core.add_lora(request("moving", moving, 50, load_inplace=True))
            core.reset_prefix_cache()
            core.add_request("second", {"prompt_token_ids": prompt}, GREEDY, lora_request=request("moving", moving, 50))
            steps = 1000
        done |= {o.request_id.split("-")[0]: list(o.outputs[0].token_ids) for o in core.step() if o.finished}
    assert tiny.differs(done["second"], prompt, tiny.merged(model, moving["moving"], 1)) is None
    assert tiny.differs(done["steady"], prompt, tiny.merged(model, adapters["all_8"])) is None
    assert tiny.differs(done["base"], prompt, tiny.merged(model, None)) is None
    assert core.remove_lora(50) and 50 not in core.list_loras()


@pytest.mark.parametrize(
    "kind, error",
    [
        (dict(r=32, targets=tiny.ALL), "rank"),
        (dict(r=4, targets=("self_attn.q_proj",), use_dora=True), "(?i)dora"),
        (dict(r=4, targets=("mlp.no_such",), sizes={"mlp.no_such": (128, 128)}), "expected target modules"),
        (dict(r=4, targets=("self_attn.o_proj",), sizes={"self_attn.o_proj": (64, 128)}), r"lora_A \[r, 128\], got"),
        (dict(r=4, targets=("lm_head",), sizes={"lm_head": (64, 160)}), r"lora_A \[r, 128\], got"),
        (dict(r=4, targets=("lm_head",), sizes={"lm_head": (128, 168)}), r"lora_B of \[160\] rows, got \[168\]"),
        (dict(r=4, targets=("self_attn.v_proj",), sizes={"self_attn.v_proj": (128, 32)}), "of another base model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_adapter_is_refused_and_the_engine_goes_on(engine, model, adapters, tmp_path, kind, error):
    bad = {"bad": tiny.write_adapter(tmp_path / "bad", 7, **kind)}
    with pytest.raises(ValueError, match=error):
        engine.llm_engine.add_lora(request("bad", bad, 60))
    assert 60 not in engine.llm_engine.list_loras()
    tokens = run(engine, [tiny.SHARED, tiny.SHARED], [request("all_3", adapters), None])
    assert tiny.differs(tokens[0], tiny.SHARED, tiny.merged(model, adapters["all_3"])) is None
    assert tiny.differs(tokens[1], tiny.SHARED, tiny.merged(model, None)) is None


def test_a_compiled_model_calls_the_custom_operator(engine, adapters):
    """torch.compile keeps one opaque operator in the place of a call, and looks the rows up when it runs."""
    ours = wrapper(engine)
    run(engine, [tiny.SHARED], [request("all_8", adapters)])
    slots = next(s for s in ours._slots.values() if len(s.N) == 3)
    A, B, K = tuple(slots.A), tuple(slots.B), slots.A[0].shape[3]

    def layer(x):
        y = x @ torch.ones(K, sum(slots.N)) * 0.1
        ours.add_lora_linear(y, x, A, B, 1.0, tuple(slots.N))
        return y * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in ([0, -1, 0, 0], [-1, -1, -1, 0]):
        slot = max(range(4), key=lambda s: slots.ranks[0][s])
        ours._tokens.step(torch.tensor(rows).mul(slot + 1).clamp(-1).numpy().astype("int32"))
        x = torch.randn(4, K)
        assert torch.equal(compiled(x), layer(x))


def test_terms_alone_leave_base_rows_as_they_are(engine, adapters):
    """add_inputs=False, which vLLM asks for where the base product runs beside on another stream."""
    ours = wrapper(engine)
    run(engine, [tiny.SHARED], [request("all_8", adapters)])
    slots = next(s for s in ours._slots.values() if len(s.N) == 3)
    slot = max(range(4), key=lambda s: slots.ranks[0][s])
    mapping = [slot + 1, 0, slot + 1]
    ours.update_metadata(LoRAMapping(mapping, mapping, is_prefill=True), [*range(1, 5)], 4, tiny.VOCAB)
    x, sums = torch.randn(3, slots.A[0].shape[3]), []
    for start in (torch.zeros(3, sum(slots.N)), torch.full((3, sum(slots.N)), 7.0)):
        ours.add_lora_linear(start, x, slots.A, slots.B, 1.0, tuple(slots.N), add_inputs=False)
        sums.append(start)
    assert torch.equal(sums[0][::2], sums[1][::2]) and sums[0][0].any()
    assert (sums[0][1] == 0).all() and (sums[1][1] == 7).all()
