"""Where kernels can run, what they read, how long they take, as a graph, two at once, and what it looks like when they cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import Tensor, nn

from cotvalve.inlets import Beside


def available(model: nn.Module) -> bool:
    """Whether kernels can run for `model`: 16 bits on an NVIDIA card, with Triton (it comes with torch)."""
    weight = next(model.parameters())
    return weight.is_cuda and torch.version.cuda is not None and weight.dtype in (torch.bfloat16, torch.float16) and find_spec("triton") is not None


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: kernels and graphs are for the current one, wherever their tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power(number: int) -> int:
    """The least power of two from 16 on that holds `number`: what a side of a matrix product has to be in a kernel."""
    return max(16, 1 << (number - 1).bit_length()) if number else 16


def by_rows(y: Tensor) -> Tensor:
    """y [..., W] as [rows, W] whose rows may lie apart, as those cut from a wider product do."""
    return (y if y.stride(-1) == 1 else y.contiguous()).view(-1, y.shape[-1])


def turns(alpha: Tensor | None, like: Tensor, rows: int) -> tuple[Tensor, int, bool]:
    """alpha as kernels read it, how many rows share one, and whether it is still to be multiplied in."""
    return (like, 1, False) if alpha is None else (flat := alpha.reshape(-1).contiguous(), rows // flat.numel(), True)


def seconds(work: Callable[[], object], times: int = 8) -> float:
    """Of one call of `work`, as a graph replays it: without what the processor takes to start kernels. The best of five.

    Infinite for tiles that the card has no room for: a wide one may hold a direction of rank 16 and not one of rank 256.
    """
    try:
        work()  # compiles
    except _refusals():
        return math.inf
    graph, found = torch.cuda.CUDAGraph(), list[float]()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / times / 1e3)
    return min(found)


@cache
def _capturing(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all graphs: libraries keep working memory for each stream


def captured(work: Callable[[], object], last: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """Does `work` once and captures it as a graph, which does nothing more; both while the card is still at what came before.

    `torch.cuda.graph` waits for the card first and gives its unused memory back, which the next prompts ask for again. What
    lies between two steps shares the memory of the `last` graph, so nothing of it may be wanted when this one is replayed.
    """
    free, idle = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free < idle:
        torch.cuda.empty_cache()
    graph, stream, before = torch.cuda.CUDAGraph(), _capturing(torch.cuda.current_device()), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        work()
        graph.capture_begin(pool=None if last is None else last.pool())
        try:
            work()
        finally:
            graph.capture_end()
    before.wait_stream(stream)
    return graph


def beside(stream: torch.cuda.Stream, here: Callable[[], Tensor], there: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The results of both: `there` runs on `stream`, while the current one does `here`; what follows waits for both.

    Each fork waits for all that was begun before it, so memory of a result that is let go is safe to be used again.
    """
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        two = there()
    one = here()
    current.wait_stream(stream)
    return one, two


def aside(device: torch.device | None) -> Beside:
    """`beside` on a stream of its own."""
    return partial(beside, torch.cuda.Stream(device))


def failures() -> tuple[type[Exception], ...]:
    """What a compiler of kernels raises on a machine it does not know."""
    return (RuntimeError, OSError, SubprocessError, *_refusals())


def _refusals() -> tuple[type[Exception], ...]:
    """What it raises of a kernel that the machine cannot hold."""
    if find_spec("triton") is None:
        return ()
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    return (TritonError,)
