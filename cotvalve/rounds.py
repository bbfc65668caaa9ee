"""`reward`: sample, learn from all chains, right and wrong, sample what was learned, as often as is asked for.

Comes in: questions with gold answers, and a direction to begin with (none: the plain model). Goes out: the last round's
direction, a folder for each round with its chains and its direction, and a table of the rounds. A round is a run of
`mix` and one of `train reward` on it, on the next questions of the seeded order; a killed run goes on in the round, and
in the chain or the step, where it was.

    cotvalve reward --model BASE --direction runs/progressive --data gsm8k --limit 600 --rounds 4 --out runs/reward
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from cotvalve import mixchain, train
from cotvalve.direction import Direction
from cotvalve.figures import DASH
from cotvalve.fitting import UNDECIDED, FitSettings
from cotvalve.mixchain import MixSettings, Sampling
from cotvalve.records import Run, disk, read_json, write_json, write_text
from cotvalve.settings import Alphas, Count, NotNegative, Positive, Settings, Share
from cotvalve.train import TrainSettings
from cotvalve.types import Progress, Toward, silent, within

Own = TypeVar("Own", bound=Settings)

TABLE = "rounds.md"
"""What a run folder of `reward` shows of itself."""

HEAD = (
    "What each round sampled, at temperature 1, on training questions of its own: the direction as the round began. Look at the last one on held-out questions. "
    "Right is what grading says: without the box that the prompt asked for it earned nothing.", "",
    "| round | alpha | right % | mean tokens of right chains |", "| --: | --: | --: | --: |",
)  # fmt: skip


class RewardSettings(Sampling, FitSettings):
    """Settings of `reward`."""

    direction: str = ""
    """A LoRA direction to go on from; empty starts a new one from the plain model's own chains."""
    data: str = "gsm8k"
    """A data set: its training questions are answered."""
    limit: Count | None = 600
    """Questions of a round; each round has others, until all were asked."""
    offset: int = 0
    """Questions that an earlier run of the same seed has asked: where `direction` is one of `reward`, its rounds times its limit."""
    rounds: int = 4
    """How often to sample and learn."""
    alphas: Alphas = (0.5, 1.0)
    """Positions that are sampled and learned, with commas. Those beyond 1 break first."""
    samples: int = 8
    """Chains per question and alpha: what a chain is worth is told by the others."""
    temperature: NotNegative = 1.0
    """Has to stay 1: chains at another temperature are no sample of what learns."""
    brevity: float = 0.5
    """What the longest right chain of a question earns less than the shortest, which earns 1; a wrong one earns 0."""
    truncated: bool = False
    """Unlearn truncated chains too, most of which repeat themselves; without it they only count as wrong."""
    # A step of few examples follows the luck of a few chains.
    batch: Count = 256
    """Examples per optimizer step."""
    learning_rate: Positive = 5e-5
    """Peak learning rate of each round."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: Share = 0.0
    """Share of a round's steps in which the learning rate rises."""
    toward: Toward = "shorter"
    """Where chains go as alpha grows."""
    out: str = "runs/reward"
    """Run folder; the direction is put into it."""

    def model_post_init(self, context: Any, /) -> None:
        Sampling.model_post_init(self, context)
        FitSettings.model_post_init(self, context)
        if self.rounds < 1:
            raise ValueError("rounds has to be 1 or more")
        if self.offset < 0:
            raise ValueError("offset has to be 0 or more")
        if self.full or self.dora:
            raise ValueError("reward learns a plain LoRA, whose positions it samples; full and dora are for the recipe valve")
        if self.samples < 2 or not any(self.alphas):
            raise ValueError("reward needs 2 samples or more, and a position other than 0: a chain's worth is told by the others of its question")
        if self.temperature != 1 or self.top_p != 1:
            raise ValueError("temperature and top_p have to be 1: other chains are no sample of what learns")
        tuple(parts(self))  # what a round would refuse is refused now


def parts(settings: RewardSettings) -> Iterator[tuple[MixSettings, TrainSettings]]:
    """What each round samples, and what it learns from."""
    at = settings.direction
    for number in range(settings.rounds):
        home = Path(settings.out) / f"round-{number + 1}"
        # One right chain of a question is enough: it is the wrong ones that it is measured against.
        sample = _shared(MixSettings, settings, direction=at, offset=settings.offset + number * (settings.limit or 0), fewest=1, out=str(home / "mix"))
        learn = _shared(TrainSettings, settings, recipe="reward", direction=at, data=sample.out, limit=None, out=str(home / "direction"))
        yield sample, learn
        at = learn.out


def _shared(kind: type[Own], settings: RewardSettings, **own: object) -> Own:
    """Another verb's settings: those that it has in common with `reward`, and its own."""
    # What was not said of a new LoRA says nothing against the direction that is gone on from.
    unsaid = {"rank", "lora_alpha", "rslora", "modules"} - settings.model_fields_set
    return kind.read({name: value for name, value in settings.model_dump(exclude=unsaid).items() if name in kind.model_fields} | own)


def run(settings: RewardSettings, progress: Progress = silent) -> Path:
    """Runs what is missing of the rounds; returns the path of `rounds.md`, beside the last round's direction."""
    folder = Path(settings.out)
    decisive = settings.model_dump(mode="json", exclude={"out", "engine", "gpus", "slots", "data_dir", "device"} | UNDECIDED)
    lines, stages = list(HEAD), list[Any]()
    with Run(folder, "reward", decisive) as at:
        for number, (sample, learn) in enumerate(parts(settings), 1):
            last, told = Path(learn.out), within(f"round {number} of {settings.rounds}", progress)
            if not (last / "train.json").exists():
                if not (Path(sample.out) / "mix.json").exists():
                    mixchain.run(sample, told)
                train.run(learn, told)
            stages += read_json(last / "train.json")["stages"]
            found = read_json(Path(sample.out) / "mix.json")["by_alpha"]
            # Of all right chains: `mean_tokens` are those of the set, where a text counts at the smallest of its alphas alone.
            lines += [f"| {number} | {alpha} | {100 * t['right'] / t['sampled']:.1f} | {t.get('right_tokens') or DASH} |" for alpha, t in found.items()]
            at.note({name: str(value) for name, value in read_json(last / "run.json")["facts"].items() if name not in at.facts})
            with disk(folder):
                Direction.load(last).save(folder)
            write_text(folder / TABLE, "\n".join(lines) + "\n")
        write_json(folder / "train.json", {"stages": stages})
    return folder / TABLE
