"""Compile on this machine what a GPU machine would compile in its first minutes, and pack the binaries.

    python tools/precompile.py fill --cache DIR [--target sm_90] [--only layers,smoke,launches,decode,tests]
    python tools/precompile.py pack --cache DIR CACHE.tar.xz
    python tools/precompile.py unpack CACHE.tar.xz          on the machine with the GPU, before the first launch

``fill`` needs no GPU: launches stop after the compiler. It must run under the Triton release of the other machine.
Triton's key of a binary is a hash of five things: the installation (which differs between builds of one release), the
kernel's source, the backend, the options and the environment. ``pack`` keeps the last four. ``unpack`` adds the first
for the machine it runs on, and builds the C launchers on all its cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import io
import itertools
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = "parts.jsonl"  # of each binary: its key, the parts of the key, the C source of its launcher
TESTS = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
MULTIPROCESSORS = 132


def install(capability: int) -> None:
    """From now on a launch compiles for ``capability`` and computes nothing. Tensors may be on any device."""
    import triton.compiler.compiler as compiler
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_device_capability(self, device=0):
            return divmod(capability, 10)

    driver.set_active(Driver())
    run, key_of, log = JITFunction.run, compiler.get_cache_key, Path(os.environ["TRITON_CACHE_DIR"]) / PARTS
    log.parent.mkdir(parents=True, exist_ok=True)

    def compile_only(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    def recorded(src, backend, options, env_vars):
        full = key_of(src, backend, options, env_vars=env_vars)
        key = hashlib.sha256(full.encode()).hexdigest()
        position = src.fn.arg_names.index
        constants = {(position(i),) if isinstance(i, str) else i: v for i, v in src.constants.items()}
        # newer releases have one launcher for all signatures
        make = getattr(nvidia, "make_launcher", None)
        launcher = make(constants, dict(src.signature), None) if make else None
        parts = src.hash(), backend.hash(), options.hash(), str(sorted(env_vars.items())), src.name
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps([key, parts, launcher]) + "\n")
        return full

    JITFunction.run, compiler.get_cache_key = compile_only, recorded
    from fused_lora.kernels import (
        config,
        grouped_expand,
        grouped_shrink,
        launch,
        lora_backward,
        lora_expand,
        lora_grad,
        lora_linear,
        lora_shrink,
        merge,
    )
    from fused_lora.ops import guard

    guard.DEVICE = "cpu"
    launchers = grouped_expand, grouped_shrink, lora_backward, lora_expand, lora_grad, lora_linear, lora_shrink
    for module in (config, merge, *launchers):
        if hasattr(module, "capability"):
            module.capability = lambda device: capability
        if hasattr(module, "processors"):
            module.processors = lambda device: MULTIPROCESSORS
    launch.Launch._prepare = lambda *_: None  # it would load a launcher, and here is none
    os.environ["FUSED_LORA_CHECK"] = "0"


def ignore_results() -> None:
    """Nothing is computed, so no comparison can hold."""
    import torch

    from fused_lora.kernels import corrections
    from fused_lora.ops import guard
    from fused_lora.ops.merge import launch
    from fused_lora.testing import interpreter, layers, numeric, smoke

    interpreter.install_shim = lambda *_, **__: None
    corrections.totals_of = launch.totals_of = lambda records: [(0, 0, 0)] * len(records)  # each merge went well
    corrections.Corrections.is_back = lambda _: True
    layers.LayerCase.check = guard.compare = lambda *_, **__: None
    smoke.assert_merged = smoke.assert_no_worse = lambda *_, **__: None
    numeric.assert_no_worse = layers.assert_no_worse = torch.testing.assert_close = lambda *_, **__: None
    torch.equal = lambda *_: True


def pytest_configure() -> None:
    """As a plug-in of pytest (-p precompile): the kernels' tests launch what they launch on a GPU."""
    os.environ.pop("TRITON_INTERPRET", None)
    install(int(os.environ["PRECOMPILE_CAPABILITY"]))
    ignore_results()


def fill_layers() -> None:
    """What the gpu tests and the benchmarks of a layer launch: plans and variants, on tensors without memory."""
    import importlib.util

    import torch

    from fused_lora.ops import guard

    guard.DEVICE = "meta"

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_linear
    import bench_variants

    spec = importlib.util.spec_from_file_location("gpu_layers", ROOT / "tests" / "gpu" / "test_layers.py")
    gpu_layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_layers)
    options = argparse.Namespace(device=torch.device("cuda"), shapes=None, rows=None, points="first")
    bench = {*bench_linear.points(options), *bench_variants.points(options)}
    shapes = [(*shape, *dtypes) for shape in gpu_layers.SHAPES for dtypes in gpu_layers.DTYPES]
    shapes += [
        (p.M, p.outputs, p.inputs, p.r, p.dropout, getattr(torch, p.dtype), getattr(torch, p.adapter_dtype))
        for p in bench
    ]
    for M, N, K, r, p, dtype, adapter_dtype in dict.fromkeys(shapes):
        for bias in (True, False):
            _layer(M, N, K, [r], [p], dtype, adapter_dtype, bias, every=bias)
            if dtype.itemsize == 2:  # under autocast
                _layer(M, N, K, [r], [p], dtype, torch.float32, bias, every=False, rounded=dtype)
    two = (40, 1024, 4096, [16], [0.0]), (40, 256, 256, [16], [0.0])
    for args in ((3000, 4096, 2048, [16, 3, 100], [0.1, 0.0, 0.5]), *two):
        _layer(*args, torch.bfloat16, torch.bfloat16, True, every=False)
    # tests/gpu/test_runtime.py
    rows = [(M, 1024) for M in (1, 40, 512, 600, 2048)] + [(M, 1040) for M in (41, 601, 2050)]
    layers = [(M, 2048, K, [16], [p]) for (M, K), p in itertools.product(rows, (0.0, 0.5))]
    for args in (*layers, (513, 64, 4096, [1], [0.5])):
        _layer(*args, torch.bfloat16, torch.bfloat16, False, every=False)


def _layer(M, N, K, ranks, dropout, dtype, adapter_dtype, bias, every, rounded=None) -> None:
    import torch

    from fused_lora.kernels import config
    from fused_lora.testing.layers import LayerCase

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    case = LayerCase(
        x=empty(M, K), weight=empty(N, K), bias=empty(N) if bias else None,
        lora_A=[empty(r, K, dtype=adapter_dtype) for r in ranks],
        lora_B=[empty(N, r, dtype=adapter_dtype) for r in ranks],
        scaling=[2.0] * len(ranks), dropout=dropout,
        seeds=empty(len(ranks), dtype=torch.int64) if any(dropout) else None, g=empty(M, N),
    )  # fmt: skip
    case.planned(rounded)
    if every:
        upcast = adapter_dtype != dtype
        for variant in (*config.variants(M, max(ranks), dtype, any(dropout), upcast, len(ranks)), "library"):
            _, S = case.by(variant)
        passes = len(ranks) == 1 and ranks[0] <= config.PASS_RANKS
        for variant in ("passes", "library") if passes else ("library",):
            case.by(variant, S)


def fill_launches() -> None:
    """What bench_merge and bench_launches launch; a configuration that does not compile is a result in the latter."""
    import torch

    from fused_lora.kernels import config, merge
    from fused_lora.ops.merge import launch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_launches
    import bench_merge

    cpu = torch.device("cpu")
    for name in bench_merge.DTYPES["cuda"]:
        # as its shapes: multiples of the tiles
        weights = bench_merge.Weights.draw(bench_merge.Point(128, 128, dtype=name), cpu)
        for merger in bench_merge.mergers(weights).values():
            merger.merge()
            merger.unmerge()
        dtype = weights.weight.dtype
        tile = merge.default_tile(dtype, True, config.capability(cpu))
        for how, even in itertools.product(("merge", "unmerge", "switch"), (True, False)):
            launch._check_together(how, False, tile, dtype, cpu, even)  # a model's

    options = argparse.Namespace(shapes=None, rows=None)
    for point in bench_launches.points(options):
        for name, tiles, call, *_ in bench_launches.launches(point, torch.device("meta")):
            if tiles is not None:
                try:
                    call()
                except Exception as error:  # whatever the compiler raises
                    print(f"{name} {tiles}: {type(error).__name__}: {str(error)[:200]}")


def fill_decode() -> None:
    """What bench_decode launches."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_decode

    torch.nn.functional.linear = lambda x, W, bias=None: x.new_zeros(*x.shape[:-1], len(W))  # the base is not ours
    decode = bench_decode.Decode(bench_decode.LLAMA_3_8B, torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        for point in bench_decode.points(argparse.Namespace(rows=None)):
            names, inputs, store = decode.names(point), decode.inputs(point.M), decode.stores[point.ranks]
            with store.batch(names):
                decode.served[point.ranks](*inputs)
            buffers = store.row_buffers(point.M, point.D, max(bench_decode.RANKS[point.ranks]))
            with store.batch_rows(names, [1] * point.M, buffers):
                decode.served[point.ranks](*inputs)


def fill_smoke() -> None:
    """What fused_lora.testing.smoke launches."""
    import torch

    from fused_lora.testing import smoke

    torch.set_num_threads(1)
    for part in smoke.PARTS:
        with contextlib.suppress(AssertionError, RuntimeError):  # of a record that was not written
            for line in part("cpu"):
                print(line)


def fill_tests(capability: int) -> None:
    """What the kernels' own tests launch."""
    environment = os.environ | {"PRECOMPILE_CAPABILITY": str(capability), "PYTHONPATH": _path()}
    for path in TESTS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "precompile", "-p", "no:cacheprovider", "-m", "not slow"]
        found = subprocess.run(
            [*command, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        print(path.stem, (found.stdout or found.stderr).strip().splitlines()[-1], flush=True)


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))


def fill(arguments) -> None:
    """Run the parts, each in a process of its own, beside each other."""
    os.environ["TRITON_CACHE_DIR"] = str(arguments.cache)
    os.environ.pop("TRITON_INTERPRET", None)
    if arguments.part:
        capability = int(arguments.target.removeprefix("sm_"))
        if arguments.part == "tests":
            return fill_tests(capability)
        install(capability)
        ignore_results()
        parts = {"layers": fill_layers, "smoke": fill_smoke, "launches": fill_launches, "decode": fill_decode}
        return parts[arguments.part]()
    command = [sys.executable, __file__, "fill", "--cache", str(arguments.cache), "--target", arguments.target]
    running = [subprocess.Popen([*command, "--part", part]) for part in arguments.only.split(",")]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"parts that failed: {codes} of {arguments.only}")


def pack(arguments) -> None:
    """Every binary that ``fill`` has put into the cache, by the parts of its key that no machine changes."""
    os.environ["TRITON_CACHE_DIR"] = str(arguments.cache)
    import triton
    from triton.runtime.cache import get_cache_manager

    entries, launchers = {}, {}
    for line in (arguments.cache / PARTS).read_text(encoding="utf-8").splitlines():
        key, parts, launcher = json.loads(line)
        entries[key] = parts
        if launcher:
            launchers[hashlib.sha256(launcher.encode()).hexdigest()] = launcher
    manifest = []
    with tarfile.open(arguments.file, "w:xz") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for key, parts in entries.items():
            group = get_cache_manager(key).get_group(f"{parts[4][:150]}.json") or {}
            files = [Path(p) for name, p in group.items() if name.endswith((".cubin", ".json"))]
            if len(files) < 2:
                continue  # it did not compile
            manifest.append(dict(parts=parts, files=[f.name for f in files], at=key))
            for f in files:
                add(f"{key}/{f.name}", f.read_bytes())
        content = dict(entries=manifest, launchers=list(launchers.values()), triton=triton.__version__)
        add("manifest.json", json.dumps(content).encode())
    size = arguments.file.stat().st_size / 2**20
    print(f"{len(manifest)} binaries, {len(launchers)} launchers, {size:.1f} MiB")


def unpack(arguments) -> None:
    """Put the packed binaries where this machine's Triton looks for them, and build their launchers."""
    import triton
    from triton.runtime.cache import get_cache_manager, triton_key

    start, here = time.time(), triton_key()
    try:
        with tarfile.open(arguments.file) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        manifest = json.loads(files["manifest.json"])
    except (tarfile.TarError, EOFError, lzma.LZMAError, KeyError, ValueError) as error:
        sys.exit(f"{arguments.file}: expected a whole file of the command pack, got {error!r}: nothing unpacked")
    if manifest["triton"] != triton.__version__:
        sys.exit(f"packed with triton {manifest['triton']}, here is {triton.__version__}: nothing unpacked")
    for entry in manifest["entries"]:
        src, backend, options, environment, name = entry["parts"]
        key = hashlib.sha256(f"{here}-{src}-{backend}-{options}-{environment}".encode()).hexdigest()
        cache = get_cache_manager(key)
        group = {f: cache.put(files[f"{entry['at']}/{f}"], f) for f in entry["files"]}
        cache.put_group(f"{name[:150]}.json", group)
    with concurrent.futures.ProcessPoolExecutor() as pool:
        built = sum(pool.map(_build, manifest["launchers"]))
    print(f"{len(manifest['entries'])} binaries, {built} launchers in {time.time() - start:.1f} s")


def _build(text: str) -> int:
    """Compile one launcher under the key that Triton gives it; 1 if it was not there."""
    import sysconfig

    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.build import _build as build
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    name = "__triton_launcher"
    cache = get_cache_manager(hashlib.sha256((text + platform_key()).encode()).hexdigest())
    library = name + sysconfig.get_config_var("EXT_SUFFIX")
    if cache.get_file(library):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{name}.c"
        source.write_text(text, encoding="utf-8")
        so = build(name, str(source), folder, nvidia.library_dirs(), nvidia.include_dirs, nvidia.libraries, [])
        cache.put(Path(so).read_bytes(), library, binary=True)
    return 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    filling = commands.add_parser("fill")
    filling.add_argument("--target", default="sm_90")
    filling.add_argument("--only", default="layers,smoke,launches,decode,tests", help="parts, separated by commas")
    filling.add_argument("--part", help=argparse.SUPPRESS)
    packing, unpacking = commands.add_parser("pack"), commands.add_parser("unpack")
    for command, run in ((filling, fill), (packing, pack), (unpacking, unpack)):
        command.set_defaults(run=run)
        if command is not unpacking:
            command.add_argument("--cache", type=lambda text: Path(text).resolve(), required=True)
        if command is not filling:
            command.add_argument("file", type=Path)
    arguments = parser.parse_args(argv)
    found = importlib.metadata.version("triton")
    if tuple(map(int, found.split(".")[:2])) < (3, 5):  # no function makes the key of a launch
        sys.exit(f"expected triton 3.5 or newer, found {found}: nothing done")
    arguments.run(arguments)


if __name__ == "__main__":
    main()
