"""`fused-lora tune`: the fastest variant that is right is kept, noise keeps the rules', errors change nothing."""

import json
import warnings

import pytest
import torch

pytest.importorskip("triton")

from fused_lora import cli  # noqa: E402
from fused_lora.diagnostics import tune  # noqa: E402
from fused_lora.ops.linear import launch as kernel  # noqa: E402
from fused_lora.ops.linear import plan, tuned  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
LAYER = dict(rows=[8], r=4, dtype=FP32, dropout=0.0)


def timer(**ms):
    """These times, 1.0 for others."""
    return lambda calls: {name: [ms.get(name, 1.0)] * 5 for name in calls}


@pytest.fixture
def measure(kernels_on, tmp_path):
    """A small layer by fake times, without a word of warning: {op: what was measured}."""

    def run(times, **layer):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer = LAYER | layer
            table = tune.tune([(48, 40)], tmp_path / "tuned.json", timer=times, **layer)
        return {shape.op: found[8] for shape, found in table.found.items() if shape.dropout == (layer["dropout"] > 0)}

    return run


def test_the_fastest_is_kept(measure):
    found = measure(timer(split=0.5, library=0.9))
    assert found["linear"] == ("split", "recompute", dict(split=500.0, recompute=1000.0, library=900.0, eager=1000.0))
    assert found["backward"] == ("library", "passes", dict(passes=1000.0, library=900.0, eager=1000.0))


def test_eager_where_it_is_the_fastest(measure, tmp_path, monkeypatch, device):
    found = measure(timer(eager=0.5), dropout=0.1)
    assert [found[op][:2] for op in tuned.OPS] == [("eager", "library"), ("eager", "passes")]
    monkeypatch.setenv(tuned.SWITCH, str(tmp_path / "tuned.json"))
    plan.forget()
    x, A, B = (
        torch.randn(9, 48, device=device),
        [torch.randn(4, 48, device=device)],
        [torch.randn(40, 4, device=device)],
    )
    for p in (0.0, 0.1):
        call = plan.case_of(x, 40, 48, None, A, B, [p])
        assert plan.planned("linear", call, 40, 48).variant == plan.planned("backward", call, 48, 40).variant == "eager"


@pytest.mark.parametrize("adapters", [dict(adapter_dtype=FP32), dict(autocast=True)], ids=["wider", "rounded"])
def test_fp32_adapters_over_16_bits(adapters, measure, tmp_path):
    measure(timer(eager=0.5), dtype=BF16, dropout=0.1, **adapters)
    kind = "rounded" if "autocast" in adapters else "wider"
    shapes = tuned.read(tmp_path / "tuned.json").found
    assert len(shapes) == 4 and {(shape.dtype, shape.adapters) for shape in shapes} == {("bfloat16", kind)}


def test_noise_keeps_the_variant_of_the_rules():
    quiet = dict(recompute=[10.0] * 5, eager=[9.81] * 5)
    assert tune.fastest(quiet, "recompute") == "recompute" and tune.fastest(quiet, "eager") == "eager"
    assert tune.fastest(quiet | dict(eager=[9.79] * 5), "recompute") == "eager"
    loud = [7.0, 8.0, 9.0, 10.0, 11.0]
    assert tune.fastest(quiet | dict(eager=loud), "recompute") == "recompute"
    assert tune.fastest(quiet | dict(eager=[t - 1 for t in loud]), "recompute") == "eager"
    assert tune.fastest(quiet, "split") == "eager"  # which did not pass


@pytest.mark.parametrize("when", ["in its check", "later"])
def test_a_wrong_variant_is_never_chosen(when, kernels_on, tmp_path, monkeypatch):
    honest = kernel.lora_linear

    def bad(chosen, x, *arguments):
        run = honest(chosen, x, *arguments)
        if chosen.variant != "split" or (when == "later" and x.shape != (8, 48)):
            return run
        if when == "later":
            return lambda *args: 1 / 0
        return lambda *args: tuple(t * 1.01 for t in run(*args))

    monkeypatch.setattr(kernel, "lora_linear", bad)
    with pytest.warns(UserWarning, match="split.*is dropped"):
        table = tune.tune([(48, 40)], tmp_path / "a.json", timer=timer(split=0.1, library=0.5), **LAYER)
    (found,) = (by_rows[8] for shape, by_rows in table.found.items() if shape.op == "linear")
    assert found.variant == "library" and "split" not in found.us


def test_what_was_measured_before_stays(measure, tmp_path):
    measure(timer(eager=0.5))
    measure(timer(eager=0.5), r=20)
    measure(timer(split=0.5))
    found = {
        (shape.op, shape.r): by_rows[8].variant for shape, by_rows in tuned.read(tmp_path / "tuned.json").found.items()
    }
    assert found == {
        ("linear", 16): "split",
        ("backward", 16): "passes",
        ("linear", 32): "eager",
        ("backward", 32): "eager",
    }


def test_what_another_run_adds_meanwhile_stays(kernels_on, tmp_path):
    path, others = tmp_path / "tuned.json", []

    def meanwhile(calls):
        if not others:
            others.append(tune.tune([(64, 40)], path, timer=timer(), **LAYER))
        return timer()(calls)

    table = tune.tune([(48, 40)], path, timer=meanwhile, **LAYER)
    assert tuned.read(path) == table and {shape.K for shape in table.found if shape.op == "linear"} == {48, 64}


def test_a_file_of_another_machine_is_begun_anew(measure, tmp_path):
    measure(timer(eager=0.5))
    path, lines = tmp_path / "tuned.json", []
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    tune.tune([(64, 40)], path, timer=timer(), tell=lines.append, **LAYER)
    assert lines[0] == f"{path} is begun anew: it was measured under torch 1.0, here {torch.__version__}"
    assert {shape.K for shape in tuned.read(path).found if shape.op == "linear"} == {64}


def test_a_layer_too_large_is_left_out(kernels_on, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(kernel, "lora_linear_backward", full)
    lines = []
    table = tune.tune([(48, 40)], tmp_path / "a.json", timer=timer(), tell=lines.append, **LAYER)
    assert {shape.op for shape in table.found} == {"linear"}
    assert lines[1] == "48x40 rows=8 dropout=0 backward: not measured, the memory does not suffice"


def test_a_layer_that_cannot_be_drawn_is_left_out(kernels_on, tmp_path, monkeypatch):
    make = tune.LayerCase.make

    def full(M, N, K, *others, **kinds):
        if K == 64:
            raise torch.OutOfMemoryError("full")
        return make(M, N, K, *others, **kinds)

    monkeypatch.setattr(tune.LayerCase, "make", full)
    lines = []
    table = tune.tune([(64, 40), (48, 40)], tmp_path / "a.json", timer=timer(), tell=lines.append, **LAYER)
    assert lines[0] == "64x40: not measured, the memory does not suffice" and len(table) == 2


def test_the_timer_takes_turns_on_the_device(device):
    turns = []
    found = tune.device_timer(device, 0)({name: lambda name=name: turns.append(name) for name in "ab"})
    assert turns == ["a", "b"] * (tune.ROUNDS + 1) and [len(found[name]) for name in "ab"] == [tune.ROUNDS] * 2


def test_the_command(kernels_on, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tuned.json"
    options = "--shapes 48x40,40x48 --rows 8,3 --r 4 --dtype float32 --dropout 0 --seconds 0".split()
    assert cli.main(["tune", *options, "--out", path.name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].startswith("48x40 rows=3 dropout=0 linear: ")
    content = json.loads(path.read_text())
    assert content["key"] == tuned.key_of(device) and len(content["entries"]) == 8
    assert all(entry["variant"] in entry["us"] for entry in content["entries"])
    assert lines[-2].startswith("tuned.json: 8 measurements, ") and lines[-1].startswith(f"FUSED_LORA_TUNED={path} ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["tune"]) == 1
    assert capsys.readouterr().err == "fused-lora tune: torch finds no GPU. Nothing was changed.\n"
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no GPU"):
        tune.tune()


@pytest.mark.parametrize("name", ["dtype", "adapter_dtype"])
def test_dtypes_that_no_kernel_has(name, kernels_on, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: expected one of bfloat16.* got torch.float64"):
        tune.tune([(48, 40)], tmp_path / "a.json", **{name: torch.float64})
    assert not list(tmp_path.iterdir())


def test_kernels_that_are_switched_off(kernels_on, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_LORA_PLAN", "eager")
    assert cli.main(["tune"]) == 1
    assert "FUSED_LORA_PLAN=eager. Nothing was changed." in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, options",
    [
        ("--shapes", ["--shapes", "4096"]),
        ("--shapes", ["--shapes", "0x8"]),
        ("--rows", ["--rows", "8,x"]),
        ("--shapes", ["--model", "a", "--shapes", "8x8"]),
        ("--model", ["--model", "/nowhere/to/be/found"]),
        ("--r", ["--r", "0"]),
        ("--dtype", ["--dtype", "float64"]),
        ("--adapter-dtype", ["--adapter-dtype", "float32", "--autocast"]),
        ("--autocast", ["--dtype", "float32", "--autocast"]),
        ("--dropout", ["--dropout", "1.0"]),
        ("--seconds", ["--seconds", "nan"]),
        ("--out", []),
    ],
)
def test_errors_name_the_argument(name, options, kernels_on, tmp_path, capsys):
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", "--out", str(path), *options])
    assert stop.value.code == 2 and f"{name}:" in capsys.readouterr().err
    assert path.read_text() == "{" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("argument", [dict(shapes=4), dict(rows=8), dict(dropout="0.1"), dict(dropout=None)], ids=str)
def test_an_argument_of_another_type_is_named(argument):
    with pytest.raises(TypeError, match=f"^{next(iter(argument))}: expected"):
        tune.tune(**argument)


def test_a_folder_that_cannot_be_is_known_before_anything_is_measured(kernels_on, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tune, "_compare", None)
    with pytest.raises(OSError, match="file"):
        tune.tune([(48, 40)], tmp_path / "file" / "tuned.json", **LAYER)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_layers_of_a_model(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
        expected = {(32, 32), (32, 16), (32, 48), (48, 32)}
    else:
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64)
        expected = {(32, 96), (32, 32), (32, 128), (128, 32)}
    config.save_pretrained(tmp_path)
    found = tune.shapes_of(str(tmp_path))
    assert set(found) == expected and len(found) == len(expected)
