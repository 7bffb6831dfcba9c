"""Broken and malicious checkpoints: each is refused quickly with file, key, expected and found, and the model keeps
every bit and every module."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from fused_lora.adapters import AdapterError, load_adapter, read_adapter
from fused_lora.adapters.checkpoint import KEY_PREFIX as PREFIX
from fused_lora.adapters.tensorfile import MAX_HEADER_BYTES
from fused_lora.modules.inject import adapter_configs
from helpers.adapter_files import CONFIG, Net, good_tensors, header_and_data, pack, put
from helpers.alone import alone
from helpers.seeds import shifted
from helpers.waiting import HANG

A1, B1, A2, B2 = good_tensors()
hostile = pytest.mark.experiment(
    "B1",
    full=1,
    quick=1,
    what="A hostile adapter, loaded in a process of its own with 64 MiB and 20 s of CPU time: refused with file, key "
    "and reason by AdapterError, and the model keeps every bit and module",
)


def write(folder, config=None, tensors=None, weights=None, raw_config=None):
    """A checkpoint; ``tensors`` are laid over the good ones (None removes one), raw bytes replace a whole file."""
    merged = {**CONFIG, **(config or {})}
    text = (
        json.dumps({k: v for k, v in merged.items() if v != "REMOVED"}).encode() if raw_config is None else raw_config
    )
    kept = {k: v for k, v in {**good_tensors(), **(tensors or {})}.items() if v is not None}
    put(folder, text, pack(*header_and_data(kept)) if weights is None else weights)
    return folder


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [(n, type(m)) for n, m in model.named_modules()]


ACTS = {"exec", "compile", "import", "pickle.find_class", "os.system", "os.exec", "os.fork", "subprocess.Popen"}
ACTS |= {"socket.connect", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "ctypes.dlopen"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Records what code does that only reads files should never do, while it is on."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.on and (event in ACTS or (event == "open" and isinstance(args[2], int) and args[2] & WRITES)):
            self.seen.append((event, args))


@pytest.fixture(scope="module", autouse=True)
def watch(tmp_path_factory):
    """Installed after one sound load, which may import lazily."""
    global WATCH
    load_adapter(Net(), write(tmp_path_factory.mktemp("sound") / "a"))
    WATCH = Watch()
    yield
    WATCH.on = False


def refused(folder, match=None, seconds=2.0, name=None, dtype=torch.float32):
    torch.manual_seed(shifted(0))
    model = Net().to(dtype)
    tensors, modules = state(model)
    start, WATCH.on, WATCH.seen = time.process_time(), True, []
    with pytest.raises(AdapterError, match=match) as caught:
        load_adapter(model, folder, name)
    WATCH.on = False
    assert WATCH.seen == []
    assert time.process_time() - start < seconds
    error = caught.value
    assert str(folder) in error.file and error.file in str(error)
    assert error.expected and error.found and len(str(error)) < 2000
    assert not re.match("[A-Za-z]*Error\\(", error.expected)  # a sentence, not an exception's repr cut in the middle
    after, modules_after = state(model)
    assert modules_after == modules and after.keys() == tensors.keys()
    assert all(torch.equal(after[k].view(torch.uint8), v.view(torch.uint8)) for k, v in tensors.items())
    assert adapter_configs(model) == {} and all(p.requires_grad for p in model.parameters())
    return error


def test_the_watch_notices_forbidden_calls(tmp_path):
    WATCH.on, WATCH.seen = True, []
    (tmp_path / "x").write_text("x")
    pickle.loads(pickle.dumps(json.dumps))
    eval("1 + 1")
    WATCH.on = False
    assert {"open", "pickle.find_class", "exec", "compile"} <= {event for event, _ in WATCH.seen}


def test_an_undamaged_checkpoint_loads(tmp_path):
    model = Net()
    load_adapter(model, write(tmp_path / "a"))
    assert torch.equal(model.fc1.lora_A["default"].weight, good_tensors()[A1])


def change(name, function):
    return {name: function(good_tensors()[name])}


def with_value(name, value):
    tensor = good_tensors()[name]
    tensor.view(-1)[5] = value
    return {name: tensor}


TENSOR_CASES = {
    "A transposed": change(A1, lambda t: t.T.contiguous()),
    "B transposed": change(B1, lambda t: t.T.contiguous()),
    "A 1-D": change(A1, lambda t: t.reshape(-1)),
    "B 1-D": change(B1, lambda t: t.reshape(-1)),
    "A 3-D": change(A1, lambda t: t[None]),
    "A 0-D": change(A1, lambda t: t[0, 0]),
    "A empty": change(A1, lambda t: t[:0]),
    "rank of A": change(A1, lambda t: t[:3]),
    "rank of B": change(B1, lambda t: t[:, :3].contiguous()),
    "rank of both": {**change(A1, lambda t: t[:3]), **change(B1, lambda t: t[:, :3].contiguous())},
    "K of A": change(A1, lambda t: t[:, :7].contiguous()),
    "N of B": change(B1, lambda t: t[:5]),
    "layers swapped": {A1: good_tensors()[A2], A2: good_tensors()[A1]},
    "B missing": {B1: None},
    "A missing": {A2: None},
    "layer missing": {A2: None, B2: None},
    "no tensors": {A1: None, B1: None, A2: None, B2: None},
    "NaN in A": with_value(A1, torch.nan),
    "Inf in B": with_value(B1, torch.inf),
    "-Inf in A": with_value(A2, -torch.inf),
    "int64": change(A1, lambda t: t.long()),
    "int8": change(A1, lambda t: t.to(torch.int8)),
    "bool": change(A1, lambda t: t > 0),
    "float64": change(A1, lambda t: t.double()),
    "complex": change(A1, lambda t: t.to(torch.complex64)),
    "base weight": {PREFIX + "fc2.base_layer.weight": torch.full((6, 12), 7.0)},
    "base weight, plain": {PREFIX + "fc2.weight": torch.full((6, 12), 7.0)},
    "base bias": {PREFIX + "fc1.base_layer.bias": torch.full((12,), 7.0)},
    "other bias": {PREFIX + "norm.bias": torch.full((6,), 7.0)},
    "lora bias": {PREFIX + "fc1.lora_B.bias": torch.ones(12)},
    "embedding": {PREFIX + "emb.lora_embedding_A": torch.ones(4, 4)},
    "magnitude": {PREFIX + "fc1.lora_magnitude_vector": torch.ones(12)},
    "whole module": {PREFIX + "norm.weight": torch.ones(6)},
    "unrelated": {"something": torch.ones(3)},
    "without prefix": {A1: None, A1.removeprefix(PREFIX): good_tensors()[A1]},
    "wrong prefix": {A1: None, "base.model." + A1.removeprefix(PREFIX): good_tensors()[A1]},
    "adapter name in key": {A1: None, A1.replace("lora_A", "lora_A.default"): good_tensors()[A1]},
    "root": {PREFIX + "lora_A.weight": torch.ones(4, 8), PREFIX + "lora_B.weight": torch.ones(8, 4)},
    "extra layer": {PREFIX + "fc3.lora_A.weight": torch.ones(4, 8), PREFIX + "fc3.lora_B.weight": torch.ones(8, 4)},
    "not linear": {PREFIX + "norm.lora_A.weight": torch.ones(4, 6), PREFIX + "norm.lora_B.weight": torch.ones(6, 4)},
    "path": {
        PREFIX + "../../evil.lora_A.weight": torch.ones(4, 6),
        PREFIX + "../../evil.lora_B.weight": torch.ones(6, 4),
    },
    "dunder": {
        PREFIX + "fc1.__class__.lora_A.weight": torch.ones(4, 6),
        PREFIX + "fc1.__class__.lora_B.weight": torch.ones(6, 4),
    },
    "newline": {PREFIX + "fc1\n\x1b[2J.lora_A.weight": torch.ones(4, 6)},
    "long": {PREFIX + "x" * 100_000 + ".lora_A.weight": torch.ones(4, 6)},
}


@hostile
@pytest.mark.parametrize("case", TENSOR_CASES)
@alone
def test_tensors(tmp_path, case):
    error = refused(write(tmp_path / "a", tensors=TENSOR_CASES[case]))
    assert error.file.endswith("adapter_model.safetensors")
    assert (error.key is None) == (case == "no tensors")


CONFIG_CASES = {
    "r zero": {"r": 0},
    "r negative": {"r": -4},
    "r other": {"r": 5},
    "r text": {"r": "4"},
    "r float": {"r": 4.0},
    "r bool": {"r": True},
    "r null": {"r": None},
    "r list": {"r": [4]},
    "r 1e9": {"r": 10**9},
    "r 2^63": {"r": 2**63},
    "r missing": {"r": "REMOVED"},
    "alpha missing": {"lora_alpha": "REMOVED"},
    "alpha 1e30": {"lora_alpha": 1e30},
    "alpha 10^400": {"lora_alpha": 10**400},
    "alpha text": {"lora_alpha": "8"},
    "alpha bool": {"lora_alpha": False},
    "dropout": {"lora_dropout": -1},
    "dropout 2": {"lora_dropout": 2},
    "bias mode": {"bias": "everything"},
    "dora": {"use_dora": True},
    "qalora": {"use_qalora": 1},
    "alora": {"alora_invocation_tokens": [1, 2.5]},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": []}},
    "arrow": {"arrow_config": {"top_k": 3}},
    "target_parameters": {"target_parameters": ["w"]},
    "replication": {"layer_replication": [[0, 1]]},
    "tokens": {"trainable_token_indices": [1]},
    "modules_to_save type": {"modules_to_save": "norm"},
    "modules_to_save empty": {"modules_to_save": [""]},
    "all biases, modules_to_save": {"modules_to_save": ["norm"]},
    "tokens type": {"trainable_token_indices": {"norm": 1}},
    "tokens twice": {"trainable_token_indices": [1, 1]},
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "os"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "unknown": {"use_superlora": True},
    "other peft_type": {"peft_type": "IA3"},
    "no peft_type": {"peft_type": "REMOVED"},
    "auto_mapping": {"auto_mapping": "os.system"},
    "targets too few": {"target_modules": ["fc1"]},
    "targets too many": {"target_modules": ["fc1", "fc2", "norm"]},
    "targets other": {"target_modules": ["fc9"]},
    "targets number": {"target_modules": [1]},
    "targets excluded": {"exclude_modules": ["fc2"]},
    "rank_pattern": {"rank_pattern": {"fc2": 8}},
    "rank_pattern type": {"rank_pattern": [["fc2", 8]]},
    "rank_pattern zero": {"rank_pattern": {"nothing": 0}},
    "alpha_pattern value": {"alpha_pattern": {"fc2": "8"}},
    "alpha_pattern undecided": {"alpha_pattern": {"(?=fc)fc1": 16}},
    "alpha_pattern too long": {"alpha_pattern": {"((x?){999}){999}fc1": 16}},
    "alpha_pattern broken": {"alpha_pattern": {"fc(1": 16}},
    "lora_bias without": {"lora_bias": True},
    "bias without": {"bias": "lora_only"},
    "all biases without": {"bias": "all"},
}


def test_what_to_do_about_an_initialisation_is_said_whole(tmp_path):
    folder = write(tmp_path / "a", CONFIG_CASES["pissa"])
    refused(folder, match="set the entry to true in adapter_config.json, found pissa")


@hostile
@pytest.mark.parametrize("case", CONFIG_CASES)
@alone
def test_config(tmp_path, case):
    error = refused(write(tmp_path / "a", CONFIG_CASES[case]))
    assert error.key
    if (
        not case.startswith(("targets", "r other", "rank_pattern", "lora_bias", "dora", "bias without", "all biases"))
        or "type" in case
    ):
        assert error.file.endswith("adapter_config.json")
        assert error.key.split(",")[0] in {*CONFIG_CASES[case], "extra"}


EVIL = "([a-z0-9_.]+)+!"


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_expressions_of_a_file_take_bounded_time(tmp_path, field):
    config = {
        "target_modules": EVIL,
        "exclude_modules": EVIL,
        "rank_pattern": {EVIL: 9},
        "alpha_pattern": {EVIL: 8},
        "layers_pattern": [EVIL],
    }
    values = {field: config[field], **({"layers_to_transform": [0]} if field == "layers_pattern" else {})}
    folder = write(tmp_path / "a", values)
    name = "a" * 40
    model = nn.ModuleDict({name: Net()})
    tensors = {k.replace(PREFIX, f"{PREFIX}{name}."): v for k, v in good_tensors().items()}
    (folder / "adapter_model.safetensors").write_bytes(pack(*header_and_data(tensors)))
    start = time.process_time()
    load_adapter(model, folder)
    assert time.process_time() - start < 1
    assert model[name].fc1.scaling["default"] == 2.0


def test_patterns_times_layers_is_bounded(tmp_path):
    shape = {"dtype": "F32", "shape": [1, 1]}
    names = [f"{PREFIX}l{i}.lora_{x}.weight" for i in range(10_000) for x in "AB"]
    header = {name: {**shape, "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    patterns = {f"m.{i}": 1 for i in range(10_000)}
    config = {"r": 1, "rank_pattern": patterns, "target_modules": "x"}
    folder = write(tmp_path / "a", config, weights=pack(header, bytes(4 * len(names))))
    assert refused(folder).key == "rank_pattern, alpha_pattern"


BASE_BIAS = {PREFIX + "fc1.base_layer.bias": torch.ones(12)}
ALL_BIASES = {**BASE_BIAS, PREFIX + "norm.bias": torch.ones(6)}
BIAS_CASES = {
    "shape": ("lora_only", {PREFIX + "fc1.base_layer.bias": torch.ones(11)}),
    "2-D": ("lora_only", {PREFIX + "fc1.base_layer.bias": torch.ones(12, 1)}),
    "none in the model": ("lora_only", {**BASE_BIAS, PREFIX + "fc2.base_layer.bias": torch.ones(6)}),
    "NaN": ("lora_only", {PREFIX + "fc1.base_layer.bias": torch.full((12,), torch.nan)}),
    "not of this mode": ("lora_only", ALL_BIASES),
    "other missing": ("all", BASE_BIAS),
    "other shape": ("all", {**BASE_BIAS, PREFIX + "norm.bias": torch.ones(5)}),
    "other unknown": ("all", {**ALL_BIASES, PREFIX + "norm2.bias": torch.ones(6)}),
    "other weight": ("all", {**ALL_BIASES, PREFIX + "norm.weight": torch.ones(6)}),
    "without layer": ("lora_only", {**BASE_BIAS, PREFIX + "norm.base_layer.bias": torch.ones(6)}),
}


@hostile
@pytest.mark.parametrize("case", BIAS_CASES)
@alone
def test_biases(tmp_path, case):
    mode, tensors = BIAS_CASES[case]
    assert refused(write(tmp_path / "a", {"bias": mode}, tensors)).key.startswith(PREFIX)


def test_a_file_without_the_biases_that_its_config_names(tmp_path):
    """As PEFT before 0.21 wrote them."""
    refused(write(tmp_path / "a", {"bias": "lora_only"}), match="PEFT before 0.21 wrote none.*bias 'none'")
    load_adapter(Net(), write(tmp_path / "b", {"bias": "none"}))


def test_values_beyond_a_16_bit_base(tmp_path):
    folder = write(tmp_path / "a", {"bias": "lora_only"}, {PREFIX + "fc1.base_layer.bias": torch.full((12,), 1e6)})
    refused(folder, match="values within the range of torch.float16", dtype=torch.float16)
    load_adapter(Net(), folder)
    biases = {PREFIX + "fc1.base_layer.bias": torch.ones(12), PREFIX + "norm.bias": torch.full((6,), 1e6)}
    refused(write(tmp_path / "c", {"bias": "all"}, biases), match="torch.float16", dtype=torch.float16)
    folder = write(tmp_path / "b", tensors=with_value(B1, 1e6))
    model = Net().half()
    with pytest.raises(AdapterError, match="values within the range of torch.float16"):
        load_adapter(model, folder, autocast_adapter_dtype=False)
    load_adapter(model, folder)
    assert model.fc1.lora_B["default"].weight.max() == 1e6


HEADER, DATA = header_and_data(good_tensors())
GOOD = pack(HEADER, DATA)


def edited(name=A1, **changes):
    return {**HEADER, name: {**HEADER[name], **changes}}


def duplicated(same_offsets):
    raw = json.dumps(HEADER)[:-1]
    offsets = HEADER[A1]["data_offsets"] if same_offsets else [len(DATA), len(DATA) + 128]
    entry = {"dtype": "F32", "shape": [4, 8], "data_offsets": offsets}
    return f"{raw}, {json.dumps(A1)}: {json.dumps(entry)}}}".encode()


WEIGHT_CASES = {
    "empty": b"",
    "7 bytes": GOOD[:7],
    "length only": GOOD[:8],
    "trailing bytes": GOOD + b"x",
    "one byte short": GOOD[:-1],
    "no header": pack(b"", DATA),
    "length 2^63": pack(HEADER, DATA, 2**63),
    "length 2^64-1": pack(HEADER, DATA, 2**64 - 1),
    "length 200 MB": pack(HEADER, DATA, 200_000_000),
    "length + 1": pack(HEADER, DATA, len(json.dumps(HEADER)) + 1),
    "length - 1": pack(HEADER, DATA, len(json.dumps(HEADER)) - 1),
    "not JSON": pack(b"{]", DATA),
    "array": pack(b"[]", DATA),
    "number": pack(b"1", DATA),
    "string": pack(b'"a"', DATA),
    "null": pack(b"null", b""),
    "NaN": pack(b"NaN", b""),
    "not UTF-8": pack(b'{"\xff": 1}', DATA),
    "BOM": pack(b"\xef\xbb\xbf" + json.dumps(HEADER).encode(), DATA),
    "deep": pack(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, DATA),
    "deep list": pack(b'{"a":' + b"[" * 800 + b"]" * 800 + b"}", DATA),
    "many digits": pack(b'{"a":' + b"9" * 5000 + b"}", DATA),
    "duplicate": pack(duplicated(True), DATA),
    "duplicate, other bytes": pack(duplicated(False), DATA + bytes(128)),
    "overlap": pack(edited(A2, data_offsets=[64, 64 + 192]), DATA),
    "hole": pack({k: v for k, v in HEADER.items() if k != B1}, DATA),
    "reversed offsets": pack(edited(data_offsets=[128, 0]), DATA),
    "negative offsets": pack(edited(data_offsets=[-128, 0]), DATA),
    "offsets past the end": pack(edited(data_offsets=[2**40, 2**40 + 128]), DATA),
    "float offsets": pack(edited(data_offsets=[0.0, 128.0]), DATA),
    "bool offsets": pack(edited(data_offsets=[False, 128]), DATA),
    "three offsets": pack(edited(data_offsets=[0, 64, 128]), DATA),
    "offsets no list": pack(edited(data_offsets="0,128"), DATA),
    "shape overflow": pack(edited(shape=[2**32, 2**32]), DATA),
    "shape 1e9": pack(edited(shape=[10**9, 8]), DATA),
    "negative shape": pack(edited(shape=[-4, -8]), DATA),
    "bool shape": pack(edited(shape=[True, 32]), DATA),
    "float shape": pack(edited(shape=[4.0, 8]), DATA),
    "shape no list": pack(edited(shape=32), DATA),
    "dtype unknown": pack(edited(dtype="F33"), DATA),
    "dtype no text": pack(edited(dtype=["F32"]), DATA),
    "dtype F16": pack(edited(dtype="F16"), DATA),
    "extra field": pack(edited(mode="rw"), DATA),
    "no dtype": pack({**HEADER, A1: {"shape": [4, 8], "data_offsets": [0, 128]}}, DATA),
    "entry no object": pack({**HEADER, A1: 3}, DATA),
    "metadata no object": pack({**HEADER, "__metadata__": 3}, DATA),
    "metadata number": pack({**HEADER, "__metadata__": {"format": 1}}, DATA),
    "digest wrong": pack({**HEADER, "__metadata__": {"fused_lora.sha256": "0" * 64}}, DATA),
    "digest no hex": pack({**HEADER, "__metadata__": {"fused_lora.sha256": "x"}}, DATA),
    "page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "pickle": pickle.dumps({"a": 1}),
    "zeros": bytes(4096),
}


@hostile
@pytest.mark.parametrize("case", WEIGHT_CASES)
@alone
def test_weight_files(tmp_path, case):
    assert refused(write(tmp_path / "a", weights=WEIGHT_CASES[case])).file.endswith("adapter_model.safetensors")


@hostile
@pytest.mark.parametrize("part", range(20))
@alone
def test_truncated_anywhere(tmp_path, part):
    for length in [*range(0, 40), *range(40, len(GOOD), 37), len(GOOD) - 1][part::20]:
        refused(write(tmp_path / "a", weights=GOOD[:length]))


def test_a_header_of_a_million_entries_is_not_parsed(tmp_path):
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    raw = b"{" + b",".join(entry % i for i in range(350_000)) + b"}"
    start = time.process_time()
    json.loads(raw)
    parsing = time.process_time() - start
    assert refused(write(tmp_path / "a", weights=pack(raw, b"")), seconds=parsing / 2).key == "header length"


@pytest.mark.parametrize(
    "entry", [pytest.param(b'{"":0},', marks=pytest.mark.thorough), b"[],"], ids=["objects", "lists"]
)
def test_the_largest_header_takes_less_than_a_gibibyte(tmp_path, entry):
    """The densest JSON in memory: what SECURITY.md promises, held by a limit of a process of its own."""
    raw = b'{"a":[' + entry * ((MAX_HEADER_BYTES - 16) // len(entry)) + b"0]}"
    folder = write(tmp_path / "a", weights=pack(raw, b""))
    program = (
        "import resource, sys\n"
        "from fused_lora.adapters import AdapterError, read_adapter\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * resource.getpagesize() + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "try:\n    read_adapter(sys.argv[1])\n"
        "except AdapterError as error:\n    print('refused', error.key)\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert found.stdout.split() == ["refused", "a"], found.stderr[-2000:]


CONFIG_FILES = {
    "empty": b"",
    "broken": b'{"peft_type": "LORA", ',
    "array": b"[1]",
    "number": b"3",
    "BOM": b"\xef\xbb\xbf" + json.dumps(CONFIG).encode(),
    "not UTF-8": b'{"peft_type": "\xff"}',
    "duplicate r": json.dumps(CONFIG)[:-1].encode() + b', "r": 4}',
    "duplicate inside": json.dumps(CONFIG)[:-1].encode() + b', "rank_pattern": {"a": 1, "a": 2}}',
    "NaN": json.dumps({**CONFIG, "lora_alpha": float("nan")}).encode(),
    "Infinity": json.dumps({**CONFIG, "lora_alpha": float("inf")}).encode(),
    "1e999": json.dumps(CONFIG).replace(": 8,", ": 1e999,").encode(),
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "many digits": b'{"r": ' + b"9" * 5000 + b"}",
    "too large": json.dumps(CONFIG).encode() + b" " * (1 << 20),
    "trailing": json.dumps(CONFIG).encode() + b"{}",
}


@hostile
@pytest.mark.parametrize("case", CONFIG_FILES)
@alone
def test_config_files(tmp_path, case):
    assert refused(write(tmp_path / "a", raw_config=CONFIG_FILES[case])).file.endswith("adapter_config.json")


@hostile
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "device", "link to device", "dangling link", "loop"])
@alone
def test_kinds_of_file(tmp_path, file, kind):
    path = write(tmp_path / "a") / file
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("no permission to make a device")
    elif kind != "missing":
        targets = {"link to device": "/dev/zero", "dangling link": tmp_path / "nowhere", "loop": path}
        path.symlink_to(targets[kind])
    refused(path.parent)


def test_links_to_files_are_followed(tmp_path):
    folder = write(tmp_path / "a")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).rename(tmp_path / f"blob_{file}")
        (folder / file).symlink_to(tmp_path / f"blob_{file}")
    assert sorted(read_adapter(folder).layers) == ["fc1", "fc2"]


def test_pickles_are_not_opened(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(folder, match="adapter_model.bin, a pickle, which is not read")
    assert not (tmp_path / "pwned").exists()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
INSTEAD = {
    "a pointer of Git LFS": (LFS_POINTER, "found a pointer of Git LFS to the file; `git lfs pull`"),
    "an empty file": (b"", "found an empty file .an incomplete download"),
    "a short text": (b"Not f", "found a text, of which the beginning is 'Not f'"),
    "a page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "the beginning is '<!DOCTYPE html>"),
    "half a file": (GOOD[:-40], "expected [0-9]+ bytes of tensors, found [0-9]+ bytes .an incomplete download"),
}


@pytest.mark.parametrize("case", INSTEAD)
def test_what_lies_in_place_of_the_weights_is_said(tmp_path, case):
    content, said = INSTEAD[case]
    refused(write(tmp_path / "a", weights=content), match=said)


def test_what_lies_in_place_of_the_config_is_said(tmp_path):
    refused(write(tmp_path / "a", raw_config=LFS_POINTER), match="adapter_config.json: .*`git lfs pull`")
    mlx = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "model": "some/model"}
    refused(write(tmp_path / "b", raw_config=json.dumps(mlx).encode()), match="no config of PEFT, an adapter of MLX")
    other = {"base_model": "some/model"}
    refused(
        write(tmp_path / "c", raw_config=json.dumps(other).encode()), match="no config of PEFT; it has 'base_model'"
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("adapter_model.bin", "a pickle, which is not read; convert it, in its folder: safetensors.torch.save_file"),
        ("adapters.safetensors", "no such file; the folder has 'adapters.safetensors'"),
        ("README.md", "no such file, nor other weights"),
    ],
)
def test_what_lies_beside_the_config_is_said(tmp_path, name, said):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / name)
    refused(folder, match=said)
    (folder / name).write_bytes(LFS_POINTER)
    refused(folder, match="`git lfs pull`" if name.endswith(".bin") else said)


def test_too_large(tmp_path):
    folder = write(tmp_path / "a")
    with pytest.raises(AdapterError, match="at most 100 bytes"):
        read_adapter(folder, max_bytes=100)


def test_folders(tmp_path):
    refused("some-user/some-adapter", match=r"no such folder; .*snapshot_download\('some-user/some-adapter'\)")
    (tmp_path / "all").mkdir()
    write(tmp_path / "all" / "poet")
    write(tmp_path / "all" / "sql")
    refused(tmp_path / "all", match="found none; it has adapters in 'poet', 'sql'")
    refused(tmp_path / "nowhere", match="no such folder")
    (tmp_path / "file").write_bytes(GOOD)
    refused(tmp_path / "file", match="no such folder")
    with pytest.raises(AdapterError):
        read_adapter(str(tmp_path) + "\0")


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "/abs/evil",
        "a/b",
        "a.b",
        "",
        "..",
        ".",
        "a\nb",
        "a\n",
        "a\0b",
        "a b",
        "é",
        "x" * 65,
        "lora_A.weight",
    ],
)
def test_adapter_names(tmp_path, name):
    model = Net()
    before = state(model)[1]
    with pytest.raises(ValueError, match="adapter_name must be 1 to 64"):
        load_adapter(model, write(tmp_path / "a"), name)
    assert state(model)[1] == before


@pytest.mark.parametrize("limit", [None, "many", 1e9, float("nan"), True], ids=repr)
def test_a_limit_is_an_int(tmp_path, limit):
    with pytest.raises(TypeError, match="max_bytes: expected an int, got"):
        load_adapter(Net(), write(tmp_path / "a"), max_bytes=limit)


@pytest.mark.parametrize("name", [3, b"a", ["a"]])
def test_adapter_name_types(tmp_path, name):
    with pytest.raises(TypeError, match="adapter_name"):
        load_adapter(Net(), write(tmp_path / "a"), name)


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda: bytearray(256 << 20), "MemoryError"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended with -9"),
        (lambda: pytest.fail("so it is"), "so it is"),
    ],
    ids=["memory", "crash", "failure"],
)
def test_a_process_of_its_own_tells_what_went_wrong(harm, said):
    with pytest.raises(AssertionError, match=said):
        alone(harm)()
    alone(lambda: None)()
