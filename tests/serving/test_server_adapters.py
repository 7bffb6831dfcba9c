"""Adapters that the running server cannot serve: not offered, refused by name with the reason; others are served."""

import errno
import importlib
import json
import os
import shutil
import threading

import pytest
import torch

import fused_lora
from fused_lora.adapters.errors import AdapterError
from fused_lora.modules.inject import AdapterNotFound
from fused_lora.serving.residency import refusal
from helpers import serving
from helpers.server import Server

serving.need_engine("openai", "httpx", "fastapi", "uvicorn", "prometheus_client")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = serving.write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    return folder, serving.load_model(folder)


@pytest.fixture(scope="module")
def adapters(plain, tmp_path_factory):
    """A folder with good adapters (a, b, moved), one larger than the capacity (big), and ones of each kind that
    cannot be served."""
    root = tmp_path_factory.mktemp("served")
    for i, name in enumerate(("a", "b", "moved", "dora", "biased", "other_base", "cut")):
        serving.write_adapter(root / "adapters" / name, plain[1], 4, seed=i)
    serving.write_adapter(root / "adapters" / "big", plain[1], 64, seed=8)
    serving.write_adapter(root / "outside", plain[1], 4, seed=9)
    serving.write_overflowing_adapter(root / "adapters" / "evil", plain[1], "v_proj")
    serving.write_adapter(root / "adapters" / "org" / "name.v1", plain[1], 4, seed=10)
    edit(root / "adapters" / "org" / "name.v1", base_model_name_or_path="somebody/else")
    edit(root / "adapters" / "dora", use_dora=True)
    edit(root / "adapters" / "biased", bias="all")
    edit(root / "adapters" / "other_base", target_modules=["c_attn"])
    weights = root / "adapters" / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return root / "adapters"


@pytest.fixture(scope="module")
def server(plain, adapters, tmp_path_factory):
    named = json.dumps(dict(name="json", path=str(adapters / "a"), base_model_name="tiny"))
    options = ("--allow-load", "--capacity", "512K", "--lora-modules", f"named={adapters.parent / 'outside'}", named)
    with Server(plain[0], adapters, tmp_path_factory.mktemp("log") / "log", *options) as found:
        yield found


@pytest.fixture
def store(plain):
    found = fused_lora.AdapterStore(plain[1])
    yield found
    found.detach()


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ask(server, model, **changes):
    body = dict(model=model, prompt="The answer", max_tokens=4, temperature=0, **changes)
    answer = server.http.post("/v1/completions", json=body)
    return answer.status_code, answer.json()


def offered(server):
    return [model["id"] for model in server.http.get("/v1/models").json()["data"]]


def test_adapters_that_cannot_be_served_are_not_offered(server):
    # nobody can tell evil by its header
    assert offered(server) == ["tiny", "a", "b", "big", "evil", "json", "moved", "named", "org/name.v1"]
    said = dict(dora="use_dora", biased="bias='all'", other_base="c_attn", cut="bytes")
    assert "serving tiny with 8 adapters on cpu; 4 refused\n" in server.log.read_text()
    for name, what in said.items():
        status, body = ask(server, name)
        assert (status, body["error"]["code"]) == (422, "invalid_adapter") and what in body["error"]["message"], body
        assert "/" not in body["error"]["message"]
        assert f"adapter '{name}' is refused until its files change: " in server.log.read_text()


def test_one_that_can_never_fit_is_refused_by_name(server):
    status, body = ask(server, "big")
    assert (status, body["error"]["code"], body["error"]["param"]) == (422, "store_full", "model")
    assert "'big' needs" in body["error"]["message"]
    for name in ("new", "a"):
        answer = server.load(name, "big", load_inplace=True)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "store_full")
        assert "retry-after" not in answer.headers
    assert ask(server, "new")[0] == 404 and ask(server, "a")[0] == 200


def test_names_are_those_of_the_hub_and_each_model_has_a_card(server, plain, adapters):
    roots = dict(tiny=plain[0], a=adapters / "a", named=adapters.parent / "outside", json=adapters / "a")
    for name, root in (*roots.items(), ("org/name.v1", adapters / "org" / "name.v1")):
        card = server.client.models.retrieve(name)
        assert (card.id, card.root, card.parent) == (name, str(root), None if name == "tiny" else "tiny")
        assert card.model_dump() in [model.model_dump() for model in server.client.models.list()]
        assert ask(server, name)[0] == 200
    assert server.http.get("/v1/models/none").status_code == 404
    assert server.http.get("/v1/models/dora").status_code == 422
    warned = "adapter 'org/name.v1' says that its base model is 'somebody/else', and it is served over "
    assert server.log.read_text().count(warned) == 1


@pytest.mark.parametrize(
    "module, message",
    [
        ("sql", "expected NAME=PATH"),
        ("a/b/c=x", "adapter_name must be"),
        ("../up=x", "adapter_name must be"),
        ('{"name": "sql"}', "'path'"),
        ('{"name": "sql", "path": 5}', "expected a folder"),
        ('{"name": "sql", "path": "x", "more": 1}', "unknown keys"),
    ],
)
def test_lora_modules_that_are_malformed_are_refused_at_once(module, message, capsys):
    serve = importlib.import_module("fused_lora.cli.serve")
    with pytest.raises(SystemExit):
        serve.main(["--model", "none", "--lora-modules", module])
    assert message in capsys.readouterr().err


def test_lora_modules_that_cannot_be_served_end_the_start(store, adapters):
    serve = importlib.import_module("fused_lora.cli.serve")
    options = serve.parser().parse_args(["--model", "tiny"])
    serve.probe_named(store, [("fine", str(adapters / "a"))], "tiny", options)
    for name, path, why in [("tiny", "a", "base model"), ("fine", "a", "another"), ("x", "none", "no such folder"),
                            ("y", "dora", "use_dora")]:  # fmt: skip
        with pytest.raises(SystemExit, match=f"--lora-modules: {name}: .*{why}"):
            serve.probe_named(store, [(name, str(adapters / path))], "tiny", options)


def test_one_that_overflows_is_refused_by_name_and_others_are_served(server, adapters):
    before = [ask(server, name)[1]["choices"][0]["text"] for name in ("tiny", "a")]
    for _ in range(2):
        status, body = ask(server, "evil")
        error = body["error"]
        assert (status, error["code"], error["param"]) == (422, "not_finite", "model")
        assert "'evil@1'" in error["message"]
    assert "evil" not in offered(server)
    assert [ask(server, name)[1]["choices"][0]["text"] for name in ("tiny", "a")] == before
    assert server.metric("non_finite_requests_total") == 1
    assert server.load("evil", "a", load_inplace=True).status_code == 200
    assert ask(server, "evil")[1]["choices"][0]["text"] == before[1] and "evil" in offered(server)


def test_one_whose_files_are_mended_is_served_at_once(server, adapters):
    edit(adapters / "dora", use_dora=False)
    assert "dora" in offered(server) and ask(server, "dora")[0] == 200


def test_a_folder_that_becomes_a_link_to_the_outside_is_refused(server, adapters):
    shutil.rmtree(adapters / "moved")
    (adapters / "moved").symlink_to(adapters.parent / "outside")
    status, body = ask(server, "moved")
    assert (status, body["error"]["code"]) == (422, "invalid_adapter")
    assert "inside the folder that adapters may come from" in body["error"]["message"]
    assert "moved" not in offered(server)


def test_a_store_stays_inside_the_folder_it_was_given(plain, store, tmp_path):
    """The link is made after the registration, to a folder or to a file; one that stays inside is fine."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b", "c"):
        serving.write_adapter(inside / name, plain[1], 4, seed=1)
    serving.write_adapter(outside, plain[1], 4, seed=2)
    for name in ("a", "b", "c"):
        store.register(name, str(inside / name), inside=inside)
    shutil.rmtree(inside / "a")
    (inside / "a").symlink_to(outside)
    (inside / "b" / "adapter_model.safetensors").unlink()
    (inside / "b" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for name in ("a", "b"):
        with pytest.raises(AdapterError, match="inside the folder that adapters may come from"):
            store.lease(name)
        with pytest.raises(AdapterError, match="inside the folder"):
            store.load("new", str(inside / name), inside=inside)
    shutil.rmtree(inside / "b")
    (inside / "b").symlink_to(inside / "c")
    store.lease("b").release()
    # nothing is asked of one that was registered without a folder
    store.register("free", str(inside / "a"))
    store.lease("free").release()


def test_errors_name_a_few_of_many_adapters(store, tmp_path):
    for i in range(3000):
        store.register(f"tenant-{i:05d}-sql-assistant", str(tmp_path))
    for call in (store.lease, store.identity, store.unload):
        with pytest.raises(
            AdapterNotFound, match="'nope' not found; .*'tenant-00000-sql-assistant'.* and 2992 more"
        ) as caught:
            call("nope")
        assert len(str(caught.value)) < 500


def test_a_probe_reads_no_tensor(plain, store, tmp_path):
    """A value that is not finite is found when the adapter is used; what the header says is found by the probe."""
    from safetensors.torch import load_file, save_file

    weights = serving.write_adapter(tmp_path / "nan", plain[1], 4, seed=1) / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    store.register("nan", str(tmp_path / "nan"))
    assert store.probe("nan") is None and store.refusals() == {}
    with pytest.raises(ValueError, match="expected finite values"):
        store.lease("nan")
    assert list(store.refusals()) == ["nan"]
    edit(tmp_path / "nan", r=5)
    assert isinstance(store.probe("nan"), AdapterError) and list(store.refusals()) == ["nan"]


def test_an_error_of_the_file_system_passes(plain, store, tmp_path, monkeypatch):
    """Nothing is wrong with the files, and they will not change."""
    serving.write_adapter(tmp_path / "a", plain[1], 4, seed=1)
    store.register("a", tmp_path / "a")
    real = os.open

    def too_many(path, *args, **kwargs):
        if os.path.basename(path) == "adapter_model.safetensors":
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", too_many)
        assert "Too many open files" in str(store.probe("a"))
    with pytest.raises(AdapterError, match="Too many open files"):
        store.lease("a")
    monkeypatch.setattr(refusal, "FAILED_LOAD_SECONDS", 0.0)
    store.lease("a").release()
    assert store.refusals() == {} and store.identity("a") == "a@1"


def test_the_first_adapters_are_probed_at_once_and_the_others_while_serving(plain, store, adapters, monkeypatch):
    """And one that is unloaded meanwhile is passed over."""
    serve = importlib.import_module("fused_lora.cli.serve")
    monkeypatch.setattr(serve, "_PROBE_PAUSE_SECONDS", 0.0)
    names = serve.register_folder(store, adapters, "tiny")
    assert "biased" in names and names == sorted(names) and store.refusals() == {}
    store.unload("a")
    serve.probe(store, names, threading.Event())
    assert {"biased", "cut", "other_base"} <= set(store.refusals())
    stopping = threading.Event()
    stopping.set()
    fresh = fused_lora.AdapterStore(serving.load_model(plain[0]))
    serve.probe(fresh, serve.register_folder(fresh, adapters, "tiny")[1:], stopping)
    assert len(fresh.refusals()) <= 1


def test_help_has_the_engines_defaults():
    from fused_lora.serving.engine.manager import default_config

    text = " ".join(importlib.import_module("fused_lora.cli.serve").parser().format_help().split())
    sizes = default_config(torch.device("cpu"))
    assert sizes.num_blocks is not None
    for number in (sizes.max_requests_per_batch, sizes.max_batch_tokens, sizes.num_blocks * sizes.page_size):
        assert f"(default: {number}; on a GPU by its memory)" in text
    assert text.count("(default: no limit)") == 2 and "default: 127.0.0.1" in text
