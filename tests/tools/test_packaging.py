"""kernels/ is installed as fused_lora.kernels and never as a top-level package, whichever way it is installed."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_lora
from helpers.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]
VERSION = fused_lora.__version__


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what git tracks or would track, so that nothing is built inside the checkout."""
    copy = tmp_path_factory.mktemp("sources")
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    (copy / "csrc/cpu_loops.c").write_text("int anything;")  # the loops themselves take half a minute
    (copy / "kernels/tuned").mkdir(exist_ok=True)
    (copy / "kernels/tuned/chip.json").write_text("{}")
    return copy


def build(sources, command, out):
    run(sys.executable, "setup.py", "-q", command, "--dist-dir", str(out), cwd=sources)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    return build(sources, "bdist_wheel", tmp_path_factory.mktemp("wheel"))


def test_wheel_has_one_top_level_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"fused_lora"}
    kernels = {f"fused_lora/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= set(names) and "fused_lora/py.typed" in names
    assert ("fused_lora/ops/_cpu_loops.so" in names) == bool(shutil.which("cc") or shutil.which("gcc"))


def test_one_wheel_serves_every_python(wheel):
    assert wheel.name.startswith(f"fused_lora-{VERSION}-py3-none-")


# everything that is installed, by folder; what only development needs is in tools/, tests/ and benchmarks/
INSTALLED = {
    "": {"__init__.py", "_version.py", "functional.py", "kernels.py", "reference.py", "py.typed"},
    # doctor's smoke run, and what a user needs to test kernels of their own
    "testing": set(
        "__init__.py bounds.py clock.py graphs.py grouped.py guards.py interpreter.py layers.py numeric.py ordering.py"
        " smoke.py".split()
    ),
}
FOLDERS = set(
    "adapters bases checkpoints cli diagnostics integrations kernels modules ops rows serving testing".split()
)


def test_wheel_holds_nothing_that_only_development_needs(wheel):
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    inside = [name.relative_to("fused_lora") for name in names]
    assert {name.parts[0] for name in inside if len(name.parts) > 1} == FOLDERS
    for folder, files in INSTALLED.items():
        assert {name.name for name in inside if name.parent == Path(folder)} == files
    others = {name for name in inside if name.suffix != ".py"} - {Path("py.typed"), Path("ops/_cpu_loops.so")}
    tuned = {name for name in others if name.match("kernels/tuned/*.json")}
    assert Path("kernels/tuned/chip.json") in tuned
    assert others == tuned, f"no other data, no sources of C, no caches: {others}"


def test_installed_wheel_imports_without_a_top_level_kernels(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import importlib.util as u, fused_lora, fused_lora.kernels;"
        "assert 'site' in fused_lora.__file__, fused_lora.__file__;"
        "spec = u.find_spec('kernels');"
        "print('leak' if spec and spec.origin and 'site' in spec.origin else 'ok')"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stdout + done.stderr


def test_sdist_carries_what_a_build_and_the_tests_need(sources, tmp_path):
    names = tarfile.open(build(sources, "sdist", tmp_path / "sdist")).getnames()
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    needed = {"csrc/cpu_loops.c", "kernels/tiles.py", "fused_lora/reference.py", "tests/conftest.py"}
    assert needed | {"benchmarks/bench_merge.py", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= inside


def test_the_import_from_elsewhere_finds_no_top_level_kernels(tmp_path):
    code = (
        "import importlib.util as u, pathlib, fused_lora.kernels as k; spec = u.find_spec('kernels');"
        f"root = pathlib.Path({str(ROOT)!r});"
        "print('leak' if spec and spec.origin and root in pathlib.Path(spec.origin).parents else 'ok')"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "ok"


def test_the_checkout_does_not_shadow_the_package_named_kernels(tmp_path):
    """With the checkout first on the path, as in an interpreter started there, an installed ``kernels`` is found."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): return name\n")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.path.append({str(tmp_path)!r});"
        "import kernels, fused_lora.kernels.tiles as tiles;"
        "print(kernels.get_kernel('found'), tiles.__name__)"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "found fused_lora.kernels.tiles"


def test_it_imports_and_works_without_triton(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fused_lora\n"
        "layer = fused_lora.LoraLinear(torch.nn.Linear(8, 4), r=2, lora_dropout=0.5, init_lora_weights=False)\n"
        "layer(torch.randn(3, 8)).sum().backward(); layer.merge(); layer.unmerge()\n"
        "from fused_lora.diagnostics import doctor, tune\n"
        "found = dict(doctor.examine(torch.device('cpu')))\n"
        "assert found['path']['forward'] == 'eager' and not found['wrong'], found\n"
        "print('works', layer.lora_A['default'].weight.grad.shape)"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).startswith("works")
