"""Where kernels run, how tests are seeded, and which are skipped for want of a GPU or of Triton."""

import gc
import importlib.util
import os
import random
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import reliability
from helpers.seeds import shifted

EXPERIMENTS: list[dict] = []  # of this process

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
_ASKED_FOR_A_GPU = os.environ.get("TRITON_INTERPRET") == "0"
# kernels are compiled for this chip (80, 90, 100) and their PTX is emulated, in place of the interpreter
EMULATED = int(os.environ.get("FUSED_LORA_EMULATE", 0))
if EMULATED:
    from helpers.emulated.driver import emulate

    emulate(EMULATED, int(os.environ.get("FUSED_LORA_EMULATE_ORDER") or -1))
elif not HAS_CUDA:
    # read when a kernel is decorated, so it is set before any test module imports one
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["FUSED_LORA_TUNED"] = "off"  # what was measured on this machine changes no test
if importlib.util.find_spec("hypothesis") is not None:  # a bare GPU image has none
    from hypothesis import HealthCheck, settings

    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # no clock
    settings.load_profile("busy")

# processes that tests start import what the tests do (pytest's own pythonpath is for its process alone)
_HERE = Path(__file__).resolve().parent
_PATHS = [str(_HERE), str(_HERE.parent / "tools"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in _PATHS if path))

_NEEDS_TRITON = re.compile(
    r"^(?:import|from) +(?:triton|compile_report|fused_lora\.kernels|fused_lora\.testing\.(?:interpreter|bounds))\b",
    re.MULTILINE,
)


class _WithoutTriton(pytest.Module):
    def collect(self):
        pytest.skip("Triton is not installed: kernels cannot run", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if not HAS_TRITON and _NEEDS_TRITON.search(module_path.read_text(encoding="utf-8")):
        return _WithoutTriton.from_parent(parent, path=module_path)


@pytest.fixture(params=["C", "torch"])
def loops(request, monkeypatch):
    """What uses it holds with the C loops and without them."""
    from fused_lora.ops import native
    from fused_lora.ops.merge import blocks

    if native.usable():
        blocks._agree()  # merges small weights, once in a process: a test may count calls
    if request.param == "torch":
        monkeypatch.setattr(native, "usable", lambda: False)
    elif not native.usable():
        pytest.skip(native.describe())
    return request.param


def pytest_addoption(parser):
    parser.addoption(
        "--reliability", metavar="FILE", help="experiments with their full counts; their figures are written to FILE"
    )


def pytest_report_header():
    if EMULATED:
        return f"kernels are compiled for sm_{EMULATED} and emulated"
    return f"kernels run on {torch.cuda.get_device_name()}" if HAS_CUDA else "kernels run in Triton's interpreter"


def pytest_configure(config):
    if device := os.environ.get("FUSED_LORA_TEST_DEVICE"):
        torch.set_default_device(device)
    path = config.getoption("reliability")
    if path and Path(path).resolve() == reliability.RESULTS and config.getoption("keyword"):
        raise pytest.UsageError("--reliability: the page's own figures are of all experiments; -k needs another file")
    if not HAS_CUDA and _ASKED_FOR_A_GPU:
        raise pytest.UsageError("TRITON_INTERPRET=0 asks for a GPU, and there is none")
    if config.getoption("numprocesses", None):
        # each worker, and each process that it starts, has a core; where a test asks for threads, waiting ones sleep
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_runtest_logreport(report):
    """What an experiment of tests/reliability found, on its way from the workers."""
    found = dict(report.user_properties).get("experiment")
    if found and report.when == "call":
        EXPERIMENTS.append({**found, "passed": report.passed, "seconds": round(report.duration, 1)})


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What it makes stays. gc.collect, which benchmarks and torch.compile call often, took 0.3 s to go through it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_sessionfinish(session):
    gc.unfreeze()  # libraries report what is left at the end
    path = session.config.getoption("reliability")
    if path and not hasattr(session.config, "workerinput"):  # the workers of xdist have reported to this process
        reliability.write(Path(path), EXPERIMENTS)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if "device" in item.fixturenames:
            item.add_marker(pytest.mark.kernel)
        if mark := item.get_closest_marker("experiment"):
            found = {"goal": mark.args[0], "what": mark.kwargs.get("what") or " ".join(item.function.__doc__.split())}
            found |= {"test": item.originalname, "file": item.path.stem, "count": repetitions(item)}
            item.user_properties.append(("experiment", found))
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def count(request):
    """How often an experiment is repeated: its ``full`` number with --reliability, its ``quick`` one without."""
    return repetitions(request.node)


def repetitions(item):
    mark = item.get_closest_marker("experiment")
    return mark.kwargs["full" if item.config.getoption("reliability") else "quick"]


@pytest.fixture(scope="session", autouse=True)
def interpreter_shim():
    """bf16 right in Triton's interpreter, wherever a test reaches a kernel."""
    if HAS_TRITON and not HAS_CUDA and not EMULATED:
        from fused_lora.testing.interpreter import install_shim

        install_shim()


@pytest.fixture(autouse=True)
def seed(request):
    """The same random numbers for a test whatever ran before it; FUSED_LORA_TEST_SEED gives all tests others."""
    number = shifted(zlib.crc32(request.node.nodeid.encode()))
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def plans_of_its_own():
    """What a test replaces in the planner counts from its first call on."""
    if planner := sys.modules.get("fused_lora.ops.linear.plan"):
        planner.forget()


@pytest.fixture(scope="session")
def device():
    """Where kernels run: the GPU, or the CPU through the interpreter. Whoever takes it is marked ``kernel``."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def kernels_on(device, monkeypatch):
    """Tensors on ``device`` take the kernel path, whatever failed before; on a CPU with the configurations of sm_90."""
    pytest.importorskip("triton")
    from fused_lora.kernels import config
    from fused_lora.ops import guard

    monkeypatch.setattr(guard, "DEVICE", device.type)
    monkeypatch.setattr(guard, "_state", {})
    if device.type == "cpu":
        monkeypatch.setattr(config, "capability", lambda _: EMULATED or 90)


@pytest.fixture
def guards():
    """Guarded, NaN-filled buffers; the bands are checked when the test ends."""
    from fused_lora.testing.guards import GuardedBuffers

    buffers = GuardedBuffers()
    yield buffers
    buffers.assert_intact()


@pytest.fixture
def kernel_memory():
    """Checks every access of the kernels a test launches, and what their launchers allocate uninitialised."""
    from fused_lora.testing.guards import guarded_allocations
    from fused_lora.testing.interpreter import checked

    with checked() as report, guarded_allocations():
        yield report
