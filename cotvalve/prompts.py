"""The only place that knows chat templates: question -> prompt text, chain -> training text, and back.

A prompt is rendered once, as text, through the tokenizer's own chat template; engines add no special
tokens. A training text is what the model itself would have written after that prompt, its end-of-turn mark
included, so that a chain sampled by the model and trained on again is token for token the same.
Templates that rewrite earlier assistant turns (many drop the thinking block) are never used for targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from cotvalve.errors import DataError, SettingError, unknown
from cotvalve.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A way to ask. `{question}` and `{budget}` are filled in."""

    user: str
    system: str | None = None
    """None leaves the chat template's own system prompt."""
    budgets: bool = False
    """True when `{budget}` (a number of tokens) has to be given."""


PROMPTS: dict[str, Prompt] = {
    "boxed": Prompt("{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."),
    "plain": Prompt("{question}"),
    # PAPER appendix A.1, the prompt-based control of Han et al. (2024) as the paper words it for QwQ...
    "budget": Prompt(
        "Generate the solution in less than {budget} tokens. {question}\n"
        "Please reason step by step, and put your final answer within \\boxed{{}}.",
        budgets=True,
    ),
    # ... for QwQ with its system prompt, to the letter...
    "budget-qwq": Prompt(
        "Generate the solution in less than {budget} tokens. {question}",
        "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step.",
        budgets=True,
    ),
    # ... and for LLaMA-3.2-1B-Instruct.
    "budget-llama": Prompt(
        "Given the following problem, reason and give a final answer to the problem using less than {budget} tokens. "
        "{question}",
        "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2025",
        budgets=True,
    ),
    # Ding et al. (2024), Break the Chain, as later papers quote it; the paper does not say which wording it used.
    "shortcut": Prompt(
        "{question}\nRapidly evaluate and use the most effective reasoning shortcut to answer the question. "
        "Put your final answer within \\boxed{{}}."
    ),
}
"""Ways to ask by name. `boxed` is the default everywhere; the others are the paper's baselines."""


def prompt(name: str) -> Prompt:
    """The prompt called `name`; SettingError with the nearest name when there is none."""
    if name not in PROMPTS:
        raise SettingError(unknown("prompt", name, PROMPTS))
    return PROMPTS[name]


def _check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template (a base model?); give --chat-template plain, or a "
            ".jinja file, or another model that has one (chat_template= in Python)"
        )


def render(tokenizer: "PreTrainedTokenizerBase", question: str, how: Prompt, budget: int | None = None) -> str:
    """The whole prompt as text, ready to be continued by the model."""
    if how.budgets and budget is None:
        raise SettingError("this prompt needs a token budget; give budget=")
    messages = [{"role": "user", "content": how.user.format(question=question.strip(), budget=budget)}]
    if how.system is not None:
        messages.insert(0, {"role": "system", "content": how.system})
    return render_messages(tokenizer, messages)


def render_messages(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation (role, content) as text, ready for the model's next turn; nothing is added to its words.

    Raises SettingError for an order of roles that the chat template refuses.
    """
    _check_template(tokenizer)
    return _templated(tokenizer, messages, add_generation_prompt=True)


def _templated(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        raise SettingError(f"the model's chat template refuses these messages: {error}") from None


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The mark a model writes to end its turn, read off the chat template ('<|im_end|>', '<|eot_id|>', ...)."""
    _check_template(tokenizer)
    eos = tokenizer.eos_token
    return _end_of_turn(tokenizer, str(tokenizer.chat_template), None if eos is None else str(eos))


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", _template: str, eos: str | None) -> str:
    # The template is there for the cache: a tokenizer may be given another one.
    mark = "cotvalve-end-of-turn-probe"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": mark}]
    # A template that leaves the model's turns out has no end of them.
    _, found, after = _templated(tokenizer, turns, add_generation_prompt=False).rpartition(mark)
    after = after if found else ""
    for token in [*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values())]:
        if token and after.lstrip().startswith(token):
            return token
    if eos is None:
        raise DataError(f"{tokenizer.name_or_path}: no end-of-turn mark in the chat template and no eos token")
    return eos


def stop_ids(tokenizer: "PreTrainedTokenizerBase", eos: int | Sequence[int] | None) -> list[int]:
    """Ids that end a chain: the generation config's `eos` and the chat template's end of turn."""
    known = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    end = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
    return sorted({*known, *([end] if isinstance(end, int) else [])})


def thinks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True when the model writes a thinking block: its chat template or vocabulary knows the end mark.

    Models that have the mark but do not use it exist; the settings' `thinking` field overrides this.
    """
    vocabulary = tokenizer.get_vocab()
    return END_THINK in vocabulary and END_THINK in str(tokenizer.chat_template or "")


def end_think_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id of the end-of-thinking mark, or None for a tokenizer without one."""
    found = tokenizer.get_vocab().get(END_THINK)
    return None if found is None else int(found)


def chain_from_solution(problem: Problem, thinking: bool) -> str:
    """A human-written solution as the model would have written it: the short chain of eq. 2.

    Raises DataError for a problem without a solution.
    """
    if not problem.solution:
        raise DataError(f"{problem.id}: has no human-written solution to train on; use chains sampled by `mix`")
    solution = problem.solution.strip()
    answer = f"The answer is \\boxed{{{problem.answer}}}."
    if thinking:
        return f"{THINK}\n{solution}\n{END_THINK}\n\n{answer}"
    # MATH solutions already end in a box; a second one would teach the model to say its answer twice.
    return solution if "\\boxed" in solution else f"{solution}\n{answer}"


def target(tokenizer: "PreTrainedTokenizerBase", rendered: str, chain: str, ended: bool = True) -> str:
    """The text to learn after the prompt `rendered`: the chain and, if it `ended`, the end-of-turn mark.

    Where the chat template's generation prompt already opened the thinking block, the chain's own opening
    is dropped, as the model would not have written it.
    """
    text = chain.strip()
    if rendered.rstrip().endswith(THINK) and text.startswith(THINK):
        text = text.removeprefix(THINK).lstrip("\n") if rendered.endswith("\n") else text.removeprefix(THINK)
    return text + end_of_turn(tokenizer) if ended else text
