"""``fused-lora serve`` in a process of its own, and clients that ask it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.waiting import HANG


def _too_long() -> tuple[str, int]:
    path = "x" * 5000
    try:
        Path(path).is_file()
    except OSError:
        return path, 400
    return path, 404


TOO_LONG = _too_long()  # no path of a file, and the answer to it: to newer releases of Python it is no error


class Server:
    """A running server; ``client`` is OpenAI's, ``http`` speaks to it without one.

    Args:
        model, adapters: folders. log: file for what it prints. options: of the command line.
        program: what Python runs. key: that the clients send.
    """

    def __init__(
        self,
        model: Path,
        adapters: Path,
        log: Path,
        *options: str,
        program: Sequence[str] = ("-m", "fused_lora.cli"),
        key: str = "none",
    ):
        import httpx
        import openai

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, *program, "serve", "--model", str(model), "--port", str(self.port)]
        command += ["--adapters", str(adapters), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log, self.url = log, f"http://127.0.0.1:{self.port}"
        with log.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=HANG)
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=HANG)

    def __enter__(self) -> Server:
        return self.wait()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait(self) -> Server:
        """Until it is healthy; its log is the error where it ends before that."""
        import httpx

        end = time.monotonic() + HANG
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health").status_code == 200:
                    return self
            time.sleep(0.1)
        self.stop()
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        """Kill it, if it runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def say(self, model: str, prompt: Any, count: int = 12, **more: Any) -> Any:
        """OpenAI's completion, greedy unless ``more`` says otherwise."""
        return self.client.completions.create(
            **{"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, **more}
        )

    def load(self, name: str, path: Any, **more: Any) -> Any:
        """The answer to a request to load an adapter; ``load_inplace=True`` where the name is known."""
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})

    def unload(self, name: str) -> Any:
        """And to unload one."""
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def metric(self, name: str) -> float:
        """A number on the page of metrics, by its name without the prefix."""
        found = re.search(rf"^fused_lora_{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(found.group(1))
