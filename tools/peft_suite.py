"""Run the LoRA tests of PEFT's own suite twice, without and with fused_lora's install(), and print where they differ.

    python tools/peft_suite.py                     # PEFT's source archive of the installed version, from the index
    python tools/peft_suite.py --source peft-0.21.2 -n 2 -k "mixed or lora_ga"

Both runs are offline unless HF_HUB_OFFLINE=0 is set: tests of models that are not in the Hugging Face cache fail alike.
So do files that cannot be imported, which ``error`` counts: the suite wants diffusers, parameterized and scipy, too.
The exit status is 1 when a test that passes under stock PEFT does not pass with install(). The same file is the pytest
plugin of both runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

# what the names of the LoRA tests have in common, over all files of the suite
LORA = "(lora or mixed or initialization or low_level or tuners_utils or other or integrations or target_parameters)"
OTHER_METHODS = ("adalora", "delora", "randlora", "vblora", "unilora", "riemannian", "tinylora", "xlora", "lorafa")
SLOW = ("fsdp", "gpu")
INSTALLED = "FUSED_LORA_PEFT_SUITE"
# tests that differ for a reason
_FOLDS = "it counts PEFT's folds: there are none"
EXPECTED = {
    "test_target_multiple_parameters_on_same_module": _FOLDS,
    "test_target_parameter_result_caching_works": _FOLDS,
    "test_target_parameters_forward_under_autocast": _FOLDS,
}


def pytest_configure() -> None:
    """The plugin: in the second run every LoRA Linear that PEFT builds in this process is accelerated."""
    if os.environ[INSTALLED] == "1":
        from fused_lora.integrations.peft import install

        install()


def pytest_collection_finish() -> None:
    """PEFT's tests go online for a model's first use, whatever HF_HUB_OFFLINE says: call every use a later one."""
    utilities = sys.modules.get("tests.testing_utils")
    if utilities is not None and os.environ["HF_HUB_OFFLINE"] == "1":
        utilities._HUB_MODEL_ACCESSES = _Known()


class _Known(dict):
    def __contains__(self, model: object) -> bool:
        return True

    def __missing__(self, model: str) -> int:
        return 0


def unpack(version: str, folder: Path) -> Path:
    """PEFT's source of this version below ``folder``."""
    download = "-m pip download --quiet --no-binary :all: --no-deps --dest".split()
    subprocess.run([sys.executable, *download, str(folder), f"peft=={version}"], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"peft-{version}"


def outcomes(folder: Path, installed: bool, arguments: list[str]) -> dict[str, tuple[str, str]]:
    """One run of the suite: test -> (passed, failed, error or skipped; the message)."""
    report = folder / f"{'fused' if installed else 'stock'}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "--continue-on-collection-errors", "tests"]
    command += ["-p", Path(__file__).stem, "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    path = os.pathsep.join([str(Path(__file__).parent.resolve()), os.environ.get("PYTHONPATH", "")])
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path, INSTALLED: str(int(installed))}
    with open(report.with_suffix(".log"), "w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    found = {}
    for case in ET.parse(report).iter("testcase"):
        tags = {child.tag: child.get("message") or "" for child in case if child.tag in ("failure", "error", "skipped")}
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = next(iter(tags.items()), ("passed", ""))
    return found


def main() -> int:
    """Both runs and the differences; 0 when nothing that passes under stock PEFT stops passing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, help="an unpacked source archive or checkout of PEFT")
    parser.add_argument("-n", default="0", help="processes (pytest-xdist)")
    parser.add_argument("-k", default=f"{LORA} and not ({' or '.join(OTHER_METHODS + SLOW)})", help="which tests")
    parser.add_argument("--keep", type=Path, help="folder for the copy of the tests, the logs and the XML reports")
    args = parser.parse_args()
    import peft

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        source = args.source or unpack(peft.__version__, Path(temporary))
        shutil.copytree(source / "tests", folder / "tests", dirs_exist_ok=True)
        (folder / "tests" / "__init__.py").touch()
        (folder / "pytest.ini").write_text("[pytest]\n")
        both = [outcomes(folder, installed, ["-n", args.n, "-k", args.k]) for installed in (False, True)]
    stock, fused = both
    worse = 0
    for name in sorted(stock.keys() | fused.keys()):
        before, after = stock.get(name, ("missing", "")), fused.get(name, ("missing", ""))
        if before[0] != after[0]:
            expected = EXPECTED.get(name.rpartition("::")[2])
            worse += before[0] == "passed" and expected is None
            print(name if expected is None else f"{name} (expected: {expected})")
            print(f"  stock: {before[0]} {before[1][:300]}\n  fused: {after[0]} {after[1][:300]}")
    for kind, found in (("stock", stock), ("fused", fused)):
        counts = {k: sum(o[0] == k for o in found.values()) for k in ("passed", "failure", "error", "skipped")}
        print(f"{kind}: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
