"""``fused_lora.verify``: is the difference between a merged and an unmerged model rounding, or a bug?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fused_lora.diagnostics.tables import grouped
from fused_lora.diagnostics.verification import report
from fused_lora.diagnostics.verification.find import check_state, find_layers
from fused_lora.diagnostics.verification.judge import add_findings, holds_delta
from fused_lora.diagnostics.verification.layers import Layer
from fused_lora.diagnostics.verification.measure import check_layer, compare_outputs, output_noise
from fused_lora.diagnostics.verification.passes import Pass, check_inputs, restored, run
from fused_lora.diagnostics.verification.reference import compare_weights
from fused_lora.diagnostics.verification.report import Finding, Verification
from fused_lora.modules.arguments import check_int
from fused_lora.modules.changes import alone
from fused_lora.modules.names import some


@alone
def verify(
    model: nn.Module,
    inputs: Tensor | Mapping | tuple | list,
    *,
    reference: nn.Module | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    max_rows: int = 64,
) -> Verification:
    """Compare a model's merged and unmerged outputs, for each layer and for the model, and name what is wrong.

    Each layer is checked against float64, on the input rows that it gets in the unmerged model. W and Wm are the base
    weight and the merged weight as stored, D = sum_i s_i B_i A_i:

        unmerged output  |y  - (x W^T + b + s x A^T B^T)|  within the rounding of its dtypes and sums
        merged weight    |Wm - (W + D)|                    within the roundings of one merge
        merged output    |ym - (x Wm^T + b)|               within the rounding of its dtype and sum

    A DoRA adapter multiplies all that was there before by c = m / ||W + s B A||, by rows of W: D, and outputs without
    the bias. A stacked parameter of experts has a check of its own, of W, Wm and D of all experts. Its outputs are
    those of the experts' whole call, in float64, whose bound goes through the gate (decision 59).

    If all three are within their bounds (derived in ``verification.weights``), rounding is the only difference of the
    layer. It may be large: in bf16 most of a small D is lost, which ``lost`` reports. At the model's output the
    expected effect of rounding is measured: two further passes add random changes of that size to each layer.

    Causes of bugs, in ``Verification.findings``:

        dropout left on         the unmerged output depends on the seed in eval mode, or a dropout of a model in eval
                                mode is still in training mode
        not deterministic       the same seed gives different outputs
        double merge            W already holds D: against the reference, or because <W, D> / <D, D> is 1 by more than
                                10 standard deviations over all layers, which small adapters do not reach
        wrong base              W is not the reference's, or a merged weight was replaced since its merge
        mismatched quantisation W is the reference's (or the merge's) rounded to a coarser grid
        stale merge             the merged weight is not W + D of the adapter as it is now
        layer not called        its weight is read all the same: the adapter does nothing there until it is merged
        adapter lost in rounding    all is right, but a merge keeps less than half of a layer's adapter
        shared weight           a merge would change another module's weight too
        wrong adapter, other parameters    they differ from the reference's
        unmerged forward, merged weight, merged forward, output    out of bounds for none of these reasons

    It runs in eval mode, without gradients, and is deterministic for a ``seed``. Nothing changes: a layer is put into
    its other state on a copy of its weight, one layer at a time. Training flags, buffers, RNG states and hooks are
    restored. It takes merged and unmerged models of ``fused_lora.inject`` and of PEFT, accelerated or not. Layers that
    it does not compare (other variants, DoRA over packed bases, ...) are listed in ``skipped``; the result is not ok.

    Over a quantised layer of bitsandbytes or torchao W and Wm are the dequantised weights. Wm must be W + D quantised
    once: the distance to the nearest code times the block's largest magnitude, and the error of the stored scale, are
    the bound. Where a call quantises x, too (int8 of bitsandbytes), half a step of x times the weight adds to the
    bounds of the outputs.

    Args:
        model: a model with LoRA layers.
        inputs: a tensor, keyword arguments or positional arguments of the model.
        reference: what the model should agree with: the base model, the merged model, the model before it was saved,
            or a mapping of parameter names to tensors. Weights are compared by name. A model's output is compared too.
        seed: of the random numbers that the passes see.
        max_rows: rows of each layer's input that are replayed in float64.

    Returns:
        A :class:`Verification`; ``str()`` of it is a table.

    Raises:
        TypeError: an argument has the wrong type, or the model returns no floating-point tensor.
        ValueError: max_rows is not positive; an adapter or weight is not finite; or the inputs give an output that is
            empty or all NaN.
        RuntimeError: the model has no active adapter to verify, or its adapters are disabled.
    """
    _check_arguments(model, inputs, reference, seed, max_rows)
    check_state(model)
    layers, skipped, folded = find_layers(model)
    if not layers:
        kinds = grouped(skipped, skipped.__getitem__)
        why = "; ".join(f"{reason} ({some(paths)})" for reason, paths in kinds.items()) or "the model has none"
        raise RuntimeError(f"model: expected LoRA layers with an active adapter that can be merged, found none: {why}")
    _check_finite(layers)
    findings, notes = _training_flags(model)
    others = [reference] if isinstance(reference, nn.Module) else []
    with restored(model, *others, layers=layers):
        # first: calls may repack quantised weights
        compared = None if reference is None else compare_weights(model, [*layers, *folded], reference)
        findings += _stubborn(model)
        unmerged = run(model, inputs, layers, False, seed, max_rows)
        _check_output(unmerged.output)
        random = _randomness(model, inputs, layers, unmerged, seed, max_rows)
        findings += random or _uncalled(model, inputs, layers, unmerged, seed)
        checks = [c for layer in layers if layer.path in unmerged.x for c in check_layer(layer, unmerged)]
        skipped |= {path: "it was not called" for la in layers if la.path not in unmerged.x for path in la.paths}
        merged = run(model, inputs, layers, True, seed)
        noise = output_noise(model, inputs, layers, checks, unmerged, seed)
        result = Verification(checks, compare_outputs(merged.output, unmerged.output, noise), findings, notes, skipped)
        result.was_merged = any(layer.merged for layer in layers)
        add_findings(model, layers, result)
        judged = {path for layer in layers if layer.broken for path in layer.paths}  # or by the reference, below
        if compared is not None:
            differ, further, relations = compared
            result.findings += differ
            result.notes += further
            result.reference_merged = any(relation.times == -1 for relation in relations.values())
            judged |= relations.keys()
        if holds_delta([c for c in checks if c.path not in judged]):
            text = "the base weight already holds the adapter, as after a merge, and it acts once more beside it"
            result.findings.append(Finding(report.DOUBLE, text, tuple(c.path for c in checks)))
        if isinstance(reference, nn.Module):
            given = run(model, inputs, layers, None, seed).output
            _compare_with_reference(result, given, reference, inputs, noise, seed)
    if not result.output.ok and result.ok:
        result.findings.append(Finding(report.OUTPUT, "differs by more than rounding in the LoRA layers explains"))
    return result


def _check_arguments(model, inputs, reference, seed, max_rows) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    check_inputs(inputs)
    if reference is not None and not isinstance(reference, (nn.Module, Mapping)):
        raise TypeError(f"reference: expected nn.Module or a mapping of tensors, got {type(reference).__name__}")
    check_int("seed", seed)
    check_int("max_rows", max_rows, 1)


def _check_output(output: Tensor) -> None:
    if not output.numel():
        raise ValueError(f"inputs: expected at least one row, got an output of shape {tuple(output.shape)}")
    if output.isnan().all():
        raise ValueError("inputs: expected numbers, the model's output for them is NaN throughout")


def _check_finite(layers: list[Layer]) -> None:
    for layer in layers:
        parts = {"base weight": layer.weights().values(), "adapter": layer.parts().values()}
        for what, tensors in parts.items():
            if not all(torch.isfinite(t).all() for t in tensors):
                raise ValueError(f"model: the {what} of {layer.path} holds NaN or infinity")


def _drops(module: nn.Module) -> bool:
    """Whether a module in training mode drops something."""
    values = (getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout"))
    return module.training and any(isinstance(p, float) and p > 0 for p in values)


def _training_flags(model: nn.Module) -> tuple[list[Finding], list[str]]:
    """What the training flags of a model say before they are set to eval mode."""
    active = tuple(path for path, module in model.named_modules() if _drops(module))
    if not active:
        return [], []
    if model.training:
        text = f"the model is in training mode, {len(active)} dropouts act in it: call model.eval() before you compare"
        return [], [f"{text} its outputs; here it was in eval mode"]
    return [Finding(report.DROPOUT, "in training mode in a model that is in eval mode", active)], []


def _stubborn(model: nn.Module) -> list[Finding]:
    """Dropouts that model.eval() does not reach."""
    active = tuple(path for path, module in model.named_modules() if _drops(module))
    return [Finding(report.DROPOUT, "still in training mode after model.eval()", active)] if active else []


def _randomness(model, inputs, layers: list[Layer], first: Pass, seed: int, max_rows: int) -> list[Finding]:
    """Two further unmerged passes: the same seed must give the same bits, and so must another one."""
    for other_seed, cause, text in (
        (seed, report.RANDOM, "the same seed gives different outputs"),
        (seed + 1, report.DROPOUT, "the output depends on the seed in eval mode"),
    ):
        other = run(model, inputs, layers, False, other_seed, max_rows)
        if _same(other.output, first.output):
            continue
        where = tuple(p for p in first.x if _same(first.x[p], other.x[p]) and not _same(first.y[p], other.y[p]))
        return [Finding(cause, text if where else f"{text}; it is no LoRA layer that does it", where)]
    return []


def _uncalled(model, inputs, layers: list[Layer], unmerged: Pass, seed: int) -> list[Finding]:
    """A finding where layers that the forward did not call change its output when their weights are switched."""
    uncalled = [layer for layer in layers if layer.path not in unmerged.x]
    if not uncalled:
        return []
    with ExitStack() as switched:
        for layer in uncalled:
            switched.enter_context(layer.shown(not layer.merged))
        output = run(model, inputs, [layer for layer in layers if layer.path in unmerged.x], False, seed).output
    if _same(output, unmerged.output):
        return []
    distance = (output.double() - unmerged.output.double()).abs().max().item()
    text = "the model reads weights of these layers without calling them, so adapters there do nothing until a merge"
    text = f"{text}, which moves the output by up to {distance:.1e}"
    return [Finding(report.UNCALLED, text, tuple(path for layer in uncalled for path in layer.paths))]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _compare_with_reference(result: Verification, given: Tensor, reference, inputs, noise: float, seed: int) -> None:
    if not (find_layers(reference)[0] or result.reference_merged):
        result.notes.append("the reference is a model without the adapter: its output was not compared")
        return
    output = run(reference, inputs, [], None, seed).output.to(given.device)
    if output.shape != given.shape:
        raise ValueError(f"reference: expected an output of shape {tuple(given.shape)}, got {tuple(output.shape)}")
    result.reference = compare_outputs(given, output, noise)
    if not result.reference.ok and result.ok:
        text = "this model's output and the reference's differ by more than rounding, though their weights agree"
        result.findings.append(Finding(report.OUTPUT, text))
