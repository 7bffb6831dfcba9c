"""A tiny language model with adapters on disk, the tokens it must give (alone, with its adapter merged, in fp32), and
what tests of the engine share."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_lora.serving import AdapterStore
from fused_lora.serving.engine.continuous import check_transformers
from helpers.seeds import shifted
from helpers.waiting import HANG, wait_for

KEY = "base_model.model."  # before every path in PEFT's files
CHAT_TEMPLATE = "{{ opening }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def need_engine(*packages: str) -> None:
    """Skip a test file where one of these packages, or a transformers that the engine was tested on, is missing."""
    for package in (*packages, "transformers"):
        pytest.importorskip(package)
    try:
        check_transformers()
    except RuntimeError as error:
        pytest.skip(str(error), allow_module_level=True)


def write_tiny_llama(folder: Path, seed: int = 0, intermediate_size: int = 160) -> Path:
    """A random two-layer Llama over bytes, with a tokenizer and a chat template, as transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(shifted(seed))
        model = transformers.LlamaForCausalLM(config)
    # a logit of 0 is never the best of 257: greedy answers do not end before their limit, drawn ones may
    model.lm_head.weight.data[fast.eos_token_id] = 0
    model.save_pretrained(folder)
    return folder


def byte_fallback_tokenizer() -> Any:
    """A tokenizer of pieces with byte fallback, as Llama 2's: 1 to 256 are the bytes, 257 is " the" and 258 "b"."""
    import transformers
    from tokenizers import Tokenizer, decoders, models

    pieces = [("<unk>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256)), ("\u2581the", -1.0), ("b", -1.0)]
    fast = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")


def load_model(folder: Path, **options: Any) -> nn.Module:
    """The model of :func:`write_tiny_llama`, or any other, in fp32 and eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def store_of(model: nn.Module, adapters: Mapping[str, Path], **options: Any) -> AdapterStore:
    """A store that knows these adapters, none of them loaded."""
    store = AdapterStore(model, **options)
    for name, path in adapters.items():
        store.register(name, str(path))
    return store


def engine_config(**changes: Any) -> Any:
    """Small pages and steps: prompts of a few dozen tokens share pages and are prefilled in chunks."""
    from transformers import ContinuousBatchingConfig

    sizes = dict(page_size=8, num_blocks=512, max_batch_tokens=48, max_requests_per_batch=32)
    return ContinuousBatchingConfig(**{**sizes, "auto_switch_to_flash": False, **changes})


def write_adapter(folder: Path, model: nn.Module, r: int, seed: int, std: float = 0.1, head: bool = False) -> Path:
    """A random PEFT adapter of rank ``r`` on all linear layers, with ``head`` on the output's too."""
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(shifted(seed))
    tensors, names = {}, set()
    for path, layer in _linears(model, head).items():
        names.add(path.rpartition(".")[2])
        key = f"{KEY}{path}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(r, layer.in_features, generator=draw) * layer.in_features**-0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, r, generator=draw) * std
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=sorted(names))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_overflowing_adapter(folder: Path, model: nn.Module, layer: str, value: float = 3e38) -> Path:
    """An adapter of rank 4 whose values are finite and whose term at every ``layer`` is not."""
    from safetensors.torch import load_file, save_file

    weights = write_adapter(folder, model, 4, seed=1, head=layer == "lm_head") / "adapter_model.safetensors"
    tensors = load_file(weights)
    for key, tensor in tensors.items():
        if f"{layer}.lora_B" in key:
            tensor.fill_(value)
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def fail_on(model: nn.Module, token: int, times: int | None = None) -> nn.Module:
    """``model``, whose last layer raises RuntimeError in a forward with this token in it, the first ``times`` times."""
    left, marked = [times], [False]

    def look(module: nn.Module, args: tuple) -> None:
        marked[0] = bool((args[0] == token).any())

    def fail(module: nn.Module, args: tuple) -> None:
        if marked[0] and left[0] != 0:
            left[0] = None if left[0] is None else left[0] - 1
            raise RuntimeError("the layer met its mark")

    model.get_input_embeddings().register_forward_pre_hook(look)
    model.model.layers[-1].register_forward_pre_hook(fail)
    return model


@torch.no_grad()
def merged(model: nn.Module, adapter: Path | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of a plain ``model`` in ``dtype`` with an adapter merged: W + (lora_alpha / r) B A."""
    from safetensors.torch import load_file

    found = copy.deepcopy(model).to(dtype)
    if adapter is None:
        return found
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for path, layer in _linears(found, head=f"{KEY}lm_head.lora_A.weight" in tensors).items():
        A, B = (tensors[f"{KEY}{path}.lora_{side}.weight"].to(layer.weight) for side in "AB")
        layer.weight += config["lora_alpha"] / config["r"] * (B @ A)
    return found


@torch.no_grad()
def greedy(model: nn.Module, ids: Sequence[int], count: int) -> list[int]:
    """The ``count`` tokens that ``model`` alone continues ``ids`` with, or fewer up to its end of sequence."""
    prompt = torch.tensor([list(ids)], device=model.device)
    settings = dict(max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(prompt))
    pad = model.generation_config.pad_token_id
    return model.generate(prompt, pad_token_id=0 if pad is None else pad, **settings)[0, len(ids) :].tolist()


@torch.no_grad()
def is_rounding_tie(model: nn.Module, adapter: Path | None, ids: Sequence[int], token: int, wanted: int) -> bool:
    """Whether ``token`` instead of ``wanted`` after ``ids`` is rounding: in float64 the two are the best, and as near
    to each other as the merged fp32 model's own error there is large (times 4: both sides have one, of either sign)."""
    prompt = torch.tensor([list(ids)], device=model.device)
    narrow = merged(model, adapter)(prompt).logits[0, -1].double()
    exact = merged(model, adapter, torch.float64)(prompt).logits[0, -1]
    error = (narrow - exact).abs().max()
    best_two = set(exact.topk(2).indices.tolist())
    return best_two == {token, wanted} and bool((exact[wanted] - exact[token]).abs() <= 4 * error)


def adapter_bytes(rank: int) -> int:
    """At least what an adapter of this rank on all linear layers of the tiny model takes in a store."""
    shapes = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64))
    return 2 * sum(4 * rank * (K + N) for K, N in shapes)  # float32, two layers


class Tiny:
    """A tiny Llama and random adapters of these ranks below ``root``; what it gives alone, with one of them merged."""

    def __init__(self, root: Path, **ranks: int):
        self.folder, self.root = write_tiny_llama(root / "tiny"), root / "adapters"
        self.plain = load_model(self.folder)
        self.adapters = {
            name: write_adapter(self.root / name, self.plain, r, seed=i) for i, (name, r) in enumerate(ranks.items())
        }
        self._merged = functools.cache(lambda name, dtype: merged(self.plain, self.adapters.get(name), dtype))
        self._tokens = functools.cache(lambda name, ids, count: greedy(self._merged(name, torch.float32), ids, count))

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def tokens(self, name: str | None, ids: Sequence[int], count: int) -> list[int]:
        """As :func:`greedy`; of the base model for a ``name`` that is no adapter's."""
        return self._tokens(name, tuple(ids), count)

    def text(self, name: str | None, prompt: str, count: int) -> str:
        """The same between texts."""
        return self.tokenizer.decode(
            self.tokens(name, self.tokenizer(prompt)["input_ids"], count), skip_special_tokens=True
        )

    @torch.no_grad()
    def log_softmax(self, name: str | None, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), vocabulary] in float64."""
        return self._merged(name, torch.float64)(torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt for the tiny model."""
    draw = torch.Generator().manual_seed(shifted(1000 * length + seed))
    return torch.randint(1, 250, (length,), generator=draw).tolist()


def results(engine: Any, *ids: str) -> list[Any]:
    """The last outputs of these requests of an engine; those of others are kept for a later call."""
    seen = engine.__dict__.setdefault("seen_by_test", {})

    def done() -> bool:
        output = engine.get_result(timeout=0.1)
        if output is not None and output.is_finished():
            seen[output.request_id] = output
        return all(i in seen for i in ids)

    wait_for(done)
    return [seen[i] for i in ids]


@contextlib.contextmanager
def stopped(engine: Any, when: Callable[[], bool], start: Callable[[], Any] = lambda: None) -> Iterator[Any]:
    """What ``start()`` returned, once the engine stands before the first step at which ``when()`` holds.

    It goes on at the end of the block: however slow the test's thread is, the engine does not run past the moment.
    """
    reached, go, step = threading.Event(), threading.Event(), engine._generation_step

    def gated() -> None:
        if not reached.is_set() and when():
            reached.set()
            go.wait(HANG)
        step()

    engine._generation_step = gated
    try:
        began = start()
        assert reached.wait(HANG), "waited in vain"
        yield began
    finally:
        go.set()


def _linears(model: nn.Module, head: bool) -> dict[str, nn.Linear]:
    output = model.get_output_embeddings()
    return {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and (head or m is not output)}
