"""The command line: one verb per stage. The only module that prints.

Flags are made from the verb's settings class, so a flag, a recipe's field and its help are one thing. What a
user can mend is one line and exit code 2; a stopped command goes on when it is given again.
"""

import errno
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from cotvalve.errors import CotvalveError, unknown
from cotvalve.progress import Drawn, Notes, hush
from cotvalve.settings import ModelSettings, Settings

try:
    from typer.exceptions import TyperException as UsageProblem
except ImportError:  # typer before it had exceptions of its own
    from click import ClickException as UsageProblem

app = typer.Typer(
    name="cotvalve", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="One dial for how long a language model thinks: theta + alpha * delta (CoT-Valve, arXiv 2502.09601).",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="List, fetch and check data sets.")
app.add_typer(data_app, name="data")

Run = Callable[[Any, Drawn], Path]

STOPPED = 130
"""The exit code of Ctrl-C. What typer makes of a KeyboardInterrupt, which does not reach `main`; an Abort in its older versions."""

UNREACHABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What the file system says of a path that its user can mend."""

FIRST = ("model", "data", "direction", "out")
"""Flags that stand first in every verb's help."""


def _verb(name: str, settings: type[Settings], run: Run, help: str, arguments: tuple[str, ...] = (), example: str = "") -> None:
    """Adds a command that draws its progress and prints what it made."""

    def work(values: Any) -> None:
        with Drawn() as progress:
            made = run(values, progress)
        _done(made)

    _command(name, settings, work, help, arguments, example)


def _command(
    name: str, settings: type[Settings], work: Callable[[Any], None], help: str, arguments: tuple[str, ...] = (), example: str = ""
) -> None:  # fmt: skip
    """Adds a command whose flags are the fields of `settings`; `arguments` are given by position, `example` ends its help."""

    def command(**values: Any) -> None:
        work(settings.read({key: value for key, value in values.items() if value is not None}))

    parameters: list[inspect.Parameter] = []
    for field, info in settings.model_fields.items():
        default = info.default
        if get_origin(info.annotation) is tuple:
            default = ",".join(f"{value:g}" for value in default)
        # In round brackets: square ones are markup to whoever draws the help, and would not be shown.
        shown = "" if default in (None, "") or info.is_required() else f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        text = f"{' '.join((info.description or '').split())}{'' if field in arguments else shown}"
        flag = f"--{field.replace('_', '-')}"
        kind: Any
        if field in arguments:
            kind = Annotated[str, typer.Argument(help=text, metavar=field.upper(), show_default=False)]
        elif info.annotation is bool:
            kind = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)]
        else:
            # Values arrive as text and are read by the settings class: one place for types, ranges and messages.
            choices = "|".join(get_args(info.annotation)) if get_origin(info.annotation) is Literal else None
            kind = Annotated[str | None, typer.Option(flag, help=text, show_default=False, metavar=choices or "VALUE")]
        where = inspect.Parameter.KEYWORD_ONLY
        parameters.append(
            inspect.Parameter(field, where, annotation=kind, default=inspect.Parameter.empty if field in arguments else None)
        )
    command.__signature__ = inspect.Signature(sorted(parameters, key=lambda p: _place(p.name, arguments)))
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=help, epilog=f"Example: {example}" if example else None)(command)


def _place(field: str, arguments: tuple[str, ...]) -> int:
    """Where a field stands in --help: arguments, what nearly every call gives, the verb's own, how models are loaded."""
    if field in arguments:
        return -len(FIRST) - 1
    return FIRST.index(field) - len(FIRST) if field in FIRST else int(field in ModelSettings.model_fields)


def _done(path: Path) -> None:
    """Prints the table that a verb made, and where it is."""
    from cotvalve.mixchain import TABLE

    shown = path if path.suffix == ".md" else path / TABLE
    if shown.is_file():
        print(shown.read_text(encoding="utf-8"))
    print(path)


def _register() -> None:
    from cotvalve import pipeline, serve

    for name, verb in pipeline.VERBS.items():
        _verb(name, verb.settings(), verb.run, verb.help, verb.arguments, verb.example)
    _command("serve", serve.ServeSettings, _serve, "OpenAI-compatible HTTP with alpha on each request, and a page with the dial.",
             example="cotvalve serve --model tiny-reasoner --direction tiny-valve\n\nThen open http://127.0.0.1:8000")  # fmt: skip


def _serve(settings: Any) -> None:
    from cotvalve import serve

    hush()
    serve.run(settings, _say)


def _say(line: str) -> None:
    print(line, flush=True)


@app.command("run")
def run_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe: a YAML file, or the name of one in recipes/.")],
    plan: Annotated[bool, typer.Option("--plan", help="Print stages, tokens, memory and GPU-hours; load and run nothing.")] = False,
    out: Annotated[str | None, typer.Option(help="Folder for all steps; by default the recipe's.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with local copies of the data sets.")] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed than the recipe's, for all steps that have none of their own.")] = None,
) -> None:
    """The whole pipeline from one file: train, mix, train again, sweep; goes on where it stopped."""
    from cotvalve import pipeline

    found = pipeline.read(recipe, out=out, data_dir=data_dir, model=model, seed=seed)
    if plan:
        from cotvalve.plan import describe

        print(describe(found))
        return
    with Drawn() as progress:
        for step, folder in pipeline.run(found, progress):
            print(f"{step}: {folder}")


@app.command("demo")
def demo(
    out: Annotated[str, typer.Option(help="Run folder.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """The whole method on the embedded model, on a CPU, in minutes; ends with a report to look at."""
    from cotvalve import pipeline

    with Drawn() as progress:
        folder = pipeline.demo(Path(out), seed, progress)
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"Open {folder / 'report.html'} in a browser.")


@app.command("report")
def report(
    run: Annotated[str, typer.Argument(help="Run folder of sweep, mix or calibrate.")],
    data_dir: Annotated[str | None, typer.Option(help="Folder with local copies of the data sets.")] = None,
) -> None:
    """Figures, HTML and Markdown again from a finished sweep's rows; the tables of mix, reward and calibrate."""
    from cotvalve.sweep import redo

    tables = [path for name in ("mix.md", "calibration.md", "rounds.md") if (path := Path(run) / name).is_file()]
    _done(tables[0] if tables else redo(Path(run), data_dir))


@data_app.command("list")
def data_list() -> None:
    """The data sets, their splits and sizes."""
    from cotvalve import problems

    print(problems.table())


@data_app.command("check")
def data_check(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets; all by default.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with local copies of the data sets.")] = None,
) -> None:
    """Grades every gold answer of every set: all of them have to be right before a model is graded."""
    from cotvalve import problems

    with Drawn() as progress:
        results = problems.check(names or problems.NAMES, data_dir, progress)
    for result in results:
        print("\n  ".join([result.line(), *result.wrong]))
    if not all(result.passed for result in results):
        raise SystemExit(1)


@data_app.command("fetch")
def data_fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets; all by default.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with local copies of the data sets.")] = None,
) -> None:
    """Downloads the data sets, so that everything after it works offline."""
    from cotvalve import problems

    for name in names or problems.NAMES:
        for split in problems.splits(name):
            print(f"{name} {split}: {len(problems.load(name, split=split, data_dir=data_dir))} problems")


def main() -> None:
    """The `cotvalve` command."""
    # Read when the library is imported: a line for each of its five tries would bury the one that says what to do.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    Notes.on()
    # Deprecations between transformers and peft are for their developers, not for whoever runs a verb.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        _register()
        code = app(standalone_mode=False)
        if code == STOPPED:
            raise KeyboardInterrupt
        raise SystemExit(code if isinstance(code, int) else 0)
    except UsageProblem as problem:
        said = problem.format_message() if hasattr(problem, "format_message") else str(problem)
        if said.startswith("No such command"):
            said = unknown("command", said.split("'")[1], [*(c.name or "" for c in app.registered_commands), "data"])
        _fail(said)
    except CotvalveError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None or error.errno not in UNREACHABLE:
            raise
        _fail(f"{error.filename}: cannot be read or written ({error.strerror}); mend its permissions, or name another path")
    except (KeyboardInterrupt, typer.Abort):
        print("cotvalve: stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(STOPPED) from None


def _fail(said: str) -> None:
    print(f"cotvalve: {' '.join(said.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
