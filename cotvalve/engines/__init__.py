"""Engines: requests in, completions out, one protocol.

    transformers   own decoding loop on a transformers model: slots that refill, one alpha per row, CUDA graphs
    vllm           vLLM with the dial in its workers: its pages hold more long chains than slots do; several GPUs
    generate       plain `model.generate`, batch by batch: any architecture, slower; the reference in tests

With several GPUs `replicas` deals the requests of any but vLLM out among copies of it.

A new engine is one file with a class that has `generate`, and one line in `pick`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Protocol

from cotvalve.errors import SettingError, unknown
from cotvalve.types import Completion, Progress, Request, silent

if TYPE_CHECKING:
    from cotvalve.valve import Valve

NAMES = ("auto", "transformers", "vllm", "generate")
WORTH_VLLM = 10_000_000
"""New tokens asked for at most, from which `auto` waits for vLLM to start."""
FEW_SLOTS = 128
"""Chains at once below which a GPU's steps are mostly waiting: long chains of a large model, which vLLM packs better."""
PROMPT = 512
"""Tokens of a prompt, before any was seen."""


class Engine(Protocol):
    """Samples chains."""

    name: str

    def generate(self, requests: Iterable[Request], progress: Progress = silent) -> Iterator[Completion]:
        """Yields one completion per request as it finishes, in any order.

        A request that cannot be run (longer than the model's context) is a completion with finish 'error'
        and a reason. Rows of different alpha share batches where the valve can do that.
        """
        ...

    def facts(self) -> dict[str, str]:
        """What a run has to say about its engine."""
        ...


def pick(name: str, valve: "Valve", batch: int | None = None, *, work: int = 0, longest: int = 0, gpus: int = 1) -> Engine:
    """The engine called `name` on `valve`; 'auto' takes the fastest one that supports the model.

    `batch` is the number of rows decoded at once; None sizes it from the memory. `work` is the number of new tokens
    that will be asked for at most, `longest` that of one chain: 'auto' starts vLLM, where it is installed and there is
    a GPU, for WORTH_VLLM tokens of chains so long that fewer than FEW_SLOTS of them fit the memory, or of a model that
    our slots do not take. `gpus` share each layer in vLLM; elsewhere each holds a copy of the model and some of the requests.
    """
    from cotvalve.engines.generate import GenerateEngine, folds_rows
    from cotvalve.engines.transformers import TransformersEngine, unsupported

    if name not in NAMES:
        raise SettingError(unknown("engine", name, NAMES))
    large = name == "auto" and work >= WORTH_VLLM and valve.model.device.type == "cuda"
    if gpus > 1 and name != "vllm":
        return _copied(pick(name, valve, batch), valve, batch, gpus)
    slower = large and (unsupported(valve.model) or TransformersEngine(valve).slots_that_fit(longest + PROMPT) < FEW_SLOTS)
    if name == "vllm" or slower:
        from cotvalve.engines import vllm_support

        if name == "vllm" or not (vllm_support.missing() or vllm_support.unsupported(valve)):
            from cotvalve.engines.vllm import Options, VllmEngine

            return VllmEngine(valve, options=Options(batch=batch, tensor_parallel=gpus))
    if name == "generate" or (name == "auto" and (unsupported(valve.model) or folds_rows(valve))):
        return GenerateEngine(valve, batch=batch)
    return TransformersEngine(valve, batch=batch)


def _copied(engine: Engine, valve: "Valve", batch: int | None, gpus: int) -> Engine:
    import torch

    from cotvalve.engines.replicas import Replicas

    own = valve.model.device
    there = torch.cuda.device_count() if own.type == "cuda" else 0
    if gpus > there:
        raise SettingError(f"gpus is {gpus}, but this machine shows {there or 'none'}; set CUDA_VISIBLE_DEVICES, or gpus to {max(1, there)}")
    others = [f"cuda:{i}" for i in range(there) if i != (own.index or 0)]
    return Replicas(valve, engine, others[: gpus - 1], batch)


def own_seed(seed: int, name: object) -> int:
    """The seed of one chain of many, by what it is called: chains of the next seed are others, not these moved by one."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest(), "big") >> 1


def _numbers(alpha: float | Iterable[float] | None) -> list[float]:
    """`alpha` as a list, 0 where it is None; a single number of numpy or torch is one as well, though it is no float."""
    import torch

    try:
        found = [0.0] if alpha is None else torch.as_tensor(list(alpha) if isinstance(alpha, Iterator) else alpha, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise SettingError(f"alpha is {alpha!r}; expected a number or a list of numbers") from None
    # As the model computes with it: 1e39 is infinite in fp32.
    if bad := [number for number in found if not torch.tensor(number, dtype=torch.float32).isfinite()]:
        raise SettingError(f"alpha {bad[0]} is not a finite number")
    return found


def ask(
    valve: "Valve", questions: Sequence[str], alpha: float | Iterable[float] | None, *, prompt: str, budget: int | None,
    max_new_tokens: int, temperature: float, top_p: float, seed: int,
) -> list[Completion]:  # fmt: skip
    """Every question at every alpha, all in one batch; questions outermost, alphas innermost. SettingError for numbers out of range."""
    alphas = _numbers(alpha)
    if max_new_tokens < 1 or seed < 0:
        raise SettingError(f"max_new_tokens has to be 1 or more, seed 0 or more (given: {max_new_tokens}, {seed})")
    if not 0 <= temperature < float("inf") or not 0 <= top_p <= 1:
        raise SettingError(f"temperature has to be 0 or more, top_p between 0 and 1 (given: {temperature}, {top_p})")
    from cotvalve import prompts

    way = prompts.prompt(prompt)
    if budget is not None and (budget < 1 or not way.budgets):
        raise SettingError(f"budget is {budget} with the prompt '{prompt}'; it has to be 1 or more, with a prompt that names one")
    texts = [prompts.render(valve.tokenizer, question, way, budget) for question in questions]
    requests = [
        Request(f"{i:09d}", text, position, max_new_tokens, temperature, top_p, own_seed(seed, i))
        for i, (text, position) in enumerate(product(texts, alphas))
    ]
    return sorted(pick("auto", valve).generate(requests), key=lambda completion: completion.id)
