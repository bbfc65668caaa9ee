"""The documents say what is so: commands parse, links lead somewhere, quoted code and messages are in the source."""

import ast
import dataclasses
import doctest
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from typer.main import get_command

from cotvalve import calibration, card, cli, mixchain, pipeline, types

PACKAGE = ROOT / "cotvalve"
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README.md")], key=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


SOURCES = sorted(path for folder in ("cotvalve", "benchmarks") for path in (ROOT / folder).rglob("*.py") if ">>> " in text(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_examples_in_docstrings_are_so(path: Path) -> None:
    """Those of three modules were run, of the twenty-four that have some."""
    found = doctest.testmod(importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)))
    assert found.attempted
    assert not found.failed


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language ('' for commands and output)."""
    return [body for tag, body in FENCE.findall(text(page)) if tag == language]


def prose(page: Path) -> str:
    return FENCE.sub("", text(page))


def each(pairs: Iterator[tuple[Path, Any]]) -> list[Any]:
    return [pytest.param(page, value, id=f"{page.stem}-{number}") for number, (page, value) in enumerate(pairs)]


# Commands


@lru_cache
def verbs() -> dict[str, Any]:
    """The commands by name, 'data list' and the like with both words."""
    cli._register()
    found: dict[str, Any] = dict(get_command(cli.app).commands)  # type: ignore[attr-defined]
    data = found.pop("data")
    return found | {f"data {name}": verb for name, verb in data.commands.items()}


def split(words: list[str]) -> tuple[str, list[str]]:
    """'data check gsm8k' as its verb and its arguments."""
    size = 2 if words[0] == "data" else 1
    return " ".join(words[:size]), words[size:]


def flags(verb: str) -> set[str]:
    return {flag for option in verbs()[verb].params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}


def commands() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for language in ("", "bash", "sh"):
            for block in blocks(page, language):
                for line in block.replace("\\\n", " ").splitlines():
                    if line.startswith("cotvalve "):
                        yield page, line


@pytest.mark.parametrize(("page", "line"), each(commands()))
def test_every_command_line_parses(page: Path, line: str) -> None:
    """Verb, flags and values, up to the settings object: only running it is left out."""
    verb, arguments = split(shlex.split(line.replace("$ASK", "boxed"), comments=True)[1:])  # a prompt has to be one
    assert verb in verbs(), f"{page.name}: {line}"
    given = verbs()[verb].make_context(verb, list(arguments)).params
    if verb in pipeline.VERBS:
        pipeline.VERBS[verb].settings().read({name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_in_a_sentence_exists(page: Path) -> None:
    every = {flag for verb in verbs() for flag in flags(verb)}
    for span in INLINE.findall(prose(page)):
        words = span.split()
        if words[0] == "cotvalve" and len(words) > 1 and re.fullmatch("[a-z]+", words[1]):
            verb, arguments = split(words[1:]) if words[1:] != ["data"] else ("data list", [])
            assert verb in verbs(), f"{page.name}: `{span}`"
            unknown = {word.partition("=")[0] for word in arguments if word.startswith("--")} - flags(verb)
            assert not unknown, f"{page.name}: `{span}`: {unknown}"
        elif words[0].startswith("--"):
            assert words[0].partition("=")[0] in every, f"{page.name}: `{span}`"


def test_the_check_of_commands_can_fail() -> None:
    assert len(list(commands())) > 20
    with pytest.raises(Exception, match="No such option"):
        verbs()["mix"].make_context("mix", ["--alpah", "1"])


# Links and places


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}: {sorted(anchors(there))}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples" / "one_page.py"], ids=lambda page: page.stem)
def test_no_path_of_a_machine(page: Path) -> None:
    assert not re.findall(r"(?<![\w.])(?:/(?:home|root|tmp|work|Users|mnt|content)/\S+|[A-Z]:\\\w+)", text(page))


# Code, data and recipes in the pages


@pytest.mark.parametrize(("page", "code"), each((page, body) for page in PAGES for body in blocks(page, "python")))
def test_python_blocks_are_python(page: Path, code: str) -> None:
    if not code.startswith("# cotvalve/"):
        compile(code, page.name, "exec")


@pytest.mark.parametrize(("page", "body"), each((page, body) for page in PAGES for body in blocks(page, "json")))
def test_json_blocks_are_json(page: Path, body: str) -> None:  # noqa: ARG001
    json.loads(body)


@pytest.mark.parametrize(("page", "body"), each((page, body) for page in PAGES for body in blocks(page, "yaml")))
def test_yaml_blocks_are_recipes(page: Path, body: str, tmp_path: Path) -> None:  # noqa: ARG001
    (tmp_path / "recipe.yaml").write_text(body, encoding="utf-8")
    assert pipeline.read(str(tmp_path / "recipe.yaml")).steps


def test_formats_name_every_field() -> None:
    """formats.md lists the fields of what is written; a new field has to be told."""
    told = set(INLINE.findall(text(ROOT / "docs" / "formats.md")))
    written = [types.Point, types.Chain, card.Card, calibration.Calibration, calibration.Position, calibration.Error]
    for cls in written:
        missing = {field.name for field in dataclasses.fields(cls)} - told
        assert not missing, f"{cls.__name__}: {missing}"
    completion = types.Completion("p|0|0", 0.0, "", 0, "error", reason="the prompt is empty")
    row = mixchain.row(types.Problem("p", "q", "1"), completion, 0)
    assert row.keys() <= told, row.keys() - told


# method.md


def excerpts() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    page = ROOT / "docs" / "method.md"
    for body in blocks(page, "python"):
        first, _, code = body.partition("\n")
        named = re.fullmatch(r"# (cotvalve/\S+\.py): ([\w.]+)", first)
        assert named, f"method.md: an excerpt begins with '# cotvalve/FILE.py: FUNCTION', not {first!r}"
        yield page, (named[1], named[2], code)


def source_of(path: str, name: str) -> str:
    """The text of a function or method."""
    source = text(ROOT / path)
    node: Any = ast.parse(source)
    for part in name.split("."):
        inside = [child for child in node.body if getattr(child, "name", None) == part]
        assert inside, f"{path} has no {name}"
        node = inside[0]
    return ast.get_source_segment(source, node, padded=True) or ""


@pytest.mark.parametrize(("page", "excerpt"), each(excerpts()))
def test_quoted_code_is_in_the_source(page: Path, excerpt: tuple[str, str, str]) -> None:  # noqa: ARG001
    path, name, code = excerpt
    assert code.rstrip() in source_of(path, name), f"method.md quotes {name} of {path} as it no longer is"


def test_every_equation_has_its_code() -> None:
    quoted = {name for _, (_, name, _) in excerpts()}
    # 1, theta + alpha delta (LoRA, task vector), 2, MixChain, 3, 4, +P, 5
    assert quoted >= {
        "encode", "Learner.forward", "HeadLoss.forward", "Dial._forward", "Product.forward", "Dial._learn", "Dial._turn",
        "TaskVector.at", "low_rank", "valve", "assemble", "ValveTrainer._learn", "beta", "plus", "progressive", "acu",
    }  # fmt: skip
    for number in range(1, 6):
        assert f"## Equation {number}: " in text(ROOT / "docs" / "method.md")


# troubleshooting.md


def template(node: ast.expr) -> str | None:
    """A string as it is written in the source, what is filled in as \\0."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return None


@lru_cache
def templates() -> tuple[str, ...]:
    """Every string of the package, f-strings whole."""
    return tuple(
        found
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(text(path)))
        if isinstance(node, ast.expr) and (found := template(node))
    )


def quoted_messages() -> Iterator[tuple[Path, str]]:
    page = ROOT / "docs" / "troubleshooting.md"
    for line in text(page).partition("## Messages")[2].splitlines():
        if found := re.match(r"\| `(.+?)` \| ", line):
            yield page, found[1]


@pytest.mark.parametrize(("page", "message"), each(quoted_messages()))
def test_messages_are_what_the_package_says(page: Path, message: str) -> None:  # noqa: ARG001
    """The fixed parts of a quoted message stand, in their order, in one string of the package."""
    parts = [part.strip() for part in message.split("...") if part.strip(" ':;,")]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(known) for known in templates()), message


def test_every_family_of_errors_is_told() -> None:
    headings = set(re.findall(r"^### (\w+): ", text(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE))
    from cotvalve import errors

    assert headings == {cls.__name__ for cls in errors.CotvalveError.__subclasses__()}
    assert len(list(quoted_messages())) > 50


def test_the_grading_cases_are_as_many_as_told() -> None:
    cases = [line for line in text(ROOT / "tests" / "cases" / "grading.jsonl").splitlines() if line.strip()]
    assert f"holds {len(cases)} cases" in text(ROOT / "docs" / "data.md")
