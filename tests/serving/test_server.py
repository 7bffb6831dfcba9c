"""The HTTP server, run as its users run it: a process of its own, asked by OpenAI's client."""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import re
import shutil
import signal
import socket
import sys
import threading

import pytest

from helpers import serving
from helpers.server import Server
from helpers.waiting import HANG, wait_for

openai = pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")
serving.need_engine("fastapi", "uvicorn", "prometheus_client")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from fused_lora.cli.serve import _bytes, parser  # noqa: E402
from fused_lora.serving.engine import continuous  # noqa: E402
from fused_lora.serving.http.api import ApiError  # noqa: E402
from fused_lora.serving.http.engine import Limits  # noqa: E402
from fused_lora.serving.http.guard import Guard, allowed_adapter  # noqa: E402
from fused_lora.serving.http.metrics import Metrics  # noqa: E402

KEY, ORIGIN = "right-key", "http://pages.test:3000"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Beside the folder of adapters is one that must stay out of reach."""
    found = serving.Tiny(tmp_path_factory.mktemp("server"), a0=4, a1=8, a2=16, a3=6, a4=12, a5=64)
    secret = serving.write_adapter(found.root.parent / "outside" / "secret", found.plain, 4, seed=77)
    (found.root / "escape").symlink_to(secret)
    linked = found.root / "linked"
    linked.mkdir()
    shutil.copy(secret / "adapter_config.json", linked)
    (linked / "adapter_model.safetensors").symlink_to(secret / "adapter_model.safetensors")
    (found.root / "empty").mkdir()
    return found


@pytest.fixture(scope="module")
def alone(world):
    return world.text


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    with Server(world.folder, world.root, log, "--allow-load", "--drain-timeout", "1", key=KEY) as found:
        yield found


@pytest.fixture(scope="module")
def strict(world, tmp_path_factory):
    """A server with a key, small limits and no loading."""
    limits = f"--max-tokens 1000 --max-queue 3 --max-body 20K --max-requests 2 --allow-origin {ORIGIN}".split()
    log = tmp_path_factory.mktemp("log") / "log"
    with Server(world.folder, world.root, log, "--api-key", KEY, *limits, key=KEY) as found:
        yield found


def status_of(call):
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value.status_code, caught.value.body


def test_models_are_the_base_and_its_adapters(server):
    models = server.client.models.list().data
    assert [m.id for m in models] == ["tiny", "a0", "a1", "a2", "a3", "a4", "a5"]
    assert models[0].parent is None and {m.parent for m in models[1:]} == {"tiny"}
    log = server.log.read_text()
    assert "'escape' is left out" in log and "'linked' is left out" in log


@pytest.mark.parametrize("name", ["tiny", "a0", "a1", "a5"])
def test_completion_is_the_merged_models(server, alone, name):
    answer = server.say(name, "The answer is", 16)
    choice = answer.choices[0]
    assert choice.text == alone(name, "The answer is", 16)
    assert (choice.index, answer.model, answer.object) == (0, name, "text_completion")
    used = answer.usage
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (13, 16, 29)
    assert choice.finish_reason == "length"


def test_end_of_sequence_ends_the_answer(server):
    answer = server.say("a1", "End", 300, n=8, temperature=2.0, seed=1)
    assert "stop" in {choice.finish_reason for choice in answer.choices}
    assert answer.usage.completion_tokens < 8 * 300 and not any("<end>" in c.text for c in answer.choices)


def test_ignore_eos_goes_on_to_the_limit(server):
    answer = server.say("a1", "End", 300, n=8, temperature=2.0, seed=1, extra_body={"ignore_eos": True})
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.completion_tokens == 8 * 300 and not any("<end>" in c.text for c in answer.choices)


def test_chat_is_the_merged_models(server, alone):
    parts = [{"type": "text", "text": "hi"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    create = server.client.chat.completions.create
    answer = create(model="a2", messages=messages, temperature=0, max_completion_tokens=9)
    assert answer.choices[0].message.content == alone("a2", "system: Be brief.\nuser: hi\nassistant:", 9)
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"


@pytest.mark.parametrize("name", ["tiny", "a2"])
def test_streams_add_up_to_the_whole(server, alone, name):
    chunks = list(server.say(name, "Stream this", 20, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(c.choices[0].text for c in pieces) == alone(name, "Stream this", 20)
    assert [c.choices[0].finish_reason for c in pieces][:-1] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length") and len(pieces) > 3
    assert last.choices == [] and last.usage.completion_tokens <= 20 and len({c.id for c in chunks}) == 1
    messages = [{"role": "user", "content": "hi"}]
    create = server.client.chat.completions.create
    chunks = list(create(model=name, messages=messages, temperature=0, max_tokens=9, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == alone(name, "user: hi\nassistant:", 9)


def test_an_event_is_one_line_to_every_client(server):
    text = "".join(map(chr, range(1, 0x100))) + "\u2028\u2029"
    body = dict(model="a1", prompt=text, echo=True, max_tokens=0, stream=True)
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = list(answer.iter_lines())  # as str.splitlines
    assert [line for line in lines if line][1:] == ["data: [DONE]"]
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == text


def test_chunks_have_the_usage_up_to_them_where_it_is_asked_for(server):
    options = dict(include_usage=True, continuous_usage_stats=True, include_obfuscation=False)
    more = dict(messages=[dict(role="user", content="hi")], max_tokens=9, temperature=0, stream=True, n=2)
    chunks = list(server.client.chat.completions.create(model="a1", **more, stream_options=options))
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts) and counts[-1] == 18 and len(set(counts)) > 4
    # the role comes with the first token: load generators take the first chunk's time for the token's
    assert chunks[0].choices[0].delta.role == "assistant" and counts[0] == 1
    assert {c.usage.prompt_tokens for c in chunks} == {19} and chunks[-1].choices == []


def test_many_clients_with_different_adapters(server, alone):
    names = ["tiny", "a0", "a1", "a2", "a3", "a4", "a5"]
    shared = "The same prompt for many of them, page after page"
    jobs = [(names[i % 7], f"Prompt {i // 3}" if i % 2 else shared) for i in range(42)]
    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        answers = list(pool.map(lambda job: server.say(*job, 10).choices[0].text, jobs))
    assert answers == [alone(*job, 10) for job in jobs]
    assert server.metric("step_requests_total") > server.metric("steps_total")


def test_prompts_of_a_list_and_several_choices(server, alone):
    answer = server.say("a1", ["one", "two"], 8, n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    wanted = [alone("a1", p, 8) for p in ("one", "one", "two", "two")]
    assert [c.text for c in answer.choices] == wanted and answer.usage.prompt_tokens == 6
    ids = [ord(c) - ord("!") for c in "one"]  # the byte tokenizer's order begins with "!"
    assert server.say("a1", ids, 8).choices[0].text == wanted[0]
    sampled = server.say("a1", "one", 8, n=2, temperature=1.0, seed=5)
    assert sampled.choices[0].text != sampled.choices[1].text
    again = server.say("a1", "one", 8, n=2, temperature=1.0, seed=5)
    assert [c.text for c in again.choices] == [c.text for c in sampled.choices]
    streamed = list(server.say("a1", ["one", "two"], 8, stream=True))
    for index, text in ((0, wanted[0]), (1, wanted[2])):
        assert "".join(c.choices[0].text for c in streamed if c.choices[0].index == index) == text


def test_one_request_may_have_as_many_prompts_as_the_queue(server, strict, alone):
    answer = server.say("a1", ["one", "two"] * 60, 2)
    assert [c.text for c in answer.choices] == [alone("a1", "one", 2), alone("a1", "two", 2)] * 60
    status, body = status_of(lambda: strict.say("a1", ["one"] * 4, 2))  # no 429: to ask again would not help
    assert status == 400 and "expected 1 to 3, got 4 x 1" in body["message"]


def test_stop_strings(server, alone):
    whole = alone("tiny", "Stop", 30)
    pairs = [whole[i : i + 2] for i in range(4, 20)]
    stop = next(pair for pair in pairs if "\ufffd" not in pair and pair not in whole[:4])
    wanted = whole[: whole.index(stop)]
    answer = server.say("tiny", "Stop", 30, stop=[stop, "never in it"])
    assert answer.choices[0].text == wanted and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 30
    chunks = list(server.say("tiny", "Stop", 30, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == wanted and chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "changes, status, named",
    [
        (dict(model="nobody"), 404, "nobody"),
        (dict(model="escape"), 404, "escape"),
        (dict(model="../outside/secret"), 404, "does not exist"),
        (dict(suffix="x"), 400, "suffix is not supported"),
        (dict(presence_penalty=0.5), 400, "presence_penalty"),
        (dict(extra_body={"min_p": 0.1}), 400, "min_p is not supported"),
        (dict(extra_body={"priority": 1}), 400, "Unrecognized request argument: priority"),
        (dict(max_tokens=1024), 400, "This model's maximum context length is 1024 tokens, and the prompt is too long"),
        (dict(n=99, prompt=["x", "y"]), 400, "expected 1 to 128, got 2 x 99"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_unsupported_parameters_are_refused_by_name(server, changes, status, named, stream):
    request = {**dict(model="tiny", prompt="x", max_tokens=4, stream=stream), **changes}
    got, body = status_of(lambda: server.client.completions.create(**request))
    assert got == status and named in body["message"] and body["param"] != ""
    assert set(body) == {"message", "type", "param", "code", "request_id"}


def test_neutral_values_are_accepted(server):
    neutral = dict(logit_bias={}, presence_penalty=0, frequency_penalty=0.0, logprobs=None, best_of=1, user="me")
    of_vllm = dict(top_k=-1, min_p=0, repetition_penalty=1.0, ignore_eos=False, min_tokens=0, stop_token_ids=[])
    assert server.say("tiny", "x", 2, **neutral, extra_body=of_vllm).usage.completion_tokens == 2


def test_what_clients_send_on_their_own_is_accepted_in_chats(server, alone):
    messages = [dict(role="user", content="x", type="text", name="me"), dict(role="assistant", content="y", audio=None)]
    asks_nothing = dict(tools=[], tool_choice="auto", response_format={"type": "text"})
    asks_nothing |= dict(logprobs=False, top_logprobs=0, reasoning_effort="none", verbosity="medium", audio=None)
    without_effect = dict(prediction={"type": "content", "content": "y"}, prompt_cache_retention="24h", store=True)
    body = dict(model="a1", messages=messages, max_tokens=4, temperature=0, **asks_nothing, **without_effect)
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == alone("a1", "user: x\nassistant: y\nassistant:", 4)


def test_what_a_chat_template_reads_beside_the_messages(server, alone):
    body = dict(model="a1", messages=[dict(role="user", content="x")], max_tokens=4, temperature=0)

    def ask(told):
        return server.http.post("/v1/chat/completions", json={**body, "chat_template_kwargs": told})

    answer = ask({"opening": "Hm. ", "enable_thinking": False}).json()
    assert answer["choices"][0]["message"]["content"] == alone("a1", "Hm. user: x\nassistant:", 4)
    assert ask(None).json()["choices"] == ask({}).json()["choices"]
    for wrong in ({"chat_template": "x"}, {"tokenize": False}, {"messages": "x"}, {"opening": ["x"]}, ["x"]):
        refused = ask(wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"].startswith("chat_template_kwargs")


def test_chat_refuses_tools(server):
    request = dict(model="a0", max_tokens=4, messages=[{"role": "user", "content": "x"}])
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    _, body = status_of(lambda: server.client.chat.completions.create(**request, tools=tools))
    assert "tools" in body["message"]


def test_unknown_routes_have_the_error_shape(server):
    error = server.http.post("/v1/responses", json={}).json()["error"]
    assert error["type"] == "invalid_request_error" and "POST /v1/responses" in error["message"]
    wrong = server.http.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and "POST" in wrong.json()["error"]["message"]


def test_head_is_answered_where_get_is(server):
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/a0"):
        head, whole = server.http.head(path), server.http.get(path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert [server.http.head(path).status_code for path in ("/v1/models/nobody", "/v1/completions")] == [404, 405]
    assert server.http.get("/health").json() == {"status": "ok"}  # the connection is still in step


def test_load_and_unload(server, alone, world):
    assert server.load("guest", "a3").status_code == 200
    assert server.say("guest", "Load", 8).choices[0].text == alone("a3", "Load", 8)
    assert "guest" in [m.id for m in server.client.models.list().data]
    again = server.load("guest", "a4")
    assert again.status_code == 400 and "already been loaded" in again.json()["error"]["message"]
    assert server.load("guest", world.root / "a4", load_inplace=True).status_code == 200
    assert server.say("guest", "Load", 8).choices[0].text == alone("a4", "Load", 8)
    assert [server.unload("guest").status_code for _ in range(2)] == [200, 404]
    assert status_of(lambda: server.say("guest", "Load", 8))[0] == 404


@pytest.mark.parametrize(
    "path, status",
    [
        ("escape", 400),
        ("linked", 400),
        ("../outside/secret", 400),
        ("a0/../../outside/secret", 400),
        ("/nowhere/at/all", 400),
        ("empty", 404),
        ("missing", 404),
    ],
)
def test_only_adapters_of_the_folder_are_loaded(server, path, status):
    before = server.http.get("/v1/models").json()
    answer = server.load("ok", path)
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert server.http.get("/v1/models").json() == before


def test_damaged_adapter_is_refused_and_the_old_one_stays(server, alone, world):
    folder = world.root / "damaged"
    shutil.copytree(world.root / "a3", folder)
    try:
        assert server.load("frail", "damaged").status_code == 200
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-64])
        answer = server.load("frail", "damaged", load_inplace=True)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_adapter"
        assert str(folder) not in answer.text
        assert server.say("frail", "Still", 8).choices[0].text == alone("a3", "Still", 8)
    finally:
        server.unload("frail")
        shutil.rmtree(folder)


def test_reload_never_serves_a_token_of_the_old_one(server, alone):
    """Clients ask all the time while the adapter changes under its name: every answer is of one version, and whoever
    asked after the load had returned gets the new one."""
    versions = ["a0", "a1", "a2", "a3"]
    wanted = {v: alone(v, "Which one are you?", 24) for v in versions}
    assert len(set(wanted.values())) == len(versions)
    assert server.load("swap", versions[0]).status_code == 200
    loaded, asked, stop = [0], [], threading.Event()

    def ask(index):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=HANG)
        while not stop.is_set():
            at_least = loaded[0]
            request = dict(model="swap", prompt="Which one are you?", max_tokens=24, temperature=0)
            try:
                if index % 2:
                    text = "".join(c.choices[0].text for c in client.completions.create(**request, stream=True))
                else:
                    text = client.completions.create(**request).choices[0].text
            except openai.APIError as error:  # a load ends what is still running after the drain timeout
                assert "was changed while the request ran" in str(error)
                continue
            asked.append((at_least, loaded[0], text))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 9):
            answered = len(asked)
            wait_for(lambda n=answered: len(asked) > n + len(threads))
            answer = server.load("swap", versions[number % len(versions)], load_inplace=True)
            assert answer.status_code == 200, answer.text
            loaded[0] = number
        answered = len(asked)
        wait_for(lambda: len(asked) > answered + len(threads))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    server.unload("swap")
    for first, last, text in asked:
        # a load counts from when its answer was read, so one more may have happened
        possible = {wanted[versions[i % len(versions)]] for i in range(first, last + 2)}
        assert text in possible, (first, last)


def test_load_ends_what_still_runs_on_the_old_version(server, alone):
    """Its drain time is a second here; that it waits is shown in test_server_engine.py, without a clock."""
    prompts = [f"Prompt {i}" for i in range(16)]
    for old, new in itertools.cycle([("a0", "a1"), ("a1", "a0")]):
        assert server.load("busy", old, load_inplace=True).status_code == 200
        texts = [""] * 16
        stream = iter(server.say("busy", prompts, 1000, stream=True))
        for chunk in itertools.islice(stream, 64):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert server.load("busy", new, load_inplace=True).status_code == 200
        assert server.say("busy", "New", 8).choices[0].text == alone(new, "New", 8)
        try:
            for chunk in stream:
                texts[chunk.choices[0].index] += chunk.choices[0].text
        except openai.APIError as error:
            assert "'busy' was changed while the request ran" in str(error)
            break
        # all of it was made before the load began: this machine is fast, or this thread waited for long
    for prompt, text in zip(prompts[:4], texts, strict=False):
        assert len(text) > 2 and alone(old, prompt, 200).startswith(text[:100].rstrip("\ufffd"))
    server.unload("busy")


def test_client_that_hangs_up_frees_its_place(server):
    def left() -> bool:
        """Whether the client has left before the end; where this process waits for long, all tokens are made before."""
        body = {"model": "a5", "prompt": "Go on", "max_tokens": 1000, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            return server.metric("requests_running") == 1

    wait_for(left)
    wait_for(lambda: server.metric("requests_running") == 0 and server.metric("requests_waiting") == 0)
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "a5", "prompt": "Go on", "max_tokens": 1000, "n": 8}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(HANG, read=0.4))
    wait_for(lambda: server.metric("requests_running") == 0 and server.metric("requests_waiting") == 0)

    def alone() -> bool:
        """Whether a request is the only one that generates tokens while it runs."""
        before = server.metric("generation_tokens_total")
        used = server.say("a5", "Go on", 4).usage.completion_tokens
        return server.metric("generation_tokens_total") == before + used

    before = server.metric("generation_tokens_total")
    wait_for(alone)  # the step that ran when the client left may still count
    assert server.metric("generation_tokens_total") < before + 1000  # nothing like the 8,000 that were asked for


def families(server):
    """{name: family} of the page, as Prometheus' own parser reads it."""
    page = server.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(page.text)}


def test_metrics(server):
    before = server.metric("inter_token_seconds_count"), server.metric("prompt_tokens_cached_total")
    for _ in range(2):
        server.say("a0", "x" * 100, 3)
    assert server.metric("inter_token_seconds_count") == before[0] + 4
    assert before[1] + 64 <= server.metric("prompt_tokens_cached_total") <= before[1] + 99
    assert 0 < server.metric("cache_used_ratio") < 1
    known = families(server)
    for name in ("time_to_first_token", "inter_token", "request"):
        family = known[f"fused_lora_{name}_seconds"]
        buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        (count,) = (sample.value for sample in family.samples if sample.name.endswith("_count"))
        (total,) = (sample.value for sample in family.samples if sample.name.endswith("_sum"))
        assert family.type == "histogram" and buckets == sorted(buckets) and buckets[-1] == count > 0 < total
    page = server.http.get("/metrics").text
    numbers = "generation_tokens_per_second steps_total adapters_known adapter_bytes_used adapter_evictions_total"
    for name in numbers.split():
        assert re.search(rf"^fused_lora_{name} [0-9.e+-]+$", page, re.MULTILINE), name
    assert server.metric("adapter_loads_total") >= 1 and server.metric("adapter_hits_total") >= 1
    assert server.metric('step_rows_total{kind="adapter"}') >= 3
    names = re.findall(r"^# TYPE (\S+)", page, re.MULTILINE)
    assert len(names) == len(set(names))


def by_adapter(server, what):
    """{adapter: count}"""
    return {s.labels["adapter"]: s.value for s in families(server)[f"fused_lora_adapter_{what}"].samples}


def test_adapters_are_counted_while_they_are_loaded(server):
    name = "org/counted.v1"
    assert server.load(name, "a3").status_code == 200
    base = by_adapter(server, "sequences").get("", 0)
    server.say(name, ["one", "three"], 5, n=2)
    server.say("tiny", "x", 2)
    found = {what: by_adapter(server, what) for what in ("sequences", "prompt_tokens", "generation_tokens")}
    assert [found[what][name] for what in found] == [4, 16, 20] and found["sequences"][""] == base + 1
    assert server.unload(name).status_code == 200
    assert name not in by_adapter(server, "sequences")
    assert status_of(lambda: server.say(name, "x", 2))[0] == 404
    assert name not in by_adapter(server, "sequences")  # who asks for it does not bring it back


def log_line(server, request_id):
    """The fields of this request's line in the access log."""
    found, line = [], re.compile(rf"fused_lora.access .*? (id={request_id} .*)")
    wait_for(lambda: found.extend(line.findall(server.log.read_text())) or found)
    assert len(found) == 1
    return dict(field.split("=", 1) for field in found[0].split())


@pytest.mark.parametrize("stream", [False, True])
def test_request_ids_and_the_access_log(server, stream):
    given = f"mine/{stream}:1"
    headers = {"x-request-id": given}
    answer = server.client.completions.with_raw_response.create(
        model="a1", prompt="Nobody reads this", max_tokens=6, temperature=0, stream=stream, extra_headers=headers
    )
    assert answer.headers["x-request-id"] == given
    list(answer.parse()) if stream else answer.parse()
    line = log_line(server, given)
    said = [line[key] for key in ("method", "route", "status", "model", "error")]
    assert said == ["POST", "/v1/completions", "200", "a1", "-"]
    assert (line["tokens_in"], line["tokens_out"]) == ("17", "6")
    assert 0 < float(line["first_token_s"]) <= float(line["seconds"]) < HANG
    assert "Nobody reads" not in server.log.read_text()


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "ü", "a\tb"])
def test_ids_are_made_where_none_is_given_that_fits_in_a_line(server, given):
    headers = {} if given is None else {"x-request-id": given.encode()}
    made = server.http.get("/v1/models", headers=headers).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert log_line(server, made)["model"] == "-"


def test_errors_say_which_request(server):
    answer = server.http.post(
        "/v1/completions", json={"model": "a\nid=x", "prompt": "x"}, headers={"x-request-id": "e1"}
    )
    assert answer.status_code == 404 and answer.json()["error"]["request_id"] == "e1"
    line = log_line(server, "e1")
    assert (line["status"], line["error"], line["model"]) == ("404", "model_not_found", "-")
    with pytest.raises(openai.NotFoundError) as caught:
        server.say("nobody", "x")
    assert caught.value.request_id == caught.value.body["request_id"]
    made = server.http.get("/any%0Aid=x").headers["x-request-id"]
    assert (log_line(server, made)["route"], log_line(server, made)["status"]) == ("other", "404")


def test_a_client_that_hangs_up_is_logged_as_that(server):
    body = {"model": "a5", "prompt": "Go on", "max_tokens": 1000, "stream": True}
    for name in map("left-{}".format, itertools.count()):
        with server.http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": name}) as answer:
            next(answer.iter_lines())
        line = log_line(server, name)
        if int(line["tokens_out"]) < 1000:  # else this process waited for long, and all were made before
            break
    assert (line["status"], line["error"]) == ("200", "disconnected") and int(line["tokens_out"]) > 0


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"])
def test_key_is_needed(strict, header):
    headers = {} if header is None else {"Authorization": header}
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/openapi.json"),
        ("GET", "/anything"),
    ):
        answer = httpx.request(method, f"{strict.url}{path}", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{strict.url}/health").status_code == 200
    assert httpx.get(f"{strict.url}/metrics").status_code == 200


def test_the_description_says_where_the_key_is_needed(strict, server):
    paths = strict.http.get("/openapi.json").json()["paths"]
    with_key = {path for path, methods in paths.items() for method in methods.values() if "security" in method}
    assert with_key == set(paths) - {"/health", "/metrics"} and len(with_key) == 6
    assert "security" not in server.http.get("/openapi.json").text


def test_right_key_is_let_in(strict, alone):
    assert strict.say("a1", "Key", 6).choices[0].text == alone("a1", "Key", 6)


def test_web_pages_of_allowed_origins_may_ask(strict, server):
    asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    url = f"{strict.url}/v1/chat/completions"
    first = httpx.options(url, headers=asks)  # without the key: browsers do not send it here
    assert first.status_code == 200 and first.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-lang" in first.headers["access-control-allow-headers"]
    assert httpx.options(url, headers={**asks, "Origin": "http://other.test"}).status_code == 400
    refused = httpx.post(url, headers={"Origin": ORIGIN}, json={})  # the page can read why
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == ORIGIN
    body = dict(model="a1", prompt="x", max_tokens=2, stream=True)
    answer = strict.http.post("/v1/completions", headers={"Origin": ORIGIN}, json=body)
    assert answer.headers["access-control-allow-origin"] == ORIGIN and answer.text.endswith("data: [DONE]\n\n")
    assert answer.headers["x-accel-buffering"] == "no"
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers={"Origin": ORIGIN}).headers


def test_loading_is_off_by_default(strict):
    for answer in (strict.load("a0", "a0"), strict.unload("a0")):
        assert answer.status_code == 403 and "--allow-load" in answer.json()["error"]["message"]


def test_limits(strict):
    assert strict.http.post("/v1/completions", content=b"x" * 30_000).status_code == 413
    chunked = strict.http.post("/v1/completions", content=(b"x" * 1000 for _ in range(30)))
    assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "body_too_large"
    status, body = status_of(lambda: strict.say("tiny", "x", 1001))
    assert status == 400 and "at most 1000" in body["message"]
    with strict.say("tiny", "x", 1000, n=3, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        status, body = status_of(lambda: strict.say("tiny", "x", 4))
    assert (status, body["code"]) == (429, "queue_full")
    wait_for(lambda: strict.metric("requests_running") == 0)


def test_requests_that_take_too_long_end(world, tmp_path):
    # three sequences of 1,000 tokens, two at a time: more than any machine does in this time
    slow = dict(temperature=1.0, top_p=0.9, seed=1)
    limits = "--request-timeout", "0.8", "--max-requests", "2"
    with Server(world.folder, world.root, tmp_path / "log", *limits) as server:
        status, body = status_of(lambda: server.say("a1", ["x"] * 3, 1000, **slow))
        assert (status, body["code"]) == (504, "timeout")
        wait_for(lambda: server.metric("requests_running") == 0)
        with pytest.raises(openai.APIError, match="longer than 0.8 s"):
            list(server.say("a1", ["x"] * 3, 1000, stream=True, **slow))


def digests(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_kill_in_the_middle_of_loads_leaves_every_file(world, tmp_path):
    adapters = tmp_path / "adapters"
    shutil.copytree(world.root, adapters, symlinks=True)
    before = digests(adapters)
    server = Server(world.folder, adapters, tmp_path / "log", "--allow-load").wait()
    done = []

    def load():
        with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=server.url) as client:
            while True:
                body = {"lora_name": "x", "lora_path": f"a{len(done) % 6}", "load_inplace": True}
                done.append(client.post("/v1/load_lora_adapter", json=body).status_code)

    thread = threading.Thread(target=load)
    thread.start()
    wait_for(lambda: len(done) > 5)
    server.process.send_signal(signal.SIGKILL)
    thread.join()
    assert server.process.wait() == -signal.SIGKILL and set(done) == {200}
    assert digests(adapters) == before


def test_graceful_shutdown_finishes_what_runs(world, alone, tmp_path):
    server = Server(world.folder, world.root, tmp_path / "log").wait()
    stream = server.say("a2", "Until the end", 200, stream=True)
    text = next(iter(stream)).choices[0].text
    server.process.send_signal(signal.SIGTERM)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == alone("a2", "Until the end", 200)
    assert server.process.wait(HANG) == 0, server.log.read_text()


def test_what_has_not_ended_in_time_is_told_that_the_server_stops(world, tmp_path):
    # 16 sequences of 1,000 tokens, two at a time: more than any machine does in this time
    long = dict(n=8, extra_body={"ignore_eos": True})
    with Server(world.folder, world.root, tmp_path / "log", "--drain-timeout", "1", "--max-requests", "2") as server:
        stream = server.say("a2", "x", 1000, stream=True, **long)
        next(iter(stream))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            whole = pool.submit(status_of, lambda: server.say("a1", "x", 1000, **long))
            wait_for(lambda: server.metric("requests_waiting") >= 8)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(stream)
            status, body = whole.result()
        assert (status, body["code"]) == (503, "shutting_down")
        assert server.process.wait(HANG) == 0 and "Traceback" not in server.log.read_text()


def test_a_client_that_does_not_read_is_cut_off_when_the_server_stops():
    async def run():
        begun, told = asyncio.Event(), asyncio.Event()

        async def stream(scope, receive, send):
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            begun.set()
            await asyncio.sleep(HANG)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            if message["type"] == "http.response.body":
                told.set()
                await asyncio.sleep(HANG)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        task = asyncio.create_task(Guard(stream, Limits(), None, Metrics())(scope, receive, send))
        await begun.wait()
        task.cancel()  # as uvicorn does after its time
        await told.wait()
        task.cancel()  # as the loop does at its end
        await task

    asyncio.run(run())


def test_command_line_refuses_nonsense(tmp_path, capsys, monkeypatch):
    from fused_lora.cli import main

    serve = ["serve", "--model", "m", "--port", "0"]
    with pytest.raises(SystemExit, match="needs --adapters"):
        main([*serve, "--allow-load"])
    with pytest.raises(SystemExit, match="no folder"):
        main([*serve, "--adapters", str(tmp_path / "none")])
    sizes = ("--capacity", "--host-capacity", "--max-body")
    counts = ("--max-requests", "--max-step-tokens", "--cache-tokens", "--max-queue", "--max-tokens")
    for option in (*sizes, *counts, "--request-timeout", "--drain-timeout", "--port"):
        for text in ("-1", "x", "", "1e999", "nan", "²", *(["0"] if option != "--port" else ["65536"])):
            with pytest.raises(SystemExit):
                parser().parse_args(["--model", "m", f"{option}={text}"])
            assert f"argument {option}: expected" in capsys.readouterr().err
    for text in ("pages.test", "http://pages.test/", ""):
        with pytest.raises(SystemExit):
            parser().parse_args(["--model", "m", "--allow-origin", text])
        assert "argument --allow-origin: expected" in capsys.readouterr().err
    for key in ("", " "):
        with pytest.raises(SystemExit, match="the key is empty"):
            main([*serve, "--api-key", key])
        monkeypatch.setenv("FUSED_LORA_API_KEY", key)
        with pytest.raises(SystemExit, match="FUSED_LORA_API_KEY: the key is empty"):
            main(serve)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^secret$"):
        patch.setenv("FUSED_LORA_API_KEY", "secret\n")  # as of a file
        patch.setattr("fused_lora.cli.serve.build", lambda options: sys.exit(options.api_key))
        main(serve)
    monkeypatch.delenv("FUSED_LORA_API_KEY")
    with pytest.raises(SystemExit, match="--model: .*nowhere"):
        main([*serve, "--model", str(tmp_path / "nowhere"), "--device", "cpu"])
    for device in ("toaster", "cuda:77"):
        with pytest.raises(SystemExit, match="--device: "):
            main([*serve, "--device", device])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1 port {port}: .*address already in use"):
            main([*serve, "--port", port])
    for host in ("no.such.host.test", "no..host"):
        with pytest.raises(SystemExit, match=f"cannot listen on {host} port 0: "):
            main([*serve, "--host", host])
    monkeypatch.setattr(continuous, "TESTED_TRANSFORMERS", ("5.0",))
    with pytest.raises(SystemExit, match=r"tested on 5\.0\.x; found"):
        main(serve)
    assert [_bytes(t) for t in ("10", "1k", "1.5M", "2G")] == [10, 1024, 3 << 19, 2 << 30]


def test_idle_connections_outlive_those_of_clients_and_proxies(monkeypatch):
    import uvicorn

    from fused_lora.cli import main

    seen = []
    monkeypatch.setattr("fused_lora.cli.serve.build", lambda options: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: seen.append(self.config.timeout_keep_alive))
    assert main(["serve", "--model", "m", "--port", "0"]) == 0
    assert seen[0] > 60  # of nginx and of load balancers; aiohttp keeps them for 15 s


def test_error_that_nobody_thought_of_ends_the_stream_with_an_event():
    """A tokenizer that fails on what the model said: the stream says so, where it would just break off."""
    from fused_lora.serving.http.streams import merged

    class Engine:
        async def generate(self, job):
            yield "first"
            raise LookupError("/secret/path")

    async def read():
        return [piece async for piece in merged(Engine(), [None])]

    with pytest.raises(ApiError, match="LookupError in the server; its log says more") as caught:
        asyncio.run(read())
    assert caught.value.status == 500 and "secret" not in caught.value.message


def test_allowed_adapter(world):
    adapters, outside = world.root, world.root.parent / "outside"
    assert allowed_adapter(adapters, "a0") == (adapters / "a0").resolve()
    assert allowed_adapter(adapters, str(adapters / "a0")) == (adapters / "a0").resolve()
    with pytest.raises(ApiError) as there:
        allowed_adapter(adapters, str(outside / "secret"))
    with pytest.raises(ApiError) as missing:
        allowed_adapter(adapters, str(outside / "missing"))
    assert json.dumps(there.value.body()) == json.dumps(missing.value.body())
