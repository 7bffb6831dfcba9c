"""The running server when the model raises: who is told, what is freed, when it gives up."""

import pytest

from fused_lora.serving.engine.failures import MAX_FAILED_STEPS
from helpers import serving
from helpers.server import Server
from helpers.waiting import wait_for

openai = pytest.importorskip("openai")
serving.need_engine("httpx", "fastapi", "uvicorn", "prometheus_client")

MARK = "<end>"
# the server as its command line starts it, over a model whose last layer raises when it meets the mark
SCRIPT = """
import sys, transformers
from fused_lora.cli import main
from helpers import serving

load = transformers.AutoModelForCausalLM.from_pretrained

def faulty(*arguments, **options):
    model = load(*arguments, **options)
    return serving.fail_on(model, model.config.eos_token_id)

transformers.AutoModelForCausalLM.from_pretrained = faulty
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return serving.Tiny(tmp_path_factory.mktemp("failures"), a=8, b=16)


@pytest.fixture
def server(world, tmp_path):
    with Server(world.folder, world.root, tmp_path / "log", program=("-c", SCRIPT)) as found:
        yield found


def test_failed_step_is_a_500_and_the_server_goes_on(server, world):
    text = world.text
    with pytest.raises(openai.InternalServerError) as caught:
        server.say("a", f"bad {MARK}")
    assert caught.value.status_code == 500
    assert caught.value.body["code"] == "step_failed" and caught.value.body["type"] == "server_error"
    assert "(RuntimeError)" in caught.value.body["message"] and "mark" not in caught.value.body["message"]
    assert "the layer met its mark" in server.log.read_text()
    with pytest.raises(openai.InternalServerError) as caught:
        server.say("b", MARK, stream=True)
    assert caught.value.status_code == 500 and caught.value.body["code"] == "step_failed"
    # a stream that has begun is told in the stream, as is one of the requests of a chat
    stream = server.say("a", "Tell me", 1000, stream=True)
    begun = [next(stream).choices[0].text for _ in range(4)]
    with pytest.raises(openai.InternalServerError):
        server.client.chat.completions.create(model="b", messages=[{"role": "user", "content": MARK}], max_tokens=4)
    with pytest.raises(openai.APIError, match="the model failed in a step"):
        begun += [chunk.choices[0].text for chunk in stream]
    said = "".join(begun)
    assert len(said) > 3 and text("a", "Tell me", 1000).startswith(said.rstrip("\ufffd"))
    assert server.http.get("/health").json() == {"status": "ok"}
    assert [server.say(name, "Tell me").choices[0].text for name in "ab"] == [text(n, "Tell me", 12) for n in "ab"]
    counted = {name: server.metric(name) for name in ("failed_steps_total", "failed_requests_total")}
    assert counted == {"failed_steps_total": 3, "failed_requests_total": 4}
    assert server.metric('requests_total{route="/v1/completions",status="500"}') == 2
    assert server.metric("requests_running") == server.metric("requests_waiting") == 0


def test_server_says_when_it_gave_up(server, world):
    statuses = []
    for _ in range(MAX_FAILED_STEPS):
        with pytest.raises(openai.InternalServerError) as caught:
            server.say("a", MARK)
        statuses.append(caught.value.status_code)
    assert set(statuses[:-1]) == {500} and statuses[-1] in (500, 503)
    wait_for(lambda: server.http.get("/health").status_code != 200)
    health = server.http.get("/health")
    assert health.status_code == 503 and "RuntimeError" in health.json()["error"]["message"]
    with pytest.raises(openai.InternalServerError) as caught:
        server.say("b", "x")
    assert caught.value.status_code == 503 and caught.value.body["code"] == "engine_stopped"
    assert server.http.get("/metrics").status_code == 200 and server.http.get("/v1/models").status_code == 200
