"""What schemathesis is told about the server of http_server.py: values at random would hardly ever be answered."""

import json
import zlib
from pathlib import Path

import schemathesis

MODELS = ("base", "base", "a", "b", "torn", "nobody")  # sound, damaged and unknown
PATHS = ("a", "b", "torn", "./a/", "../adapters/a", "..", "/", "")


@schemathesis.hook
def before_add_examples(context, examples):
    """The requests of the corpus, put first."""
    corpus = Path(__file__).with_name("corpus") / "http" / f"{context.operation.path.strip('/').replace('/', '_')}.json"
    if corpus.exists():
        examples += [context.operation.Case(body=body, media_type="application/json") for body in read(corpus)]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@schemathesis.hook
def map_body(context, body):
    """Four of five bodies with names that exist, and with numbers that the server takes."""
    if not isinstance(body, dict):
        return body
    number = zlib.crc32(json.dumps(body, sort_keys=True, default=str).encode("utf-8", "backslashreplace"))
    if number % 5 == 0:
        return body
    found = dict(body)
    for field, names in (("model", MODELS), ("lora_name", MODELS), ("lora_path", PATHS)):
        if isinstance(body.get(field), str):
            found[field] = names[number // 5 % len(names)]
    for field, most in (("max_tokens", 16), ("max_completion_tokens", 16), ("n", 4)):
        if type(body.get(field)) is int and body[field] > most:
            found[field] = body[field] % most + 1
    return {**found, **({"prompt": ids(body["prompt"])} if "prompt" in body else {})}


def ids(prompt):
    """The prompt with its token ids in the range of the vocabulary."""
    if type(prompt) is int:
        return prompt % 250
    return list(map(ids, prompt)) if isinstance(prompt, list) else prompt
