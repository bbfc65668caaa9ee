"""Question to prompt, chain to training text: the only place that knows chat templates."""

import pytest
from transformers import PreTrainedTokenizerFast

from cotvalve import Valve, checkpoints
from cotvalve.batches import IGNORED, encode
from cotvalve.errors import DataError, SettingError
from cotvalve.problems import arithmetic
from cotvalve.prompts import (
    PROMPTS,
    chain_from_solution,
    end_of_turn,
    end_think_id,
    prompt,
    render,
    stop_ids,
    target,
    thinks,
)
from cotvalve.recipes import Example, Stage
from cotvalve.types import Chain, Problem
from tests import models

LLAMA = (
    "{{ '<|bos|>' }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# As R1's: the generation prompt opens the thinking block, and earlier answers lose theirs.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


def tokenizer(template: str | None = None, extra: list[str] | None = None) -> PreTrainedTokenizerFast:
    made = models.tokenizer(extra or [])
    if template is not None:
        made.chat_template = template
    return made


# Asking


def test_the_default_prompt_token_by_token() -> None:
    """The wording is part of the method: a trained direction was trained on exactly this."""
    assert render(tokenizer(), "  2+2?\n", prompt("boxed")) == (
        "<|im_start|>user\n2+2?\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("name", "asked", "system"),
    [
        ("plain", "Q", None),
        ("budget", "Generate the solution in less than 50 tokens. Q\nPlease reason step by step, and put your final answer within "
         "\\boxed{}.", None),
        ("budget-qwq", "Generate the solution in less than 50 tokens. Q",
         "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."),
        ("budget-llama", "Given the following problem, reason and give a final answer to the problem using less than 50 tokens. Q",
         "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2025"),
    ],
)  # fmt: skip
def test_the_papers_prompts_to_the_letter(name: str, asked: str, system: str | None) -> None:
    """Appendix A.1."""
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    assert render(tokenizer(), "Q", prompt(name), 50) == f"{before}<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", PROMPTS)
def test_braces_and_percent_signs_in_a_question_are_its_own(name: str) -> None:
    question = "Let f{x} = {budget} 100% {question} \\frac{1}{2} {0} {}"
    assert question in render(tokenizer(), question, prompt(name), 50)


def test_a_budget_has_to_be_given_where_the_prompt_asks_for_one() -> None:
    with pytest.raises(SettingError, match="needs a token budget"):
        render(tokenizer(), "Q", prompt("budget"))
    with pytest.raises(SettingError, match="unknown prompt 'budgt': did you mean 'budget"):
        prompt("budgt")


def test_a_base_model_without_a_chat_template_is_refused() -> None:
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render(bare, "Q", prompt("plain"))


# The end of a turn


@pytest.mark.parametrize(
    ("template", "extra", "mark"),
    [
        (None, [], "<|im_end|>"),
        (LLAMA, ["<|eot_id|>", "<|start|>", "<|end|>", "<|bos|>"], "<|eot_id|>"),
        (LLAMA.replace("<|eot_id|>", "\n<|eot_id|>"), ["<|eot_id|>", "<|start|>", "<|end|>", "<|bos|>"], "<|eot_id|>"),
        (R1, ["<|User|>", "<|Assistant|>", "<|eos|>", "</think>"], "<|eos|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", [], "<|im_end|>"),  # no mark: the eos token
        # The model's turns are left out: the mark that begins the user's turn was taken for their end.
        ("<|im_start|>{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", [], "<|im_end|>"),
    ],
    ids=["ChatML", "Llama", "on a line of its own", "R1", "none", "user only"],
)
def test_the_end_of_a_turn_is_read_off_the_template(template: str | None, extra: list[str], mark: str) -> None:
    made = tokenizer(template, extra)
    assert end_of_turn(made) == mark
    one = made.convert_tokens_to_ids(mark)
    assert stop_ids(made, None) == [one]
    assert stop_ids(made, 256) == sorted({256, one})
    assert stop_ids(made, [256, one]) == sorted({256, one})


def test_another_template_has_another_end() -> None:
    """It was remembered by tokenizer: stop ids and targets stayed those of the template that was there before."""
    made = tokenizer(None, ["<|eot_id|>", "<|start|>", "<|end|>", "<|bos|>"])
    assert end_of_turn(made) == "<|im_end|>"
    made.chat_template = LLAMA
    assert end_of_turn(made) == "<|eot_id|>"


def test_a_template_that_cannot_be_filled_in_is_told_in_a_line() -> None:
    """Engines ask for the end of a turn before a question is rendered: they ended with Jinja's traceback."""
    for template in ("{% for m in messages", "{{ raise_exception('no') }}"):
        made = tokenizer(template)
        with pytest.raises(SettingError, match="the model's chat template refuses these messages"):
            end_of_turn(made)


def test_no_end_at_all_is_an_error() -> None:
    made = tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    made.eos_token = None
    with pytest.raises(DataError, match="no end-of-turn mark"):
        end_of_turn(made)


# Chains


def test_a_solution_becomes_the_chain_the_model_would_write() -> None:
    plain = Problem("p", "2+2?", "4", solution="  2 + 2 = 4.\n")
    assert chain_from_solution(plain, thinking=False) == "2 + 2 = 4.\nThe answer is \\boxed{4}."
    assert chain_from_solution(plain, thinking=True) == "<think>\n2 + 2 = 4.\n</think>\n\nThe answer is \\boxed{4}."
    boxed = Problem("p", "2+2?", "4", solution="So \\boxed{4}.")
    assert chain_from_solution(boxed, thinking=False) == "So \\boxed{4}.", "MATH's solutions already hold their answer"
    with pytest.raises(DataError, match="p7: has no human-written solution"):
        chain_from_solution(Problem("p7", "?", "4"), thinking=False)


def test_a_target_is_the_chain_and_its_end() -> None:
    made = tokenizer()
    assert target(made, render(made, "Q", prompt("plain")), "\n 4 \n") == "4<|im_end|>"
    assert target(made, "Q", "4", ended=False) == "4", "a chain that was cut has no end"
    assert target(made, "...", "<think>\na\n</think>\n\n4") == "<think>\na\n</think>\n\n4<|im_end|>"


def test_a_thinking_block_that_the_prompt_opened_is_not_opened_twice() -> None:
    made = tokenizer(R1, ["<|User|>", "<|Assistant|>", "<|eos|>", "</think>"])
    asked = render(made, "Q", prompt("plain"))
    assert asked == "<|User|>Q<|Assistant|><think>\n"
    assert target(made, asked, "<think>\na\n</think>\n\n4") == "a\n</think>\n\n4<|eos|>"
    assert target(made, asked, "a\n</think>\n\n4") == "a\n</think>\n\n4<|eos|>", "as it was sampled after that prompt"
    assert target(made, asked.rstrip("\n"), "<think>\na\n</think>\n\n4") == "\na\n</think>\n\n4<|eos|>"


def test_who_thinks() -> None:
    assert thinks(tokenizer(R1, ["</think>"]))
    assert not thinks(tokenizer(None, ["</think>"])), "in the vocabulary, but not in the template"
    assert not thinks(tokenizer())
    assert end_think_id(tokenizer()) is None
    assert end_think_id(tokenizer(None, ["</think>"])) == 260
    assert thinks(checkpoints.load_tokenizer("tiny-reasoner"))


def test_a_sampled_chain_trained_on_again_is_token_for_token_the_same() -> None:
    """The embedded reasoner's own tokenizer and template, which drops the thinking block of earlier turns."""
    valve = Valve.load("tiny-reasoner", device="cpu")
    problem = arithmetic.generate(4, 1, "validation")[0]
    asked = render(valve.tokenizer, problem.question, prompt("boxed"))
    ids = valve.tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = valve.model.generate(ids, max_new_tokens=700, do_sample=False)[0].tolist()
    (chain,) = valve.generate(problem.question, max_new_tokens=700)
    assert chain.finish == "stop"
    example = Example(problem, Chain(chain.text, chain.tokens), 1.0)
    rows, too_long = encode(Stage("s", (example,)), valve.tokenizer, "boxed", 2000)
    assert too_long == 0
    assert rows[0]["input_ids"] == out
    assert sum(label != IGNORED for label in rows[0]["labels"]) == chain.tokens
