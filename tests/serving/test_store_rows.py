"""Rows of mixed batches in models of transformers: each answers as under its adapter alone, or it is refused."""

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.serving import NonFiniteOutput
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.seeds import shifted

transformers = pytest.importorskip("transformers")

SIZES = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
SIZES |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, d_model=16, vocab_size=64, decoder_start_token_id=1)
IDS = torch.arange(3, 27).reshape(3, 8)


def t5():
    sizes = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), dict(input_ids=IDS)


def bart():
    config = transformers.BartConfig(**SIZES, max_position_embeddings=64)
    return transformers.BartForConditionalGeneration(config), dict(input_ids=IDS)


def xlnet():
    config = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=32)
    return transformers.XLNetLMHeadModel(config), dict(input_ids=IDS)


def bloom():
    config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    return transformers.BloomForCausalLM(config), dict(input_ids=IDS)


def switch():
    sizes = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_experts=4, decoder_start_token_id=0)
    layers = dict(num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2, num_sparse_decoder_layers=1)
    config = transformers.SwitchTransformersConfig(**sizes, **layers)
    return transformers.SwitchTransformersForConditionalGeneration(config), dict(input_ids=IDS)


def served(build, layers="", seed=5):
    """(model, inputs, store) with random adapters a and b on the linear layers whose path holds ``layers``."""
    torch.manual_seed(shifted(seed))
    model, inputs = build()
    store = fused_lora.AdapterStore(model.eval())
    for name in "ab":
        tensors = {}
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and layers in path and "lm_head" not in path and "lm_loss" not in path:
                K, N = layer.in_features, layer.out_features
                tensors[path] = torch.randn(2, K) * 0.3, torch.randn(N, 2) * 0.3, 1.0
        store.load(name, tensors)
    return model, inputs, store


@torch.no_grad()
@pytest.mark.parametrize("build", [t5, bart])
def test_generate_again_with_another_number_of_beams(build):
    model, inputs, store = served(build)
    names = ["a", None, "b"]
    options = dict(max_new_tokens=4, do_sample=False)

    def scores(beams):
        out = model.generate(**inputs, **options, num_beams=beams, return_dict_in_generate=True, output_scores=True)
        return out.scores[0].view(3, beams, -1)

    alone = {n: {i: None for i in range(3)} for n in (1, 3)}
    for beams in alone:
        for i, name in enumerate(names):
            with store.batch([name] * 3):
                alone[beams][i] = scores(beams)[i]
    with store.batch(names):
        for beams in (1, 1, 3, 3, 1):
            found = scores(beams)
            for i in range(3):
                want = alone[beams][i]
                finite = want.isfinite()
                assert_close(found[i][finite], want[finite], terms=1000)


@torch.no_grad()
@pytest.mark.parametrize("build", [xlnet, bloom])
def test_models_that_keep_tokens_or_heads_first_inside(build):
    model, inputs, store = served(build)
    for tokens in (8, 3):  # three tokens in three sequences: no size tells them apart
        ids = inputs["input_ids"][:, :tokens]
        with store.batch(["a", None, "b"]):
            mixed = model(ids).logits
        for i, name in enumerate(["a", None, "b"]):
            with store.batch([name] * 3):
                assert_close(mixed[i], model(ids).logits[i], terms=1000)


@torch.no_grad()
def test_experts_of_switch_transformers_are_refused_unless_all_rows_are_one_adapters():
    model, inputs, store = served(switch, layers="experts")
    decoder = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(2):
        with store.batch(["a", None, "b"]), pytest.raises(ValueError, match="experts.*picked by their numbers"):
            model(**inputs, decoder_input_ids=decoder)
    base = model(**inputs, decoder_input_ids=decoder).logits
    with store.batch(["a"] * 3):
        assert not torch.equal(model(**inputs, decoder_input_ids=decoder).logits, base)
    # beside the experts nothing is in the way
    model, inputs, store = served(switch, layers="SelfAttention")
    with store.batch(["a", None, "b"]):
        mixed = model(**inputs, decoder_input_ids=decoder).logits
    for i, name in enumerate(["a", None, "b"]):
        with store.batch([name] * 3):
            want = model(**inputs, decoder_input_ids=decoder).logits[i]
        assert_close(mixed[i], want, terms=1000)


@torch.no_grad()
def test_masks_and_positions_of_any_shape_and_order():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model, _, store = served(lambda: (transformers.LlamaForCausalLM(config), {}))
    ids = IDS[:2]
    mask, positions = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(), torch.arange(8)[None]
    with store.batch(["a", "b"]):
        want = model(ids).logits
        for kw in (
            dict(input_ids=ids, position_ids=positions),
            dict(position_ids=positions, input_ids=ids),
            dict(attention_mask=mask, input_ids=ids),
            dict(attention_mask=mask, inputs_embeds=model.get_input_embeddings()(ids)),
        ):
            assert_close(model(**kw).logits, want, terms=1000)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_a_batch_under_autocast_is_no_worse_than_peft(dtype, autocast):
    """PEFT's layer runs unmerged under the same autocast; exact are both in float64, from inputs in its dtype."""
    peft = pytest.importorskip("peft")
    ours, theirs, exact = [], [], []
    for draw in range(30):
        torch.manual_seed(shifted(100 + draw))
        plain = nn.Sequential(nn.Linear(48, 40)).to(dtype).eval()
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(48, 40)).to(dtype), config).eval()
        wrapped.base_model.model[0].base_layer.load_state_dict(plain[0].state_dict())
        store = fused_lora.AdapterStore(plain)
        store.load("a", wrapped)
        x = torch.randn(4, 3, 48)
        with torch.autocast("cpu", autocast):
            base = plain(x)
            theirs.append(wrapped(x))
            with store.batch(["a", None, "a", "a"]):
                out = plain(x)
        assert out.dtype == theirs[-1].dtype == autocast and torch.equal(out[1], base[1])
        layer, linear = wrapped.base_model.model[0], plain[0]
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        x, W, bias = (t.to(autocast).double() for t in (x, linear.weight, linear.bias))
        exact.append((x @ W.T + bias + layer.scaling["default"] * (x @ A.T @ B.T))[[0, 2, 3]])
        ours.append(out[[0, 2, 3]])
        theirs[-1] = theirs[-1][[0, 2, 3]]
    assert_no_worse(torch.stack(ours), torch.stack(theirs), torch.stack(exact), draws=True)


@torch.no_grad()
def test_a_model_under_autocast_answers_as_each_adapter_alone():
    model, inputs, store = served(t5)
    decoder = torch.zeros(3, 1, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        with store.batch(["a", None, "b"]):
            mixed = model(**inputs, decoder_input_ids=decoder).logits
        for i, name in enumerate(["a", None, "b"]):
            with store.batch([name] * 3):
                assert torch.equal(model(**inputs, decoder_input_ids=decoder).logits[i], mixed[i])


@torch.no_grad()
def test_texts_that_were_sorted_by_length_are_refused():
    """As ``encode`` of sentence-transformers does: rows of one adapter would be those of other texts."""
    model, inputs, store = served(bloom)

    def encode(length_sorted_idx):
        return model(**inputs).logits

    def sorted_with_names(names, length_sorted_idx):
        with store.batch([names[i] for i in length_sorted_idx]):
            return model(**{key: t[length_sorted_idx] for key, t in inputs.items()}).logits[length_sorted_idx]

    for names, one in ((["a", "b", None], False), (["a"] * 3, True)):
        with store.batch(names):
            expected = model(**inputs).logits
            assert torch.equal(encode([0, 1, 2]), expected)
        assert_close(sorted_with_names(names, [2, 1, 0]), expected, terms=1000)
        with store.batch(names):
            if one:
                assert torch.equal(encode([2, 0, 1]), expected)
            else:
                with pytest.raises(ValueError, match="test_store_rows has sorted its texts by length"):
                    encode([2, 0, 1])


@torch.no_grad()
def test_nested_tensors_are_refused_by_name():
    """nn.TransformerEncoder makes one of a padding mask in eval mode."""

    def build():
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1), "head": nn.Linear(16, 16)}), {}

    model, _, store = served(build, "linear")
    encoder, x, padding = model["encoder"], torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    model.forward = lambda x: model["head"](encoder(x, src_key_padding_mask=padding))
    base = model(x)
    for names in (["a", None, "b"], ["a"] * 3):
        with pytest.raises(ValueError, match=r"linear1' expected .*, got a nested tensor.* use_nested_tensor to False"):
            with store.batch(names):
                model(x)
    with store.batch([None] * 3):
        assert torch.equal(model(x), base)
    store.load("head", {"head": (torch.randn(2, 16), torch.randn(16, 2), 1.0)})
    with (
        pytest.raises(ValueError, match="'head' got an input .*: a nested tensor.* use_nested_tensor to False"),
        store.batch(["head", None, "head"]),
    ):
        model(x)
    encoder.use_nested_tensor = False
    with store.batch(["a", None, "b"]):
        mixed = model(x)
    for i, name in enumerate(["a", None, "b"]):
        with store.batch([name] * 3):
            assert_close(mixed[i], model(x)[i], terms=200)


class Turned(nn.Module):
    """One layer over [sequences, tokens, 8], or tokens first: ``within`` the model alone, or of its inputs, too."""

    def __init__(self, within):
        super().__init__()
        self.layer, self.within = nn.Linear(8, 8), within

    def forward(self, x, attention_mask=None):
        return self.layer(x.transpose(0, 1)).transpose(0, 1) if self.within else self.layer(x)


@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("within, dim", [(False, 0), (True, 0), (False, 1), (True, 1)])
@torch.no_grad()
def test_of_rows_in_any_order_the_adapter_that_overflows_is_named(within, dim, tokens):
    """No other one, in whichever token it does; in padding none is."""
    model = Turned(within)
    store = fused_lora.AdapterStore(model)
    store.load("good", {"layer": (torch.randn(2, 8), torch.randn(8, 2), 1.0)})
    store.load("bad", {"layer": (torch.eye(2, 8) * 1e30, torch.full((8, 2), 1e30), 1.0)})
    for names in (["bad", "good"], ["good", "bad"], ["bad", None], [None, "bad"]):
        for token in range(tokens):
            x, mask = torch.zeros(2, tokens, 8), torch.ones(2, tokens, dtype=torch.int64)
            x[names.index("bad"), token, 0] = 1
            mask[names.index("bad"), token] = 0
            x = x.transpose(0, dim)
            with pytest.raises(NonFiniteOutput) as caught, store.batch(names, dim=dim):
                model(x)
            assert caught.value.identities == ("bad@1",)
            with store.batch(names, dim=dim):
                model(x, attention_mask=mask)


@pytest.mark.parametrize("dim", [0, 1])
@torch.no_grad()
def test_padding_of_one_token_in_flat_rows_is_no_error(dim):
    """As many rows as sequences, in one dimension: the mask says of each row what it is."""
    model = nn.Sequential(nn.Linear(8, 8))
    layer = model[0]
    model.forward = lambda x, attention_mask=None: layer(x).reshape(-1, 8)
    store = fused_lora.AdapterStore(model)
    store.load("a", {"0": (torch.randn(2, 8), torch.randn(8, 2), 1.0)})
    x = torch.zeros(2, 1, 8)
    x[0, 0, 0] = torch.nan
    with store.batch(["a", None], dim=dim):
        model(x.transpose(0, dim), attention_mask=torch.tensor([[0], [1]]))


class Copied(nn.Module):
    """A layer that gets each row of its input [1, rows, 8] twice, the copies apart."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(torch.cat([x, x])).sum(0, keepdim=True)


@torch.no_grad()
def test_of_packed_rows_that_a_layer_gets_twice_the_adapter_that_overflows_is_named():
    model = Copied()
    store = fused_lora.AdapterStore(model)
    store.load("good", {"layer": (torch.randn(2, 8), torch.randn(8, 2), 1.0)})
    store.load("bad", {"layer": (torch.eye(2, 8) * 1e30, torch.full((8, 2), 1e30), 1.0)})
    x = torch.zeros(1, 4, 8)
    x[0, :, 0] = 1
    with pytest.raises(NonFiniteOutput) as caught, store.batch_rows(["good", "bad", None], [1, 2, 1]):
        model(x)
    assert caught.value.identities == ("bad@1",)
