"""Whatever a client sends, the answer is a 4xx that names the field, and the server serves on."""

import concurrent.futures
import json
import re
import shutil

import pytest

from helpers import serving
from helpers.server import TOO_LONG, Server

serving.need_engine("openai", "httpx", "fastapi", "uvicorn", "prometheus_client")

COMPLETION = dict(model="a", prompt="x", max_tokens=2)
CHAT = dict(model="a", messages=[dict(role="user", content="x")], max_tokens=2)
LOAD = dict(lora_name="new", lora_path="b")
NAN, INF, SURROGATE = float("nan"), float("inf"), "\ud800"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("input")
    tiny = serving.Tiny(root, a=4, b=4, torn=4, biased=4, gone=4)
    with Server(tiny.folder, tiny.root, root / "log", "--allow-load", "--drain-timeout", "1") as found:
        damage(tiny.root)
        yield found


def damage(adapters):
    """Once the server knows them: one is cut short, one has what cannot be served beside others, one is deleted."""
    weights, config = adapters / "torn" / "adapter_model.safetensors", adapters / "biased" / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-64])
    config.write_text(json.dumps({**json.loads(config.read_text()), "bias": "all"}))
    shutil.rmtree(adapters / "gone")


def post(server, route, content):
    """The answer to this content, JSON unless it is bytes; NaN and halves of surrogates are sent as they are."""
    content = content if isinstance(content, bytes) else json.dumps(content)
    return server.http.post(f"/v1/{route}", content=content, headers={"Content-Type": "application/json"})


def refused(answer, status, param, *said):
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    for text in said:
        assert text in error["message"]


@pytest.mark.parametrize(
    "field, values",
    [
        ("model", [None, 5, True, [], ["a"], {}]),
        (
            "prompt",
            [None, 5, True, {}, [1, "a"], [True], [1.5], [[1], ["a"]], [[[1]]], [None], SURROGATE, ["x", SURROGATE]],
        ),
        ("prompt", [[], [[]], [""], ["x", ""], "", [-1], [257], [10**30], ["x"] * 129, "x" * 1024, [1] * 1024]),
        ("max_tokens", [0, -1, -(10**30), 10**30, 10**400, 1.5, 2.0, "5", True, [], NAN, INF]),
        ("temperature", [-1, -1e-9, 2.1, 1e400, 10**400, "0.5", True, [], NAN, INF, -INF]),
        ("top_p", [0, -1, 1.1, "0.5", True, NAN, INF]),
        ("seed", [1.5, "1", True, 2**63, -(2**63) - 1, [], NAN]),
        ("n", [0, -1, 129, 10**30, "2", True, 1.5]),
        ("stop", [5, [5], [None], {}, True, "", [""], ["x"] * 17, "y" * 257, ["x", "y" * 257]]),
        ("stream", ["yes", "true", 0, 1, [], {}]),
        ("stream_options", [5, True, [], {}, {"include_usage": True}]),
        ("logprobs", [-1, 6, 1.5, "1", True, [], NAN]),
        ("echo", [1, 0, "true", []]),
        ("reasoning_effort", ["low", 5]),
        ("verbosity", ["low"]),
        ("tool_choice", ["required", {"type": "function", "function": {"name": "f"}}]),
        *((name, [1]) for name in ("top_logprobs", "suffix", "best_of_all", "ü" * 90, "__proto__", "prompt_ids")),
    ],
)
def test_completions(server, field, values):
    for value in values:
        refused(post(server, "completions", {**COMPLETION, field: value}), 400, field, field)


@pytest.mark.parametrize("name, value", [("prompt", ["x"] * 129), ("prompt", [[1]] * 129), ("stop", ["x"] * 129)])
def test_lists_that_are_too_long(server, name, value):
    refused(post(server, "completions", {**COMPLETION, name: value}), 400, name, f"{name}: expected at most 128 items")


@pytest.mark.parametrize("name, value", [("include_usage", 1), ("continuous_usage_stats", "yes"), ("speed", True)])
def test_stream_options(server, name, value):
    body = {**COMPLETION, "stream": True, "stream_options": {name: value}}
    refused(post(server, "completions", body), 400, f"stream_options.{name}", name)


@pytest.mark.parametrize(
    "messages, where",
    [
        *((value, "messages") for value in (None, 5, "x", {}, [])),
        *(([value], "messages.0") for value in (None, 5, "x", [])),
        ([{}], "messages.0.role"),
        ([dict(role="user")], "messages.0.content"),
        ([CHAT["messages"][0], dict(role=5, content="x")], "messages.1.role"),
        *(
            ([dict(role="user", content=value)], "messages.0.content")
            for value in (None, 5, True, {}, [5], ["x"], [{}], [dict(type="text")], [dict(type="image_url")])
        ),
        ([dict(role="assistant", content="x", tool_calls=[{}])], "messages.0.tool_calls"),
        ([dict(role="user", content="x", type="image")], "messages.0.type"),
        ([dict(role="tool", content="x", tool_call_id="1")], "messages.0.tool_call_id"),
        ([dict(role="user", content=SURROGATE)], "messages"),
        *(([dict(role=role, content="x")], "messages.0.role") for role in (SURROGATE, "wizard", "", "User", None)),
        ([dict(role="user", content="x" * 1100)], "messages"),
    ],
)
def test_messages(server, messages, where):
    answer = post(server, "chat/completions", {**CHAT, "messages": messages})
    refused(answer, 400, where, "context length" if len(answer.request.content) > 1100 else where)


def test_the_limit_that_is_named_is_the_one_that_was_given(server):
    for name in ("max_tokens", "max_completion_tokens"):
        for value in (5000, 10**400):
            body = {**{key: value for key, value in CHAT.items() if key != "max_tokens"}, name: value}
            refused(post(server, "chat/completions", body), 400, name, f"{name}: at most 4096")


@pytest.mark.parametrize("name", ["", SURROGATE, "x" * 10_000, "ü", "../a", "a\0"])
def test_models_that_do_not_exist(server, name):
    answer = post(server, "completions", {**COMPLETION, "model": name})
    refused(answer, 404, "model", "does not exist")
    assert answer.json()["error"]["code"] == "model_not_found" and len(answer.text) < 400


@pytest.mark.parametrize(
    "changes, status, param",
    [
        *(
            (dict(lora_name=name), 400, "lora_name")
            for name in (None, 5, True, ["a"], "", "ü", "a\n", "../x", "a b", "a@1")
        ),
        *((dict(lora_name=name), 400, "lora_name") for name in ("x" * 257, "a/b/c", ".a", SURROGATE, "tiny", "a")),
        *(
            (dict(lora_path=path), 400, "lora_path")
            for path in (None, 5, ["b"], "", ".", "..", "../tiny", "/etc", "//")
        ),
        *((dict(lora_path=path), 400, "lora_path") for path in ("a/../../tiny", "\0", SURROGATE, "/dev/null")),
        (dict(lora_path=TOO_LONG[0]), TOO_LONG[1], "lora_path"),
        *((dict(lora_path=path), 404, "lora_path") for path in ("ü", "~", "b/adapter_config.json", "a/" * 100)),
        (dict(load_inplace="yes"), 400, "load_inplace"),
        (dict(is_merged=True), 400, "is_merged"),
        ({"str": 1}, 400, "str"),
    ],
)
def test_loads(server, changes, status, param):
    before = server.http.get("/v1/models").json()
    refused(post(server, "load_lora_adapter", {**LOAD, **changes}), status, param)
    assert server.http.get("/v1/models").json() == before


@pytest.mark.parametrize("name, said", [("torn", "expected"), ("biased", "bias='all'"), ("gone", "no such folder")])
def test_adapters_that_broke_on_the_server_are_refused_with_the_reason(server, name, said):
    answer = post(server, "completions", {**COMPLETION, "model": name})
    refused(answer, 422, "model", "the adapter cannot be served", said)
    assert answer.json()["error"]["code"] == "invalid_adapter"
    streamed = post(server, "completions", {**COMPLETION, "model": name, "stream": True})  # known by now
    assert streamed.status_code == 422 and streamed.json()["error"]["message"] == answer.json()["error"]["message"]
    loaded = post(server, "load_lora_adapter", dict(lora_name="new", lora_path=name))
    refused(loaded, 404 if name == "gone" else 400, "lora_path", "gone" if name == "gone" else said)
    assert not any("/" in found.json()["error"]["message"] for found in (answer, loaded))  # no folder of the server
    assert f"adapter '{name}': " in server.log.read_text()


def test_unloads(server):
    for name, status in ((None, 400), (5, 400), ("", 400), ("ü", 400), ("tiny", 400), ("nobody", 404)):
        refused(post(server, "unload_lora_adapter", dict(lora_name=name)), status, "lora_name", "lora")
    refused(post(server, "unload_lora_adapter", dict(lora_name="a", lora_int_id="x")), 400, "lora_int_id")


def test_an_adapter_is_loaded_once_however_many_ask(server):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(server, "load_lora_adapter", LOAD), range(8)))
    assert sorted(answer.status_code for answer in answers)[0] == 200
    for answer in answers:
        if answer.status_code != 200:
            refused(answer, 409 if answer.status_code == 409 else 400, "lora_name", "loaded")
    assert [answer.status_code for answer in answers].count(200) == 1
    assert post(server, "unload_lora_adapter", dict(lora_name="new")).status_code == 200


@pytest.mark.parametrize(
    "body, param, said",
    [
        (b"", None, "expected a JSON object"),
        (b"{", None, "at character 1"),
        (b'{"model":"a"', None, "at character 12"),
        (b'{"model":"a","prompt":"x', None, "Unterminated string"),
        (b'{"a":1}x', None, "at character 7"),
        (b"\xff\xfe", None, "body"),
        (b'{"model":"a","prompt":"\xff"}', None, "body"),
        *((body, None, "expected a JSON object") for body in (b"[]", b"null", b"5", b'"x"')),
        *((body, None, "body") for body in (b"[" * 5000, b"[" * 100_000, b'{"prompt":' * 50_000)),
        (b'{"model":"a","prompt":"x","max_tokens":' + b"9" * 5000 + b"}", None, "body"),
        (b'{"model": 5}', "model", "string"),
        (b'{"model":"a","prompt":"' + b"x" * 900_000 + b'"}', "prompt", "context length"),
        (b'{"model":"a","prompt":[' + b"1," * 450_000 + b'"x"]}', "prompt", "expected a string, a list of strings"),
        *(
            (b'{"model":"a","prompt":[' + many + last + b"]}", "prompt", "expected at most 128 items")
            for many, last in ((b'"",' * 300_000, b"1"), (b"[]," * 300_000, b"[]"))
        ),
        (b'{"model":"a","prompt":"x","stop":[' + b"1," * 450_000 + b"1]}", "stop", "expected a string"),
        (b'{"model":"a","prompt":[' + b"1," * 450_000 + b"1]}", "prompt", "context length"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_bodies(server, body, param, said):
    refused(post(server, "completions", body), 400, param, said)


def test_bodies_that_are_too_large_or_not_json(server):
    assert post(server, "completions", b"x" * 5_000_000).status_code == 413
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}):
        answer = server.http.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers)
        refused(answer, 400, None, "Content-Type: application/json")


def test_paths(server):
    for path in ("/", "/v1", "/v1/%00", "/v1/completions/", "/v1//models", "/%ff", "/v1/models/../../etc"):
        refused(server.http.get(path), 404, None)
    assert server.http.request("PUT", "/v1/models").status_code == 405


def test_unusual_but_valid_requests_are_served(server):
    greedy = post(server, "completions", {**COMPLETION, "temperature": 0}).json()["choices"][0]["text"]
    for changes in (dict(temperature=1e-300), dict(temperature=1e-40), dict(top_p=1e-300), dict(stop=[SURROGATE, "ü"])):
        answer = post(server, "completions", {**COMPLETION, "temperature": 0, **changes})
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == greedy, changes
    known = ("system", "developer", "user", "assistant", "tool", "function")
    several = [dict(role=role, content="") for role in known]
    for messages in (several, [dict(role="user", content=[], name="me", tool_calls=None)]):
        assert post(server, "chat/completions", {**CHAT, "messages": messages}).status_code == 200


def test_after_all_this_the_server_is_as_it_was(server):
    assert server.http.get("/health").status_code == 200
    # those that broke are not offered
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["tiny", "a", "b"]
    assert server.metric("adapters_refused") == 3
    assert server.metric("requests_running") == server.metric("requests_waiting") == 0
    assert server.metric("failed_requests_total") == 3 and server.metric("failed_steps_total") == 0
    assert "Traceback" not in server.log.read_text()
    assert not re.findall(r'status="5\d\d"', server.http.get("/metrics").text)
