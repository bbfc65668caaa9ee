"""Steps of several recipes and seeds side by side, a process for each GPU.

    python benchmarks/side_by_side.py --gpus 4 --out runs/reproduction recipes/reproduction/{main,table7}.yaml --seeds 0 1 2

A free GPU takes the first step, in the order given, whose inputs are made; so put first what others wait for longest. Each
seed has a folder, OUT/SEED, as with `cotvalve run RECIPE --out OUT/SEED --seed SEED`, and what either has finished the other
passes over. A step that fails is told, and only what needs it is left out; the same command tries it again, and goes on
where it was after kill -9. A step whose input was made anew counts as one that failed until its folder is removed.
"""

import argparse
import gc
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import yaml

from cotvalve import pipeline
from cotvalve.errors import CotvalveError, DataError, SettingError
from cotvalve.types import silent

Key = tuple[Path, str]
"""A seed's folder and a step's name: recipes that share a step have it made once."""


@dataclass
class Queue:
    """All steps, and how far they are."""

    steps: dict[Key, pipeline.Step] = field(default_factory=dict[Key, pipeline.Step])
    """In the order in which they are taken."""
    recipes: dict[Key, pipeline.Recipe] = field(default_factory=dict[Key, pipeline.Recipe])
    """The first that has the step."""
    needs: dict[Key, set[Key]] = field(default_factory=dict[Key, set[Key]])
    done: set[Key] = field(default_factory=set[Key])
    begun: set[Key] = field(default_factory=set[Key])
    failed: dict[Key, str] = field(default_factory=dict[Key, str])

    def add(self, recipe: pipeline.Recipe, path: str) -> None:
        """A recipe's steps, behind those that are there; finished ones count as such."""
        fields = yaml.safe_load(pipeline.recipe_path(path).read_text(encoding="utf-8"))["steps"]
        for step in recipe.steps:
            key = recipe.out, step.name
            if self.steps.setdefault(key, step).settings != step.settings:
                raise SettingError(f"{path}: step '{step.name}' has other settings than a recipe before it; give it another --out")
            names = re.findall(r"\$([\w-]+)", " ".join(map(str, fields[step.name].values())))
            self.needs[key] = {(recipe.out, name) for name in names if name in fields}
            # A recipe that is done needs no folder of a step that it shares; another one may.
            if key not in self.recipes or key in self.done:
                self._judge(key, recipe)
            self.recipes.setdefault(key, recipe)

    def _judge(self, key: Key, recipe: pipeline.Recipe) -> None:
        """Counts a step as done, to do, or failed where its input was made anew."""
        self.done.discard(key)
        try:
            if pipeline.passed_over(recipe, self.steps[key]):
                self.done.add(key)
        except DataError as error:
            self.failed[key] = str(error)

    def next(self) -> Key | None:
        """The first step that can begin."""
        for key in self.steps:
            if key not in self.done | self.begun | self.failed.keys() and self.needs[key] <= self.done:
                return key
        return None

    def begin(self, key: Key) -> pipeline.Step:
        """Writes down what `cotvalve run` does, before and after."""
        pipeline.begin(self.recipes[key], self.steps[key])
        self.begun.add(key)
        return self.steps[key]

    def made(self, key: Key, where: str) -> None:
        """The same at the end, and what was made from another one of it is not done."""
        pipeline.end(self.recipes[key], self.steps[key], Path(where))
        self.begun.discard(key)
        self.done.add(key)
        for other in [other for other in self.done if key in self.needs[other]]:
            self._judge(other, self.recipes[other])


@dataclass
class Worker:
    """A process with one GPU."""

    gpu: int
    process: BaseProcess
    pipe: Connection
    key: Key | None = None
    since: float = 0.0


def start(gpu: int) -> Worker:
    """A new process that sees only this GPU."""
    context = get_context("spawn")
    here, there = context.Pipe()
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    # What an outer setting allows is dealt out, and not the machine's own numbers; none stays none.
    allowed = [str(gpu)] if before is None else before.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = allowed[gpu % len(allowed)]
    process = context.Process(target=work, args=(there,))
    process.start()
    if before is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = before
    there.close()
    return Worker(gpu, process, here)


def work(pipe: Connection) -> None:
    """Runs the steps that come through `pipe`, one after the other, in one process: libraries are loaded once."""
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    while step := pipe.recv():
        try:
            pipe.send(("", str(pipeline.VERBS[step.verb].run(step.settings, silent))))
        except Exception as error:  # whatever it is, the other steps go on
            pipe.send((f"{type(error).__name__}: {error}", ""))
        gc.collect()
        torch.cuda.empty_cache()


def run(queue: Queue, gpus: int) -> None:
    """Until nothing is left that can begin."""
    workers = [start(gpu) for gpu in range(gpus)]
    try:
        while True:
            for worker in workers:
                if worker.key is None and (key := queue.next()):
                    worker.key, worker.since = key, time.monotonic()
                    worker.pipe.send(queue.begin(key))
                    say(queue, worker, "begins")
            busy = [worker for worker in workers if worker.key]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy])
            for i, worker in enumerate(workers):
                if worker.key and worker.pipe in ready:
                    try:
                        why, where = worker.pipe.recv()
                    except EOFError:
                        worker.process.join()
                        why, where = f"its process died (exit code {worker.process.exitcode})", ""
                    if why:
                        queue.begun.discard(worker.key)
                        queue.failed[worker.key] = why
                    else:
                        queue.made(worker.key, where)
                    say(queue, worker, f"FAILED, {why}:" if why else f"{time.monotonic() - worker.since:.0f} s,")
                    worker.key = None
                    if not worker.process.is_alive():
                        workers[i] = start(worker.gpu)
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.pipe.send(None)
            worker.process.join()


def say(queue: Queue, worker: Worker, what: str) -> None:
    """One line of what happens."""
    assert worker.key
    print(f"{len(queue.done)} of {len(queue.steps)}; GPU {worker.gpu}: {what} {worker.key[0] / worker.key[1]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a step failed or could not begin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="as for cotvalve run; their steps are taken in this order, seed by seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gpus", type=int, default=1, help="processes, a GPU each")
    parser.add_argument("--out", default="runs/side-by-side", help="a folder for each seed goes in here")
    parser.add_argument("--model", help="another model than the recipes'")
    parser.add_argument("--data-dir", help="folder with local copies of the data sets")
    given = parser.parse_args(arguments)
    queue = Queue()
    try:
        for seed in given.seeds:
            for path in given.recipes:
                queue.add(pipeline.read(path, f"{given.out}/{seed}", given.data_dir, given.model, seed), path)
        run(queue, given.gpus)
    except CotvalveError as error:
        sys.exit(f"side_by_side: {error}")
    left = [key for key in queue.steps if key not in queue.done]
    for folder, name in left:
        print(f"not made: {folder / name}: {queue.failed.get((folder, name), 'what it needs is not made')}", file=sys.stderr)
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
