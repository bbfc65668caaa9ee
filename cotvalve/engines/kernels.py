"""Where our kernels can run, and what it looks like when they cannot."""

from __future__ import annotations

from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import nn


def available(model: nn.Module) -> bool:
    """Whether kernels can run for `model`: 16 bits on an NVIDIA card, with Triton (it comes with torch)."""
    weight = next(model.parameters())
    return weight.is_cuda and torch.version.cuda is not None and weight.dtype in (torch.bfloat16, torch.float16) and find_spec("triton") is not None


def failures() -> tuple[type[Exception], ...]:
    """What a compiler of kernels raises on a machine it does not know."""
    known: tuple[type[Exception], ...] = (RuntimeError, OSError, SubprocessError)
    if find_spec("triton") is None:
        return known
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    return (*known, TritonError)
