"""``fused-lora inspect``, ``diff``, ``convert``, ``extract``, ``combine`` and ``shrink``: adapters as files."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fused_lora.cli.merge import DTYPES, common, renaming, run, torch_dtype, weighted
from fused_lora.diagnostics.tables import table

_BRIEF = 300  # letters of one entry
_SHOWN = 40  # rows of a table; --json has all


def inspect(arguments: Sequence[str] | None = None) -> int:
    """Tell what an adapter holds; the exit status is 1 if it does not fit ``--base``."""
    found = argparse.ArgumentParser("fused-lora inspect", description="what an adapter's files hold")
    found.add_argument("adapter", metavar="DIR")
    found.add_argument("--base", metavar="DIR_OR_FILE", help="tell whether it fits this checkpoint, and why not")
    options = common(found).parse_args(arguments)
    from fused_lora.checkpoints import inspect_adapter

    return run(
        "inspect",
        options,
        lambda _: inspect_adapter(options.adapter, options.base),
        _tell_inspected,
        judge=lambda report: int(report.fits is False),
    )


def diff(arguments: Sequence[str] | None = None) -> int:
    """Compare two adapters; the exit status is 0 if they add the same, else 1, and 2 for an error."""
    found = argparse.ArgumentParser("fused-lora diff", description="how two adapters differ, layer by layer")
    found.add_argument("a", metavar="DIR")
    found.add_argument("b", metavar="DIR")
    options = common(found).parse_args(arguments)
    from fused_lora.checkpoints import diff_adapters

    return run(
        "diff",
        options,
        lambda _: diff_adapters(options.a, options.b),
        _tell_diff,
        status=2,
        judge=lambda report: int(not report.same),
    )


def convert(arguments: Sequence[str] | None = None) -> int:
    """Write another program's LoRA file as a PEFT adapter."""
    found = argparse.ArgumentParser("fused-lora convert", description="another program's LoRA file as PEFT's")
    found.add_argument("source", metavar="DIR_OR_FILE")
    found.add_argument("--out", required=True, metavar="DIR")
    found.add_argument(
        "--base", metavar="DIR_OR_FILE", help="a checkpoint, to resolve kohya's names and tell parameters apart"
    )
    found.add_argument("--alpha", type=float, help="where the file has none (default: the rank)")
    found.add_argument("--stack-experts", action="store_true", help="single experts to transformers 5's stacks")
    renaming(found)
    options = _dtype(common(found)).parse_args(arguments)
    from fused_lora.checkpoints import convert_adapter

    return run(
        "convert",
        options,
        lambda _: convert_adapter(
            options.source,
            options.out,
            base=options.base,
            rename=options.rename,
            dtype=torch_dtype(options.dtype),
            lora_alpha=options.alpha,
            stack_experts=options.stack_experts,
        ),
        lambda report: print(
            f"wrote {report.out}: {len(report.layers)} layers"
            + f", experts in {len(report.stacked)} stacked parameters" * bool(report.stacked)
            + ("\nno alpha in the file: the scaling is 1 (--alpha sets another)" if report.assumed else "")
        ),
    )


def extract(arguments: Sequence[str] | None = None) -> int:
    """Write an adapter out of a base and a fine-tuned checkpoint."""
    found = argparse.ArgumentParser("fused-lora extract", description="an adapter out of what fine-tuning changed")
    found.add_argument("--base", required=True, metavar="DIR_OR_FILE")
    found.add_argument("--tuned", required=True, metavar="DIR_OR_FILE")
    found.add_argument("--rank", required=True, type=int)
    found.add_argument("--seed", type=int, default=0, help="of random projections (default: 0)")
    found.add_argument("--out", required=True, metavar="DIR")
    options = _dtype(common(found)).parse_args(arguments)
    from fused_lora.checkpoints import extract_adapter

    paths = options.base, options.tuned, options.out
    return _make("extract", options, partial(extract_adapter, *paths, options.rank, seed=options.seed))


def combine(arguments: Sequence[str] | None = None) -> int:
    """Write one adapter out of several."""
    found = argparse.ArgumentParser(
        "fused-lora combine", description="one adapter out of several, as PEFT combines them"
    )
    found.add_argument("adapters", nargs="+", type=weighted, metavar="DIR[:WEIGHT]")
    found.add_argument("--out", required=True, metavar="DIR")
    found.add_argument("--method", default="svd", help="cat, svd, linear, ties, dare_linear, ... (default: svd)")
    found.add_argument("--rank", type=int, help="of the result, for the svd kinds")
    found.add_argument("--density", type=float, help="share that pruning keeps, for ties, dare and magnitude_prune")
    _base(found)
    found.add_argument("--majority-sign", default="total", help="total or frequency, for ties (default: total)")
    found.add_argument("--seed", type=int, default=0, help="of what DARE drops (default: 0)")
    options = _dtype(common(found)).parse_args(arguments)
    from fused_lora.checkpoints import combine_adapters

    names = "base", "rank", "density", "majority_sign", "seed"
    chosen = {name: getattr(options, name) for name in names}
    work = partial(combine_adapters, options.adapters, options.out, options.method, **chosen)
    return _make("combine", options, work)


def shrink(arguments: Sequence[str] | None = None) -> int:
    """Write the nearest adapter of a lower rank."""
    found = argparse.ArgumentParser("fused-lora shrink", description="the nearest adapter of a lower rank")
    found.add_argument("adapter", metavar="DIR")
    found.add_argument("--rank", required=True, type=int)
    found.add_argument("--out", required=True, metavar="DIR")
    _base(found)
    options = _dtype(common(found)).parse_args(arguments)
    from fused_lora.checkpoints import shrink_adapter

    work = partial(shrink_adapter, options.adapter, options.out, options.rank, base=options.base)
    return _make("shrink", options, work)


def _make(command: str, options: argparse.Namespace, work: Callable[..., Any]) -> int:
    """Run what computes a new adapter, by default in fp32."""
    dtype = torch_dtype(options.dtype or "float32")
    return run(command, options, lambda _: work(dtype=dtype), _tell_new)


def _base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="DIR_OR_FILE", help="a checkpoint, to tell parameters apart by their sizes")


def _dtype(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--dtype", choices=DTYPES, help="of the new file")
    return parser


def _tell_inspected(report: Any) -> None:
    rows: list[tuple[str, ...]] = [("layer", "r", "scaling", "shape", "dtype", "norm", "largest", "effective rank")]
    for layer in report.layers[:_SHOWN]:
        size = "x".join(map(str, layer["shape"]))
        numbers = [f"{layer[name]:.3g}" for name in ("norm", "largest", "effective_rank")]
        name = layer["parameter"] or layer["path"]
        rows.append((name, str(layer["r"]), f"{layer['scaling']:.4g}", size, layer["dtype"], *numbers))
    print("\n".join(table(rows)))
    _more(report.layers)
    ranks = ", ".join(f"{count} of rank {r}" for r, count in report.ranks.items())
    print(f"{len(report.layers)} layers ({ranks}), {report.parameters:,} numbers")
    kinds = Counter(layer["kind"] for layer in report.layers)
    if set(kinds) != {"LoRA"}:
        print(f"kinds: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    if dora := {layer["norm_of"] for layer in report.layers if layer["kind"] == "DoRA"}:
        more = "" if report.fits else "; what the magnitude makes of it depends on W: --base"
        print(f"DoRA: the norm is of {', '.join(dora)}; the largest singular value and the rank are of s B A{more}")
    if tokens := report.config.get("alora_invocation_tokens"):
        print(f"aLoRA: it acts from the tokens {tokens} on")
    for text in (*(f"beside LoRA: {key}" for key in report.beside), *report.oddities):
        print(text)
    for key in report.copies:
        print(f"the base's own weight: {key}")
    if report.fits is not None:
        print("fits the base" if report.fits else f"does not fit: {report.why_not}")


def _tell_diff(report: Any) -> None:
    dora = any(layer["magnitudes_apart"] is not None for layer in report.layers)
    rows: list[tuple[str, ...]] = [("layer", "norm a", "norm b", "apart", "cosine", *["magnitudes apart"] * dora)]
    for layer in report.layers[:_SHOWN]:
        cosine = "-" if layer["cosine"] is None else f"{layer['cosine']:.4f}"
        row = (layer["path"], *(f"{layer[name]:.3g}" for name in ("norm_a", "norm_b", "apart")), cosine)
        m = layer["magnitudes_apart"]
        rows.append((*row, *["-" if m is None else f"{m:.3g}"] * dora))
    print("\n".join(table(rows, numbers=True)))
    if dora:
        print("DoRA: norms are of s B A, before the magnitudes scale the rows of W + s B A")
    _more(report.layers)
    for name, only in (("a", report.only_a), ("b", report.only_b)):
        if only:
            print(f"only in {name}: {_brief(', '.join(only))}")
    for name, (a, b) in report.config.items():
        print(f"{name}: {_brief(repr(a))} / {_brief(repr(b))}")
    if report.beside:
        print(f"beside LoRA, not the same in both: {_brief(', '.join(report.beside))}")
    print("they add the same" if report.same else "they do not add the same")


def _tell_new(report: Any) -> None:
    rows = [("layer", "r", "kept")]
    for layer in report.layers[:_SHOWN]:
        rows.append((layer["path"], str(layer["r"]), "-" if layer["kept"] is None else f"{layer['kept']:.4f}"))
    print("\n".join(table(rows, numbers=True)))
    _more(report.layers)
    if report.left_out:
        print(f"not in the adapter: {', '.join(report.left_out)}")
    print(f"wrote {report.out}: {len(report.layers)} layers")


def _brief(text: str) -> str:
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}... (--json has all)"


def _more(layers: Sequence[Any]) -> None:
    if len(layers) > _SHOWN:
        print(f"... and {len(layers) - _SHOWN} more (--json has all)")
