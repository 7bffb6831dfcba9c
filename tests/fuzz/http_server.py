"""Fuzz a running server by its OpenAPI description, with schemathesis.

    python tests/fuzz/http_server.py [--seconds S] [--examples N] [--seed N]

Requests that fit the description and requests that do not, with the key and without. Every answer must have a status,
media type and shape that the description has for it. None may be a 500. What does not fit must be refused. Afterwards
nothing is left in the engine, and the same questions have the same answers as before.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
CHECKS = "not_a_server_error status_code_conformance content_type_conformance response_schema_conformance"
CHECKS += " response_headers_conformance negative_data_rejection ignored_auth unsupported_method"
KEY = "of the fuzzer"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, help="at most")
    options.add_argument("--examples", type=int, help="requests for each route in the random part")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    from helpers import serving
    from helpers.server import Server

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny = serving.Tiny(folder, a=4, b=4, torn=4)
        limits = "--max-tokens 16 --drain-timeout 1 --served-model-name base --allow-load".split()
        with Server(tiny.folder, tiny.root, folder / "log", *limits, "--api-key", KEY, key=KEY) as server:
            weights = tiny.root / "torn" / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-64])
            before = answers(server)
            status = fuzz(server, arguments)
            if status or (found := wrong(server, before)):
                raise SystemExit(f"{(folder / 'log').read_text()[-4000:]}\n{status or found}")
            page = server.http.get("/metrics").text
    counts = re.findall(r'^fused_lora_requests_total\{route="(.*)",status="(\d+)"\} (\d+)\.0$', page, re.MULTILINE)
    print("\n".join(f"{route} {status}: {count}" for route, status, count in counts))


def answers(server) -> list[str]:
    """Greedy texts of the base and of both sound adapters, loaded anew."""
    for name in ("a", "b"):
        assert server.load(name, name, load_inplace=True).status_code == 200
    return [server.say(name, f"Tell {name}").choices[0].text for name in ("base", "a", "b")]


def fuzz(server, arguments: argparse.Namespace) -> int:
    """Run schemathesis against ``server``; its exit status."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--seed", str(arguments.seed), "--no-color"]
    command += ["--checks", ",".join(CHECKS.split()), "--generation-database", ":memory:"]
    # most requests for what random names mean are refused: no fault of theirs
    command += ["--suppress-health-check", "all", "--warnings", "off"]
    command += ["--max-time", str(arguments.seconds)] if arguments.seconds else []
    command += ["--max-examples", str(arguments.examples)] if arguments.examples else []
    hooks = {"SCHEMATHESIS_HOOKS": str(HERE / "http_hooks.py")}
    with tempfile.TemporaryDirectory() as folder:  # where it leaves its reports
        return subprocess.run(command, env={**os.environ, **hooks}, cwd=folder).returncode


def wrong(server, before: list[str]) -> str | None:
    """What is not as it was, if anything."""
    if (now := answers(server)) != before:
        return f"answered {before} before, {now} now"
    names = ("requests_running", "requests_waiting", "failed_steps_total", "non_finite_requests_total")
    if left := {name: value for name in names if (value := server.metric(name))}:
        return f"left behind: {left}"
    return None


if __name__ == "__main__":
    main()
