"""On a GPU: captured graphs with fresh masks, streams, threads, compute-sanitizer, what a broken kernel leads to."""

import os
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from fused_lora import reference
from fused_lora.kernels import config, descriptors, sync
from fused_lora.ops import guard
from fused_lora.ops.linear import eager as cpu
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear import plan
from fused_lora.ops.linear.op import lora_linear
from fused_lora.testing.graphs import capture
from fused_lora.testing.layers import LayerCase

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def layer(M, K=1024, N=2048, r=16, device="cuda"):
    """x, weight, A and B with gradients, and the gradient of y."""
    case = LayerCase.make(M, N, K, [r], [0.0], BF16, bias=False, device=device)
    return (*(t.requires_grad_() for t in (case.x, case.lora_A[0], case.lora_B[0])), case.weight, case.g)


def step(x, A, B, W, g, p, seeds=None):
    y = lora_linear(x, W, None, [A], [B], [2.0], [p], seeds)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), g)]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("M", [1, 40, 2048])
def test_a_graph_reads_its_seed_at_every_replay(M):
    tensors, seeds = layer(M), torch.tensor([11], device="cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is dropped.*")
        graph, results = capture(lambda: step(*tensors, 0.5, seeds))
    masks = []
    for seed in (11, -5, 2**62 + 1, 11):
        seeds.fill_(seed)
        graph.replay()
        replayed = [t.clone() for t in results]
        assert equal(replayed, step(*tensors, 0.5, seeds)), seed
        masks.append(replayed[0])
    assert torch.equal(masks[0], masks[3]) and not torch.equal(masks[0], masks[1])


def test_a_graph_draws_fresh_masks_by_itself():
    tensors = layer(512)
    graph, results = capture(lambda: step(*tensors, 0.5))
    seen = []
    for _ in range(4):
        graph.replay()
        seen.append(results[0].clone())
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_graphs_replay_beside_each_other_and_beside_eager_work():
    """Each captured launch has counters of its own: three replays in flight and eager launches do not meet."""
    cases = [layer(2048), layer(2048), layer(40)]
    expected = [step(*tensors, 0.0) for tensors in cases]
    graphs = [capture(lambda tensors=tensors: step(*tensors, 0.0)) for tensors in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        assert equal(step(*cases[0], 0.0), expected[0])
    torch.cuda.synchronize()
    for (_, results), true in zip(graphs, expected, strict=True):
        assert equal(results, true)


def test_streams_do_not_disturb_each_other():
    cases = [layer(M) for M in (2048, 2048, 40, 600)]
    seeds = [torch.tensor([i], device="cuda") for i in range(4)]
    expected = [step(*tensors, 0.25, seed) for tensors, seed in zip(cases, seeds, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, tensors, seed in zip(streams, cases, seeds, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(*tensors, 0.25, seed))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert equal(results, expected[i % 4]), i
    assert all(not held.any() for held in sync._of_stream.values())


def test_threads_do_not_disturb_each_other():
    """Four threads, first uses included, on the default stream and on streams of their own."""
    cases = [layer(M, K=1040) for M in (2050, 2050, 41, 601)]
    failures = []

    def work(number):
        try:
            tensors, seed = cases[number], torch.tensor([number], device="cuda")
            stream = torch.cuda.Stream() if number % 2 else torch.cuda.default_stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                first = step(*tensors, 0.25, seed)
                for _ in range(20):
                    if not equal(step(*tensors, 0.25, seed), first):
                        failures.append((number, "differs"))
        except Exception as error:
            failures.append((number, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("M", [40, 2048])
def test_inductors_graphs_hold_the_first_use(M, p, monkeypatch):
    """Its warm-up allocates from a private pool and raises if anything stays there: counters and trials must not."""
    monkeypatch.setattr(sync, "_free", {})
    monkeypatch.setattr(sync, "_of_stream", {})
    monkeypatch.setattr(guard, "_state", {})
    x, A, B, W, g = layer(M)
    seeds = torch.tensor([11], device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(lambda x, seeds: lora_linear(x, W, None, [A], [B], [2.0], [p], seeds),
                             mode="reduce-overhead", fullgraph=True)  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(is dropped|eager path).*")
        for number in range(5):  # warm-up, recording, replays
            torch.compiler.cudagraph_mark_step_begin()
            seeds.fill_(number)
            y = compiled(x, seeds)
            found = [y.detach().clone(), *(t.clone() for t in torch.autograd.grad(y, (x, A, B), g))]
            assert equal(found, step(x, A, B, W, g, p, seeds)), number
    assert sync._of_stream and all(guard._state.values())


def test_the_callers_triton_allocator_is_restored(monkeypatch):
    """Tensor descriptors need memory from Triton's allocator: ours for the launch, the caller's before and after."""
    import triton
    from triton.runtime import _allocation

    def allocate(size, alignment, stream):
        raise AssertionError("the caller's allocator was used")

    held = _allocation._allocator
    before = held.get() if hasattr(held, "get") else held
    triton.set_allocator(allocate)
    try:
        step(*layer(2048), 0.1)
        held = _allocation._allocator
        assert (held.get() if hasattr(held, "get") else held) is allocate
        assert descriptors._allocate(64, 128, None).is_cuda
    finally:
        triton.set_allocator(before)


def _broken(chosen, product):
    return plan.Plan(chosen.variant, product, chosen.shrink, chosen.weight_grad)


@pytest.mark.parametrize("failure", ["does not fit the chip", "computes something else"])
def test_a_broken_configuration_is_dropped(failure, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(guard, "_state", {})
    case = LayerCase.make(40, 256, 256, [16], [0.0], BF16, device="cuda")
    expected = cpu.lora_linear(case.x, case.weight, case.bias, *case.adapters)
    if failure == "does not fit the chip":
        original = plan.plan
        monkeypatch.setattr(plan, "plan", lambda *a: _broken(c := original(*a), replace(c.product, num_stages=64)))
    else:
        original = kernel.lora_linear

        def off(chosen, *arguments):
            run = original(chosen, *arguments)
            return lambda *args: tuple(t * 1.05 for t in run(*args))

        monkeypatch.setattr(kernel, "lora_linear", off)
    arguments = case.x, case.weight, case.bias, case.lora_A, case.lora_B
    with pytest.warns(UserWarning, match="is dropped, the eager path takes over") as caught:
        y, _ = plan.forward(*arguments, case.scaling, case.dropout)(*arguments, case.seeds)
    assert len(caught) == 1 and torch.equal(y, expected[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = plan.forward(*arguments, case.scaling, case.dropout)(*arguments, case.seeds)
    assert torch.equal(again, y)


def test_the_mask_of_a_kernel_is_the_exported_one():
    """With W = 0 and one rank of ones, S is the row sum of what was kept."""
    M, K = 513, 4096
    x = torch.ones(M, K, dtype=BF16, device="cuda")
    A, B = torch.ones(1, K, dtype=BF16, device="cuda"), torch.ones(64, 1, dtype=BF16, device="cuda")
    seeds = torch.tensor([123456789], device="cuda")
    W = torch.zeros(64, K, dtype=BF16, device="cuda")
    _, S = plan.forward(x, W, None, [A], [B], [1.0], [0.5])(x, W, None, [A], [B], seeds)
    keep = reference.dropout_mask(123456789, (M, K), 0.5).to("cuda")
    assert torch.equal(S[:, 0], 2.0 * keep.sum(1).float())


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]
    command += [sys.executable, "-m", "fused_lora.testing.smoke"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]


def test_the_plan_knows_this_chip():
    device = torch.device("cuda")
    found = config.capability(device)
    assert found >= 10 and config.processors(device) > 0
    chosen = plan.plan("linear", 8192, 4096, 4096, 16, BF16, True, False, 1, found)
    assert chosen.variant == ("split" if found == 90 else "library" if found >= 80 else "eager")
