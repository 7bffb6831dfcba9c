"""AdapterStore around a transformers model: forward and generate give what each adapter gives, merged and alone."""

import pytest
import torch

import fused_lora
from fused_lora.reference import bits
from helpers import serving

pytest.importorskip("transformers")

RANKS = {"a": 4, "b": 16, "c": 16, "d": 64}
COUNT = 12  # tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(plain model, model with a store, store, {name: folder})."""
    root = tmp_path_factory.mktemp("store")
    folder = serving.write_tiny_llama(root / "model")
    plain, model = serving.load_model(folder), serving.load_model(folder)
    adapters = {n: serving.write_adapter(root / n, plain, r, seed=r + ord(n)) for n, r in RANKS.items()}
    store = fused_lora.AdapterStore(model)
    for name, path in adapters.items():
        store.load(name, path)
    return plain, model, store, adapters


def prompts(lengths):
    return [torch.randint(0, 256, (n,)) for n in lengths]


def padded(ids, side):
    width = max(map(len, ids))
    tokens, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
    for row, (t, m) in enumerate(zip(tokens, mask, strict=True)):
        where = slice(width - len(ids[row]), width) if side == "left" else slice(0, len(ids[row]))
        t[where], m[where] = ids[row], 1
    return tokens, mask


def assert_same_tokens(plain, folder, ids, ours, wanted):
    """Equal, or different first where float64 says that rounding decides."""
    if ours == wanted:
        return
    at = next(i for i, (a, b) in enumerate(zip(ours, wanted, strict=True)) if a != b)
    assert serving.is_rounding_tie(plain, folder, [*ids.tolist(), *wanted[:at]], ours[at], wanted[at])


def test_generate_with_left_padding_gives_the_tokens_of_each_adapter_merged(world):
    plain, model, store, adapters = world
    names = ["a", None, "d", "b", "c", "a", None, "b"]
    ids = prompts([5, 9, 3, 17, 1, 9, 4, 12])
    tokens, mask = padded(ids, "left")
    with store.batch(names):
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
    for i, name in enumerate(names):
        folder = adapters.get(name)
        wanted = serving.greedy(serving.merged(plain, folder), ids[i].tolist(), COUNT)
        assert_same_tokens(plain, folder, ids[i], out[i, tokens.shape[1] :].tolist(), wanted)


@torch.no_grad()
def test_a_forward_with_right_padding_gives_the_logits_of_each_adapter_merged(world):
    plain, model, store, adapters = world
    names = ["b", "d", None, "c"]
    ids = prompts([6, 11, 8, 2])
    tokens, mask = padded(ids, "right")
    with store.batch(names):
        logits = model(tokens, attention_mask=mask).logits
    for i, name in enumerate(names):
        n = len(ids[i])
        exact = serving.merged(plain, adapters.get(name), torch.float64)(ids[i][None]).logits[0]
        narrow = serving.merged(plain, adapters.get(name))(ids[i][None]).logits[0]
        assert (logits[i, :n] - exact).abs().max() <= 4 * (narrow - exact).abs().max()


@torch.no_grad()
def test_base_rows_of_a_batch_keep_their_bits(world):
    plain, model, store, _ = world
    tokens = torch.randint(0, 256, (6, 9))
    base = plain(tokens).logits
    with store.batch(["a", None, "b", None, {"a": 0.5, "d": 1}, None]):
        mixed = model(tokens).logits
    with store.batch([None] * 6):
        none = model(tokens).logits
    assert torch.equal(bits(mixed[1::2]), bits(base[1::2]))
    assert torch.equal(bits(none), bits(base)) and torch.equal(bits(model(tokens).logits), bits(base))
    assert not torch.equal(mixed[0], base[0])


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_return_sequences=3, do_sample=True, top_k=1)])
def test_beams_and_return_sequences_repeat_the_entries(world, options):
    plain, model, store, adapters = world
    names, ids = ["d", None], torch.randint(0, 256, (2, 6))
    common = dict(max_new_tokens=6, pad_token_id=0, do_sample=False) | options
    mask = torch.ones_like(ids)
    with store.batch(names):
        out = model.generate(ids, attention_mask=mask, **common)
    for i, name in enumerate(names):
        alone = serving.merged(plain, adapters.get(name)).generate(ids[i : i + 1], attention_mask=mask[:1], **common)
        assert torch.equal(out.view(2, -1, out.shape[1])[i], alone)
    with store.batch(["a", "b", "c"]), pytest.raises(ValueError, match="3 entries for a model batch of 2"):
        model.generate(ids, attention_mask=mask, **common | dict(num_beams=1, num_return_sequences=1))


def test_an_adapter_of_the_output_layer_is_served(world, tmp_path):
    plain, model, store, _ = world
    folder = serving.write_adapter(tmp_path / "head", plain, 8, seed=3, head=True)
    store.load("head", folder)
    ids = torch.randint(0, 256, (1, 6))
    with store.batch(["head"]):
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
    store.unload("head")
    wanted = serving.greedy(serving.merged(plain, folder), ids[0].tolist(), COUNT)
    assert_same_tokens(plain, folder, ids[0], ours[0, 6:].tolist(), wanted)
