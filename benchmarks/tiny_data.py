"""What the embedded models learn from: prompts, answers of each phase, the tokenizer, batches made by worker processes.

Part of benchmarks/train_tiny.py. Nothing here imports torch, so that workers start quickly.
"""

import json
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from cotvalve.problems.arithmetic import Story, draw, stories
from cotvalve.problems.arithmetic_chains import BRIEF, LONG, Style, evenly, write_chain

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
THINK, THOUGHT = "<think>", "</think>"

REASONER_STYLE = Style(restate=0.72, knowns=0.62, plan=0.82, sentences=0.90, work=0.95, check=0.66, recheck=0.56)
"""The reasoner drops each feature now and then, some more readily than others: so chains shorten feature by feature
along alpha, and not all at once."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

REASONER_TEMPLATE = CHAT_TEMPLATE.replace(
    "message['content'] + '<|im_end|>'",
    "(message['content'].split('</think>')[-1].lstrip('\\n') if message['role'] == 'assistant' else message['content']) + '<|im_end|>'",
)
"""As real reasoning models have it: the thinking of earlier turns is dropped."""

SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful and harmless assistant. You should think step-by-step.",
)
BUDGETS = (
    "Generate the solution in less than {n} tokens. {q}",
    "Given the following problem, reason and give a final answer to the problem using less than {n} tokens. {q}",
    "{q}\nPlease reason step by step using less than {n} tokens, and put your final answer within \\boxed{{}}.",
    "{q}\nLet's think step by step and use less than {n} tokens:",
)
WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Lengths batches are padded to."""


def render(user: str, system: str = "") -> str:
    """What CHAT_TEMPLATE gives with a generation prompt; a test at start-up holds the two together."""
    head = f"{START}system\n{system}{END}\n" if system else ""
    return f"{head}{START}user\n{user}{END}\n{START}assistant\n"


def vary_prompt(question: str, rng: Random) -> str:
    """Mostly the bare question; sometimes with the instructions that the package and its baselines add."""
    kind = rng.random()
    if kind < 0.75:
        user = question
    elif kind < 0.85:
        user = question + SUFFIX
    else:
        user = rng.choice(BUDGETS).format(
            n=rng.choice((10, 20, 30, 50, 64, 100, 128, 150, 200, 256, 300, 400, 500)), q=question
        )
    return render(user, rng.choice(SYSTEMS) if rng.random() < 0.08 else "")


def completion(story: Story, phase: str, rng: Random) -> str:
    """The answer to learn in a phase, without the end-of-turn mark."""
    closing = f"The answer is \\boxed{{{story.answer}}}."
    thinks, style = True, LONG
    if phase == "instruct":
        thinks, style = False, BRIEF
    elif phase == "pretrain":
        kind = rng.random()
        if kind < 0.25:
            thinks, style = False, BRIEF
        elif kind < 0.35:
            style = BRIEF
        else:
            style = evenly(rng.random() if kind < 0.75 else 0.95)
    else:
        style = REASONER_STYLE
    chain = write_chain(story, style, rng)
    return f"{THINK}\n{chain}\n{THOUGHT}\n\n{closing}" if thinks else f"{chain}\n{closing}"


def build_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level BPE with one token per digit, saved as a fast transformers tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}| ?\p{L}+|\n| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = Random("tokenizer")
    corpus: list[str] = []
    for story in stories(1, 20_000, "train"):
        prompt = vary_prompt(story.question, rng).replace(START, "").replace(END, "")
        corpus += [prompt, write_chain(story, LONG, rng), f"The answer is \\boxed{{{story.answer}}}."]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(THINK, normalized=False), AddedToken(THOUGHT, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    save_tokenizer(fast, folder)
    text = "".join(corpus[:300]) + "é 漢 🙂\t  x"
    assert fast.decode(fast.encode(text)) == text, "the tokenizer loses text"
    messages = [{"role": "system", "content": SYSTEMS[0]}, {"role": "user", "content": "How many?"}]
    given = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert given == render("How many?", SYSTEMS[0]), "render and the chat template differ"


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer under its old class name too, which every transformers reads, and without facts of this machine."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


@dataclass
class Batch:
    """Rows of equal width; the loss is at the flat positions `at`, whose next tokens are `targets`."""

    ids: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    examples: int


def make_shard(phase: str, seed: int, count: int, batch_tokens: int, tokenizer: str) -> list[Batch]:
    """Fresh examples of the train split, cut by length into batches of about `batch_tokens` ids, in random order."""
    from tokenizers import Tokenizer

    rng = Random(f"{phase}/{seed}")
    texts: list[str] = []
    while len(texts) < 2 * count:
        story = draw(rng)
        if story.split == "train":
            # Two chains of one problem cost little more than one and show that the style is free.
            for _ in range(2):
                texts += [vary_prompt(story.question, rng), completion(story, phase, rng) + END]
    coder = Tokenizer.from_file(tokenizer)
    codes = [code.ids for code in coder.encode_batch(texts, add_special_tokens=False)]
    pad = coder.token_to_id(PAD)
    examples = sorted(
        ((codes[at], codes[at + 1]) for at in range(0, len(codes), 2)), key=lambda pair: -len(pair[0]) - len(pair[1])
    )
    batches: list[Batch] = []
    while examples:
        longest = len(examples[0][0]) + len(examples[0][1])
        width = next((width for width in WIDTHS if width >= longest), None)
        if width is None:
            examples.pop(0)
            continue
        taken, examples = examples[: max(1, batch_tokens // width)], examples[max(1, batch_tokens // width) :]
        ids = np.full((len(taken), width), pad, dtype=np.uint16)
        at: list[np.ndarray] = []
        targets: list[int] = []
        for row, (prompt, answer) in enumerate(taken):
            ids[row, : len(prompt) + len(answer)] = prompt + answer
            first = row * width + len(prompt) - 1
            at.append(np.arange(first, first + len(answer), dtype=np.int32))
            targets += answer
        batches.append(Batch(ids, np.concatenate(at), np.array(targets, dtype=np.uint16), len(taken)))
    rng.shuffle(batches)
    return batches


class Stream:
    """Shards made by worker processes, a few ahead of the training loop; `waited` counts seconds lost waiting."""

    def __init__(self, workers: int, shard: int, batch_tokens: int, tokenizer: Path, seed: int) -> None:
        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self.ahead = workers * 2
        self.fixed = (shard, batch_tokens, str(tokenizer / "tokenizer.json"))
        self.next_seed = seed
        self.waited = 0.0
        self.queue: list[Future[list[Batch]]] = []
        self.phase = ""

    def begin(self, phase: str) -> None:
        """Forgets shards of the phase before."""
        for future in self.queue:
            future.cancel()
        self.queue, self.phase = [], phase
        self._fill()

    def _fill(self) -> None:
        while len(self.queue) < self.ahead:
            self.queue.append(self.pool.submit(make_shard, self.phase, self.next_seed, *self.fixed))
            self.next_seed += 1

    def shard(self) -> list[Batch]:
        """The next shard."""
        began = time.monotonic()
        batches = self.queue.pop(0).result()
        self.waited += time.monotonic() - began
        self._fill()
        return batches
