"""Prompts are bounded before they are tokenised, and a short one never waits for a long one."""

import asyncio
import threading

import pytest

pytest.importorskip("fastapi")

from fused_lora.serving.http.api import ApiError  # noqa: E402
from fused_lora.serving.http.prompts import SHORT_CHARACTERS, PromptReader  # noqa: E402
from fused_lora.serving.http.streams import unless_gone  # noqa: E402

CONTEXT = 100_000


class Words:
    """A tokenizer of words of at most 8 letters; texts that begin with "wait" take until ``go`` is set."""

    is_fast = True

    def __init__(self):
        self.go, self.read = threading.Event(), []

    def get_vocab(self):
        return {"x": 0, "eightful": 1}

    def __call__(self, text):
        self.read.append(text)
        if text.startswith("wait"):
            assert self.go.wait(20)
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, **options):
        return self(" ".join(message["content"] for message in messages))["input_ids"]


@pytest.fixture
def words():
    found = Words()
    yield found
    found.go.set()


def test_short_texts_pass_long_ones(words):
    reader = PromptReader(words, CONTEXT)

    async def scenario():
        long = [asyncio.create_task(reader.encode("wait " + "y " * SHORT_CHARACTERS, "prompt")) for _ in range(8)]
        assert await asyncio.wait_for(reader.encode("a short one", "prompt"), 10) == [1, 5, 3]
        chat = [dict(role="user", content="hi")]
        assert await asyncio.wait_for(reader.encode(chat, "messages"), 10) == [2]
        assert not any(task.done() for task in long)
        for task in long[4:]:
            task.cancel()  # whose client has hung up: it is not read when its turn comes
        await asyncio.gather(*long[4:], return_exceptions=True)
        words.go.set()
        assert {len(ids) for ids in await asyncio.gather(*long[:4])} == {SHORT_CHARACTERS + 1}

    asyncio.run(scenario())
    assert sum(text.startswith("wait") for text in words.read) == 4


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("y" * (8 * 100 + 1), "801 characters"),
        ([dict(role="user", content="y" * 400)] * 3, "characters"),
        ([dict(role="", content="")] * 101, "0 characters"),
    ],
)
def test_texts_that_cannot_fit_are_refused_unread(words, prompt, said):
    reader, before = PromptReader(words, 100), len(words.read)
    with pytest.raises(ApiError, match=said) as caught:
        asyncio.run(reader.encode(prompt, "prompt"))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded") and len(words.read) == before


def test_a_text_of_too_many_tokens_is_not_read_to_its_end():
    words = Words()
    words.get_vocab = lambda: {"z" * 1000: 0}
    with pytest.raises(ApiError, match="more than 200 tokens in its first 800 characters"):
        asyncio.run(PromptReader(words, 100).encode("y " * 40_000, "prompt"))
    assert max(map(len, words.read)) == 800
    assert asyncio.run(PromptReader(words, 100).encode("y" * 80_000, "prompt")) == [80_000]


def test_work_ends_with_its_client_and_with_its_time():
    class Http:
        def __init__(self, gone):
            self.gone = gone

        async def receive(self):
            if not self.gone:
                await asyncio.sleep(60)
            return {"type": "http.disconnect"}

    async def statuses():
        found = []
        for gone, seconds in ((True, float("inf")), (False, 0.5)):
            with pytest.raises(ApiError) as caught:
                await unless_gone(Http(gone), asyncio.sleep(60), 0.0, seconds)
            found.append((caught.value.status, caught.value.message))
        assert await unless_gone(Http(False), asyncio.sleep(0, "done")) == "done"
        return found

    gone, late = asyncio.run(statuses())
    assert gone == (499, "the client closed the connection") and late == (504, "the request took longer than 0.5 s")
