"""``fused-lora serve``: the command line of the HTTP server. Heavy imports come after the options are checked."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger("fused_lora.serve")
_NEEDS = "fused-lora serve needs more packages: pip install fused_lora[serve]"
_PROBED_FIRST = 100  # adapters that are checked before the server answers
_PROBE_PAUSE_SECONDS = 0.05
# clients and proxies keep idle connections for up to 60 s; one that is closed just as they use it fails their request
KEEP_ALIVE_SECONDS = 75
KEY_VARIABLE = "FUSED_LORA_API_KEY"


def parser() -> argparse.ArgumentParser:
    """The options of ``fused-lora serve``."""
    found = argparse.ArgumentParser("fused-lora serve", description="OpenAI-compatible server for many adapters")
    found.add_argument("--model", required=True, help="folder or hub name of the base model")
    found.add_argument("--adapters", type=Path, metavar="DIR", help="each folder in it with an adapter is served")
    found.add_argument(
        "--lora-modules",
        nargs="+",
        type=_lora_module,
        default=[],
        metavar="NAME=PATH",
        help='adapters by name, from any folder; or JSON as for vLLM: \'{"name": "sql", "path": "adapters/sql"}\'',
    )
    found.add_argument("--served-model-name", metavar="NAME", help="what requests call the base model")
    found.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    found.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default: 8000)")
    found.add_argument("--api-key", help=f"clients must send it; {KEY_VARIABLE} in the environment does the same")
    found.add_argument(
        "--allow-origin",
        nargs="+",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="web pages of these origins may ask, e.g. https://chat.example.org; * for all (default: none)",
    )
    found.add_argument("--allow-load", action="store_true", help="/v1/load_lora_adapter and unload, from DIR only")
    found.add_argument(
        "--allow-partial", action="store_true", help="leave out what an adapter has and the model has not"
    )
    found.add_argument("--device", help="default: cuda if there is one, else cpu")
    found.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: float32 on a CPU")
    found.add_argument(
        "--capacity", type=_bytes, metavar="BYTES", help="adapters on the device at most, e.g. 512M (default: no limit)"
    )
    found.add_argument(
        "--host-capacity", type=_bytes, metavar="BYTES", help="adapters kept in host memory at most (default: no limit)"
    )
    found.add_argument("--no-access-log", action="store_true", help="no line in the log for each request")
    engine = found.add_argument_group("engine")
    for option, what, default in (
        ("--max-requests", "requests in one step at most", 64),
        ("--max-step-tokens", "tokens in one step at most", 256),
        ("--cache-tokens", "tokens of keys and values kept", 16384),
    ):
        text = f"{what} (default: {default}; on a GPU by its memory)"
        engine.add_argument(option, type=_count, metavar="N", help=text)
    engine.add_argument("--no-prefix-sharing", action="store_true", help="compute equal prefixes again")
    limits = found.add_argument_group("limits")
    limits.add_argument("--max-queue", type=_count, default=256, help="sequences running and waiting (default: 256)")
    limits.add_argument("--max-tokens", type=_count, default=4096, help="per sequence (default: 4096)")
    limits.add_argument("--max-body", type=_bytes, default=1 << 20, metavar="BYTES", help="default: 1M")
    limits.add_argument("--request-timeout", type=_seconds, default=600.0, metavar="SECONDS", help="default: 600")
    limits.add_argument("--drain-timeout", type=_seconds, default=30.0, metavar="SECONDS", help="default: 30")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it; returns the exit status."""
    options = parser().parse_args(arguments)
    _log_with_ids(options.no_access_log)
    if options.allow_load and options.adapters is None:
        raise SystemExit("--allow-load: needs --adapters DIR, the folder that adapters may come from")
    if options.adapters is not None and not options.adapters.is_dir():
        raise SystemExit(f"--adapters: {str(options.adapters)!r} is no folder")
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise SystemExit(f"--api-key, {KEY_VARIABLE}: the key is empty, so everybody would have it")
    options.api_key = key and key.strip()  # a file's last line ends with a newline, which no header can hold
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import transformers  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise SystemExit(f"{_NEEDS} ({error})") from None
    from fused_lora.serving.engine.continuous import check_transformers

    try:
        check_transformers()
    except RuntimeError as error:
        raise SystemExit(f"fused-lora serve: {error}") from None
    _check_address(options.host, options.port)
    app = build(options)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="info",
        access_log=False,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(options.drain_timeout),
        server_header=False,
    )
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal that ended it once more, which would make an orderly end look like a crash
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run()
    return 0


def _check_address(host: str, port: int) -> None:
    """SystemExit if the server cannot listen there, which uvicorn would find out after the model was loaded."""

    async def listen() -> None:  # as uvicorn does
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, host, port, start_serving=False)).close()

    try:
        asyncio.run(listen())
    except (OSError, UnicodeError) as error:  # a name with an empty or a long part
        reason = getattr(error, "strerror", None) or error
        raise SystemExit(f"--host, --port: cannot listen on {host} port {port}: {reason}") from None


def _log_with_ids(no_access_log: bool) -> None:
    """Log to stderr, each line with the id of its request."""
    from fused_lora.serving.http.record import AddRequestId

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(AddRequestId())
    if no_access_log:
        logging.getLogger("fused_lora.access").setLevel(logging.WARNING)


def build(options: argparse.Namespace) -> Any:
    """The ASGI application for these options, its engine not yet started."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fused_lora.serving.engine.continuous import continuous_batching
    from fused_lora.serving.http.app import Settings, create_app
    from fused_lora.serving.http.engine import AsyncEngine, Limits
    from fused_lora.serving.http.metrics import Metrics
    from fused_lora.serving.store import AdapterStore

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device: {error}") from None
    dtype = options.dtype or ("float32" if device.type == "cpu" else "auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        model.to(device).eval()
    except (OSError, ValueError) as error:  # no such model, or none for text
        raise SystemExit(f"--model: {error}") from None
    name = options.served_model_name or os.path.basename(os.path.abspath(options.model))
    store = AdapterStore(model, capacity_bytes=options.capacity, host_bytes=options.host_capacity)
    with torch.no_grad():  # one token: which layers the model never calls is known before an adapter has them
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    known = [] if options.adapters is None else register_folder(store, options.adapters, name, options.allow_partial)
    probe(store, known[:_PROBED_FIRST], base=options.model)
    probe_named(store, options.lora_modules, name, options)
    manager = continuous_batching(model, store, _engine_config(options, device))
    limits = Limits(
        max_queue=options.max_queue,
        max_tokens=options.max_tokens,
        request_seconds=options.request_timeout,
        drain_seconds=options.drain_timeout,
        body_bytes=options.max_body,
    )
    engine = AsyncEngine(manager, tokenizer, limits, Metrics())
    settings = Settings(
        name,
        options.adapters,
        options.allow_load,
        options.api_key,
        options.allow_partial,
        options.model,
        options.allow_origin,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        manager.start()
        stopping = threading.Event()
        # one at a time, with pauses: Python that runs beside the engine's own slows every step
        rest = threading.Thread(target=probe, args=(store, known[_PROBED_FIRST:], stopping, options.model), daemon=True)
        rest.start()
        refused = len(store.refusals())
        _log.info("serving %s with %d adapters on %s; %d refused", name, len(store.names()) - refused, device, refused)
        try:
            yield
        finally:
            stopping.set()
            # requests had their time while the server drained its connections
            manager.stop(hard_stop=True)

    return create_app(engine, settings, lifespan)


def register_folder(store: Any, folder: Path, base_name: str, allow_partial: bool = False) -> list[str]:
    """Register every adapter in ``folder`` under its folder's name, and those one folder below as ``org/adapter``.
    Others are logged and left out.

    Returns:
        The names, in order.
    """
    from fused_lora.serving.http.api import ApiError
    from fused_lora.serving.http.guard import allowed_adapter
    from fused_lora.serving.residency.naming import check_served_name

    names = []
    for path in sorted([*folder.glob("*/adapter_config.json"), *folder.glob("*/*/adapter_config.json")]):
        name = path.parent.relative_to(folder).as_posix()
        try:
            check_served_name(name)
            if name == base_name:
                raise ValueError("it has the base model's name")
            store.register(name, str(allowed_adapter(folder, name)), inside=str(folder), allow_partial=allow_partial)
            names.append(name)
        except (ApiError, OSError, ValueError) as error:
            _log.warning("adapter %r is left out: %s", name, error)
    return names


def probe_named(store: Any, modules: Sequence[tuple[str, str]], base_name: str, options: argparse.Namespace) -> None:
    """Register and check the adapters of ``--lora-modules``. SystemExit for one that cannot be served."""
    for name, path in modules:
        try:
            if name == base_name:
                raise ValueError("it has the base model's name")
            if name in store:
                raise ValueError("there is another adapter of this name")
            store.register(name, path, allow_partial=options.allow_partial)
            probe(store, [name], base=options.model)
            if (error := store.refusal(name)) is not None:
                raise error
        except (OSError, ValueError) as error:
            raise SystemExit(f"--lora-modules: {name}: {error}") from None


def probe(store: Any, names: Sequence[str], stopping: threading.Event | None = None, base: str | None = None) -> None:
    """Check config and header of these adapters. Those that do not fit are logged, and refused until they change.

    Args:
        stopping: pause after each adapter, and end early when it is set. base: name or folder of the base model; an
            adapter whose config names another one is logged.
    """
    from fused_lora.modules.inject import AdapterNotFound

    for name in names:
        try:
            error = store.probe(name)
        except AdapterNotFound:  # unloaded meanwhile
            continue
        if error is not None:
            _log.warning("adapter %r is refused until its files change: %s", name, error)
        elif base is not None and (other := store.other_base(name, base)):
            _log.warning("adapter %r says that its base model is %r, and it is served over %r", name, other, base)
        if stopping is not None and stopping.wait(_PROBE_PAUSE_SECONDS):
            return


def _engine_config(options: argparse.Namespace, device: Any) -> Any:
    from dataclasses import replace

    from fused_lora.serving.engine.manager import default_config

    config = default_config(device)
    changes: dict[str, Any] = {"allow_block_sharing": not options.no_prefix_sharing}
    if options.max_requests:
        changes["max_requests_per_batch"] = options.max_requests
    if options.max_step_tokens:
        changes["max_batch_tokens"] = options.max_step_tokens
    if options.cache_tokens:
        changes["num_blocks"] = -(-options.cache_tokens // config.page_size)
    return replace(config, **changes)


def _lora_module(text: str) -> tuple[str, str]:
    """(name, path) of ``name=path`` or of vLLM's JSON."""
    from fused_lora.serving.residency.naming import check_served_name

    try:
        pair = zip(("name", "path"), text.split("=", 1), strict=False)
        found = json.loads(text) if text.startswith("{") else dict(pair)
        if unknown := found.keys() - {"name", "path", "base_model_name"}:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        name, path = check_served_name(found["name"]), found["path"]
        if not (isinstance(path, str) and path):
            raise ValueError(f"expected a folder, got {path!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise argparse.ArgumentTypeError(
            f"expected NAME=PATH, or JSON with name and path, got {text!r}: {error}"
        ) from None
    return name, path


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):  # a browser sends no path
        raise argparse.ArgumentTypeError(f"expected * or SCHEME://HOST[:PORT], got {text!r}")
    return text


def _count(text: str, least: int = 1, most: float = math.inf, expected: str = "a whole number, at least 1") -> int:
    value = int(text) if text.isascii() and text.isdigit() else -1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _port(text: str) -> int:
    return _count(text, 0, (1 << 16) - 1, "0 to 65535")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def _bytes(text: str) -> int:
    units = {"k": 10, "m": 20, "g": 30, "t": 40}
    shift = units.get(text[-1:].lower(), 0)
    try:
        value = int(float(text[:-1] if shift else text) * (1 << shift))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected bytes such as 1000000, 512M or 2G, got {text!r}")
    return value
