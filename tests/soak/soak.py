"""A long run of the server with random clients, loads and reloads, and one kill -9; everything is checked.

    python tests/soak/soak.py [--minutes M | --requests N]      (make soak MINUTES=30)

``fused-lora serve`` knows 200 adapters and has room for 16. Clients ask for texts, whole or streamed. Some hang up,
before the first token or in the middle. Others load new weights under a name in use, unload a name, or ask for what is
wrong. After a quarter of the run the server is killed and started again. What must hold:

answers  Every text is the greedy one of its adapter merged alone, of a version that the name had while the request ran.
         Wrong requests have their own error, others none.
memory   After the restart the server's anonymous memory does not grow with the requests (``helpers.soak.Growth``).
         This is judged once every adapter has been asked for: its first read leaves bytes for good.
metrics  At the end nothing runs, waits or is held. Sequences started = finished + failed + cancelled. The server has
         counted the answers that the clients had, by status, and at most those besides that were hung up on. After
         SIGTERM it ends with 0, and no log has an error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import httpx  # noqa: E402
import torch  # noqa: E402
from report import RESULTS, Report, Table, commit  # noqa: E402

from helpers import serving  # noqa: E402
from helpers.server import Server  # noqa: E402
from helpers.soak import Growth, Texts  # noqa: E402
from helpers.waiting import HANG, wait_for  # noqa: E402

ROUTE, LOAD, UNLOAD = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
RANKS = (2, 4, 8)
VARIANTS = 12  # other weights that a name may get
MOST_TOKENS = 16
PROMPTS = ("The", "List the users", "Write a verse about the sea", "SELECT name FROM users WHERE", "x" * 70)
PROMPTS += ("one two three " * 28,)  # more tokens than a step takes
SAMPLE_SECONDS = 0.25
# how often clients do what; the methods of Clients
ACTS = {"whole": 40, "streamed": 20, "several": 6, "hangs_up_early": 8, "hangs_up_late": 8, "reload": 9}
ACTS |= {"unload_and_load": 3, "malformed": 6}
# what is wrong, and the status that it has; evil's values are finite and its terms are not
WRONG = [
    (ROUTE, {"model": "nobody", "prompt": "x"}, 404),
    (ROUTE, {"model": "torn", "prompt": "x"}, 422),
    (ROUTE, {"model": "evil", "prompt": "x"}, 422),
    (LOAD, {"lora_name": "evil", "lora_path": "evil", "load_inplace": True}, 200),
    (ROUTE, {"model": "base", "prompt": "x", "max_tokens": 0}, 400),
    (ROUTE, {"model": "base", "prompt": "x" * 3000}, 400),
    (LOAD, {"lora_name": "new", "lora_path": "../tiny"}, 400),
    (LOAD, {"lora_name": "a0", "lora_path": "torn", "load_inplace": True}, 400),
    (UNLOAD, {"lora_name": "nobody"}, 404),
]


@dataclass
class Name:
    """What a name means: [folder, or None for no adapter; from when; until when]."""

    own: Path
    meanings: list[list[Any]] = field(default_factory=list)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def during(self, start: float) -> set[Path | None]:
        """What it can have meant between ``start`` and now."""
        now = time.monotonic()
        return {folder for folder, since, until in self.meanings if since <= now and until >= start}

    @contextlib.asynccontextmanager
    async def becoming(self, folder: Path | None) -> AsyncIterator[None]:
        """From the start of this on it may mean ``folder``, and from the end on nothing else."""
        old = list(self.meanings)
        self.meanings.append([folder, time.monotonic(), math.inf])
        yield
        now = time.monotonic()
        for meaning in old:
            meaning[2] = min(meaning[2], now)


class World:
    """The files, the server of the moment, and what its clients have seen."""

    def __init__(self, root: Path, arguments: argparse.Namespace):
        self.root, self.arguments = root, arguments
        self.tiny, self.adapters = serving.write_tiny_llama(root / "tiny"), root / "adapters"
        self.texts = Texts(self.tiny, MOST_TOKENS)
        for i in range(arguments.adapters):
            self._write(f"a{i}", RANKS[i % len(RANKS)], i)
        # two folders below, where the server takes no names from
        self.variants = [self._write(f"of/variants/v{i}", RANKS[i % len(RANKS)], 10_000 + i) for i in range(VARIANTS)]
        self.torn = self._write("torn", max(RANKS), 20_000) / "adapter_model.safetensors"
        serving.write_overflowing_adapter(self.adapters / "evil", self.texts.model, "v_proj")
        self.room = arguments.room * self.torn.stat().st_size
        self.lives = 0
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self.asked = self.lost = 0

    def _write(self, name: str, r: int, seed: int) -> Path:
        return serving.write_adapter(self.adapters / name, self.texts.model, r, seed)

    def start(self) -> None:
        """Start a server, to which names mean their own folders."""
        self.lives += 1
        options = f"--served-model-name base --allow-load --capacity {self.room}".split()
        self.server = Server(self.tiny, self.adapters, self.root / f"log{self.lives}", *options).wait()
        self.torn.write_bytes(self.torn.read_bytes()[:1000])
        names = [f"a{i}" for i in range(self.arguments.adapters)]
        self.names = {n: Name(self.adapters / n, [[self.adapters / n, 0.0, math.inf]]) for n in names}
        self.alive = True
        self.answers: Counter[tuple[str, int]] = Counter()
        self.hung_up = self.tokens = 0
        self.samples: list[tuple[float, float]] = []

    def kill(self) -> None:
        """kill -9, whatever runs."""
        self.alive = False
        self.server.stop()

    def memory(self) -> int:
        """Bytes of anonymous memory of the server's process."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024

    async def sample(self) -> None:
        """Note requests and memory, until it is cancelled."""
        while True:
            self.samples.append((self.asked, self.memory()))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def run(self) -> None:
        """Serve a quarter of the run, kill, start again and serve the rest."""
        begin, arguments = time.monotonic(), self.arguments
        for share in (0.25, 1.0):
            self.start()
            requests = math.inf if arguments.requests is None else arguments.requests * share
            until = math.inf if arguments.requests is not None else begin + arguments.minutes * 60 * share
            sampling = asyncio.create_task(self.sample())
            numbers = [f"{arguments.seed} {self.lives} {i}" for i in range(arguments.clients)]
            draws = [random.Random(number) for number in numbers]
            clients = [asyncio.create_task(Client(self, draw).work(requests, until)) for draw in draws]
            if share < 1:
                await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
                self.kill()  # while the others ask
            await asyncio.gather(*clients)
            sampling.cancel()

    def page(self) -> dict[str, float]:
        """The metrics, once nothing runs any more."""
        gauges = ("requests_running", "requests_waiting", "adapters_in_use")
        wait_for(lambda: not any(map(self.server.metric, gauges)), 0.1)
        text = self.server.http.get("/metrics").text
        return {key: float(value) for key, value in re.findall(r"^fused_lora_(\S+) (\S+)$", text, re.MULTILINE)}

    def inconsistent(self, page: dict[str, float]) -> list[str]:
        """What the metrics say that cannot be."""
        ended = sum(value for key, value in page.items() if key.startswith("sequences_ended_total"))
        found = [f"failed_steps_total: {page['failed_steps_total']}"] if page["failed_steps_total"] else []
        if page["non_finite_requests_total"] > self.answers[ROUTE, 422]:
            found.append(f"{page['non_finite_requests_total']} requests were not finite")
        for key in ("sequences_started_total", "request_seconds_count"):
            if page[key] != ended:
                found.append(f"{key} {page[key]}, and {ended} ended")
        if page["adapter_bytes_used"] > self.room or page["adapters_known"] != len(self.names) + 2:  # torn and evil
            found.append(f"{page['adapter_bytes_used']} bytes used, {page['adapters_known']} adapters known")
        if page["generation_tokens_total"] < self.tokens:
            found.append(f"{page['generation_tokens_total']} tokens, of which the clients had {self.tokens}")
        extra = 0
        for key, value in page.items():
            if match := re.fullmatch(r'requests_total\{route="(/v1/.*)",status="(\d+)"\}', key):
                more = value - self.answers.pop((match[1], int(match[2])), 0)
                extra += more
                if more < 0:
                    found.append(f"{key}: {value}, and the clients had {-more} more")
        if extra > self.hung_up or +self.answers:
            found.append(f"{extra} answers that nobody had, {self.hung_up} hung up; not counted: {self.answers}")
        return found

    def stop(self) -> list[str]:
        """SIGTERM, and what is wrong with how it ends or with the logs."""
        self.server.process.terminate()
        found = [f"it ended with {code}"] if (code := self.server.process.wait(HANG)) else []
        for log in self.root.glob("log*"):
            lines = log.read_text(encoding="utf-8").splitlines()
            found += [
                line for line in lines if re.search(r"\bERROR\b|Traceback", line) and "adapter 'evil@" not in line
            ]
        return found


class Client:
    """One client, which does one thing after the other."""

    def __init__(self, world: World, draw: random.Random):
        self.world, self.draw = world, draw

    async def work(self, requests: float, until: float) -> None:
        """Until so many requests have been put by all clients, or that time, or the kill."""
        world = self.world
        async with httpx.AsyncClient(base_url=world.server.url, timeout=HANG) as self.http:
            while world.alive and world.asked < requests and time.monotonic() < until:
                world.asked += 1
                (act,) = self.draw.choices(list(ACTS), list(ACTS.values()))
                try:
                    await getattr(self, act)()
                    world.done[act] += 1
                except (httpx.TransportError, AssertionError) as error:
                    if world.alive or isinstance(error, AssertionError):
                        world.wrong.append(f"{act}: {error!r}")
                    else:
                        world.lost += 1

    async def post(self, route: str, body: dict[str, Any]) -> httpx.Response:
        """Put a request and count its answer."""
        answer = await self.http.post(route, json=body)
        self.world.answers[route, answer.status_code] += 1
        return answer

    def question(self) -> tuple[str, str, int]:
        """(name, prompt, tokens), half of the time one of few names."""
        names = ["base", *self.world.names]
        name = self.draw.choice(self.draw.choice((names, names[:12])))
        return name, self.draw.choice(PROMPTS), self.draw.randint(1, MOST_TOKENS)

    async def judge(self, name: str, prompt: str, count: int, said: str, start: float, whole: bool = True) -> None:
        """AssertionError unless the text is right for what the name meant since ``start``."""
        folders = self.world.names[name].during(start) if name in self.world.names else {None}
        if name != "base":
            folders = folders - {None}
        for folder in folders:
            if await asyncio.to_thread(self.world.texts.is_answer, folder, prompt, count, said, whole):
                return
        raise AssertionError(f"{name}, {prompt!r}, {count} tokens, {folders}: {said!r}")

    def may_fail(self, name: str, start: float, error: dict[str, Any]) -> bool:
        """Whether an error is what a change of the name means for requests that ran meanwhile."""
        meant = self.world.names[name].during(start) if name in self.world.names else ()
        return {"model_not_found": None in meant, "adapter_changed": len(meant) > 1}.get(error["code"], False)

    async def whole(self, hurry: float | None = None) -> None:
        """A text in one piece; ``hurry``: hang up after so many seconds."""
        name, prompt, count = self.question()
        start = time.monotonic()
        asking = self.post(ROUTE, dict(model=name, prompt=prompt, max_tokens=count, temperature=0))
        try:
            answer = await asyncio.wait_for(asking, hurry)
        except asyncio.TimeoutError:
            self.world.hung_up += 1
            return
        if answer.status_code != 200:
            assert self.may_fail(name, start, answer.json()["error"]), f"{name}: {answer.text}"
            return
        (choice,), usage = answer.json()["choices"], answer.json()["usage"]
        assert choice["finish_reason"] == "length" and usage["completion_tokens"] == count, answer.text
        self.world.tokens += count
        await self.judge(name, prompt, count, choice["text"], start)

    async def hangs_up_early(self) -> None:
        """Mostly before there is a token."""
        await self.whole(hurry=self.draw.uniform(0, 0.2))

    async def streamed(self, most: float = math.inf) -> None:
        """A text in pieces, of which ``most`` are read."""
        name, prompt, count = self.question()
        start, said, pieces, ended = time.monotonic(), "", 0, False
        body = dict(model=name, prompt=prompt, max_tokens=count, temperature=0, stream=True)
        async with self.http.stream("POST", ROUTE, json=body) as answer:
            self.world.answers[ROUTE, answer.status_code] += 1
            if answer.status_code != 200:
                error = json.loads(await answer.aread())["error"]
                assert self.may_fail(name, start, error), f"{name}: {error}"
                return
            async for line in answer.aiter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if "error" in event:
                    assert self.may_fail(name, start, event["error"]), f"{name}: {event}"
                    return
                said += "".join(choice["text"] for choice in event.get("choices", ()))
                ended = ended or line == "data: [DONE]"
                pieces += bool(event)
                if pieces >= most:
                    break
        assert ended or most < math.inf, f"{name}: a stream without an end, {said!r}"
        await self.judge(name, prompt, count, said, start, whole=ended)

    async def hangs_up_late(self) -> None:
        """After one to three pieces."""
        await self.streamed(most=self.draw.randint(1, 3))

    async def several(self) -> None:
        """Several prompts and choices in one request."""
        name, _, count = self.question()
        prompts, n, start = self.draw.sample(PROMPTS, 2), self.draw.randint(1, 2), time.monotonic()
        answer = await self.post(ROUTE, dict(model=name, prompt=prompts, n=n, max_tokens=count, temperature=0))
        if answer.status_code != 200:
            assert self.may_fail(name, start, answer.json()["error"]), f"{name}: {answer.text}"
            return
        for choice in answer.json()["choices"]:
            await self.judge(name, prompts[choice["index"] // n], count, choice["text"], start)

    async def reload(self) -> None:
        """Other weights, or its own, under a name that may be in use."""
        name = self.draw.choice(list(self.world.names)[:12] if self.draw.random() < 0.5 else list(self.world.names))
        known = self.world.names[name]
        async with known.changing:
            await self.load(name, self.draw.choice([known.own, *self.world.variants]))

    async def load(self, name: str, folder: Path) -> None:
        """Load a folder in place."""
        path = str(folder.relative_to(self.world.adapters))
        async with self.world.names[name].becoming(folder):
            answer = await self.post(LOAD, dict(lora_name=name, lora_path=path, load_inplace=True))
            assert answer.status_code == 200, f"{name}: {answer.text}"

    async def unload_and_load(self) -> None:
        """Away for a moment."""
        name = self.draw.choice(list(self.world.names))
        known = self.world.names[name]
        async with known.changing:
            async with known.becoming(None):
                answer = await self.post(UNLOAD, dict(lora_name=name))
                assert answer.status_code == 200, f"{name}: {answer.text}"
            await asyncio.sleep(self.draw.uniform(0, 0.2))
            await self.load(name, known.own)

    async def malformed(self) -> None:
        """What is wrong has its status."""
        route, body, status = self.draw.choice(WRONG)
        answer = await self.post(route, body)
        assert answer.status_code == status, f"{body}: {answer.text}"


def report(world: World, seconds: float, arguments: argparse.Namespace) -> int:
    """Check the end, print the table, write the result; the exit status."""
    page = world.page()
    problems = world.wrong + world.inconsistent(page) + world.stop()
    growth, asked = Growth.of(world.samples), world.samples[-1][0] - world.samples[0][0]
    # half of the requests draw from all names; n log n draws find each of n
    judged = asked > 2 * len(world.names) * math.log(len(world.names))
    options = ("adapters", "room", "clients", "minutes", "requests", "seed")
    settings = {name: getattr(arguments, name) for name in options}
    found = Report("soak", torch.device("cpu"), arguments.out, settings, arguments.commit)
    found.heading()
    row: dict[str, Any] = dict(
        benchmark="soak", provider="fused_lora", correct=not problems and not (judged and growth.is_leak)
    )
    row |= dict(seconds=round(seconds, 1), requests=world.asked, by_kind=dict(world.done), lost_by_the_kill=world.lost)
    row |= dict(wrong=len(problems), first_wrong=problems[:3], memory_mib=[round(m / 2**20, 1) for m in _ends(world)])
    row |= dict(bytes_per_request=round(growth.slope), standard_error=round(growth.error), limit=growth.LIMIT)
    points = world.samples[:: max(len(world.samples) // 20, 1)]
    row |= dict(memory_curve=[[requests, round(memory / 2**20, 2)] for requests, memory in points])
    row |= dict(memory_judged=judged, requests_since_the_restart=asked)
    counts = ("sequences_started_total", "generation_tokens_total", "steps_total", "failed_requests_total")
    counts += ("adapter_loads_total", "adapter_evictions_total", "adapter_hits_total", "adapter_waits_total")
    row |= {"since_the_restart": {name: page[name] for name in counts}}
    found.rows.append(row)
    table = Table([("of the run", 40), ("", 24)])
    for name, value in row.items():
        for key, one in value.items() if isinstance(value, dict) else [(name, value)]:
            table.row(key, one if isinstance(one, str) else json.dumps(one)[:72])
    return found.finish()


def _ends(world: World) -> tuple[float, float]:
    """Memory after the warm-up, and at the end."""
    return world.samples[len(world.samples) // 3][1], world.samples[-1][1]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=30.0)
    options.add_argument("--requests", type=int, help="so many instead of minutes")
    options.add_argument("--adapters", type=int, default=200)
    options.add_argument("--room", type=int, default=16, help="adapters of the largest rank that fit on the device")
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = options.parse_args()
    arguments.commit = commit()  # of what runs, whatever is changed meanwhile
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), arguments)
        start = time.monotonic()
        try:
            asyncio.run(world.run())
            return report(world, time.monotonic() - start, arguments)
        except BaseException:
            print((world.root / f"log{world.lives}").read_text(encoding="utf-8")[-3000:], file=sys.stderr)
            raise
        finally:
            world.server.stop()


if __name__ == "__main__":
    sys.exit(main())
