"""``logprobs`` and ``echo`` of the server, as OpenAI's client reads them and as lm-eval asks for them."""

import pytest
import torch

from fused_lora.testing.numeric import assert_close
from helpers import serving
from helpers.server import Server

openai = pytest.importorskip("openai")
serving.need_engine("fastapi", "uvicorn", "prometheus_client")

from fused_lora.serving.engine.logprobs import TokenLogprob  # noqa: E402
from fused_lora.serving.http.logprobs import Scored, Speller  # noqa: E402

TERMS = 2 * (4 * 64 + 160) + 257  # two layers of 64 features, an mlp of 160, and the sum over the vocabulary
TEXT = "Näive 日本 🙂"  # characters of one to four bytes, and a token is a byte


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(server, tokenizer, log_softmax(adapter, ids) of the merged model in float64)."""
    tiny = serving.Tiny(tmp_path_factory.mktemp("logprobs"), a0=8)
    with Server(tiny.folder, tiny.root, tmp_path_factory.mktemp("log") / "log") as server:
        yield server, tiny.tokenizer, tiny.log_softmax


def spelled(tokenizer, ids):
    """What the server calls these byte tokens."""
    table = tokenizer.convert_ids_to_tokens(ids)
    whole = Speller(tokenizer)
    return [c if len(c) == 1 and c.isascii() else whole.text(i, "bytes:") for c, i in zip(table, ids, strict=True)]


def check(choice, ids, prompt, exact, top):
    """``choice.logprobs`` of a completion of these ids, of which ``prompt`` are the prompt's, echoed or not."""
    told = choice.logprobs
    count = len(told.tokens)
    first = len(ids) - count
    assert first in (0, prompt) and len(told.text_offset) == len(told.top_logprobs) == count
    values, likeliest = told.token_logprobs, told.top_logprobs
    if first == 0:
        assert values[0] is None and likeliest[0] is None
        values, likeliest, first = values[1:], likeliest[1:], 1
    rows = exact[first - 1 : len(ids) - 1]
    wanted = rows.gather(1, torch.tensor(ids[first:])[:, None])[:, 0]
    assert_close(torch.tensor(values), wanted, TERMS, name="token_logprobs")
    for entry, value, row in zip(likeliest, values, rows, strict=True):
        assert value in entry.values() and top <= len(entry) <= top + 1 or (top == 0 and len(entry) == 1)
        if top:
            best = torch.tensor(sorted(entry.values(), reverse=True)[:top])
            assert_close(best, row.topk(top).values.float(), TERMS, name="top_logprobs")


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["tiny", "a0"])
@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_ids", [False, True])
def test_log_likelihood_request_of_an_evaluation(world, name, max_tokens, as_ids):
    """Two prompts of different lengths, echoed, with one token more or none."""
    server, tokenizer, exact = world
    prompts = [TEXT, "And a second one, longer than that. " * 12]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    answer = server.say(name, ids if as_ids else prompts, max_tokens, logprobs=1, echo=True, seed=1234)
    assert answer.usage.completion_tokens == 2 * max_tokens and answer.usage.prompt_tokens == sum(map(len, ids))
    for choice, prompt, own in zip(answer.choices, prompts, ids, strict=True):
        assert choice.text.startswith(prompt) and choice.finish_reason == "length"
        rows = exact(name, own)
        new = serving_token(tokenizer, choice.logprobs.tokens[len(own) :])
        assert len(new) == max_tokens
        check(choice, own + new, len(own), rows, 1)
        assert choice.logprobs.tokens[: len(own)] == spelled(tokenizer, own)


def serving_token(tokenizer, tokens):
    """The ids of byte tokens by what the server calls them."""
    names = spelled(tokenizer, list(range(256)))
    return [names.index(token) for token in tokens]


def test_offsets_are_where_tokens_begin(world):
    server, tokenizer, _ = world
    for prompt in (TEXT, tokenizer(TEXT)["input_ids"]):
        choice = server.say("a0", prompt, 12, logprobs=0, echo=True).choices[0]
        told = choice.logprobs
        starts = [i for i, c in enumerate(TEXT) for _ in c.encode()]
        assert told.text_offset[: len(starts)] == starts and choice.text.startswith(TEXT)
        for token, at in zip(told.tokens[: len(starts)], starts, strict=True):
            assert token.startswith("bytes:\\x") or choice.text[at : at + 1] == token
        assert told.text_offset == sorted(told.text_offset)
        alone = server.say("a0", prompt, 12, logprobs=0).choices[0].logprobs
        assert alone.text_offset == [at - len(TEXT) for at in told.text_offset[len(starts) :]]
        assert alone.token_logprobs == pytest.approx(told.token_logprobs[len(starts) :], abs=1e-4)


@pytest.mark.parametrize("echo", [False, True])
def test_streams_tell_the_same(world, echo):
    server, _, _ = world
    whole = server.say("a0", ["One", "Another"], 9, logprobs=3, echo=echo)
    chunks = list(server.say("a0", ["One", "Another"], 9, logprobs=3, echo=echo, stream=True))
    for index, choice in enumerate(whole.choices):
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(part.text for part in parts) == choice.text
        for field in ("tokens", "text_offset"):
            assert sum((getattr(part.logprobs, field) for part in parts), []) == getattr(choice.logprobs, field)
        values = sum((part.logprobs.token_logprobs for part in parts), [])
        assert values[echo:] == pytest.approx(choice.logprobs.token_logprobs[echo:], abs=1e-4)


def test_echo_alone_is_the_prompt_before_the_answer(world):
    server, _, _ = world
    for more in ({}, {"stop": ["\x00never"]}):
        plain = server.say("a0", "Say it", 6, **more).choices[0].text
        choice = server.say("a0", "Say it", 6, echo=True, **more).choices[0]
        assert choice.text == "Say it" + plain and choice.logprobs is None
    # a stop string of the prompt does not stop the answer
    assert server.say("a0", "Say it", 6, echo=True, stop="Say").choices[0].text == "Say it" + plain


def test_tokens_behind_a_stop_string_are_not_told(world):
    server, _, _ = world
    whole = server.say("tiny", "Stop", 30, logprobs=0).choices[0]
    text = whole.text
    stop = next(text[i : i + 2] for i in range(3, 25) if text[i : i + 2].isascii() and text[i : i + 2] not in text[:4])
    for stream in (False, True):
        answer = server.say("tiny", "Stop", 30, logprobs=0, stop=stop, stream=stream)
        parts = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        tokens = sum((part.logprobs.tokens for part in parts), [])
        assert "".join(part.text for part in parts) == text[: text.index(stop)]
        count = sum(at < text.index(stop) for at in whole.logprobs.text_offset)
        assert tokens == whole.logprobs.tokens[:count] and count < 30


@pytest.mark.numeric
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [None, 0, 4])
def test_chats(world, stream, top):
    server, tokenizer, exact = world
    ids = tokenizer("user: hi\nassistant:")["input_ids"]
    request = dict(model="a0", messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=7)
    more = {} if top is None else {"top_logprobs": top}
    answer = server.client.chat.completions.create(**request, logprobs=True, stream=stream, **more)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    content = sum((choice.logprobs.content for choice in choices if choice.logprobs), [])
    text = "".join((c.delta if stream else c.message).content or "" for c in choices)
    assert len(content) == 7 and b"".join(bytes(e.bytes) for e in content).decode(errors="replace") == text
    ids += tokenizer.convert_tokens_to_ids([byte_token(tokenizer, entry.bytes[0]) for entry in content])
    rows = exact("a0", ids)[-8:-1]
    wanted = rows.gather(1, torch.tensor(ids[-7:])[:, None])[:, 0]
    assert_close(torch.tensor([entry.logprob for entry in content]), wanted, TERMS)
    for entry, row in zip(content, rows, strict=True):
        assert len(entry.top_logprobs) == (top or 0)
        if top:
            values = torch.tensor([other.logprob for other in entry.top_logprobs])
            assert_close(values, row.topk(top).values.float(), TERMS)
            assert entry.top_logprobs[0].logprob == entry.logprob  # greedy


def byte_token(tokenizer, byte):
    """What the byte-level vocabulary calls a byte."""
    speller = Speller(tokenizer)
    return next(tokenizer.convert_ids_to_tokens(i) for i in range(256) if speller.bytes(i) == bytes([byte]))


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(max_tokens=0), "max_tokens: expected at least 1, or 0 with echo=true"),
        (dict(max_tokens=-1, echo=True), "max_tokens"),
        (dict(logprobs=6), "logprobs"),
        (dict(logprobs=-1), "logprobs"),
        (dict(logprobs=True), "logprobs"),
        (dict(echo=1), "echo"),
        (dict(extra_body={"top_logprobs": 1}), "top_logprobs is not supported"),
        (dict(prompt="x" * 1024, max_tokens=0, echo=True), "maximum context length"),
    ],
)
def test_what_is_refused(world, changes, named):
    server, _, _ = world
    with pytest.raises(openai.BadRequestError, match=named):
        server.say("tiny", **{"prompt": "x", "count": changes.pop("max_tokens", 4), **changes})


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(top_logprobs=2), "top_logprobs: only with logprobs=true"),
        (dict(top_logprobs=2, logprobs=False), "top_logprobs: only with logprobs=true"),
        (dict(top_logprobs=21, logprobs=True), "top_logprobs"),
        (dict(logprobs=1), "logprobs"),
        (dict(extra_body={"echo": True}), "echo is not supported"),
    ],
)
def test_what_a_chat_is_refused(world, changes, named):
    server, _, _ = world
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError, match=named):
        server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, **changes)


def test_tokens_are_spelled_by_their_bytes(world):
    """Of tokenizers over bytes, and of those over pieces with byte fallback; two tokens of one text are one entry."""
    _, tokenizer, _ = world
    speller = Speller(tokenizer)
    assert b"".join(map(speller.bytes, tokenizer(TEXT)["input_ids"])).decode() == TEXT
    assert speller.text(tokenizer.eos_token_id) == "<end>" and speller.bytes(10**6) == b""
    speller = Speller(serving.byte_fallback_tokenizer())
    assert [speller.bytes(i) for i in (1 + 0xF0, 257)] == [b"\xf0", b" the"]
    assert speller.text(1 + 0xF0, "bytes:") == "bytes:\\xf0" and speller.text(257) == " the"
    twice = TokenLogprob(258, -3.0, ((1 + ord("b"), -1.0),))
    assert speller.of_completion([Scored(twice, 0)])["top_logprobs"] == [{"b": -1.0}]
