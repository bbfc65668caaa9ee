"""A chat template for a tokenizer that has none (base models), or another in place of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cotvalve import checkpoints
from cotvalve.errors import DataError, SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message.role == 'user' %}Question: {{ message.content }}\nAnswer:\n"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}\n\n"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
)
"""Words and the end-of-text token only: a base model has seen no other marks, and trains no embeddings here."""


def put(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Gives `tokenizer` a chat template: 'plain', a .jinja file, or that of another folder's or hub id's tokenizer.

    Raises DataError where there is none, and SettingError for one whose marks are no tokens of this tokenizer: they
    would be cut into letters.
    """
    marks: set[str] = set()
    if source == "plain":
        template = PLAIN
    elif source.endswith((".jinja", ".j2")):
        if not Path(source).is_file():
            raise DataError(f"{source}: no such file; expected a chat template in Jinja")
        template = _read(Path(source), tokenizer)
    else:
        other = checkpoints.load_tokenizer(source)
        if other.chat_template is None:
            raise DataError(f"{source}: its tokenizer has no chat template; name one that has, a .jinja file, or 'plain'")
        template = other.get_chat_template()
        marks = {str(token) for token in other.added_tokens_decoder.values()}
    unknown = sorted(mark for mark in marks - tokenizer.get_vocab().keys() if mark in template)
    if unknown:
        raise SettingError(
            f"chat template of '{source}': {unknown[0]} is no token of {tokenizer.name_or_path}; name the template of a "
            "model with the same tokens, or 'plain'"
        )
    tokenizer.chat_template = template


def _read(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateSyntaxError

    try:
        template = path.read_text(encoding="utf-8")
        _ = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], chat_template=template, tokenize=False)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); expected a chat template in Jinja") from None
    except TemplateSyntaxError as error:
        raise DataError(f"{path}: not a chat template in Jinja ({error.message}, line {error.lineno})") from None
    return template
