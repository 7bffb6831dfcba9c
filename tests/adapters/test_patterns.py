"""alpha_pattern and rank_pattern of a file: PEFT's choice for every expression that is decided, in bounded time."""

import copy
import re
import time
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from torch import nn

from fused_lora.adapters import load_adapter, save_adapter
from fused_lora.adapters.patterns import PatternTable
from fused_lora.modules.inject import lora_layers
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

# what a key is made of, whether it is decided alone or not
PIECES = [
    *("a", "b", "0", ".", r"\.", r"\d", r"\w", r"\D+", "[ab]", "[^a.]", "[0-9]", "[]a]", "[a.]+?", "^", "$", "|", "-"),
    *("(?:a|b.)", "(a)", "(a|.)*", "(a{1,2}b?)*", ".*", "a*", "b{2}", "{2}", "{1,}", "{,2}", "?", "*", "+", "x{"),
    *("(", ")", "[", "]", "(?=a)", r"\b", r"\1", r"\n", "(?i)"),
]
NAMES = ["a", "b.a", "aab.b0", "a.b.0.a", "ab", "", "a.", "..", "layers.0.a", "aaaa.bb0", "0.1.a", "a\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.sampled_from(NAMES))
def test_a_decided_key_matches_as_in_python(key, name):
    possible = PatternTable({key: 1}, 0).possible(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of classes that it may read anew
        try:
            matched = get_pattern_key([key], name) == key if key != name else True
        except re.error:
            assert possible == {0, 1}
            return
    assert int(matched) in possible


DECIDED = [
    r"blocks\.\d+\.q", r"blocks\.(0|2)\..*", r"^blocks\.[0-1]\.(?:q|v)$", r".*\.v", "q|v", r"\w+_proj",
    r"b.*s\.\d{1,2}\.q?", r"[^.]+", r"(blocks\.)?\d\.(q|v)", r"blocks\.1\.q", "1.q", r"([a-z0-9_.]+)+!",
]  # fmt: skip


@pytest.mark.parametrize("key", DECIDED)
@pytest.mark.parametrize("name", ["blocks.0.q", "blocks.1.q", "blocks.12.v", "q", "v", "up_proj", "blocks.1.up_proj"])
def test_usual_expressions_are_decided(key, name):
    assert PatternTable({key: 1}, 0).possible(name) == {int(re.match(rf"(.*\.)?({key})$", name) is not None)}


@pytest.mark.parametrize(
    "key",
    [
        "([a-z0-9_.]+)+!",
        "(a*)*" * 30 + "!",
        "(((((a*)*)*)*)*)*!",
        "(a?){999999}!",
        "(" * 9999,
        "|" * 99999,
        "(.*.*.*)*!",
        ".?" * 100000,
        "".join(f"[{chr(0x4E00 + i)}a]" for i in range(20000)),
    ],
    ids=range(9),
)
def test_hostile_expressions_end(key):
    start = time.process_time()
    table = PatternTable({key: 1}, 0)
    for i in range(100):
        assert 0 in table.possible("a" * 60 + f".{i}")
    assert time.process_time() - start < 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6)}) for _ in range(3)])
        self.up_proj = nn.Linear(6, 6)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block["v"](block["q"](x)))
        return self.up_proj(x)


PATTERNS = [
    ({r"blocks\.\d\.q": 3}, {r"blocks\.[02]\..*": 16, r".*\.(q|v)": 4}),
    ({r"(?:blocks\.)?[01]\.v|up_proj": 2, r".*": 5}, {r".*\.v": 1, r"blocks\.1\.\w": 7, r"\w+_proj": 9}),
    ({r"blocks\.1\..+": 2, r"blocks\.\d+\.q": 7}, {"q": 2, r"blocks\.0\.q": 16, r"[^.]+": 3}),  # the first decides
    ({r"\d\.q": 6}, {r"^blocks\.\d{1,2}\.q$": 12, r"(blocks\.)?2\.(q|v)": 5}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("ranks", "alphas"), PATTERNS, ids=range(len(PATTERNS)))
def test_files_of_peft_load_with_its_ranks_and_alphas(tmp_path, ranks, alphas):
    torch.manual_seed(shifted(0))
    base, x = Net(), torch.randn(4, 6)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "v", "up_proj"], rank_pattern=ranks, alpha_pattern=alphas,
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")  # whose file sorts the keys
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "theirs")
    layers = lora_layers(ours)
    wanted = {path: theirs.base_model.model.get_submodule(path) for path in layers}
    assert len(wanted) == 7
    for field in ("r", "lora_alpha", "scaling"):
        assert {p: getattr(m, field)["default"] for p, m in layers.items()} == {
            p: getattr(m, field)["default"] for p, m in wanted.items()
        }
    assert_close(ours(x), theirs(x), terms=300)
    save_adapter(ours, tmp_path / "ours")  # and PEFT reads them again
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(again(x), theirs(x))
