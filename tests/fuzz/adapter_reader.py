"""Fuzz the readers of an adapter's two files: what ``helpers.adapter_files.is_accepted`` says must hold for any bytes.

    python tests/fuzz/adapter_reader.py [config] [header] [weights] [--runs N] [--seconds S] [--engine NAME]

config and header take the text files of tests/fuzz/corpus/ as seeds, weights whole files that are made here. Beside the
file that changes lies a good one. The engine ``atheris`` (libFuzzer) takes one target, and looks for inputs that reach
new lines of the readers. ``mutations`` needs no such package: it changes the seeds at random. Both stop at the first
input that breaks a rule, and save it in --findings. No input may take more than 2 s of CPU time, nor 64 MiB more memory
than the process has at the start.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
CORPUS = HERE / "corpus"
TARGETS = ("config", "header", "weights")
CPU_SECONDS = 2.0
MORE_BYTES = 64 << 20
LONGEST = 1 << 16


def seeds(target: str) -> dict[str, bytes]:
    """Inputs to begin with, by name."""
    if target != "weights":
        return {path.name: path.read_bytes() for path in sorted((CORPUS / target).iterdir())}
    import torch

    from helpers.adapter_files import good_tensors, header_and_data, pack

    good = header_and_data(good_tensors())
    half = header_and_data({name: tensor.bfloat16() for name, tensor in good_tensors().items()})
    file, short = pack(*good), pack(*half)
    infinite = header_and_data({name: torch.full_like(tensor, torch.inf) for name, tensor in good_tensors().items()})
    found = {"fp32": file, "bf16": short, "digest": with_digest(), "inf": pack(*infinite)}
    found |= {"cut": file[:-1], "longer": file + b"\0", "empty": b"", "length": file[:8]}
    found |= {f"length {n}": pack(*good, length=n) for n in (0, 1, 2**31, 2**63, 2**64 - 1)}
    return found | {"aligned": pack(json.dumps(half[0]).encode() + b" " * 7, half[1])}


def with_digest() -> bytes:
    """The good adapter as save_adapter writes it."""
    from fused_lora.adapters.checkpoint import WEIGHTS_NAME
    from fused_lora.adapters.write import write_files
    from helpers.adapter_files import good_tensors

    with tempfile.TemporaryDirectory() as folder:
        write_files(folder, "{}", good_tensors())
        return (Path(folder) / WEIGHTS_NAME).read_bytes()


class Check:
    """Puts inputs to the property and counts them: ``accepted`` and ``refused``."""

    def __init__(self, target: str, findings: Path):
        from helpers.adapter_files import CONFIG, good_tensors, header_and_data, is_accepted, pack, packed

        self._temporary = tempfile.TemporaryDirectory()
        self._folder, self._findings, self._target = Path(self._temporary.name) / "a", findings, target
        self._is_accepted, self._packed = is_accepted, packed
        config = json.dumps({**CONFIG, "bias": "all"} if target == "header" else CONFIG).encode()
        self._config, self._weights = config, pack(*header_and_data(good_tensors()))
        self.counts: Counter[str] = Counter()

    def __call__(self, raw: bytes) -> None:
        """One input; whatever it breaks is raised once more after the input was saved."""
        files = (raw, self._weights) if self._target == "config" else (self._config, self._packed(raw))
        signal.signal(signal.SIGVTALRM, too_slow)
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        try:
            self.counts["accepted" if self._is_accepted(self._folder, *files) else "refused"] += 1
        except BaseException:
            path = self._findings / f"{self._target}-{hashlib.sha256(raw).hexdigest()[:16]}"
            path.write_bytes(raw)
            print(f"broken by {path}", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def too_slow(*_: object) -> None:
    raise TimeoutError(f"one input took more than {CPU_SECONDS} s of CPU time")


def bound_memory() -> None:
    """From here on allocations beyond MORE_BYTES fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def mutants(target: str, number: int) -> Iterator[bytes]:
    """Every seed, then changed ones without end."""
    from helpers.adapter_files import mutated

    draw, known = random.Random(number), list(seeds(target).values())
    yield from known
    while True:
        yield mutated(draw.choice(known), draw)


def by_mutations(check: Check, target: str, options: argparse.Namespace) -> None:
    """Random changes of the seeds."""
    end = time.monotonic() + options.seconds if options.seconds else float("inf")
    for number, raw in enumerate(mutants(target, options.seed)):
        if number == options.runs or time.monotonic() > end:
            break
        check(raw)
    print(f"{target}: {check.counts['accepted']} accepted, {check.counts['refused']} refused")


def by_atheris(check: Check, target: str, options: argparse.Namespace) -> None:
    """libFuzzer, led by the lines that an input reaches. It ends the process."""
    import atheris

    from helpers.adapter_files import TOKENS

    folder = Path(tempfile.mkdtemp())
    for name, raw in seeds(target).items():
        (folder / name).write_bytes(raw)
    escaped = ("".join(f"\\x{byte:02x}" for byte in token) for token in TOKENS if len(token) < 64)
    dictionary = folder.with_suffix(".dict")
    dictionary.write_text("".join(f'"{token}"\n' for token in escaped))
    flags = [f"-max_len={LONGEST}", f"-dict={dictionary}", f"-artifact_prefix={options.findings}/", "-rss_limit_mb=0"]
    flags += [f"-seed={options.seed + 1}", "-print_final_stats=1"]
    flags += [f"-runs={options.runs}"] if options.runs else []
    flags += [f"-max_total_time={options.seconds}"] if options.seconds else []
    atheris.Setup([sys.argv[0], str(folder), *flags], check)
    atheris.Fuzz()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("targets", nargs="+", choices=TARGETS)
    options.add_argument("--engine", choices=("atheris", "mutations"), help="default: atheris if it is installed")
    options.add_argument("--runs", type=int, help="inputs for each target at most")
    options.add_argument("--seconds", type=int, help="for each target at most")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--findings", type=Path, default=Path.cwd(), help="folder for inputs that break a rule")
    arguments = options.parse_args()
    engine: Callable[[Check, str, argparse.Namespace], None] = by_mutations
    if arguments.engine == "atheris" or (arguments.engine is None and importlib.util.find_spec("atheris")):
        import atheris

        engine = by_atheris
        if len(arguments.targets) > 1:
            options.error("atheris ends the process: expected one target, or --engine mutations")
        with atheris.instrument_imports(include=["fused_lora.adapters", "fused_lora.modules.config"]):
            import fused_lora.adapters.checkpoint  # noqa: F401
    checks = {target: Check(target, arguments.findings) for target in arguments.targets}
    bound_memory()
    for target, check in checks.items():
        engine(check, target, arguments)


if __name__ == "__main__":
    main()
