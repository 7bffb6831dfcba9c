"""Every way to load an adapter uses all of it, or says what it does not use: the corpus of helpers.adapter_corpus."""

import ast
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fused_lora
from fused_lora.adapters import AdapterError
from fused_lora.cli.serve import parser, probe, register_folder
from fused_lora.modules.names import likely_rename, some
from fused_lora.serving.store import AdapterStore
from fused_lora.testing.numeric import assert_close
from helpers.adapter_corpus import CASES, Case, P, good_tensors, llama, pair
from helpers.thorough import sampled

IDS = torch.arange(3, 19).reshape(2, 8)
SOUND = [name for name, case in CASES.items() if case.refused is None]
REFUSED = [name for name, case in CASES.items() if case.refused is not None]


@torch.no_grad()
def served(store, name="a"):
    with store.batch([name] * len(IDS)):
        return store.model(IDS).logits


def by_load_adapter(model, folder, **options):
    fused_lora.load_adapter(model, folder, **options)
    with torch.no_grad():
        return model(IDS).logits


def by_load(model, folder, **options):
    store = AdapterStore(model)
    store.load("a", folder, **options)
    return served(store)


def by_load_async(model, folder, **options):
    store = AdapterStore(model)
    store.load_async("a", folder, **options).result()
    return served(store)


def by_register(model, folder, **options):
    store = AdapterStore(model)
    store.register("a", folder, **options)
    return served(store)


def by_lease(model, folder, **options):
    store = AdapterStore(model)
    store.register("a", folder, **options)
    with store.lease("a"):
        return served(store)


def by_probe(model, folder, **options):
    store = AdapterStore(model)
    store.register("a", folder, **options)
    error = store.probe("a")
    if error is not None:
        assert store.refusal("a") is not None  # a batch raises it, too
        raise error
    return served(store)


def by_server(model, folder, allow_partial=False):
    store = AdapterStore(model)
    (name,) = register_folder(store, folder.parent, "base", allow_partial)
    probe(store, [name])
    if store.refusals():
        raise store.refusals()[name]
    return served(store, name)


DOORS = {
    "load_adapter": by_load_adapter,
    "store.load": by_load,
    "store.load_async": by_load_async,
    "store.register, then a batch": by_register,
    "store.register, then a lease": by_lease,
    "store.register, then probe": by_probe,
    "fused-lora serve --adapters": by_server,
}
each_door = pytest.mark.parametrize(
    "case, door",
    sampled([pytest.param(case, door, id=f"{case}-{name}") for case in REFUSED for name, door in DOORS.items()], 2),
)

# whoever calls what reads an adapter; all of them are behind one of the doors, or give tensors to no model
READERS = {"read_checked", "from_folder", "check_folder", "from_tensors", "live_adapter"}
CALLERS = {
    "adapters/checkpoint.py:read_adapter",  # tensors alone
    "adapters/read.py:load_adapter",
    "checkpoints/adapter_file.py:_open",  # files to files
    "serving/residency/packing.py:_read",  # of from_folder and check_folder
    "serving/residency/registry.py:load",
    "serving/residency/registry.py:probe",
    "serving/residency/registry.py:_read",  # the first batch, a lease, a pin, a changed file
}


def test_the_table_of_doors_is_whole():
    package, found = Path(fused_lora.__file__).parent, set()
    for path in package.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
                if READERS & {getattr(call, "id", getattr(call, "attr", None)) for call in calls}:
                    found.add(f"{path.relative_to(package).as_posix()}:{function.name}")
    assert found == CALLERS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SOUND)
def test_sound_adapters_give_what_peft_gives(tmp_path, case):
    peft = pytest.importorskip("peft")
    folder = known = CASES[case].write(tmp_path / "a")
    if CASES[case].bare is not None:
        known = Case(CASES[case].bare, CASES[case].config).write(tmp_path.parent / f"{tmp_path.name} bare")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(CASES[case].model(), known).eval()(IDS).logits
        base = CASES[case].model()(IDS).logits
    assert (theirs - base).abs().max() > 1e-3
    for door in DOORS.values():
        assert_close(door(CASES[case].model(), folder), theirs, terms=5000)


@each_door
def test_others_are_refused_with_key_and_reason(tmp_path, case, door):
    model = CASES[case].model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=CASES[case].refused) as caught:
        door(model, CASES[case].write(tmp_path / "a"))
    assert len(str(caught.value)) < 2000
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@each_door
def test_a_part_of_them_only_where_it_is_asked_for(tmp_path, case, door):
    (tmp_path / "all").mkdir()
    folder = CASES[case].write(tmp_path / "all" / "a")
    fitting = CASES[case].partial
    if fitting is None:
        with pytest.raises(AdapterError):
            door(CASES[case].model(), folder, allow_partial=True)
        return
    names = sorted({key.split(".lora_")[0].removeprefix(P) for key in fitting})
    (tmp_path / "alone").mkdir()
    alone = Case(fitting, {"target_modules": names}).write(tmp_path / "alone" / "a")
    expected = by_load(llama(), alone)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert_close(door(llama(), folder, allow_partial=True), expected, terms=5000)
    left_out = len(CASES[case].tensors) - len(fitting)
    told = [w for w in told if "are left out" in str(w.message)]
    texts = [str(w.message) for w in told]
    assert bool(texts) == (left_out > 0)
    assert all(f"{left_out} of {len(CASES[case].tensors)} tensors" in text for text in texts)
    if door is by_load_adapter:
        assert all(w.filename == __file__ for w in told)


def test_a_mapping_is_used_whole(tmp_path):
    A, B = torch.randn(4, 32), torch.randn(32, 4)
    layers = {f"model.layers.{i}.self_attn.q_proj": (A, B, 1.0) for i in range(3)}
    store = AdapterStore(llama())
    with pytest.raises(
        ValueError, match=r"source: 1 of the adapter's 3 layers .*: 'model\.layers\.2\.self_attn\.q_proj';"
    ):
        store.load("a", layers)
    with pytest.warns(UserWarning, match=r"source: 1 of 3 layers are left out: 'model\.layers\.2"):
        store.load("a", layers, allow_partial=True)
    with pytest.raises(ValueError, match="3 of the adapter's 3 layers .*rename: 'decoder' -> 'model'"):
        renamed = {path.replace("model.", "decoder."): layer for path, layer in layers.items()}
        store.load("a", renamed, allow_partial=True)


def test_the_server_leaves_out_only_what_it_is_told_to():
    assert not parser().parse_args(["--model", "m"]).allow_partial
    assert parser().parse_args(["--model", "m", "--allow-partial"]).allow_partial


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_allow_partial_is_a_bool(tmp_path, value):
    folder = Case(good_tensors()).write(tmp_path / "a")
    store = AdapterStore(llama())
    for door in (store.load, store.register):
        with pytest.raises(TypeError, match="allow_partial must be True or False"):
            door("a", folder, allow_partial=value)
    with pytest.raises(TypeError, match="allow_partial must be True or False"):
        fused_lora.load_adapter(llama(), folder, allow_partial=value)


def test_a_partial_adapter_is_read_again_after_an_eviction(tmp_path):
    folder = Case({**good_tensors(), **pair(f"{P}model.layers.2.self_attn.q_proj", 32, 32)}).write(tmp_path / "a")
    store = AdapterStore(llama(), max_resident=1)
    with pytest.warns(UserWarning, match="2 of 10 tensors are left out"):
        store.load("a", folder, allow_partial=True)
    first = served(store)
    store.load("b", Case(good_tensors()).write(tmp_path / "b"))  # takes the only place
    assert torch.equal(served(store), first)


def test_the_likely_rename():
    attention = [f"language_model.model.layers.{i}.self_attn.q_proj" for i in range(4)]
    vision = [f"vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(2)]
    file = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(4)]
    assert likely_rename(file, vision + attention) == ("model.language_model", "language_model.model", 4)
    gates = [f"model.layers.{i}.block_sparse_moe.gate" for i in range(3)]
    assert likely_rename(gates, ["model.layers.0.mlp.gate"]) == ("block_sparse_moe", "mlp", 3)
    assert likely_rename(["a.q"], ["b.k"]) is None
    assert likely_rename([], attention) is None
    assert likely_rename([".".join("x" * 100_000)], attention) is None  # at once


def test_a_few_of_many_names():
    names = [f"tenant-{i:04}" for i in range(3000)]
    assert some(names) == ", ".join(map(repr, names[:8])) + " and 2992 more"
    near = some(names, near="tenant-1234x")
    assert "'tenant-1234'" in near and "'tenant-1235'" in near and "and 2992 more" in near
    assert some(names[:2]) == "'tenant-0000', 'tenant-0001'" and some([]) == "none"
    assert len(some(["x" * 10**6])) < 200


def test_layers_that_the_config_names_and_a_partial_file_lacks_are_named(tmp_path):
    model = fused_lora.inject(llama(), fused_lora.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    fused_lora.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "q_proj" in key}, path)
    said = r"target_modules names 2 layers that the file has no tensors for: 'model.layers.0.self_attn.v_proj'"
    for door in (by_load_adapter, by_load):
        with pytest.warns(UserWarning, match=said):
            door(llama(), tmp_path, allow_partial=True)
