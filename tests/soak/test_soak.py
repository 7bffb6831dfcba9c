"""A bounded run of tests/soak/soak.py, and that its judges see what is wrong; ``make soak`` has the long run."""

import asyncio
import importlib.util
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import serving
from helpers.seeds import shifted
from helpers.soak import Growth, Texts
from helpers.waiting import HANG

serving.need_engine("openai", "httpx", "fastapi", "uvicorn", "prometheus_client")
if not Path("/proc/self/status").exists():
    pytest.skip("memory of another process is read from /proc", allow_module_level=True)

SCRIPT = Path(__file__).with_name("soak.py")


@pytest.fixture(scope="module")
def soak():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("soak_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look there
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(texts, two folders of adapters)."""
    root = tmp_path_factory.mktemp("soak")
    texts = Texts(serving.write_tiny_llama(root / "tiny"), 8)
    return texts, [serving.write_adapter(root / name, texts.model, 4, seed=i) for i, name in enumerate("ab")]


def said(texts, folder, count):
    return texts.tokenizer.decode(texts._tokens(folder, "The")[:count], skip_special_tokens=True)


@pytest.mark.thorough
def test_a_short_run(tmp_path):
    command = [sys.executable, str(SCRIPT), *"--requests 120 --adapters 60 --room 10".split()]
    command += ["--seed", str(shifted(0)), "--out", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    (result,) = tmp_path.glob("*-soak.json")
    (row,) = json.loads(result.read_text())["rows"]
    assert row["correct"] and row["wrong"] == 0 and row["requests"] >= 120
    assert row["requests"] == sum(row["by_kind"].values()) + row["lost_by_the_kill"]
    assert row["since_the_restart"]["adapter_evictions_total"] > 0


def memory(bytes_per_request, seed, requests=3000):
    """Samples of a process with a warm-up of 40 MB, waves of 200 kB and noise."""
    draw = random.Random(shifted(seed))
    for number in range(0, requests, 2):
        warm = 4e7 * (1 - math.exp(-number / (requests / 20)))
        wave = 2e5 * math.sin(number / 40) + draw.gauss(0, 1e5)
        yield number, 3e8 + warm + wave + bytes_per_request * number


@pytest.mark.parametrize("seed", range(5))
def test_growth_is_told_from_warm_up_and_noise(seed):
    assert not Growth.of(list(memory(0, seed))).is_leak
    leak = Growth.of(list(memory(2048, seed)))
    assert leak.is_leak and abs(leak.slope - 2048) < 5 * leak.error
    with pytest.raises(ValueError, match="expected at least 10 after the warm-up"):
        Growth.of(list(memory(0, seed, 20)))


def test_texts_of_others_are_wrong(world):
    texts, (a, b) = world
    assert said(texts, a, 8) != said(texts, b, 8) != said(texts, None, 8)
    assert texts.is_answer(a, "The", 8, said(texts, a, 8)) and texts.is_answer(None, "The", 8, said(texts, None, 8))
    assert texts.is_answer(a, "The", 8, said(texts, a, 2), whole=False)
    for folder, text in ((b, said(texts, a, 8)), (None, said(texts, a, 8)), (a, said(texts, a, 7))):
        assert not texts.is_answer(folder, "The", 8, text)


def test_a_text_belongs_to_a_version_of_its_time(soak, world):
    texts, (a, b) = world
    name = soak.Name(a, [[a, 0.0, math.inf]])
    client = soak.Client(SimpleNamespace(names={"n": name}, texts=texts), random.Random(shifted(0)))

    async def right(folder, since):
        try:
            await client.judge("n", "The", 8, said(texts, folder, 8), since)
        except AssertionError:
            return False
        return True

    async def story():
        begin = soak.time.monotonic()
        assert await right(a, begin) and not await right(b, begin)
        async with name.becoming(b):
            assert await right(a, begin) and await right(b, begin)
        assert await right(a, begin) and await right(b, begin)
        after = math.nextafter(soak.time.monotonic(), math.inf)
        assert not await right(a, after) and await right(b, after)
        assert client.may_fail("n", begin, {"code": "adapter_changed"})
        assert not client.may_fail("n", after, {"code": "adapter_changed"})
        assert not client.may_fail("n", begin, {"code": "model_not_found"})
        async with name.becoming(None):
            assert client.may_fail("n", after, {"code": "model_not_found"})

    asyncio.run(story())


def test_metrics_that_cannot_be_are_named(soak):
    page = dict(failed_steps_total=0, non_finite_requests_total=0, sequences_started_total=5, request_seconds_count=5)
    page |= {
        f'sequences_ended_total{{outcome="{o}"}}': n for o, n in (("finished", 3), ("failed", 1), ("cancelled", 1))
    }
    page |= dict(adapter_bytes_used=10, adapters_known=3, generation_tokens_total=9)
    page |= {'requests_total{route="/v1/completions",status="200"}': 4}

    def found(answers=3, hung_up=1, **changes):
        seen = Counter({("/v1/completions", 200): answers})
        world = SimpleNamespace(room=10, names={"a": None}, tokens=9, answers=seen, hung_up=hung_up)
        return soak.World.inconsistent(world, {**page, **changes})

    assert found() == [] and found(4, 0) == []
    wrong = [found(hung_up=0), found(5), found(failed_steps_total=1), found(sequences_started_total=6)]
    wrong += [found(adapter_bytes_used=11), found(adapters_known=2), found(generation_tokens_total=8)]
    wrong += [found(request_seconds_count=4), found(non_finite_requests_total=1)]
    assert all(len(problems) == 1 for problems in wrong)
