"""The ways to train, each a function from chains to stages of examples.

    valve        the short chain of each question at alpha 1                       eq. 2
    plus         every chain of a question at alpha = beta(chain)                  eq. 3, 4
    progressive  stage k = chain k of every question, long to short, at alpha 1    section 3.3, Table 7
    reward       every sampled chain, right or wrong, at the alpha it was sampled at, by what it is worth

The first three are the paper's. An example is a chain and the position of the valve it is learned at; `train.fit`
does the rest. A new recipe is one function.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from cotvalve.errors import DataError, SettingError
from cotvalve.types import Chain, Judged, MixChain, Problem


@dataclass(frozen=True, slots=True)
class Example:
    """One chain to learn at one position of the valve."""

    problem: Problem
    chain: Chain
    alpha: float
    weight: float = 1.0
    """How much each of its tokens counts in the loss; below 0 the chain becomes less likely."""
    ended: bool = True
    """Whether the chain came to its end: a truncated one has none to learn."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Examples that are trained on together; stages follow one another on the same weights."""

    name: str
    examples: tuple[Example, ...]
    skipped: int = 0
    """Chains left out because eq. 4 gives them no position or no gradient, or because a reward tells nothing of them."""


def fingerprint(stages: Sequence[Stage]) -> str:
    """Hex sha256 of all that is learned: questions, answers, chains, positions and weights, in their order."""
    digest = hashlib.sha256()
    for stage in stages:
        for e in stage.examples:
            digest.update(json.dumps([stage.name, e.problem.id, e.problem.question, e.problem.answer, e.chain.text, e.alpha, e.weight, e.ended]).encode())
    return digest.hexdigest()


def beta(tokens: int, shortest: int, longest: int) -> float | None:
    """The position a chain is trained at: 1 - (m - m_min) / (m_max - m_min), paper eq. 4.

    Lengths are those of one question. None when all its chains are equally long: eq. 4 is 0/0 there.

    >>> beta(100, 100, 300), beta(200, 100, 300), beta(300, 100, 300)
    (1.0, 0.5, 0.0)
    >>> beta(100, 100, 100) is None
    True
    """
    if longest == shortest:
        return None
    return 1 - (tokens - shortest) / (longest - shortest)


def valve(mix: Sequence[MixChain], solution: int | None = None, stages: int | None = None) -> list[Stage]:
    """CoT-Valve: the shortest chain of each question, at alpha 1 (eq. 2).

    `solution` takes another one: the authors' column where the data has columns, else the rank by length
    with 0 the longest (the paper's Table 6 trains on one solution each). A question without that one is left
    out. With `stages` none is: the chain is the one that stage `solution` of that many `progressive` stages has.
    """
    if solution is None:
        return [Stage("valve", tuple(Example(m.problem, m.chains[-1], 1.0) for m in mix if m.chains))]
    columns = _columns(mix)
    if stages is not None:
        if columns:
            known = ", ".join(map(str, columns))
            raise SettingError(f"stages spreads ranks, but the data has solutions {known}; leave it out")
        if not 0 <= solution < stages or stages < 2:
            raise SettingError(f"solution is {solution} of {stages} stages; expected 0 to stages - 1, of 2 stages or more")
        return [_ranked(mix, solution, stages)]
    found = [
        Example(m.problem, chain, 1.0)
        for m in mix
        for rank, chain in enumerate(m.chains)
        if solution == (chain.solution if columns else rank)
    ]
    if not found:
        known = columns or range(max((len(m.chains) for m in mix), default=0))
        raise DataError(f"no question has a solution {solution}; the data has {', '.join(map(str, known)) or 'none'}")
    return [Stage(f"solution-{solution}", tuple(found))]


def plus(mix: Sequence[MixChain]) -> list[Stage]:
    """CoT-Valve++: every chain at its own beta, per question (eq. 3 and 4).

    The longest chain of a question has beta 0: no gradient reaches the direction from there, so it only
    sets the scale and costs no step. It is counted as skipped, as are questions whose chains are equally long.
    Raises DataError when nothing is left.
    """
    examples: list[Example] = []
    skipped = 0
    for m in mix:
        lengths = [chain.tokens for chain in m.chains]
        for chain in m.chains:
            position = beta(chain.tokens, min(lengths), max(lengths))
            if position:
                examples.append(Example(m.problem, chain, position))
            else:
                skipped += 1
    if not examples:
        raise DataError(f"all {skipped} chains are the longest of their question: eq. 4 needs chains of different lengths")
    return [Stage("plus", tuple(examples), skipped)]


def progressive(mix: Sequence[MixChain], stages: int | None = None) -> list[Stage]:
    """CoT-Valve+P: one chain of every question per stage, from the longest to the shortest, at alpha 1.

    A stage is one solution index over all questions: the authors' column where the data has columns, else
    the chain's rank by length, spread evenly over `stages` (default: the largest number of chains any
    question has) for questions with more or fewer chains. With columns, `stages` takes the first so many
    from the longest: 4 of the authors' five are Table 7's "4+3+2+1", which leaves out the human one.
    """
    if columns := _columns(mix):
        if stages is not None and not 1 <= stages <= len(columns):
            raise SettingError(f"stages is {stages}, but the data has {len(columns)} solutions; expected 1 to {len(columns)}")
        return [
            Stage(f"solution-{k}", tuple(Example(m.problem, c, 1.0) for m in mix for c in m.chains if c.solution == k))
            for k in columns[:stages]
        ]
    if stages is not None and stages < 2:
        raise SettingError(f"stages is {stages}; progressive compression needs two or more, from long chains to short ones")
    count = stages or max((len(m.chains) for m in mix), default=0)
    if count < 2:
        raise DataError("progressive compression needs questions with two chains or more; run `mix` with more alphas")
    return [_ranked(mix, k, count) for k in range(count)]


def worths(chains: Sequence[Judged], brevity: float) -> list[float]:
    """What each of a question's chains at one position is worth against the others: its reward less their mean.

    A wrong or truncated chain earns 0, the shortest right one 1, the longest right one 1 - brevity, between them on the
    scale of eq. 4. The mean of one's own group is the baseline of GRPO (arXiv 2402.03300), without its division by the
    deviation, which favours questions that are nearly always right or nearly never (arXiv 2503.20783).

    >>> def judged(tokens, right): return Judged(Chain("", tokens, 1.0), right)
    >>> worths([judged(100, True), judged(300, True), judged(50, False)], brevity=0.5)
    [0.5, 0.0, -0.5]
    """
    lengths = [one.chain.tokens for one in chains if one.right]

    def earned(one: Judged) -> float:
        if not one.right:
            return 0.0
        short = beta(one.chain.tokens, min(lengths), max(lengths))
        return 1.0 if short is None else 1 - brevity * (1 - short)

    rewards = [earned(one) for one in chains]
    usual = mean(rewards)
    return [each - usual for each in rewards]


def reward(sampled: Sequence[tuple[Problem, Sequence[Judged]]], brevity: float, truncated: bool = False) -> list[Stage]:
    """A step up the reward, at each position of the dial by itself: policy gradient on chains just sampled.

    Not in the paper: eq. 3 with every chain at the alpha it was sampled at, wrong ones too, weighted by `worths`. The
    gradient of mean reward with respect to delta at alpha is E[worth * d log p(chain | alpha)], as long as the chains are
    the learned direction's own: sample at temperature 1, train for one epoch, and sample anew. Truncated chains count in
    their group's mean; they are unlearned, without an end, only where `truncated` says so. Raises DataError when no group
    has chains of different worth.
    """
    examples: list[Example] = []
    skipped = 0
    for problem, chains in sampled:
        groups: dict[float, list[Judged]] = defaultdict(list)
        for one in chains:
            groups[one.chain.alpha or 0.0].append(one)
        for alpha, group in groups.items():
            for one, worth in zip(group, worths(group, brevity), strict=True):
                if worth and alpha and (truncated or not one.truncated):
                    examples.append(Example(problem, one.chain, alpha, worth, ended=not one.truncated))
                else:
                    skipped += 1
    if not examples:
        raise DataError(f"all {skipped} chains are worth as much as the others of their question: nothing to learn; sample several at each alpha but 0")
    return [Stage("reward", tuple(examples), skipped)]


def _columns(mix: Sequence[MixChain]) -> list[int]:
    """The authors' columns, the longest (4) first; empty when a chain has none, as in data made by `mix`."""
    found = {chain.solution for m in mix for chain in m.chains}
    return [] if None in found else sorted((k for k in found if k is not None), reverse=True)


def _ranked(mix: Sequence[MixChain], stage: int, stages: int) -> Stage:
    """One chain of every question: the longest in stage 0, the shortest in the last, evenly between."""
    chosen = (Example(m.problem, m.chains[_rank(stage, stages, len(m.chains))], 1.0) for m in mix if m.chains)
    return Stage(f"stage-{stage + 1}-of-{stages}", tuple(chosen))


def _rank(stage: int, stages: int, chains: int) -> int:
    return round(stage * (chains - 1) / (stages - 1))
