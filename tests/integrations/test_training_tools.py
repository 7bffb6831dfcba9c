"""The training tools that people use, each with every route to fused_lora, next to PEFT."""

import contextlib
import copy
import os
import types

import pytest
import torch
from safetensors.torch import load_file

from helpers.seeds import shifted
from helpers.thorough import sampled

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fused_lora  # noqa: E402
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse  # noqa: E402
from helpers import training  # noqa: E402
from helpers.training import ROUTES, built, counted_calls, counting_texts, largest_relative, train  # noqa: E402
from helpers.wrapped import INDUCTOR  # noqa: E402

PEFT_DOORS = ("accelerate", "install")
os.environ.setdefault("WANDB_DISABLED", "true")


class Texts(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def options(folder, kind=transformers.TrainingArguments, **more):
    fields = dict(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        max_steps=8,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        seed=7,
    )
    return kind(**{**fields, **more})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_trainer(route, folder, resume=None, base=None, p=0.0, **more):
    with built(route, training.tiny_llama() if base is None else base, lora_dropout=p) as model:
        trainer = transformers.Trainer(model, options(folder, **more), train_dataset=Texts(counting_texts(64)))
        trainer.train(resume_from_checkpoint=resume)
    return losses(trainer), model


# Runs of a float64 model, whose losses transformers forms in fp32: a few of its eps. fp32 runs drift apart by chance.
EQUAL = 8 * torch.finfo(torch.float32).eps


def wide_llama():
    return training.tiny_llama(dtype=torch.float64)


def close(ours, theirs, relative):
    ours, theirs = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    assert len(ours) == len(theirs) > 1
    worst = ((ours - theirs).abs() / theirs).max().item()
    assert worst < relative, f"losses differ by {worst:.2e}: {ours.tolist()} and {theirs.tolist()}"
    assert theirs[-1] < theirs[0]


# a plain loop


@pytest.mark.parametrize("route", ROUTES)
def test_plain_loop(route):
    data = counting_texts(48)
    with built("peft", wide_llama()) as model:
        expected = train(model, data)
    with counted_calls() as calls, built(route, wide_llama()) as model:
        found = train(model, data)
    close(found, expected, EQUAL)
    assert calls == ({} if route == "inject" else {"fused": 12 * 14})


def test_accelerate_and_restore_in_the_middle_of_a_run():
    """The optimizer's parameters and its state stay; every third of the run is PEFT's to rounding."""
    thirds = counting_texts(36).split(12)
    found = {}
    for route in ("peft", "both"):
        with built("peft", wide_llama()) as model:
            optimizer = torch.optim.AdamW(training.trainable(model).values(), lr=5e-3)
            found[route] = []
            for i, data in enumerate(thirds):
                if route == "both" and i:
                    (fused_lora.accelerate if i == 1 else fused_lora.restore)(model)
                with counted_calls() as calls:
                    found[route] += train(model, data, optimizer=optimizer)
                assert calls == ({"fused": 3 * 14} if route == "both" and i == 1 else {})
    close(found["both"], found["peft"], EQUAL)


@pytest.mark.parametrize("route", ROUTES)
def test_autocast(route):
    data = counting_texts(32)
    found = {}
    for kind in ("peft", route):
        with built(kind, training.tiny_llama()) as model:
            found[kind] = train(model, data, autocast=True)
    close(found[route], found["peft"], 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_a_16_bit_base(route, dtype):
    data = counting_texts(16)
    found = {}
    for kind in ("peft", route):
        with built(kind, training.tiny_llama(dtype=dtype)) as model:
            found[kind] = train(model, data)
            assert {p.dtype for p in training.trainable(model).values()} == {torch.float32}
    close(found[route], found["peft"], 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_gradient_checkpointing_changes_no_bit(route, use_reentrant):
    ids = counting_texts(4)
    found = []
    for checkpointing in (False, True):
        with built(route, training.tiny_llama(), lora_dropout=0.5, init_lora_weights=False) as model:
            model.enable_input_require_grads()  # the kernels form gradients of A in one pass with these
            if checkpointing:
                arguments = {"use_reentrant": use_reentrant}
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
            torch.manual_seed(shifted(3))
            with counted_calls() as calls:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            found.append(training.gradients(model))
            if route != "inject":
                assert calls == {"fused": 14 * (1 + checkpointing)}
    assert found[0].keys() == found[1].keys() and len(found[0]) == 28
    for name, gradient in found[0].items():
        assert gradient.any() and torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize(
    "route, p", sampled([("accelerate", 0.5), ("install", 0.5), ("inject", 0.5), ("accelerate", 0.0)], 2)
)
def test_compile_of_the_whole_model(route, p):
    data = counting_texts(12)
    found = []
    for compiled in (False, True):
        with built(route, wide_llama(), lora_dropout=p, init_lora_weights=False) as model:
            torch._dynamo.reset()
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
            torch.manual_seed(shifted(1))
            losses = [run(input_ids=ids, labels=ids, use_cache=False).loss for ids in data.split(4)]
            sum(losses).backward()
            found.append(({"losses": torch.stack(losses).detach()}, training.gradients(model)))
    assert largest_relative(found[1][0], found[0][0]) < EQUAL
    assert largest_relative(found[1][1], found[0][1]) < EQUAL


@pytest.mark.slow
@pytest.mark.skipif(INDUCTOR != "inductor", reason="inductor needs a C++ compiler here")
@pytest.mark.parametrize("route", ["accelerate", "inject"])
def test_inductor_uses_one_mask_in_forward_and_backward(route):
    """Its random numbers are not eager's, but (c A, B / c) is the same layer, so <dA, A> = <dB, B> under one mask."""
    torch.manual_seed(shifted(0))
    base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8))
    fields = {"target_modules": ["0", "2"], "task_type": None, "lora_dropout": 0.5, "init_lora_weights": False}
    x = torch.randn(20, 24)
    with built(route, base, **fields) as model:
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True)
        losses = []
        for _ in range(3):
            model.zero_grad()
            loss = run(x).square().sum()
            loss.backward()
            losses.append(loss.item())
            weights = training.trainable(model)
            for name, A in weights.items():
                if ".lora_A." in name:
                    B = weights[name.replace("lora_A", "lora_B")]
                    inner = [(p.grad.double() * p.double()).sum().item() for p in (A, B)]
                    assert inner[0] == pytest.approx(inner[1], rel=1e-4) and abs(inner[0]) > 1e-3
        model.eval()
        assert_close(run(x), model(x), terms=100)
    assert len(set(losses)) == 3  # a new mask at every call


# transformers.Trainer


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 4, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}, marks=pytest.mark.thorough
        ),
    ],
    ids=["plain", "accumulation", "checkpointing", "reentrant", "bf16", "compile"],
)
def test_trainer(more, tmp_path):
    make = training.tiny_llama if "bf16" in more else wide_llama
    expected, _ = run_trainer("peft", tmp_path / "peft", base=make(), **more)
    for route in ROUTES:
        with counted_calls() as calls:
            found, _ = run_trainer(route, tmp_path / route, base=make(), **more)
        close(found, expected, 2e-3 if "bf16" in more else EQUAL)
        assert set(calls) <= {"fused"}, route


@pytest.mark.parametrize("route", ROUTES)
def test_trainer_resumes_on_the_same_curve(route, tmp_path):
    whole, last = run_trainer(route, tmp_path / "whole", p=0.1)
    run_trainer(route, tmp_path / "part", p=0.1, max_steps=5, save_strategy="steps", save_steps=5)
    resumed, again = run_trainer(route, tmp_path / "part", p=0.1, resume=str(tmp_path / "part" / "checkpoint-5"))
    assert resumed == whole and len(whole) == 8
    for name, parameter in training.trainable(last).items():
        assert torch.equal(parameter, training.trainable(again)[name]), name


@pytest.mark.parametrize("route", ["peft", *PEFT_DOORS])
def test_a_trainers_checkpoint_predicts_the_same_bits(route, tmp_path):
    """The classic complaint: other predictions after reloading."""
    _, model = run_trainer(route, tmp_path, p=0.1, max_steps=5, save_strategy="steps", save_steps=5)
    ids = counting_texts(4, seed=1)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert not torch.equal(expected, training.tiny_llama().eval()(input_ids=ids).logits)
    for folder in (tmp_path / "checkpoint-5", save(model, tmp_path / "saved")):
        reloaded = peft.PeftModel.from_pretrained(training.tiny_llama(), folder)
        if route != "peft":
            fused_lora.accelerate(reloaded)
        with torch.no_grad():
            assert torch.equal(reloaded(input_ids=ids).logits, expected)
    assert fused_lora.verify(model, ids, reference=reloaded).reference.difference == 0.0


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def test_trainers_checkpoints_of_an_injected_model_are_its_adapter(tmp_path):
    """They hold no base weight, resume with what else trains, and the best one is taken back at the end."""
    data = Texts(counting_texts(64))

    def trained(folder, resume=None):
        with built("inject", training.tiny_llama(), lora_dropout=0.1) as model:
            model.lm_head.requires_grad_(True)
            fields = dict(save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, max_steps=4)
            best = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
            arguments = options(folder, **fields, **best)
            trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
            trainer.train(resume_from_checkpoint=resume)
        return trainer, model

    trainer, model = trained(tmp_path / "whole")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # the worse loss, by the options above
    state = model.state_dict()
    for step, same in ((2, True), (4, False)):
        held = load_file(tmp_path / "whole" / f"checkpoint-{step}" / "model.safetensors")
        assert (
            held.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
            and "lm_head.weight" in held
        )
        assert all(torch.equal(state[name], tensor) for name, tensor in held.items()) is same
    resumed, again = trained(tmp_path / "part", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(trainer)
    for name, tensor in load_file(tmp_path / "part" / "checkpoint-4" / "model.safetensors").items():
        assert torch.equal(tensor, held[name])
    trainer.save_model(str(tmp_path / "saved"))
    model.lm_head.load_state_dict(training.tiny_llama().lm_head.state_dict())
    plain = training.tiny_llama()
    fused_lora.load_adapter(plain, tmp_path / "saved")
    ids = counting_texts(3)
    assert torch.equal(plain.eval()(ids).logits, model.eval()(ids).logits)


def test_an_injected_models_adapter_predicts_the_same_bits(tmp_path):
    _, model = run_trainer("inject", tmp_path, p=0.1, max_steps=5)
    ids = counting_texts(4, seed=1)
    fused_lora.save_adapter(model.eval(), tmp_path / "saved")
    reloaded = training.tiny_llama().eval()
    fused_lora.load_adapter(reloaded, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("route", PEFT_DOORS)
def test_merging_what_a_trainer_trained(route, tmp_path):
    _, model = run_trainer(route, tmp_path, p=0.1, base=training.tiny_llama(dtype=torch.bfloat16))
    ids = counting_texts(2, seed=1)
    assert fused_lora.verify(model, ids).ok
    merged = copy.deepcopy(model).merge_and_unload()
    result = fused_lora.verify(model, ids, reference=merged)
    assert result.ok and result.reference.difference > 0


# TRL


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(i): i for i in range(training.VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="60", unk_token="0")


@pytest.mark.parametrize("wrapped_by_trl", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_sft_trainer(route, wrapped_by_trl, tmp_path):
    if wrapped_by_trl and route != "install":
        pytest.skip("TRL wraps models by PEFT only")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [" ".join(map(str, ids.tolist())) for ids in counting_texts(32)]})

    def run(kind):
        arguments = options(tmp_path / kind, trl.SFTConfig, max_steps=6, bf16=False, max_length=32)
        fields = dict(args=arguments, train_dataset=rows, processing_class=tokenizer())
        if wrapped_by_trl:
            with training.installed() if kind == "install" else contextlib.nullcontext():
                config = peft.LoraConfig(**training.ADAPTER)
                trainer = trl.SFTTrainer(wide_llama(), peft_config=config, **fields)
                trainer.train()
        else:
            with built(kind, wide_llama()) as model:
                trainer = trl.SFTTrainer(model, **fields)
                trainer.train()
        return losses(trainer)

    expected = run("peft")
    with counted_calls() as calls:
        found = run(route)
    close(found, expected, EQUAL)
    assert calls.keys() == (set() if route == "inject" else {"fused"})


def preferences(texts):
    """Prompts with the text as it goes on and one that does not count."""
    text = [[" ".join(map(str, part.tolist())) for part in (t[:6], t[6:], t[6:].flip(0))] for t in texts]
    return dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*text, strict=True)), strict=True))


def trl_trainer(kind, trl, folder):
    """One that TRL wraps by PEFT, whose reference model, if it has one, is the base without adapters."""
    datasets = pytest.importorskip("datasets")
    rows, length = preferences(counting_texts(32)), dict(max_length=32)
    model, config, more = wide_llama(), dict(training.ADAPTER), {}
    if kind == "Reward":
        model.config.num_labels, model.config.pad_token_id = 1, 0
        model = transformers.LlamaForSequenceClassification(model.config).double()
        config |= dict(task_type="SEQ_CLS", modules_to_save=["score"])
    if kind == "GRPO":
        rows, length = {"prompt": rows["prompt"]}, dict(max_completion_length=8, num_generations=4, beta=0.1)
        more["reward_funcs"] = lambda completions, **_: [float(len(text.split()) % 3) for text in completions]
    arguments = options(folder, getattr(trl, f"{kind}Config"), max_steps=4, bf16=False, **length)
    more |= dict(processing_class=tokenizer(), peft_config=peft.LoraConfig(**config))
    data = datasets.Dataset.from_dict(rows)
    return getattr(trl, f"{kind}Trainer")(model, args=arguments, train_dataset=data, **more)


@pytest.mark.parametrize("kind", ["DPO", "GRPO", "Reward"])
def test_trainers_of_trl(kind, tmp_path):
    trl = pytest.importorskip("trl")

    def run(installed, folder):
        transformers.set_seed(shifted(7))
        with training.installed() if installed else contextlib.nullcontext():
            trainer = trl_trainer(kind, trl, folder)
            trainer.train()
        gradients = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        trained = {n: t.detach().clone() for n, t in training.trainable(trainer.model).items()}
        return torch.tensor([*losses(trainer), *gradients]), trained

    expected, theirs = run(False, tmp_path / "peft")
    with counted_calls() as calls:
        found, ours = run(True, tmp_path / "ours")
    reference = set() if kind == "Reward" else {"adapters are disabled"}
    assert len(expected) == 8 and calls.keys() == {"fused"} | reference
    assert ((found - expected).abs() <= EQUAL * expected.abs().clamp(min=1e-3)).all(), (found, expected)
    assert largest_relative(ours, theirs) < EQUAL


# accelerate


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("route", ROUTES)
def test_accelerator(route, mixed_precision):
    accelerate = pytest.importorskip("accelerate")

    make = wide_llama if mixed_precision == "no" else training.tiny_llama

    def run(kind):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
        with built(kind, make()) as model:
            optimizer = torch.optim.AdamW(training.trainable(model).values(), lr=5e-3)
            loader = torch.utils.data.DataLoader(Texts(counting_texts(32)), batch_size=4)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            found = []
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                found.append(loss.item())
            assert accelerator.unwrap_model(model) is not None
        return found

    expected = run("peft")
    with counted_calls() as calls:
        found = run(route)
    close(found, expected, 2e-3 if mixed_precision == "bf16" else EQUAL)
    assert set(calls) <= {"fused"}


# as close to float64 as PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ROUTES)
def test_logits_and_gradients_are_as_close_to_float64_as_pefts(route, dtype):
    def run(kind, width):
        found = {}
        with built(kind, training.tiny_llama(dtype=dtype), init_lora_weights=False) as model:
            model = model.to(width) if width else model
            for draw in range(DRAWS):
                ids = counting_texts(6, seed=draw)
                model.zero_grad()
                output = model(input_ids=ids, labels=ids)
                output.loss.backward()
                for name, tensor in {"logits": output.logits.detach(), **training.gradients(model)}.items():
                    found.setdefault(name, []).append(tensor.clone())
        return found

    exact, theirs, ours = run("peft", torch.float64), run("peft", None), run(route, None)
    for name in exact:
        assert_no_worse(*(torch.stack(found[name]) for found in (ours, theirs, exact)), name=name, draws=True)


def test_trl_syncs_to_an_engine_leave_the_base_alone():
    """TRL's own merge, send and unmerge, with an engine that fails once. No bit of the base changes in 20 syncs, and
    what was sent is merged."""
    generation = pytest.importorskip("trl.generation.vllm_generation")
    linear = torch.nn.Linear(24, 40, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = fused_lora.accelerate(peft.get_peft_model(torch.nn.Sequential(linear), config))
    before = linear.weight.detach().clone()
    B = next(p for n, p in model.named_parameters() if "lora_B" in n)
    sync = generation.VLLMGeneration.__new__(generation.VLLMGeneration)
    sync.model = model
    sync._dist = types.SimpleNamespace(gather_params=lambda parameters: contextlib.nullcontext(), is_fsdp=False)
    for i in range(20):
        B.data.normal_(std=0.1)
        for name, weight in sync._iter_named_params():
            if name == "0.weight":
                assert weight.shape == linear.weight.shape and not torch.equal(weight, before)
                if i == 10:
                    break  # the engine's failure ends the loop between merge and unmerge
        if i == 10:
            with pytest.warns(UserWarning, match="already merged"):
                model.merge_adapter()
            B.data.normal_()
            fused_lora.unmerge(model)
        assert torch.equal(linear.weight.detach().view(torch.int16), before.view(torch.int16))
