"""Log probabilities of the engine are those of the adapter merged in float64, token by token."""

import pytest
import torch

from fused_lora.testing.numeric import assert_close
from helpers import serving
from helpers.serving import engine_config as config
from helpers.serving import prompt, results, stopped, store_of
from helpers.waiting import wait_for

serving.need_engine()

from fused_lora.serving.engine import logprobs  # noqa: E402
from fused_lora.serving.engine.continuous import continuous_batching, generate_batch  # noqa: E402
from fused_lora.serving.engine.logprobs import LEAST, TokenLogprob, record  # noqa: E402

TERMS = 2 * (4 * 64 + 160) + 257  # two layers of 64 features, an mlp of 160, and the sum over the vocabulary


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model, a store that knows all adapters, log_softmax(adapter, ids) of the merged model in float64)."""
    tiny = serving.Tiny(tmp_path_factory.mktemp("logprobs"), a0=4, a1=9)
    tiny.adapters["head"] = serving.write_adapter(tiny.root / "head", tiny.plain, 8, seed=5, head=True)
    model = serving.load_model(tiny.folder)
    return model, store_of(model, tiny.adapters), tiny.log_softmax


def check(exact, name, output, count, with_prompt):
    """Every token has its log probability, and the likeliest are the likeliest, up to ties of rounding."""
    ids = [*output.prompt_ids, *output.generated_tokens]
    first = 1 if with_prompt else len(output.prompt_ids)
    told = output.logprobs
    assert [entry.token for entry in told] == ids[first:]
    rows = exact(name, ids)[first - 1 : len(ids) - 1]
    wanted = rows.gather(1, torch.tensor(ids[first:])[:, None])[:, 0]
    assert_close(torch.tensor([entry.logprob for entry in told]), wanted, TERMS, name="logprobs")
    tops = torch.tensor([[value for _, value in entry.top] for entry in told]).view(len(told), count)
    assert_close(tops, rows.topk(count).values.float(), TERMS, name="top")
    places = torch.tensor([[token for token, _ in entry.top] for entry in told]).view(len(told), count)
    assert_close(tops, rows.gather(1, places).float(), TERMS, name="tokens of top")
    for entry in told:  # bit-equal, as clients compare them: lm-eval's is_greedy
        assert dict(entry.top).get(entry.token, entry.logprob) == entry.logprob


@pytest.mark.numeric
def test_prompts_in_chunks_beside_requests_that_ask_for_nothing(world, monkeypatch):
    model, store, exact = world
    monkeypatch.setattr(logprobs, "_ROWS", 7)  # so that a step of a prompt takes several pieces
    asked = [(None, 130, 3, True), ("a0", 70, 0, True), ("a1", 20, 2, False), ("head", 60, 1, True), ("a1", 1, 1, True)]
    with continuous_batching(model, store, config()) as engine:
        others = [engine.add_request(prompt(30, i), adapter="a0", max_new_tokens=9) for i in range(3)]
        ids = [
            engine.add_request(
                prompt(length), adapter=name, max_new_tokens=6, logprobs=count, prompt_logprobs=whole, temperature=0.8
            )
            for name, length, count, whole in asked
        ]
        outputs = results(engine, *ids, *others)
    for (name, _, count, whole), output in zip(asked, outputs, strict=False):
        check(exact, name, output, count, whole)
    assert all(output.logprobs == [] for output in outputs[len(asked) :])


@pytest.mark.numeric
def test_prompt_that_is_in_the_prefix_cache_is_computed_again(world):
    model, store, exact = world
    with continuous_batching(model, store, config()) as engine:
        rows = []
        for more in ({}, {}, dict(logprobs=1), dict(logprobs=1, prompt_logprobs=True)):
            before = engine.counters.adapter_rows
            (output,) = results(engine, engine.add_request(prompt(45), adapter="a0", max_new_tokens=3, **more))
            rows.append(engine.counters.adapter_rows - before)
            if more:
                check(exact, "a0", output, 1, "prompt_logprobs" in more)
    assert rows[0] == rows[3] == 47 and rows[1] == rows[2] < 20


@pytest.mark.numeric
def test_request_that_loses_its_cache_tells_each_token_once(world):
    model, store, exact = world
    with continuous_batching(model, store, config(num_blocks=30, safety_margin=0.0)) as engine:
        told = dict(adapter="a0", max_new_tokens=60, logprobs=1, prompt_logprobs=True)

        def start():
            with engine.pause():
                return [engine.add_request(prompt(30, i), **told) for i in range(6)]

        def lost():
            return any(s._true_initial_tokens for s in engine.batch_processor.scheduler.waiting_requests.values())

        with stopped(engine, lost, start) as ids:
            pass
        outputs = results(engine, *ids)
    for output in outputs:
        check(exact, "a0", output, 1, True)


def test_streamed_outputs_have_what_was_told_so_far(world):
    model, store, _ = world
    with continuous_batching(model, store, config()) as engine:
        engine.add_request(prompt(60), max_new_tokens=5, streaming=True, logprobs=0, prompt_logprobs=True)
        counts = []
        wait_for(lambda: counts.append(engine.get_result(timeout=0.1)) or len([c for c in counts if c]) == 5)
    assert [len(output.logprobs) for output in counts if output] == [60, 61, 62, 63, 64]


def test_generate_batch_has_them(world):
    model, store, exact = world
    (output,) = generate_batch(model, store, [prompt(9)], ["a1"], 4, config(), logprobs=2, prompt_logprobs=True)
    check(exact, "a1", output, 2, True)


def test_impossible_token_has_the_least():
    class Request:
        position_offset, query_length, has_new_token = 1, 1, True
        initial_tokens, logprobs, _true_initial_tokens = [3], [], 0
        logit_processor_kwargs = {"logprobs": 2}

    Request.state = Request
    logits = torch.tensor([[[0.0, float("-inf"), float("-inf")]]])
    record([Request], logits, False, torch.tensor([1], dtype=torch.int32))
    assert Request.logprobs == [TokenLogprob(1, LEAST, ((0, 0.0), Request.logprobs[0].top[1]))]
    assert Request.logprobs[0].top[1][1] == LEAST
