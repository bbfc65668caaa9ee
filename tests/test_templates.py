"""Base models have no chat template: what is said, what can be given instead, and that the whole way works with it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cotvalve import pipeline, prompts, templates
from cotvalve.checkpoints import load_tokenizer
from cotvalve.errors import DataError, SettingError
from cotvalve.records import read_json
from cotvalve.settings import ModelSettings
from cotvalve.valve import Valve
from tests import models

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny random llama as base models are published: no chat template."""
    folder = tmp_path / "base"
    models.llama().save_pretrained(folder)
    bare = models.tokenizer()
    bare.chat_template = None
    bare.save_pretrained(folder)
    assert load_tokenizer(folder).chat_template is None
    return folder


def test_plain_is_words_and_the_end_of_text() -> None:
    tokenizer = models.tokenizer()
    templates.put(tokenizer, "plain")
    rendered = prompts.render(tokenizer, "1+1?", prompts.prompt("plain"))
    assert rendered == "Question: 1+1?\nAnswer:\n"
    system = prompts.render(tokenizer, "1+1?", prompts.Prompt("{question}", "Be brief."))
    assert system == "Be brief.\n\nQuestion: 1+1?\nAnswer:\n"
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3?"}]
    assert prompts.render_messages(tokenizer, turns) == "Question: 1?\nAnswer:\n2<|im_end|>\n\nQuestion: 3?\nAnswer:\n"
    assert prompts.end_of_turn(tokenizer) == tokenizer.eos_token == "<|im_end|>"
    assert prompts.target(tokenizer, rendered, "2") == "2<|im_end|>"
    assert not prompts.thinks(tokenizer)


def test_a_text_begins_where_the_model_s_own_would() -> None:
    tokenizer = models.tokenizer(("<s>",))
    tokenizer.bos_token = "<s>"
    templates.put(tokenizer, "plain")
    assert prompts.render(tokenizer, "1?", prompts.prompt("plain")).startswith("<s>Question: 1?")


def test_a_file_or_another_model_s(tmp_path: Path, base: Path) -> None:
    models.save(models.llama(), tmp_path / "instruct")
    more = models.tokenizer(("<|unused|>",))  # a token that the template does not write may be missing here
    more.save_pretrained(tmp_path / "instruct")
    (tmp_path / "mine.jinja").write_text(models.TEMPLATE)
    for source in (tmp_path / "instruct", tmp_path / "mine.jinja"):
        tokenizer = load_tokenizer(base)
        templates.put(tokenizer, str(source))
        assert prompts.render(tokenizer, "1?", prompts.prompt("plain")) == "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
        assert prompts.end_of_turn(tokenizer) == "<|im_end|>"


def test_what_is_no_template_is_refused(tmp_path: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    with pytest.raises(DataError, match=r"nowhere\.jinja: no such file"):
        templates.put(tokenizer, str(tmp_path / "nowhere.jinja"))
    (tmp_path / "open.jinja").write_text("{% for m in messages %}\n{{ m.content")
    with pytest.raises(DataError, match=r"open\.jinja: not a chat template in Jinja \(unexpected end of template.*, line 2\)"):
        templates.put(tokenizer, str(tmp_path / "open.jinja"))
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"bytes\.jinja: not UTF-8 text"):
        templates.put(tokenizer, str(tmp_path / "bytes.jinja"))
    with pytest.raises(DataError, match="base: its tokenizer has no chat template"):
        templates.put(tokenizer, str(base))
    with pytest.raises(DataError, match="no such folder"):
        templates.put(tokenizer, "plane")
    other = models.tokenizer(("<|turn|>",))
    other.chat_template = "<|turn|>" + models.TEMPLATE
    models.llama().save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SettingError, match=r"<\|turn\|> is no token of .*base; name the template of a model with the same tokens"):
        templates.put(tokenizer, str(tmp_path / "other"))
    assert tokenizer.chat_template is None


def test_a_base_model_is_refused_with_the_way_out_and_works_with_it(tmp_path: Path, base: Path, command: Command) -> None:
    rows = [{"question": f"{i}+1?", "answer": str(i + 1), "solution": f"{i}+1={i + 1}"} for i in range(6)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    shared = ["--model", str(base), "--data", str(tmp_path / "qa.jsonl"), "--device", "cpu"]
    code, said = command("sweep", *shared, "--limit", "2", "--max-new-tokens", "4", "--out", str(tmp_path / "s"))
    assert code == 2
    assert "the tokenizer has no chat template" in said
    assert "--chat-template plain" in said
    template = ["--chat-template", "plain"]
    code, said = command("train", "valve", *shared, *template, "--rank", "2", "--batch", "2", "--out", str(tmp_path / "d"))
    assert code == 0, said
    learned = read_json(tmp_path / "d" / "train.json")["stages"][0]
    assert learned["examples"] > 0
    out = tmp_path / "s"
    code, said = command(
        "sweep", *shared, *template, "--direction", str(tmp_path / "d"), "--limit", "2", "--max-new-tokens", "4", "--alphas", "0,1", "--out", str(out)
    )
    assert code == 0, said
    assert read_json(out / "run.json")["settings"]["chat_template"] == "plain"
    valve = Valve.load(base, tmp_path / "d", device="cpu", chat_template="plain")
    assert [c.alpha for c in valve.generate("1+1?", alpha=[0.0, 1.0], max_new_tokens=3)] == [0.0, 1.0]


def test_the_recipe_for_a_base_model_gives_it_one() -> None:
    """LLaMA-3.1-8B is the paper's only base model; QwQ, which is distilled, keeps its own template."""
    given = {step.name: step.settings for step in pipeline.read("llama-3.1-8b").steps}
    for name, settings in given.items():
        assert isinstance(settings, ModelSettings)
        assert settings.chat_template == (None if name == "distill" else "plain"), name
