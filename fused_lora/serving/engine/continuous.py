"""transformers' continuous batching with an adapter per request.

transformers packs the tokens of all running requests into one row, chunks long prompts and shares the cache of equal
prefixes. Here each request also names its adapter:

* A step uses the adapters of its requests.
* Equal prefixes are shared only within one version of one adapter.
* A request keeps the version it started with when its adapter is loaded again.
* A request waits until its adapter fits into the store beside those in use.
* A step that raises ends the requests that were in it.

Importing this module does not import transformers. Its functions do.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from fused_lora.serving.engine.manager import AdapterManager

# the engine is private to transformers and changes between minor releases: these are the ones the tests have passed on
TESTED_TRANSFORMERS = ("5.22", "5.23", "5.24")


def check_transformers() -> None:
    """Raise RuntimeError unless the installed transformers is a tested release."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            f"continuous batching needs transformers {_tested()}, which is missing: pip install fused_lora[serve]"
        ) from None
    if ".".join(found.split(".")[:2]) not in TESTED_TRANSFORMERS:
        raise RuntimeError(
            f"continuous batching reaches into transformers' engine and is tested on {_tested()}; found {found}. "
            f"`with store.batch([...])` around model.generate works on any version."
        )


def _tested() -> str:
    return ", ".join(f"{version}.x" for version in TESTED_TRANSFORMERS)


def continuous_batching(model: nn.Module, store: Any, config: Any = None) -> AdapterManager:
    """The engine for ``model`` with the adapters of ``store``: a ``ContinuousBatchingManager`` of transformers.

    Use it as a context manager, or call ``start()`` and ``stop()``::

        with continuous_batching(model, store) as engine:
            engine.add_request(input_ids, adapter="sql", max_new_tokens=64)
            output = engine.get_result()

    A step that raises ends its requests with ``StepFailed`` and frees what they hold. The others go on. The engine
    stops after ``MAX_FAILED_STEPS`` failed steps in a row (``engine.failures``), or when a GPU is lost. Then
    ``is_running()`` is False, and the requests that were left have an error.

    Args:
        model: a transformers model for generation. It is set to eval mode.
        store: an ``AdapterStore`` over this model.
        config: transformers' ``ContinuousBatchingConfig``; by default pages of 32 tokens, a cache of 16,384 tokens and
            steps of at most 256 tokens on a CPU, transformers' own defaults on a GPU. Prompts longer than a step are
            prefilled in chunks. CUDA graphs, asynchronous batching and compilation are not supported.

    Raises:
        RuntimeError: another release of transformers than the tested ones.
        TypeError: ``model``, ``store`` or ``config`` has the wrong type.
        ValueError: the config asks for something unsupported, or the store belongs to another model.
    """
    check_transformers()
    from fused_lora.serving.engine.manager import AdapterManager

    return AdapterManager(model, store, config)


def generate_batch(
    model: nn.Module,
    store: Any,
    inputs: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    max_new_tokens: int = 20,
    config: Any = None,
    **request: Any,
) -> list[Any]:
    """Generate for all ``inputs``, input i under ``adapters[i]`` (None is the base model), in one continuous batch.

    Args:
        model, store, config: as in :func:`continuous_batching`.
        inputs: token ids of each prompt. adapters: one name or None per prompt.
        max_new_tokens: tokens to generate at most, after the prompt.
        request: ``eos_token_id``, ``temperature`` (default 0: greedy), ``top_p``, ``seed`` for all of them.

    Returns:
        transformers' ``GenerationOutput`` of each input, in order. ``failure_of(output)`` says which failed, and why.

    Raises:
        TypeError, ValueError: the numbers of inputs and adapters differ, or a request is malformed.
        AdapterNotFound: an adapter that the store does not know.
        RuntimeError: the engine stopped before all were done.
    """
    for name, value in (("inputs", inputs), ("adapters", adapters)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
    if len(inputs) != len(adapters):
        raise ValueError(f"adapters: expected one per input, {len(inputs)}, got {len(adapters)}")
    with continuous_batching(model, store, config) as engine:
        engine.check([0], None, max_new_tokens, **request)
        for i, (ids, adapter) in enumerate(zip(inputs, adapters, strict=True)):
            try:
                engine.check(ids, adapter, max_new_tokens, **request)
            except (TypeError, ValueError) as error:
                raise type(error)(f"inputs[{i}]: {error}") from None
        names = [
            engine.add_request(list(ids), max_new_tokens=max_new_tokens, adapter=adapter, **request)
            for ids, adapter in zip(inputs, adapters, strict=True)
        ]
        found: dict[str, Any] = {}
        while len(found) < len(names):
            output = engine.get_result(timeout=1)
            if output is not None and output.is_finished():
                found[output.request_id] = output
            elif output is None and not engine.is_running():
                raise RuntimeError(f"the engine stopped with {len(names) - len(found)} requests to go") from (
                    engine.background_thread_status.fatal_error
                )
            elif output is None:
                time.sleep(0.01)
    return [found[name] for name in names]
