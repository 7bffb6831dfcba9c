"""Small adapters as people have them: from other savers, wrappers, library versions and models. Written when a test
runs, with what must come of each."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers.seeds import shifted

P = "base_model.model."
TARGETS = ["q_proj", "down_proj"]
K, MIDDLE, R, VOCAB = 32, 48, 4, 64


def llama() -> nn.Module:
    """Two layers over 64 tokens, all values from one seed."""
    return copy.deepcopy(_made("Llama"))


def mixtral() -> nn.Module:
    """One layer of 4 experts, whose weights transformers 5 keeps in packed parameters."""
    return copy.deepcopy(_made("Mixtral", num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4))


@functools.cache
def _made(kind: str, **fields: int) -> nn.Module:
    import transformers

    sizes = dict(hidden_size=K, intermediate_size=MIDDLE, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, **{**sizes, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(shifted(0))
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def good_tensors(r: int = R) -> dict[str, Tensor]:
    """The tensors of a sound adapter of :func:`llama`."""
    draw = torch.Generator().manual_seed(shifted(1))
    tensors = {}
    for i in range(2):
        for name, (k, n) in {"self_attn.q_proj": (K, K), "mlp.down_proj": (MIDDLE, K)}.items():
            path = f"{P}model.layers.{i}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(r, k, generator=draw) * k**-0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(n, r, generator=draw) * 0.2
    return tensors


GOOD = list(good_tensors())
A0, B0 = GOOD[0], GOOD[1]
PATH0 = A0.removesuffix(".lora_A.weight")


def renamed(change: Callable[[str], str]) -> dict[str, Tensor]:
    """The good tensors under changed keys."""
    return {change(key): tensor for key, tensor in good_tensors().items()}


def pair(path: str, k: int, n: int, r: int = R) -> dict[str, Tensor]:
    """A and B of one more layer."""
    return {f"{path}.lora_A.weight": torch.ones(r, k), f"{path}.lora_B.weight": torch.ones(n, r)}


def cast(A: torch.dtype, B: torch.dtype) -> dict[str, Tensor]:
    """The good tensors in other dtypes."""
    return {key: tensor.to(A if "lora_A" in key else B) for key, tensor in good_tensors().items()}


@dataclass(frozen=True)
class Case:
    """One adapter.

    tensors: of the file. config: entries of the config that differ from a sound one. refused: what the error says, or
    None where PEFT's output is the right one. partial: the tensors that allow_partial uses, as an adapter of their
    own; None where it refuses, too. bare: the tensors under keys that PEFT knows, where they are others.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None
    partial: Mapping[str, Tensor] | None = None
    model: Callable[[], nn.Module] = llama
    bare: Mapping[str, Tensor] | None = None

    def write(self, folder: Path) -> Path:
        """The adapter's two files, in ``folder``."""
        from safetensors.torch import save_file

        folder.mkdir()
        config = {
            "peft_type": "LORA",
            "r": R,
            "lora_alpha": 6,
            "target_modules": TARGETS,
            "bias": "none",
            **self.config,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder


def more(extra: Mapping[str, Tensor], refused: str, partial: bool = True, **config: Any) -> Case:
    """A case of the good tensors and others."""
    return Case({**good_tensors(), **extra}, config, refused, good_tensors() if partial else None)


def inside(name: str) -> Case:
    """A case of a wrapper's name in every key, after the prefix."""
    return Case(renamed(lambda key: key.replace(P, f"{P}{name}.")), bare=good_tensors())


def swapped() -> dict[str, Tensor]:
    """A under B's key and the other way round."""
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return renamed(lambda key: next(key.replace(a, b) for a, b in other.items() if a in key))


EXPERTS = {
    f"{P}model.layers.0.block_sparse_moe.experts.{i}.{name}.lora_{side}.weight": torch.ones(shape)
    for i in range(4)
    for name in ("w1", "w3", "w2")
    for side, shape in (("A", (R, MIDDLE if name == "w2" else K)), ("B", (K if name == "w2" else MIDDLE, R)))
}


def router(path: str) -> dict[str, Tensor]:
    """Of four experts, whose scores move apart."""
    by = torch.arange(4.0)[:, None].expand(4, R)
    return {f"{P}{path}.lora_A.weight": torch.ones(R, K), f"{P}{path}.lora_B.weight": by}


UNET = "lora_unet_down_blocks_0_attentions_0_to_q"
KOHYA = {f"{UNET}.lora_down.weight": torch.ones(R, K), f"{UNET}.lora_up.weight": torch.ones(K, R)}
KOHYA |= {f"{UNET}.alpha": torch.ones(1)}

EMBEDDING = {
    f"{P}model.embed_tokens.lora_embedding_{side}": torch.ones(shape)
    for side, shape in (("A", (R, VOCAB)), ("B", (K, R)))
}

CASES: dict[str, Case] = {
    # ---- sound, however they were saved
    "plain": Case(good_tensors()),
    "embedding": Case({**good_tensors(), **EMBEDDING}, {"target_modules": [*TARGETS, "embed_tokens"]}),
    "experts one by one": Case(EXPERTS, {"target_modules": ["w1", "w3", "w2"]}, model=mixtral),
    "experts packed": Case(
        pair(f"{P}model.layers.0.mlp.experts", K, 2 * MIDDLE, 4 * R),
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        model=mixtral,
    ),
    "router": Case(
        router("model.layers.0.mlp.gate"), {"target_modules": [], "target_parameters": ["gate.weight"]}, model=mixtral
    ),
    "router of transformers 4": Case(
        router("model.layers.0.block_sparse_moe.gate"), {"target_modules": ["gate"]}, model=mixtral
    ),
    "bf16": Case(cast(torch.bfloat16, torch.bfloat16)),
    "fp16": Case(cast(torch.float16, torch.float16)),
    "fp16 and fp32": Case(cast(torch.float16, torch.float32)),
    "rslora": Case(good_tensors(), {"use_rslora": True}),
    "targets by expression": Case(good_tensors(), {"target_modules": r".*\.(q_proj|down_proj)"}),
    "targets by path": Case(good_tensors(), {"target_modules": [k.split(".lora_")[0].removeprefix(P) for k in GOOD]}),
    "some layers": Case({k: t for k, t in good_tensors().items() if ".1." in k}, {"layers_to_transform": [1]}),
    "eva": Case(good_tensors(), {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
    "orthogonal": Case(good_tensors(), {"init_lora_weights": "orthogonal"}),
    # ---- names of wrappers that no module of a model has
    "compiled": inside("_orig_mod"),
    "compiled, then wrapped": Case(renamed(lambda k: f"_orig_mod.{k}"), bare=good_tensors()),
    "FSDP1": inside("_fsdp_wrapped_module"),
    "checkpoint_wrapper": Case(
        renamed(lambda k: k.replace("self_attn", "_checkpoint_wrapped_module.self_attn")), bare=good_tensors()
    ),
    # ---- prefixes
    "no prefix": Case(
        renamed(lambda k: k.removeprefix(P)),
        refused=r"model\.layers.*another beginning: `fused-lora convert`.*8 of 8 k",
    ),
    "half a prefix": Case(
        renamed(lambda k: k.replace(P, "base_model.")), refused="rename: '' -> 'model', which fits 4"
    ),
    "prefix twice": Case(renamed(lambda k: P + k), refused="rename: 'base_model.model' -> '', which fits 4"),
    "DDP inside": Case(
        renamed(lambda k: k.replace(P, f"{P}module.")), refused="rename: 'module' -> '', which fits 4 of"
    ),
    "DeepSpeed": Case(renamed(lambda k: f"module.{k}"), refused="the name of a wrapper, 'module'"),
    # ---- the same weights in another class or release of transformers
    "of the text part of a VLM": Case(
        renamed(lambda k: k.replace("model.layers", "model.language_model.layers")),
        refused=r"model\.language_model\.layers\.0.*rename: 'language_model' -> '', which fits 4.*the model has 15",
    ),
    "of the older VLM classes": Case(
        renamed(lambda k: k.replace("model.layers", "language_model.model.layers")),
        refused="rename: 'language_model' -> '', which fits 4 of",
    ),
    "of GPT-2": Case(
        pair(f"{P}transformer.h.0.attn.c_attn", K, 3 * K),
        {"target_modules": ["c_attn"]},
        r"c_attn.*the model has 15: 'model\.layers\.\*\.self_attn\.q_proj'",
    ),
    "experts one by one, of another model": Case(
        EXPERTS, {"target_modules": ["w1", "w3", "w2"]}, r"12 of the adapter's 12 layers.*experts\.\*\.w1"
    ),
    "experts packed, in another number": Case(
        pair(f"{P}model.layers.0.mlp.experts", K, 2 * MIDDLE, 4 * R + 2),
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        r"expected a shape \[4 experts \* r, K\]",
        model=mixtral,
    ),
    "experts packed, with a bias of lora_B": Case(
        pair(f"{P}model.layers.0.mlp.experts", K, 2 * MIDDLE, 4 * R),
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "lora_bias": True},
        "lora_bias: expected False with target_parameters",
        model=mixtral,
    ),
    "experts packed, unsaid": Case(
        pair(f"{P}model.layers.0.mlp.experts", K, 2 * MIDDLE),
        {"target_modules": ["experts"]},
        r"mlp\.experts.*a MixtralExperts",
        model=mixtral,
    ),
    # ---- more than A and B of linear layers
    "head saved, unsaid": more(
        {f"{P}lm_head.weight": torch.ones(VOCAB, K)}, r"lm_head\.weight.*a parameter saved whole.*1 of 9 keys"
    ),
    "resized vocabulary": more(
        {f"{P}{name}.weight": torch.ones(VOCAB + 6, K) for name in ("model.embed_tokens", "lm_head")},
        r"resized vocabulary.*2 of 10 keys.*embed_tokens\.weight",
    ),
    "embedding, unsaid": more(EMBEDDING, "embed_tokens.*expected a module that target_modules names"),
    "embedding as a linear layer": more(
        pair(f"{P}model.embed_tokens", VOCAB, K),
        "lora_embedding_A and lora_embedding_B for Embedding, found lora_A and lora_B",
        False,
        target_modules=[*TARGETS, "embed_tokens"],
    ),
    "token indices, unsaid": more(
        {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, K)}, "trained tokens"
    ),
    "DoRA, of one layer": more(
        {f"{PATH0}.lora_magnitude_vector": torch.ones(K)}, "lora_magnitude_vector.*no such key", False, use_dora=True
    ),
    "DoRA, unsaid": more({f"{PATH0}.lora_magnitude_vector": torch.ones(K)}, "a DoRA magnitude", False),
    "bias of B, unsaid": more({f"{PATH0}.lora_B.bias": torch.ones(K)}, "a bias of lora_B.*lora_bias", False),
    "base weight": more({f"{PATH0}.base_layer.weight": torch.ones(K, K)}, "a parameter of the base model"),
    "PiSSA": Case(
        good_tensors(),
        {"init_lora_weights": "pissa"},
        "init_lora_weights: expected True, .*rewrite the base.*found pissa",
    ),
    "extra tensor": more({"optimizer.step": torch.ones(1)}, "optimizer.step.*another beginning; 1 of 9 keys"),
    "kohya": Case(KOHYA, refused="alpha.*the names of kohya's scripts.*3 of 3 keys"),
    "kohya's text encoder": Case(
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(R, K)}, refused="kohya's scripts"
    ),
    "adapter name in the keys": Case(
        renamed(lambda k: k.replace(".weight", ".default.weight")), refused="adapter's name inside the key.*8 of 8"
    ),
    # ---- shapes and halves
    "A and B swapped": Case(swapped(), refused="lora_B.*lora_A and lora_B seem to be swapped"),
    "other rank": Case(
        good_tensors(3), refused=r"lora_A\.weight: expected the rank of the config, \[4\], found rank 3"
    ),
    "A of another rank": Case(
        {**good_tensors(), A0: torch.ones(3, K)}, refused=r"lora_B\.weight: expected a shape \[N, 3\]"
    ),
    "of a wider model": Case(
        {**good_tensors(), **pair(PATH0, 2 * K, 2 * K)}, refused=r"lora_A.*expected a shape \[4, 32\].*found \[4, 64\]"
    ),
    "B missing": Case({k: t for k, t in good_tensors().items() if k != B0}, refused="lora_B.weight: expected a tensor"),
    "A missing": Case({k: t for k, t in good_tensors().items() if k != A0}, refused="lora_A.weight: expected a tensor"),
    "NaN": Case({**good_tensors(), B0: torch.full((K, R), torch.nan)}, refused="finite values, found NaN"),
    "int8": Case({**good_tensors(), A0: torch.ones(R, K, dtype=torch.int8)}, refused="lora_A.*expected dtype"),
    # ---- config and file do not agree
    "layers beyond the model": more(
        {**pair(f"{P}model.layers.2.self_attn.q_proj", K, K), **pair(f"{P}model.layers.2.mlp.down_proj", MIDDLE, K)},
        r"2 of the adapter's 6 layers.*'model\.layers\.2\.mlp\.down_proj', 'model\.layers\.2\.self_attn\.q_proj'; the",
    ),
    "layer that no target names": more(
        pair(f"{P}model.layers.0.self_attn.k_proj", K, K), "k_proj.*expected a module that target_modules names"
    ),
    "target without tensors": Case(
        good_tensors(),
        {"target_modules": [*TARGETS, "v_proj"]},
        "v_proj.*expected tensors.*so for 2 layers",
        good_tensors(),
    ),
    "no tensors": Case({}, refused="at least one layer"),
}
