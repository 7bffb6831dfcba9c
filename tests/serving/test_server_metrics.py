"""The page of metrics without a server: labels are bounded, and prometheus-client's parser reads every number."""

import asyncio
import logging
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("transformers")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from fused_lora.serving.engine.admission import EngineCounters  # noqa: E402
from fused_lora.serving.http.engine import AsyncEngine, Job, Limits  # noqa: E402
from fused_lora.serving.http.metrics import MOST_ADAPTERS, OTHERS, Counts, Metrics  # noqa: E402
from fused_lora.serving.http.record import AddRequestId, Record, request_id, taken_or_made  # noqa: E402


class Engine:
    counters = EngineCounters(cached_tokens=7)

    def queue_lengths(self):
        return 1, 2

    def cache_used(self):
        return 0.25


class Store:
    def stats(self):
        return dict(hits=1, loads=2, evictions=3, bytes_used=4, capacity=None, in_use=5, adapters=6)

    def refusals(self):
        return {"bad": ValueError()}


def samples(metrics):
    page = metrics.text(Engine(), Store()).decode()
    found = [s for family in text_string_to_metric_families(page) for s in family.samples]
    return {(s.name.removeprefix("fused_lora_"), *s.labels.values()): s.value for s in found}


def test_numbers_are_those_of_engine_and_store():
    metrics = Metrics()
    metrics.requests["/v1/models", 200] += 3
    metrics.ended["finished"] += 2
    metrics.of("org/a.b").generation_tokens += 9
    found = samples(metrics)
    assert found["requests_total", "/v1/models", "200"] == 3 and found["sequences_ended_total", "finished"] == 2
    assert found["adapter_generation_tokens_total", "org/a.b"] == 9
    assert found[("cache_used_ratio",)] == 0.25 and found[("prompt_tokens_cached_total",)] == 7
    assert found[("adapter_bytes_capacity",)] == 0 and found[("adapters_refused",)] == 1
    assert (found[("requests_running",)], found[("requests_waiting",)]) == (1, 2)


def test_adapters_beyond_the_most_share_a_label():
    metrics = Metrics()
    metrics.of(None).sequences += 1
    for i in range(MOST_ADAPTERS + 5):
        metrics.of(f"a{i}").sequences += 1
    found = {key[1]: value for key, value in samples(metrics).items() if key[0] == "adapter_sequences_total"}
    assert len(found) == MOST_ADAPTERS + 2 and found[OTHERS] == 5 and found[""] == found["a0"] == 1
    metrics.forget("a0")
    metrics.forget("never seen")
    late = metrics.of("a0")
    late.sequences += 1
    assert metrics.of(OTHERS) is late  # the others keep theirs


def test_the_base_model_has_its_own_label_after_many_adapters():
    metrics = Metrics()
    for i in range(MOST_ADAPTERS + 5):
        metrics.of(f"a{i}").sequences += 1
    metrics.of(None).sequences += 7
    found = {key[1]: value for key, value in samples(metrics).items() if key[0] == "adapter_sequences_total"}
    assert (found[""], found[OTHERS], len(found)) == (7, 5, MOST_ADAPTERS + 2)


class Manager:
    """Answers every request with two tokens, one after the other."""

    store, counters, generation_config = {}, EngineCounters(), SimpleNamespace(eos_token_id=0)

    def __init__(self):
        self.output_router = SimpleNamespace(_lock=threading.Lock(), result_handlers={})

    def register_result_handler(self, request_id, handler):
        self.output_router.result_handlers[request_id] = handler

    def add_request(self, prompt, request_id, *limits, **options):
        for tokens in ([5], [5, 6]):
            output = SimpleNamespace(error=None, generated_tokens=tokens, logprobs=[])
            output.is_finished = lambda tokens=tokens: len(tokens) == 2
            self.output_router.result_handlers[request_id](output)


def test_first_token_is_timed_from_the_requests_first_byte():
    """Reading and tokenising are in it; the time between tokens is not from there."""
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "x" * len(tokens))
    metrics = Metrics()
    engine = AsyncEngine(Manager(), tokenizer, Limits(), metrics)
    job = Job([1], None, 2, 0.0, 1.0, None, [], since=time.monotonic() - 1000)

    async def run():
        return [piece.text async for piece in engine.generate(job)]

    assert "".join(asyncio.run(run())) == "xx"
    found = samples(metrics)
    assert found[("time_to_first_token_seconds_sum",)] > 1000 and found[("request_seconds_sum",)] > 1000
    assert found[("inter_token_seconds_count",)] == 1 and found[("inter_token_seconds_sum",)] < 1000
    assert found["inter_token_seconds_bucket", "+Inf"] == 1
    assert metrics.of(None) == Counts(1, 1, 2)


def test_log_records_have_the_id_of_their_request(caplog):
    record = logging.LogRecord("x", logging.INFO, "f", 1, "said", (), None)
    assert AddRequestId().filter(record) and record.request_id == "-"
    token = request_id.set("r1")
    try:
        AddRequestId().filter(record)
    finally:
        request_id.reset(token)
    assert record.request_id == "r1"
    with caplog.at_level(logging.INFO, "fused_lora.access"):
        Record(taken_or_made([(b"x-request-id", b"r2")]), "GET", "/health", status=200).write()
    line = caplog.messages[0]
    assert line.startswith("id=r2 method=GET route=/health status=200 model=- tokens_in=- ") and "\n" not in line
