"""Adapters of an encoder-decoder model: the rows of its encoder are those of inputs, not of the decoder's tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.model_states.encoder_decoder import EncoderDecoderModelState

from fused_lora.integrations.vllm.cpu import GroupedWrapperCPU
from helpers import tiny_vllm as tiny
from helpers.seeds import shifted

WIDE, START = 64, (2, 3, 4)
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "encoder_attn.k_proj", "encoder_attn.v_proj", "fc1")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A tiny Whisper, and two adapters of its encoder and decoder."""
    root = tmp_path_factory.mktemp("whisper")
    folder = tiny.write_model(root / "tiny")  # for its tokenizer
    torch.manual_seed(shifted(0))
    config = WhisperConfig(
        vocab_size=tiny.VOCAB, d_model=WIDE, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=WIDE, decoder_ffn_dim=WIDE, max_target_positions=64, num_mel_bins=80,
        init_std=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=START[0],
        begin_suppress_tokens=None, suppress_tokens=None)  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder, {name: write_adapter(root / name, seed, r) for seed, (name, r) in enumerate([("a", 8), ("b", 3)])}


def write_adapter(folder, seed, r):
    sizes = {target: (WIDE, WIDE) for target in TARGETS}
    tiny.write_adapter(folder, seed, r, TARGETS, sizes)
    tensors = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        for side in ("decoder",) if "encoder_attn" in name else ("encoder", "decoder"):
            tensors[name.replace("model.layers", f"model.{side}.layers", 1)] = tensor.clone()
    tiny.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def merged(folder, adapter):
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    tensors = load_file(adapter / "adapter_model.safetensors") if adapter else {}
    for name in [name for name in tensors if "lora_A" in name]:
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        layer.weight.data += 2 * tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
    return model


def test_rows_of_the_encoder_have_the_adapter_of_their_request(whisper):
    folder, adapters = whisper
    settings = tiny.ENGINE | dict(max_model_len=64, max_num_batched_tokens=4500, enable_prefix_caching=False)
    engine = LLM(model=str(folder), **settings)
    numbers = np.random.default_rng(shifted(3))
    sounds = [numbers.standard_normal(4000).astype(np.float32) for _ in range(3)]
    given = [
        dict(encoder_prompt=dict(prompt="", multi_modal_data=dict(audio=(sound, 16000))),
             decoder_prompt=dict(prompt_token_ids=list(START[: 2 + i % 2])))
        for i, sound in enumerate(sounds)
    ]  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    features = WhisperFeatureExtractor(feature_size=80)(sounds, sampling_rate=16000, return_tensors="pt").input_features
    for names in (["a", None, "b"], ["b", "a", "a"]):
        requests = [name and LoRARequest(name, 1 + "ab".index(name), str(adapters[name])) for name in names]
        outputs = engine.generate(given, asked, use_tqdm=False, lora_request=requests)
        for i, (name, output) in enumerate(zip(names, outputs, strict=True)):
            prompt, tokens = list(START[: 2 + i % 2]), list(output.outputs[0].token_ids)
            for other in ("a", "b", None):
                model = merged(folder, other and adapters[other])
                with torch.no_grad():
                    rows = model(features[i : i + 1].double(), decoder_input_ids=torch.tensor([prompt + tokens]))
                rows = rows.logits[0, len(prompt) - 1 : -1]
                behind = max(row.max() - row[token] for row, token in zip(rows, tokens, strict=True))
                assert (behind < 1e-4) == (other == name), f"{name}: {behind:.2g} behind with {other}"


def test_the_second_model_runner_says_whose_the_inputs_are(device):
    config = SimpleNamespace(max_loras=3, max_lora_rank=16, lora_dtype=torch.float32, fully_sharded_loras=False)
    wrapper = GroupedWrapperCPU(64, 8, device, lora_config=config)
    manager = SimpleNamespace(punica_wrapper_mapping=dict(language_model=wrapper))
    runner = SimpleNamespace(prepare_mm_inputs=lambda inputs: ([], []))
    state = SimpleNamespace(model=SimpleNamespace(lora_manager=manager), encoder_runner=runner)
    batch = SimpleNamespace(req_ids=["a", "b", "c"], query_start_loc_np=np.array([0, 5, 6, 9]))
    EncoderDecoderModelState.prepare_inputs_embeds(state, dict(c=[0], a=[0, 1]), batch, None)
    assert wrapper.token_of_input.tolist() == [0, 0, 6]
    wrapper._slot_of_token = np.array([2] * 5 + [-1] + [1] * 3)
    assert wrapper._of_inputs(6)._slots.tolist() == [2, 2, 2, 2, 1, 1]
    with pytest.raises(ValueError, match="x: expected as many rows of each of 3 encoded inputs, got 7"):
        wrapper._of_inputs(7)
