"""Text while the tokens come: whole characters, stop strings, and bytes that are no text."""

import random

import pytest

pytest.importorskip("fastapi")

from fused_lora.serving.http.text import TextStream  # noqa: E402
from helpers.seeds import shifted  # noqa: E402
from helpers.serving import byte_fallback_tokenizer  # noqa: E402


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_text_comes_in_whole_characters(size):
    tokens = list("aé日🙂z\n🙂🙂 end é".encode())
    stream = TextStream(Bytes())
    pieces = [stream.add(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == bytes(tokens).decode()


def test_incomplete_character_comes_with_the_flush():
    stream = TextStream(Bytes())
    assert stream.add(list("a🙂".encode())[:-1]) == "a"
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("stops", [["END"], ["D", "END"], ["xENDING", "EN"], ["nope"], ["s", "NDI"]])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_stop_string_ends_the_text_wherever_it_is_cut(stops, size):
    text = "EN EE xEND ENDING s"
    stream = TextStream(Bytes(), stops)
    out = ""
    for i in range(0, len(text), size):
        out += stream.add(list(text[i : i + size].encode()))
        assert not any(stop in out for stop in stops)
        if stream.stopped:
            break
    out += stream.flush()
    ends = [text.index(stop) for stop in stops if stop in text]
    # the earliest to be complete wins, so a longer one that starts before may lose
    first_done = min((text.index(s) + len(s), text.index(s)) for s in stops if s in text)[1] if ends else len(text)
    assert out == text[:first_done] and stream.stopped == bool(ends)


@pytest.fixture(scope="module")
def fallback():
    pytest.importorskip("transformers")
    return byte_fallback_tokenizer()


def test_bytes_that_are_no_text_do_not_end_an_answer(fallback):
    """tokenizers' own stream raises on them, which is why ours is there (decision 55)."""
    from tokenizers.decoders import DecodeStream

    draw, raised = random.Random(shifted(1)), 0
    for _ in range(200):
        ids = [draw.choice([draw.randrange(1, 257), 257, 258]) for _ in range(20)]
        stream = TextStream(fallback)
        text = "".join(stream.add([i]) for i in ids) + stream.flush()
        theirs = DecodeStream(skip_special_tokens=True)
        try:
            wanted = "".join(theirs.step(fallback.backend_tokenizer, i) or "" for i in ids)
        except Exception as error:
            assert "Invalid prefix" in str(error)
            raised += 1
        else:
            assert text.startswith(wanted)
        assert len(stream.offsets) == 20 and stream.released == len(text)
    assert raised


def test_offsets_are_those_of_the_text(fallback):
    text = "the bé日🙂b"
    ids = fallback(text)["input_ids"]
    stream = TextStream(fallback)
    assert stream.add(ids) + stream.flush() == fallback.decode(ids)
    assert stream.offsets == sorted(stream.offsets) and stream.offsets[0] == 0 and stream.offsets[-1] == len(text) - 1
