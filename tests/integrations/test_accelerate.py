"""accelerate, restore, install, register, run: what they change and, above all, what they leave alone."""

import copy
import gc
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import fused_lora
from fused_lora.cli import main
from fused_lora.integrations import peft as integration
from fused_lora.modules import changes
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import ALL, Net, SideBySide, wrap
from helpers.hooks import hooks
from helpers.seeds import shifted
from helpers.unchanged import check_interrupts
from helpers.versions import since
from helpers.waiting import HANG

STOCK = peft.tuners.lora.Linear
IDS = torch.arange(6).reshape(2, 3)


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    integration.uninstall()


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, STOCK)]


def accelerated(model):
    return [type(m) is not STOCK for m in lora_layers(model)]


def config(**fields):
    return peft.LoraConfig(**{"target_modules": ALL, "r": 4, "init_lora_weights": False, **fields})


def marks(model):
    """All that must survive: parameter objects, buffers, hooks, flags, the type names that other code asks for."""
    return (
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [(name, id(b)) for name, b in model.named_buffers()],
        [(name, id(m), type(m).__name__, m._get_name()) for name, m in model.named_modules()],
        [hooks(m) for m in model.modules()],
        repr(model),
        list(model.state_dict()),
    )


# ---- there and back


def test_accelerate_changes_nothing_but_the_class():
    model = wrap(Net(), {"a": {"lora_dropout": 0.1}, "b": {}}).eval()
    model.base_model.model.lin0.register_forward_hook(lambda *_: None)
    before, y = marks(model), model(IDS)
    attributes = [set(vars(m)) for m in model.modules()]
    assert fused_lora.accelerate(model) is model
    assert marks(model) == before and all(accelerated(model))
    assert all(isinstance(m, STOCK) for m in lora_layers(model))
    assert_close(model(IDS), y, terms=100)
    fused_lora.restore(model)
    assert marks(model) == before and not any(accelerated(model))
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not any(h in m._forward_hooks.values() for m in model.modules() for h in (changes._begin, changes._end))
    assert torch.equal(model(IDS), y)


def test_accelerate_and_restore_are_idempotent():
    model = wrap(Net())
    fused_lora.restore(model)
    fused_lora.accelerate(fused_lora.accelerate(model))
    assert all(accelerated(model))
    fused_lora.restore(fused_lora.restore(model))
    assert not any(accelerated(model))
    fused_lora.restore(nn.Linear(2, 2))


def test_restore_after_use_leaves_no_attribute():
    model = wrap(Net())
    attributes = [set(vars(m)) for m in model.modules()]
    fused_lora.accelerate(model)
    model(IDS).sum().backward()
    model.merge_adapter()
    model.unmerge_adapter()
    model.add_adapter("b", config())
    model.delete_adapter("b")
    fused_lora.restore(model)
    assert [set(vars(m)) for m in model.modules()] == attributes


@pytest.mark.parametrize(
    "inner", [lambda m: m.base_model, lambda m: m.base_model.model, lambda m: nn.ModuleList([nn.Tanh(), m])]
)
def test_any_module_that_contains_lora_layers(inner):
    model = wrap(Net())
    fused_lora.accelerate(inner(model))
    assert all(accelerated(model))
    fused_lora.restore(inner(model))
    assert not any(accelerated(model))


def test_a_single_layer():
    layer = wrap(Net()).base_model.model.lin0
    assert fused_lora.accelerate(layer) is layer and type(layer) is not STOCK


def test_bare_models_with_injected_adapters():
    net = Net().eval()
    peft.inject_adapter_in_model(config(target_modules=["lin0"]), net)
    fused_lora.accelerate(net)
    peft.inject_adapter_in_model(config(), net, adapter_name="b")
    assert accelerated(net) == [True, False, False, False]
    fused_lora.accelerate(net)
    assert all(accelerated(net))


@pytest.mark.parametrize("model, error", [(3, TypeError), (nn.Linear(2, 2), ValueError)])
def test_models_without_lora(model, error):
    with pytest.raises(error, match="model: expected"):
        fused_lora.accelerate(model)


def test_models_of_fused_lora_need_none():
    net = Net()
    fused_lora.inject(net, fused_lora.LoraConfig(target_modules=ALL))
    with pytest.raises(ValueError, match="need no accelerate"):
        fused_lora.accelerate(net)
    assert [row.kind for row in integration.layer_report(net)] == ["LoraLinear"] * 4


def test_the_work_is_one_pass_over_the_modules():
    """60 layers of a small model take a handful of operations per module, whatever the number of parameters."""
    blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkvo"}) for _ in range(15)])
    model = peft.get_peft_model(blocks, config(target_modules=list("qkvo"), r=1))
    calls = Counter()

    def count(frame, event, _):
        if event == "call":
            calls[frame.f_code.co_filename] += 1

    sys.setprofile(count)
    try:
        fused_lora.accelerate(model)
    finally:
        sys.setprofile(None)
    assert all(accelerated(model)) and len(accelerated(model)) == 60
    modules = sum(1 for _ in model.modules())
    # named_modules recurses, so each of a handful of passes costs depth calls a module
    assert sum(calls.values()) < 80 * modules


# ---- copies and files


def test_copies_and_pickles_stay_accelerated():
    model = fused_lora.accelerate(wrap(Net().eval()))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert all(accelerated(other)) and repr(other) == repr(model)
        assert torch.equal(other(IDS), model(IDS))
        other.add_adapter("b", config(target_modules=["emb", "lin0"]))
        fused_lora.restore(other)
        assert not any(accelerated(other))
    assert all(accelerated(model))


def test_a_pickle_opens_in_a_process_that_has_imported_nothing(tmp_path):
    model = fused_lora.accelerate(wrap(nn.Sequential(nn.Linear(3, 3)), target_modules=["0"]))
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump(model, file)
    code = "import pickle, sys; m = pickle.load(open(sys.argv[1], 'rb')); print(type(m.base_model.model[0]).mro()[1])"
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pkl")], capture_output=True, text=True, check=True
    )
    assert "AcceleratedLinear" in out.stdout


@pytest.mark.parametrize("way", ["accelerate", "install", "copy", "pickle", "mixed"])
@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_the_plain_model_that_peft_returns_has_nothing_of_ours(way, unload):
    net, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    if way == "install":
        integration.install()
    model: Any = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"]), mixed=way == "mixed")
    if way != "install":
        fused_lora.accelerate(model)
    model = {"copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}.get(way, lambda m: m)(model)
    y = model(x)
    plain = getattr(model, unload)()
    assert not plain._forward_hooks and not plain._forward_pre_hooks
    assert b"fused_lora" not in pickle.dumps(plain)
    assert_close(torch.jit.script(plain)(x), y, terms=3)  # pyright: ignore[reportPrivateImportUsage]


@pytest.mark.parametrize("way", ["accelerate", "install", "unloaded"])
def test_a_model_that_nobody_has_is_freed_at_once(way):
    """Not by the garbage collector, which comes late for a GPU's memory."""
    if way == "install":
        integration.install()
    gc.disable()
    try:
        model: Any = wrap(Net(), target_modules=["lin0"])
        if way != "install":
            fused_lora.accelerate(model)
        model(IDS).sum().backward()
        weight = weakref.ref(model.base_model.model.lin0.base_layer.weight)
        plain = model.merge_and_unload() if way == "unloaded" else None
        del model, plain
        assert weight() is None
    finally:
        gc.enable()


def test_checkpoints_are_pefts(tmp_path):
    both = SideBySide(wrap(Net().eval(), {"default": {}, "b": {"r": 2}}))
    for name, model in (("ours", both.ours), ("theirs", both.theirs)):
        model.save_pretrained(tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "theirs") for p in (tmp_path / "theirs").rglob("*") if p.is_file())
    for file in files:
        ours, theirs = ((tmp_path / name / file).read_bytes() for name in ("ours", "theirs"))
        if file.suffix == ".json":  # target_modules is a set in PEFT, written in any order
            ours, theirs = (
                {key: sorted(value) if key == "target_modules" else value for key, value in json.loads(text).items()}
                for text in (ours, theirs)
            )
        assert ours == theirs, file
    torch.manual_seed(shifted(1))
    net = Net().eval()
    net.load_state_dict({k: v for k, v in both.ours.unload().state_dict().items()})
    loaded = peft.PeftModel.from_pretrained(net, tmp_path / "ours")
    y = loaded(IDS)
    assert torch.equal(fused_lora.accelerate(loaded)(IDS), fused_lora.accelerate(copy.deepcopy(loaded))(IDS))
    assert_close(loaded(IDS), y, terms=100)


def test_state_dicts_load_into_each_other():
    both = SideBySide(wrap(Net().eval()))
    fresh = fused_lora.accelerate(wrap(Net().eval()))
    fresh.load_state_dict(both.theirs.state_dict(), strict=True)
    assert torch.equal(fresh(IDS), both.ours(IDS))
    both.theirs.load_state_dict(fresh.state_dict(), strict=True)


def test_an_optimizer_made_before_keeps_working():
    model = wrap(Net(), lora_dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(20):
        if step == 5:
            fused_lora.accelerate(model)
        if step == 15:
            fused_lora.restore(model)
        loss = model(torch.arange(20).reshape(4, 5)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[14] < losses[4] < losses[0]


# ---- the process-wide switch, the registered config, scripts


def test_install_makes_every_new_layer_ours_and_counts_calls():
    old = wrap(Net().eval())
    before = [dict(vars(kind)) for kind in (LoraModel, BaseTuner)]
    report = integration.install()
    model = peft.get_peft_model(Net().eval(), config(target_modules=["lin0", "head", "emb"]))
    assert accelerated(model) == [True, True] and not any(accelerated(old))
    model.add_adapter("b", config())
    assert all(accelerated(model))
    assert report() == {"fused": 0, "around": {}, "fallback": {}}
    model(IDS)
    model.merge_adapter()
    model(IDS)
    second = integration.install()
    assert report() == {
        "fused": 3, "around": {},
        "fallback": {"no active adapter in this layer": 4, "merged: the base layer alone": 3},
    } and second() == {"fused": 0, "around": {}, "fallback": {}}  # fmt: skip
    integration.uninstall()
    integration.uninstall()
    assert [dict(vars(kind)) for kind in (LoraModel, BaseTuner)] == before
    assert not any(accelerated(wrap(Net()))) and all(accelerated(model))


def test_install_under_a_foreign_patch():
    original = vars(LoraModel)["_create_new_module"]
    integration.install()
    ours = LoraModel._create_new_module
    try:
        LoraModel._create_new_module = staticmethod(lambda *a, **k: ours(*a, **k))
        assert all(accelerated(wrap(Net())))
        integration.uninstall()
        assert not any(accelerated(wrap(Net())))
    finally:
        LoraModel._create_new_module = original


class Packed(nn.Linear):
    pass


def test_register_for_one_config():
    net = Net().eval()
    net.lin1 = Packed(40, 24, bias=False)
    chosen = integration.register(config(target_modules=[*ALL, "emb"]))
    model = peft.get_peft_model(net, chosen)
    bases = [type(m.base_layer) for m in lora_layers(model) if type(m) is not STOCK]
    assert [base.__name__ for base in bases] == ["Linear", "Conv1D", "Linear"]
    assert type(model.base_model.model.lin1) is STOCK  # a subclass may be quantised: PEFT's own dispatch decides
    assert not any(accelerated(wrap(Net())))
    assert "_custom_modules" not in chosen.to_dict()
    both = SideBySide(fused_lora.restore(copy.deepcopy(model)))
    both.ours = model
    both.assert_same_results()
    with pytest.raises(TypeError, match="config"):
        integration.register(fused_lora.LoraConfig(target_modules=ALL))


SCRIPT = """
import sys, peft, torch
if __name__ == "__main__":
    import beside
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    model(torch.randn(2, 4)).sum().backward()
    model.merge_adapter()
    model(torch.randn(2, 4))
    print(type(model.base_model.model[0]).mro()[1].__name__, sys.argv[1:], sys.argv[0].endswith("train.py"), beside.x)
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("way", ["script", pytest.param("module", marks=pytest.mark.thorough)])
def test_run_a_script_as_it_is(way, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("x = 7")
    command = [str(tmp_path / "train.py")] if way == "script" else ["-m", "train"]
    out = subprocess.run(
        [sys.executable, "-m", "fused_lora.cli", "run", *command, "3", "--lr", "1"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert out.returncode == 3, out.stderr
    assert out.stdout.strip() == "AcceleratedLinear ['3', '--lr', '1'] True 7"
    assert "1 LoRA calls ran fused, 1 in PEFT's own way\n           1 merged: the base layer alone" in out.stderr


@pytest.mark.parametrize(
    "fields, reason",
    [pytest.param({"init_lora_weights": "mica"}, "MiCALinearVariant", marks=since("peft", "0.20")), ({}, None)],
)
def test_accelerate_says_when_nothing_runs_fused(fields, reason):
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config(target_modules=["0", "1"], **fields)
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fused_lora.accelerate(model)
    texts = [str(w.message) for w in told]
    assert len(texts) == (reason is not None)
    for w in told:
        assert f"accelerate: 0 of 2 layers run fused; 2 do not: {reason}" in str(w.message)
        assert w.filename == __file__


SPAWNING = """
import dataclasses, multiprocessing
from concurrent.futures import ProcessPoolExecutor

@dataclasses.dataclass
class Row:
    x: int

def put(queue):
    queue.put(Row(3))

def make(x):
    return Row(x)

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=put, args=(queue,))
        process.start()
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            print(queue.get(), pool.submit(make, 4).result())
        process.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork server")
@pytest.mark.parametrize("way", [pytest.param("script", marks=pytest.mark.thorough), "module"])
def test_run_a_script_with_processes_of_its_own(way, tmp_path):
    (tmp_path / "spawning.py").write_text(SPAWNING)
    command = [str(tmp_path / "spawning.py")] if way == "script" else ["-m", "spawning"]
    out = subprocess.run(
        [sys.executable, "-m", "fused_lora.cli", "run", *command],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=HANG,
    )  # fmt: skip
    assert out.stdout.splitlines() == ["Row(x=3) Row(x=4)"] * 2, out.stderr


def test_run_says_how_to_call_it(tmp_path, capsys, monkeypatch):
    for arguments in ([], ["--verbose"], ["-m"], ["nowhere.py"]):
        assert main(["run", *arguments]) == 2
        assert "fused-lora run" in capsys.readouterr().err
    for module in ("nosuchmod", "json.nosuchmod", "nosuchmod.inner", "email"):  # the last has no __main__
        assert main(["run", "-m", module]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fused-lora run: ") and module.split(".")[0] in said and said.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fails.py").write_text("import nosuchmod")
    with pytest.raises(ModuleNotFoundError, match="nosuchmod"):  # the module's own error
        main(["run", "-m", "fails"])
    assert main(["nosuch"]) == 2 and "unknown command 'nosuch'" in capsys.readouterr().err
    for arguments in (["--help"], ["run", "-h"]):
        assert main(arguments) == 0 and capsys.readouterr().out.startswith("usage: fused-lora")
    assert main(["--version"]) == 0 and fused_lora.__version__ in capsys.readouterr().out
    assert not integration._installed


def test_run_leaves_the_process_as_it_was(tmp_path, capsys, monkeypatch):
    (tmp_path / "fails.py").write_text("import sys\nsys.path.append('x')\nraise KeyError('mine')")
    argv, path, main_of_children = sys.argv, list(sys.path), sys.modules.get("__mp_main__")
    with pytest.raises(KeyError, match="mine"):
        main(["run", str(tmp_path / "fails.py")])
    assert sys.argv is argv and sys.path == path and not integration._installed
    assert sys.modules.get("__mp_main__") is main_of_children
    assert "0 LoRA calls ran fused" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "works.py").write_text("")
    assert main(["run", str(tmp_path / "works.py")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "before, in_script, hint", [("", "", False), ("2", "", False), ("", "2", True), ("1", "2", True)]
)
def test_run_tells_of_ranks_that_the_script_starts(before, in_script, hint, tmp_path, capsys, monkeypatch):
    """As Lightning does, as plain scripts: PEFT's own code runs there."""
    monkeypatch.setenv("WORLD_SIZE", before or "1")
    if not before:
        monkeypatch.delenv("WORLD_SIZE")
    started = f"import os; os.environ['WORLD_SIZE'] = '{in_script}'\n" * bool(in_script)
    (tmp_path / "train.py").write_text(started + SCRIPT.replace("beside", "peft").replace("peft.x", "7"))
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "train.py"), "0"])
    said = capsys.readouterr().err
    assert "1 of 1 LoRA layers accelerated" in said and ("processes that the script starts itself" in said) == hint
    (tmp_path / "empty.py").write_text("")
    assert main(["run", str(tmp_path / "empty.py")]) == 0
    assert "processes that the script starts itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "calls, told", [("layer.base_layer(x) + layer.lora_B.a(layer.lora_A.a(x))", True), ("layer(x)", False)]
)
def test_run_tells_where_a_trainer_calls_no_layer(calls, told, tmp_path, capsys):
    (tmp_path / "train.py").write_text(f"""
import peft, torch
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
layer = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model, "a")[0]
x = torch.ones(2, 4)
{calls}
""")
    assert main(["run", str(tmp_path / "train.py")]) == 0
    said = capsys.readouterr().err
    assert "1 of 1 LoRA layers accelerated" in said and ("no accelerated layer was called" in said) == told


# ---- a second stage, the right way and the wrong ways


@pytest.fixture
def stage_one(tmp_path):
    wrap(Net(), lora_dropout=0.1).save_pretrained(tmp_path / "stage1")
    return tmp_path / "stage1"


def test_a_second_stage_on_an_accelerated_model(stage_one, tmp_path):
    both = SideBySide(peft.PeftModel.from_pretrained(Net(), stage_one, is_trainable=True))
    assert all(p.requires_grad == ("lora_" in n) for n, p in both.ours.named_parameters())
    both.assert_same_results()
    both.do(lambda m: m.load_adapter(stage_one, "again", is_trainable=True) and None)
    both.do(lambda m: m.set_adapter("again"))
    both.do(lambda m: m.eval())
    both.assert_same_results()
    both.do(lambda m: m.merge_and_unload())
    both.do(lambda m: peft.get_peft_model(m, config()))  # the next stage on the merged model
    for model in (both.ours, both.theirs):
        fused_lora.accelerate(model)
    both.assert_same_results()


def test_frozen_adapters_stay_frozen(stage_one):
    both = SideBySide(peft.PeftModel.from_pretrained(Net(), stage_one))
    assert not any(p.requires_grad for p in both.ours.parameters()) and not both.ours.training
    both.assert_same_results()


def test_a_second_stage_on_an_injected_model(stage_one):
    net = Net()
    fused_lora.inject(net, fused_lora.LoraConfig(target_modules=ALL))
    fused_lora.load_adapter(net, stage_one, "stage1", is_trainable=True)
    fused_lora.set_adapter(net, "stage1")
    net(IDS).sum().backward()
    assert net.lin0.lora_A["stage1"].weight.grad is not None


@pytest.mark.parametrize(
    "wrong_way",
    [
        lambda net, path: peft.PeftModel.from_pretrained(net, path),
        lambda net, path: peft.get_peft_model(net, config()),
        lambda net, path: peft.get_peft_model(net, config(target_modules=r".*lin.*")),
        lambda net, path: peft.get_peft_model(net, config(target_modules="all-linear")),
        lambda net, path: peft.inject_adapter_in_model(config(), net),
    ],
    ids=["from_pretrained", "get_peft_model", "regex", "all-linear", "inject_adapter_in_model"],
)
@pytest.mark.filterwarnings("ignore")
def test_peft_around_an_injected_model_is_refused(wrong_way, stage_one):
    net = Net()
    fused_lora.inject(net, fused_lora.LoraConfig(target_modules=ALL, lora_dropout=0.1))
    before = marks(net)
    with pytest.raises(RuntimeError, match="fused_lora.load_adapter"):
        wrong_way(net, stage_one)
    assert marks(net) == before
    with pytest.raises(RuntimeError, match="fused_lora.load_adapter"):
        wrong_way(pickle.loads(pickle.dumps(copy.deepcopy(net))), stage_one)
    plain = fused_lora.unload(net)
    assert not hasattr(plain, "peft_config")
    peft.get_peft_model(plain, config())


def wrap_base_again(model, path):
    return peft.get_peft_model(model.base_model.model, config(lora_alpha=64))


def numbers(model, name):
    """{path: of every LoRA layer} and {adapter: of its config}."""
    layers = {path: dict(getattr(m, name)) for path, m in model.named_modules() if hasattr(m, "lora_A")}
    configs = getattr(model, "peft_config", {})
    return layers, {adapter: getattr(config, name) for adapter, config in configs.items()}


def inject_another(model, path):
    return peft.inject_adapter_in_model(config(), model.base_model.model, adapter_name="two")


@since("peft", "0.19")
@pytest.mark.parametrize(
    "again, warns",
    [
        pytest.param(lambda m, path: peft.PeftModel.from_pretrained(m, path), True, id="from_pretrained"),
        pytest.param(lambda m, path: peft.PeftModel.from_pretrained(m, path, "two"), True, id="another-name"),
        pytest.param(lambda m, path: peft.get_peft_model(m, config()), True, id="get_peft_model"),
        pytest.param(
            lambda m, path: peft.get_peft_model(m, config(target_modules=r".*lin.*"), "two"), True, id="regex"
        ),
        pytest.param(lambda m, path: peft.get_peft_model(m, config(), "two", mixed=True), True, id="mixed"),
        pytest.param(wrap_base_again, True, id="base-model"),
        pytest.param(inject_another, False, id="a-further-injection"),
    ],
)
def test_a_second_wrap_is_pefts_with_a_warning(again, warns, stage_one):
    """PEFT lets it pass or warns in its own words; ours come on top and name the call that is meant."""
    theirs = wrap(Net(), lora_dropout=0.1)
    ours = fused_lora.accelerate(copy.deepcopy(theirs))
    wrapped, said = [], []
    for model in (theirs, ours):
        torch.manual_seed(shifted(4))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped.append(again(model, stage_one).eval())
        said.append([str(w.message) for w in caught])
    own = [text for text in said[1] if "wrapped by PEFT already" in text]
    assert [text for text in said[1] if text not in own] == said[0]
    assert bool(own) is warns and all("load_adapter" in text and "add_adapter" in text for text in own)
    state, expected = wrapped[1].state_dict(), wrapped[0].state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
    for attribute in ("r", "lora_alpha"):  # of the layers, and of the config that the next save writes
        assert numbers(wrapped[1], attribute) == numbers(wrapped[0], attribute)
    with torch.no_grad():
        assert_close(wrapped[1](IDS), wrapped[0](IDS), terms=64)


def test_fused_lora_around_a_peft_model_is_refused(stage_one):
    for model in (wrap(Net()), fused_lora.accelerate(wrap(Net()))):
        before = marks(model)
        for net in (model, model.base_model.model):
            with pytest.raises(ValueError, match="fused_lora.accelerate"):
                fused_lora.inject(net, fused_lora.LoraConfig(target_modules="all-linear"))
            with pytest.raises(ValueError, match="fused_lora.accelerate"):
                fused_lora.load_adapter(net, stage_one, "x")
        assert marks(model) == before


@torch.no_grad()
def test_layers_that_torch_reads_without_calling_them_are_named():
    """PEFT's adapters do nothing there, and neither do ours."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    targets = ["linear1", "out_proj"]
    model = peft.get_peft_model(
        nn.Sequential(encoder), peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    ).eval()
    x, prefix = torch.randn(2, 3, 16), "base_model.model.0."
    expected = model(x)
    read, never = f"{prefix}linear1", f"{prefix}self_attn.out_proj"
    with pytest.warns(UserWarning, match=f"{never}', '{read}' do nothing, as in PEFT: each is never called"):
        fused_lora.accelerate(model)
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    rows = {row.path: str(row) for row in fused_lora.explain(model).layers}
    text = "no: is not called in eval mode, nn.TransformerEncoderLayer reads its weight"
    assert rows == {read: text, never: "no: is never called, nn.MultiheadAttention reads its weight"}
    assert {row.path: str(row) for row in fused_lora.explain(model.train()).layers}[read] == "fused"
    hook = encoder.norm1.register_forward_hook(lambda *args: None)  # torch calls all layers then
    assert {row.path: str(row) for row in fused_lora.explain(model.eval()).layers}[read] == "fused"
    assert (model(x) - expected).abs().max() > 1e-3
    hook.remove()


def test_what_wraps_the_magnitude_of_dora_is_named():
    """FSDP1 does by PEFT's policy."""

    class Wraps(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "module" else getattr(self.module, name)

    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], use_dora=True))
    held = fused_lora.accelerate(model).base_model.model[0].lora_magnitude_vector
    assert [row.why_not for row in fused_lora.explain(model).layers] == [None]
    held["default"].register_forward_hook(lambda *args: None)
    assert "a hook on the magnitude of DoRA" in str(fused_lora.explain(model))
    held["default"] = Wraps(held["default"])
    assert "no: the magnitude of DoRA is inside a Wraps, which must see its call" in str(fused_lora.explain(model))
    assert model(torch.randn(2, 8)).shape == (2, 8)


def two_layers(accelerated=True, merged=False):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"], init_lora_weights=False)
    net = peft.get_peft_model(net, config)
    net.add_adapter("b", config)
    if accelerated:
        fused_lora.accelerate(net)
    if merged:
        fused_lora.merge(net)
    return net


def test_an_interrupt_leaves_a_model_accelerated_or_not():
    check_interrupts(lambda: two_layers(accelerated=False), fused_lora.accelerate, step=29)
    check_interrupts(two_layers, fused_lora.restore, step=29)


@pytest.mark.parametrize("merged", [False, True])
def test_an_interrupt_in_peft_leaves_one_adapter_active(merged):
    package = str(Path(peft.__file__).parent)
    with warnings.catch_warnings(action="ignore"):
        check_interrupts(lambda: two_layers(merged=merged), lambda net: fused_lora.set_adapter(net, "b"), package)
        if not merged:
            check_interrupts(two_layers, lambda net: fused_lora.delete_adapter(net, "default"), package)
