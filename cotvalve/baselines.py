"""What the valve is compared with, in the same table: the plain model and control by prompt.

SFT on the short chains is not run apart: eq. 2 *is* that SFT, so CoT-Valve at alpha 1 is the baseline, and
the table says so. A new baseline is one row of `baselines`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cotvalve.errors import SettingError

PLAIN = "plain model"
PROMPTED = "prompt: "
"""How the names of prompt baselines begin."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """A way to ask the plain model."""

    name: str
    prompt: str
    budget: int | None = None


def baselines(prompts: Sequence[str], budgets: Sequence[int]) -> list[Baseline]:
    """One baseline per prompt; one per budget for the prompts that take a budget.

    >>> [b.name for b in baselines(["budget", "shortcut"], [50, 100])]
    ['prompt: budget 50', 'prompt: budget 100', 'prompt: shortcut']

    Raises SettingError for such a prompt without a budget.
    """
    from cotvalve.prompts import prompt

    found: list[Baseline] = []
    for name in prompts:
        if prompt(name).budgets:
            if not budgets:
                raise SettingError(f"the baseline '{name}' asks for a token budget and none is named; give --budgets 50,100")
            found += [Baseline(f"{PROMPTED}{name} {budget}", name, budget) for budget in budgets]
        else:
            found.append(Baseline(f"{PROMPTED}{name}", name))
    return found
