"""Goal C: a saved adapter is whole or absent, and what is loaded does not depend on its file any more."""

import errno
import os
import random
import time
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fused_lora import AdapterStore, LoraConfig, inject, load_adapter, save_adapter
from fused_lora.adapters import AdapterError, read_adapter
from fused_lora.testing.numeric import assert_close
from helpers.alone import run_killed
from helpers.seeds import shifted

FILES = ["adapter_config.json", "adapter_model.safetensors"]
A = "base_model.model.0.lora_A.weight"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def net():
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)).eval()


def adapted(r):
    return inject(net(), LoraConfig(r=r, lora_alpha=r + 1, target_modules="all-linear", init_lora_weights=False))


def leftovers(parent):
    return [name for name in os.listdir(parent) if "fused_lora_" in name]


def check(folder, models):
    """The folder holds one of these adapters whole, for PEFT too; returns its rank."""
    found = read_adapter(folder)
    r = found.config.r
    layer = models[r][0]
    assert found.config.lora_alpha == r + 1
    assert torch.equal(found.layers["0"].lora_A, layer.lora_A["default"].weight)
    assert torch.equal(found.layers["0"].lora_B, layer.lora_B["default"].weight)
    assert peft.PeftConfig.from_pretrained(folder).r == r == len(load_file(folder / FILES[1])[A])
    return r


@needs_fork
@pytest.mark.experiment("C1", full=200, quick=40)
def test_kills(tmp_path, count):
    """SIGKILL at a random moment of a loop that saves two adapters in turn over one folder: it holds one of them whole.

    On until both adapters and something half written were met: a busy machine gives the loop less time.
    """
    models = {r: adapted(r) for r in (4, 8)}
    target = tmp_path / "saves" / "t"
    target.mkdir(parents=True)
    (target / "README.md").write_text("keep")

    def loop():
        while True:
            for model in models.values():
                save_adapter(model, target)

    save_adapter(models[4], target)
    start = time.perf_counter()
    for _ in range(5):
        save_adapter(models[4], target)
    cost = (time.perf_counter() - start) / 5
    draw, seen, left = random.Random(shifted(0)), set(), 0
    for kill in range(20 * count):
        if kill >= count and seen == {4, 8} and left:
            break
        run_killed(loop, lambda: time.sleep(0.003 + draw.uniform(0.1, 6) * cost))
        seen.add(check(target, models))
        assert (target / "README.md").read_text() == "keep"
        left += len(leftovers(target.parent))
    assert seen == {4, 8} and left > 0  # else nothing was killed in the middle
    save_adapter(models[4], target)
    assert leftovers(target.parent) == [] and sorted(os.listdir(target)) == ["README.md", *FILES]


SYSTEM_CALLS = ["mkdir", "fsync", "open", "rename", "link", "chmod", "write", "close", "unlink", "rmdir", "scandir"]


@pytest.mark.experiment("C2", full=1, quick=1)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EINTR], ids=errno.errorcode.get)
def test_failing_system_calls(tmp_path, monkeypatch, number, count):
    """Each system call of a save fails once (disk full, I/O error, read-only, interrupted): old or new, whole, said."""
    models = {r: adapted(r) for r in (4, 8)}
    target, failures = tmp_path / "t", 0
    save_adapter(models[4], target)
    for name in SYSTEM_CALLS:
        real = getattr(os, name)
        for nth in range(1, 12):
            seen = 0

            def failing(*args, real=real, nth=nth, **kwargs):
                nonlocal seen
                seen += 1
                if seen == nth:
                    raise OSError(number, os.strerror(number))
                return real(*args, **kwargs)

            save_adapter(models[4], target)
            failed = None
            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing)
                try:
                    save_adapter(models[8], target)
                except OSError as error:
                    failed = error.errno
                    failures += 1
            r = check(target, models)
            assert failed == number or r == 8, (name, nth)  # a failure is told
            if seen < nth:
                break  # there are fewer such calls
    assert failures >= 6
    save_adapter(models[8], target)
    assert check(target, models) == 8 and leftovers(tmp_path) == []


def truncate(path, draw):
    os.truncate(path, draw.randrange(path.stat().st_size))


def overwrite(path, draw):
    with path.open("r+b") as file:
        file.write(bytes(draw.randrange(256) for _ in range(path.stat().st_size)))


def replace(path, draw):
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[::-1])
    other.rename(path)


def delete(path, draw):
    path.unlink()


@needs_fork
@pytest.mark.experiment("C3", full=50, quick=5)
@pytest.mark.parametrize("harm", [truncate, overwrite, replace, delete])
def test_files_change_under_a_running_process(tmp_path, harm, count):
    """The files of a loaded adapter are truncated, overwritten, replaced or deleted: its answers keep every bit.

    A load that begins afterwards is refused with AdapterError, in a store too, and no process dies.
    """
    draw = random.Random(shifted(0))
    source, x = adapted(4), torch.randn(3, 24)
    child = os.fork()  # a bus error would end the process
    if child == 0:
        try:
            for i in range(count):
                save_adapter(source, folder := tmp_path / str(i))
                model = net()
                load_adapter(model, folder)
                store = AdapterStore(net())
                store.load("a", folder)
                store.register("b", folder)
                before = answers(model, store, x)
                harm(folder / FILES[draw.randrange(2)], draw)
                assert all(map(torch.equal, before, answers(model, store, x)))
                for load in (lambda: load_adapter(net(), folder), lambda: store.load("b", folder)):  # noqa: B023
                    with pytest.raises(AdapterError):
                        load()
                assert all(map(torch.equal, before, answers(model, store, x)))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def answers(model, store, x):
    with torch.no_grad():
        with store.batch(["a", None, None]):
            return model(x), store.model(x)


@pytest.mark.experiment("C5", full=5_000, quick=500)
def test_damaged_file(tmp_path, count):
    """A bit of a saved weights file is flipped: refused, or (in the name of the digest) the same tensors are read."""
    model = adapted(4)
    save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / FILES[1]
    raw, draw, accepted = path.read_bytes(), random.Random(shifted(0)), 0
    for _ in range(count):
        flipped = bytearray(raw)
        flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.unlink()
        path.write_bytes(flipped)
        try:
            found = read_adapter(path.parent).layers
        except AdapterError:
            continue
        accepted += 1
        assert b"fused_lora.sha256" not in flipped
        for name, layer in found.items():
            assert torch.equal(layer.lora_A, model.get_submodule(name).lora_A["default"].weight)
            assert torch.equal(layer.lora_B, model.get_submodule(name).lora_B["default"].weight)
    assert accepted < 0.05 * count


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def random_adapter(draw):
    """A model with an adapter of a random kind, and what to build it again."""
    number, names = draw.randrange(1 << 30), ["0", "2", "3"]
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    fields = {
        "r": draw.randint(1, 9),
        "lora_alpha": draw.choice([1, 4, 7.5, -2]),
        "target_modules": sorted(draw.sample(names, draw.randint(1, 3))),
        "use_rslora": draw.random() < 0.3,
        "lora_bias": draw.random() < 0.3,
        "bias": draw.choice(["none", "none", "lora_only", "all"]),
        "rank_pattern": draw.choice([{}, {"^2$": 3}, {"[03]": 5, "0": 2}]),
        "alpha_pattern": draw.choice([{}, {"0|3": 2.5}, {r"\d": 3}]),
        "init_lora_weights": False,
    }

    def base():
        torch.manual_seed(number)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Linear(8, 4)).to(dtype).eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a key of a pattern may name a layer that is no target
        model = inject(base(), LoraConfig(**fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return base, model, torch.randn(5, 6, dtype=dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.experiment("C4", full=1_000, quick=30)
def test_random_adapters(tmp_path, count):
    """A random adapter is saved and loaded here and by PEFT: every bit of its tensors is back, and outputs agree."""
    draw = random.Random(shifted(0))
    for i in range(count):
        base, model, x = random_adapter(draw)
        save_adapter(model, tmp_path / "a")
        written, again = load_file(tmp_path / "a" / FILES[1]), base()
        load_adapter(again, tmp_path / "a")
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
        save_adapter(again, tmp_path / "again")
        theirs.save_pretrained(tmp_path / "theirs")
        for folder in ("again", "theirs"):
            found = load_file(tmp_path / folder / FILES[1])
            assert found.keys() == written.keys(), i
            assert all(same_bits(found[key], tensor) for key, tensor in written.items()), i
        with torch.no_grad():
            assert_close(again(x), theirs(x), terms=300)
