r"""CoT-Valve on one page: theta + alpha * delta, one alpha per row, learned, sampled and learned again.
    python examples/one_page.py            # some minutes on a CPU
    python examples/one_page.py --quick    # a minute: the same with less data

The embedded reasoner (4.5 M parameters) answers word problems with long chains. The script trains a LoRA on the
brief solutions (eq. 2), samples chains at several alphas and keeps the right ones (MixChain-C), gives each its
beta (eq. 4), trains a new LoRA on all of them (eq. 3, CoT-Valve++), another from the long ones to the short ones
(CoT-Valve+P), and prints tokens, accuracy and ACU (eq. 5) of the three along alpha. Last, the direction that needs no
training: theta2 - theta1 of two checkpoints. Nothing of the package is used but the models' folders and the problems.

Left out, and where the package has it:
- alpha per token, packed rows; NaN in the LoRA; refusing merged adapters                                valve.py
- theta2 - theta1 of checkpoints larger than the memory, or as a LoRA of low rank        taskvector.py, extraction.py
- the authors' data, resuming; chains kept on disk, counts of what was dropped      recipes.py, train.py, mixchain.py
- slots that refill, CUDA graphs, seeds per chain; answers other than numbers               engines/, grading.py
- 95 % intervals, paired tests, baselines, a report; alpha chosen on held-out questions          sweep.py, calibrate.py
"""

import argparse
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import cotvalve
from cotvalve.problems import arithmetic
from cotvalve.types import Problem

TINY = Path(cotvalve.__path__[0]) / "assets" / "tiny"
INSTRUCT, REASONER = TINY / "instruct", TINY / "reasoner"  # theta1 answers briefly, theta2 was made from it
Alphas = tuple[float, ...]
ALPHAS: Alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
STAGES = 3  # of CoT-Valve+P
BATCH = 80  # chains sampled at once
Example = tuple[Problem, str, float]  # problem, chain, the alpha it is learned at
Sample = tuple[Problem, float, str, int]  # problem, alpha, chain, tokens
Kept = list[Sample]  # the right chains of one question, longest first


class Valve:
    """A frozen model with a LoRA of its own, and the alpha of each row of the next batch."""

    def __init__(self, folder: Path = REASONER) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: PeftModel = get_peft_model(base, config)  # B starts at zero: delta is zero until it is trained
        self.alpha_B = torch.zeros(1)
        hooked = 0
        for name, module in self.model.named_modules():
            if name.endswith("lora_B.default"):
                module.register_forward_hook(self._turn)
                hooked += 1
        assert hooked, "no LoRA layer was found: the dial would be dead, and nothing would say so"

    def _turn(self, _module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        # The whole trick: W x + alpha * (lora_alpha / r) * B A x, with one alpha per row of the batch.
        return out * self.alpha_B[:, None, None]


@contextmanager
def moved(theta1: nn.Module, theta2: nn.Module, alpha: float) -> Iterator[None]:
    """theta1 + alpha * (theta2 - theta1) while inside. The stored theta1 is copied back: subtracting again would drift."""
    stored = {name: weight.detach().clone() for name, weight in theta1.named_parameters()}
    goal = dict(theta2.named_parameters())
    with torch.no_grad():
        for name, weight in theta1.named_parameters():
            weight.add_(goal[name] - weight, alpha=alpha)
        try:
            yield
        finally:
            for name, weight in theta1.named_parameters():
                weight.copy_(stored[name])


def easy(split: arithmetic.Split, steps: int, seed: int) -> list[Problem]:
    """Problems of so few steps, whose chains are short enough for a CPU, in an order that the seed decides."""
    found = [problem for problem in arithmetic.load(split) if (problem.solution or "").count("=") <= steps]
    Random(seed).shuffle(found)
    return found


def prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    turn = [{"role": "user", "content": problem.question}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def brief(problem: Problem) -> str:
    """The human-short chain, in the form in which the reasoner itself writes."""
    return f"<think>\n{problem.solution}\n</think>\n\nThe answer is \\boxed{{{problem.answer}}}."


def train(valve: Valve, tokenizer: PreTrainedTokenizerBase, examples: list[Example], seed: int) -> float:
    """Cross-entropy of the chain's own tokens at theta + alpha * delta; returns the last step's loss.

    With alpha 1 everywhere this is eq. 2 (and a stage of +P); with alpha = beta of each chain, eq. 3.
    """
    rows: list[tuple[list[int], int, float]] = []
    for problem, chain, alpha in examples:
        asked = tokenizer(prompt(tokenizer, problem), add_special_tokens=False)["input_ids"]
        told = tokenizer(chain + "<|im_end|>", add_special_tokens=False)["input_ids"]
        rows.append((asked + told, len(asked), alpha))
    learned = [p for p in valve.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.01)
    loss = torch.zeros(())
    order = Random(seed)
    for _ in range(3):
        order.shuffle(rows)
        for at in range(0, len(rows), 8):
            batch = rows[at : at + 8]
            width = max(len(ids) for ids, _, _ in batch)
            ids_B_T = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in batch])
            # A token is learned where it is the chain's: not the prompt's, not padding.
            labels_B_T = torch.tensor(
                [[-100] * asked + ids[asked:] + [-100] * (width - len(ids)) for ids, asked, _ in batch]
            )
            valve.alpha_B = torch.tensor([alpha for _, _, alpha in batch])
            logits = valve.model(input_ids=ids_B_T).logits  # causal: padding on the right needs no mask
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels_B_T[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
    return loss.item()


@torch.inference_mode()
def sample(valve: Valve, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], alphas: Alphas) -> list[Sample]:
    """One chain for every problem at every alpha, at temperature 1: a greedy one shows only the likeliest style."""
    todo = [(problem, alpha) for alpha in alphas for problem in problems]  # one batch holds several alphas
    done: list[Sample] = []
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "cache_implementation": "static"}
    for at in range(0, len(todo), BATCH):
        batch = todo[at : at + BATCH]
        texts = [prompt(tokenizer, problem) for problem, _ in batch]
        asked = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        valve.alpha_B = torch.tensor([alpha for _, alpha in batch])
        out = valve.model.generate(**asked, max_new_tokens=400, eos_token_id=end, pad_token_id=0, **how)
        for (problem, alpha), ids in zip(batch, out[:, asked["input_ids"].shape[1] :].tolist(), strict=True):
            tokens = ids.index(end) + 1 if end in ids else len(ids)  # generated ids, never words
            done.append((problem, alpha, tokenizer.decode(ids[: tokens - (end in ids)]), tokens))
    return done


def right(problem: Problem, chain: str) -> bool:
    """Graded on the last box; a chain without one (truncated, lost) is wrong and stays in the denominator."""
    boxes = re.findall(r"\\boxed\{(-?\d+)\}", chain)
    return bool(boxes) and int(boxes[-1]) == int(problem.answer)


def beta(tokens: int, shortest: int, longest: int) -> float:
    """Eq. 4, over the chains of one question: its longest is learned at 0, its shortest at 1."""
    return 1 - (tokens - shortest) / (longest - shortest)


def mixchain(samples: list[Sample]) -> list[Kept]:
    """MixChain-C: questions with right chains of several lengths. One length has no beta: eq. 4 is 0/0."""
    found: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        if right(sample[0], sample[2]):
            found.setdefault(sample[0].id, {})[sample[2]] = sample
    mix = [sorted(chains.values(), key=lambda sample: -sample[3]) for chains in found.values()]
    return [kept for kept in mix if kept[0][3] > kept[-1][3]]


def at_beta(mix: list[Kept]) -> list[Example]:
    """Eq. 3: every chain at its own beta. At beta 0 there is no gradient: the longest of a question is left out."""
    examples = [(p, chain, beta(tokens, kept[-1][3], kept[0][3])) for kept in mix for p, _, chain, tokens in kept]
    return [example for example in examples if example[2] > 0]


def stages(mix: list[Kept]) -> list[list[Example]]:
    """CoT-Valve+P: a stage is one chain of every question, by rank from its longest to its shortest, at alpha 1."""
    ranks = [[kept[round(k * (len(kept) - 1) / (STAGES - 1))] for kept in mix] for k in range(STAGES)]
    return [[(problem, chain, 1.0) for problem, _, chain, _ in stage] for stage in ranks]


def curve(name: str, valve: Valve, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> None:
    billions = sum(p.numel() for n, p in valve.model.named_parameters() if "lora_" not in n) / 1e9
    torch.manual_seed(0)  # the same random numbers for each system: at alpha 0 all are the base, chain by chain
    chains = sample(valve, tokenizer, problems, ALPHAS)
    for alpha in ALPHAS:
        here = [(problem, chain, tokens) for problem, at, chain, tokens in chains if at == alpha]
        accuracy = 100 * sum(right(problem, chain) for problem, chain, _ in here) / len(here)
        tokens = sum(tokens for _, _, tokens in here) / len(here)
        acu = 100 * accuracy / (billions * tokens)  # eq. 5
        print(f"{name:12} {alpha:5.2f} {accuracy:10.1f} {tokens:6.1f} {acu:10.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="CoT-Valve on one page.")
    parser.add_argument("--quick", action="store_true", help="less data: seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    how = parser.parse_args()
    learn, mix, test = (64, 8, 6) if how.quick else (96, 64, 40)
    torch.manual_seed(how.seed)
    logging.disable_progress_bar()
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(REASONER, padding_side="left")
    problems, unseen = (easy(split, 2 if how.quick else 3, how.seed) for split in ("train", "test"))

    valve = Valve()
    loss = train(valve, tokenizer, [(p, brief(p), 1.0) for p in problems[:learn]], how.seed)
    print(f"CoT-Valve: {learn} brief chains at alpha 1, loss {loss:.3f}")
    chains = sample(valve, tokenizer, problems[learn : learn + mix], ALPHAS)
    mixed = mixchain(chains)
    examples = at_beta(mixed)
    kept = sum(right(problem, chain) for problem, _, chain, _ in chains)
    print(f"MixChain-C: {kept} of {len(chains)} chains are right, {len(examples)} have a beta above 0")
    plus = Valve()  # a new LoRA on the reasoner, as eq. 3 reads
    loss = train(plus, tokenizer, examples, how.seed)
    print(f"CoT-Valve++: {len(examples)} chains at their beta, loss {loss:.3f}")
    progressive = Valve()  # one LoRA through all stages; the optimizer starts anew at each
    for number, stage in enumerate(stages(mixed)):
        loss = train(progressive, tokenizer, stage, how.seed + number)
    print(f"CoT-Valve+P: {STAGES} stages of {len(mixed)} chains at alpha 1, loss {loss:.3f}")

    print(f"\n{test} test questions, temperature 1\n{'':12} alpha accuracy % tokens        ACU")
    curve("CoT-Valve", valve, tokenizer, unseen[:test])
    curve("CoT-Valve++", plus, tokenizer, unseen[:test])
    curve("CoT-Valve+P", progressive, tokenizer, unseen[:test])

    pair, longer = Valve(INSTRUCT), Valve(REASONER)  # their LoRAs stay zero: here the weights themselves move
    for alpha in (0.0, 0.75):  # one alpha for the whole batch; larger is longer
        with moved(pair.model, longer.model, alpha):
            lengths = [tokens for *_, tokens in sample(pair, tokenizer, unseen[:test], (0.0,))]
        print(f"theta1 + {alpha:.2f} * (theta2 - theta1): {sum(lengths) / test:.1f} tokens")
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
