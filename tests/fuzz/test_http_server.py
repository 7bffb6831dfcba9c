"""A bounded run of tests/fuzz/http_server.py; ``make fuzz`` has longer ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import serving
from helpers.seeds import shifted
from helpers.waiting import HANG

pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11 or newer")
serving.need_engine("openai", "httpx", "fastapi", "uvicorn", "prometheus_client")


def test_every_answer_is_as_described():
    script = Path(__file__).with_name("http_server.py")
    command = [sys.executable, str(script), "--examples", "8", "--seed", str(shifted(0) % 2**31)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-4000:]
    seen = set(re.findall(r"^(\S+) (\d+): \d+$", found.stdout, re.MULTILINE))
    for route in ("completions", "chat/completions", "load_lora_adapter", "unload_lora_adapter"):
        assert {(f"/v1/{route}", status) for status in ("200", "400", "401", "404", "405")} <= seen
