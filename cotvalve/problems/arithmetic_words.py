"""The words of the embedded world: names, families of stories, and the sentences that tell each event.

Data only. Fields in braces: `a` and `b` numbers, `times` and `third` the words for `b`, `who` the hero (`he`, `his`),
`other` somebody else, `units` and `boxes` the family's things and their containers.
"""

from dataclasses import dataclass, field

HE = (
    "Tom", "Ben", "Sam", "Omar", "Luis", "Kofi", "Ivan", "Raj",
    "Hugo", "Finn", "Theo", "Juan", "Adam", "Noah", "Ken", "Paul",
)  # fmt: skip
SHE = (
    "Mia", "Ana", "Lena", "Zoe", "Nora", "Aisha", "Mei", "Priya",
    "Rosa", "Ella", "Sara", "Ida", "Lily", "Emma", "Jane", "Kate",
)  # fmt: skip
NAMES = (*((name, "he") for name in HE), *((name, "she") for name in SHE))

FRACTIONS = {3: "third", 4: "quarter", 5: "fifth"}
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"}

Sentences = tuple[str, ...]

DEFAULTS: dict[str, Sentences] = {
    "plain": ("{Who} has {a} {units}.", "At first {who} has {a} {units}."),
    "groups": (
        "{Who} has {a} {boxes} with {b} {units} in each {box}.",
        "There are {b} {units} in each of {a} {boxes} of {who}.",
    ),
    "two": ("{Who} has {a} {new} {units} and {b} {old} {units}.",),
    "times": ("{Other} has {a} {units}. {Who} has {times} as many.",),
    "gain": ("Then {he} gets {b} more {units}.", "{Other} gives {who} {b} {units}."),
    "lose": ("{He} gives {b} {units} to {other}.", "Then {he} loses {b} {units}."),
    "gain_groups": ("Then {he} gets {a} more {boxes} with {b} {units} in each {box}.",),
    "lose_groups": ("{He} gives {b} {units} to each of {a} {friends}.",),
    "grow": ("After a while {he} has {times} as many {units}.",),
    "half": ("{He} gives half of the {units} to {other}.",),
    "fraction": ("{He} gives one {third} of the {units} to {other}.",),
    "now": ("How many {units} does {who} have now?", "How many {units} are there now?"),
    "share": ("{He} shares the {units} equally among {b} {friends}. How many {units} does each of them get?",),
    "pack": ("{He} puts the {units} into {boxes} of {b}. How many {boxes} does {he} need?",),
    "sell": ("{He} sells every {unit} for {b} dollars. How many dollars does {he} get?",),
    "goal": ("{He} needs {b} {units}. How many more {units} does {he} need?",),
}
"""How an event is told, unless the family tells it in its own words."""


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of story: its things and its own words for some events; an event with no words never happens in it."""

    units: tuple[tuple[str, str], ...]
    box: tuple[str, str]
    friends: str
    own: dict[str, Sentences] = field(default_factory=dict[str, Sentences])
    kinds: tuple[str, str] = ("new", "old")

    def sentences(self, event: str) -> Sentences:
        """The ways this family tells `event`; empty when it never happens."""
        return self.own.get(event, DEFAULTS[event])


FAMILIES: dict[str, Family] = {
    "shop": Family(
        (("pen", "pens"), ("shirt", "shirts"), ("lamp", "lamps")),
        ("box", "boxes"),
        "customers",
        {
            "plain": ("{Who} has {a} {units} in the shop.", "The shop of {who} has {a} {units}."),
            "gain": ("{He} buys {b} more {units} for the shop.", "A truck brings {b} more {units}."),
            "lose": ("In the morning {he} sells {b} {units}.", "{He} sells {b} of the {units}."),
            "lose_groups": ("Then {a} {friends} buy {b} {units} each.",),
            "half": ("On Friday {he} sells half of the {units}.",),
            "fraction": ("On Friday {he} sells one {third} of the {units}.",),
            "grow": (),
        },
    ),
    "farm": Family(
        (("egg", "eggs"), ("apple", "apples"), ("melon", "melons")),
        ("crate", "crates"),
        "neighbors",
        {
            "plain": ("{Who} collects {a} {units} on the farm.",),
            "two": ("{Who} collects {a} {units} on Monday and {b} {units} on Tuesday.",),
            "gain": ("The next day {he} collects {b} more {units}.", "Then {he} finds {b} more {units} in the barn."),
            "lose": ("{He} throws away {b} {units} that are bad.", "{He} eats {b} {units}."),
            "grow": (),
        },
    ),
    "travel": Family(
        (("kilometer", "kilometers"), ("mile", "miles")),
        ("day", "days"),
        "friends",
        {
            "plain": ("{Who} drives {a} {units} away from home.",),
            "groups": ("{Who} drives {b} {units} a day for {a} days.",),
            "two": ("{Who} drives {a} {units} before lunch and {b} {units} after lunch.",),
            "times": ("{Other} drives {a} {units}. {Who} drives {times} as far.",),
            "gain": ("Then {he} drives {b} {units} more.", "The next day {he} drives {b} {units} farther."),
            "lose": ("Then {he} turns and drives {b} {units} back.",),
            "gain_groups": ("Then {he} drives {b} {units} more on each of {a} days.",),
            "lose_groups": ("Then {he} drives back {b} {units} on each of {a} days.",),
            "grow": (),
            "half": ("Then {he} drives half of the way back.",),
            "fraction": ("Then {he} drives one {third} of the way back.",),
            "now": ("How many {units} is {who} from home?",),
            "share": (),
            "pack": ("The way back takes several days with {b} {units} a day. How many days does it take?",),
            "sell": ("The way back costs {b} dollars for every {unit}. How many dollars does it cost?",),
            "goal": ("The sea is {b} {units} from home. How many more {units} must {he} drive?",),
        },
    ),
    "books": Family(
        (("page", "pages"),),
        ("chapter", "chapters"),
        "friends",
        {
            "plain": ("{Who} reads {a} {units} of a long book.",),
            "groups": ("{Who} reads {a} chapters with {b} {units} in each chapter.",),
            "two": ("{Who} reads {a} {units} on Saturday and {b} {units} on Sunday.",),
            "times": ("{Other} reads {a} {units}. {Who} reads {times} as many.",),
            "gain": ("In the evening {he} reads {b} more {units}.", "Then {he} reads {b} {units} in bed."),
            "lose": (),
            "lose_groups": (),
            "half": (),
            "fraction": (),
            "share": (),
            "gain_groups": ("Then {he} reads {a} more chapters of {b} {units}.",),
            "grow": ("At the end of the year {he} has read {times} as many {units}.",),
            "now": ("How many {units} has {who} read now?",),
            "pack": ("{He} reads all of them again, {b} {units} a day. How many days does {he} need?",),
            "sell": ("{He} needs {b} seconds for every {unit}. How many seconds is that?",),
            "goal": ("The book has {b} {units}. How many {units} are left to read?",),
        },
    ),
    "savings": Family(
        (("dollar", "dollars"), ("coin", "coins")),
        ("week", "weeks"),
        "cousins",
        {
            "plain": ("{Who} has {a} {units} in the bank.",),
            "groups": ("{Who} saves {b} {units} a week for {a} weeks.",),
            "two": ("{Who} earns {a} {units} in May and {b} {units} in June.",),
            "gain": ("Then {he} earns {b} {units} more.", "For {his} birthday {he} gets {b} {units}."),
            "lose": ("{He} spends {b} {units} on shoes.", "{He} pays {b} {units} for a coat."),
            "gain_groups": ("Then {he} earns {b} {units} a week for {a} weeks.",),
            "lose_groups": ("{He} buys {a} gifts for {b} {units} each.",),
            "half": ("{He} spends half of the {units}.",),
            "fraction": ("{He} spends one {third} of the {units} on a trip.",),
            "pack": ("{He} spends {b} {units} a week. For how many weeks is that enough?",),
            "sell": (),
            "goal": ("A bike costs {b} {units}. How many more {units} does {he} need?",),
        },
    ),
    "baking": Family(
        (("cookie", "cookies"), ("muffin", "muffins"), ("roll", "rolls")),
        ("tray", "trays"),
        "guests",
        {
            "plain": ("{Who} bakes {a} {units}.",),
            "groups": ("{Who} bakes {a} trays of {b} {units}.",),
            "gain": ("Then {he} bakes {b} more {units}.", "{Other} brings {b} more {units}."),
            "lose": ("{He} burns {b} {units}.", "The children eat {b} {units}."),
            "lose_groups": ("Then {a} {friends} eat {b} {units} each.",),
            "half": ("The guests eat half of the {units}.",),
            "fraction": ("The guests eat one {third} of the {units}.",),
            "grow": (),
        },
        ("sweet", "plain"),
    ),
    "classroom": Family(
        (("sticker", "stickers"), ("pencil", "pencils"), ("sheet", "sheets")),
        ("pack", "packs"),
        "students",
        {
            "plain": ("The class of {who} has {a} {units}.",),
            "gain": ("The school gives the class {b} more {units}.", "Then {he} finds {b} {units} in a drawer."),
            "lose": ("The class uses {b} {units}.", "{He} uses {b} {units} for a poster."),
            "lose_groups": ("{He} gives each of {a} {friends} {b} {units}.",),
            "half": ("The class uses half of the {units}.",),
            "fraction": ("The class uses one {third} of the {units}.",),
            "grow": (),
        },
        ("red", "blue"),
    ),
    "garden": Family(
        (("rose", "roses"), ("tulip", "tulips"), ("bush", "bushes")),
        ("row", "rows"),
        "visitors",
        {
            "plain": ("{Who} plants {a} {units}.",),
            "groups": ("{Who} plants {a} rows of {b} {units}.",),
            "gain": ("In spring {he} plants {b} more {units}.",),
            "lose": ("A storm destroys {b} {units}.", "{He} cuts {b} {units}."),
            "gain_groups": ("In spring {he} plants {a} more rows of {b} {units}.",),
            "grow": ("The next year the garden has {times} as many {units}.",),
            "half": ("In winter half of the {units} die.",),
            "fraction": ("{He} cuts one {third} of the {units}.",),
            "pack": ("{He} plants all of them again in rows of {b}. How many rows are there?",),
        },
        ("white", "yellow"),
    ),
    "collection": Family(
        (("card", "cards"), ("stamp", "stamps"), ("shell", "shells")),
        ("album", "albums"),
        "friends",
        {
            "gain": ("{He} wins {b} {units} in a game.", "{Other} gives {who} {b} {units}."),
            "lose": ("{He} loses {b} {units} in a game.", "{He} gives {b} {units} to {other}."),
            "grow": ("Two years later {he} has {times} as many {units}.",),
        },
    ),
    "factory": Family(
        (("wheel", "wheels"), ("bolt", "bolts"), ("clock", "clocks")),
        ("pallet", "pallets"),
        "clients",
        {
            "plain": ("A factory makes {a} {units}.", "{Who} makes {a} {units} in a factory."),
            "groups": ("A factory fills {a} pallets with {b} {units} each.",),
            "two": ("A factory makes {a} {units} by day and {b} {units} by night.",),
            "times": ("An old factory makes {a} {units}. A new factory makes {times} as many.",),
            "gain": ("The next day it makes {b} more {units}.",),
            "lose": ("Of these, {b} {units} are broken and must go.", "Then {b} {units} are shipped."),
            "gain_groups": ("Then it fills {a} more pallets with {b} {units} each.",),
            "lose_groups": ("It ships {b} {units} to each of {a} {friends}.",),
            "grow": ("With new machines it makes {times} as many {units}.",),
            "half": ("It ships half of the {units}.",),
            "fraction": ("It ships one {third} of the {units}.",),
            "now": ("How many {units} does the factory have now?",),
            "share": ("It sends the rest to {b} {friends}, the same number to each. How many {units} does each get?",),
            "pack": ("It packs the {units} on pallets of {b}. How many pallets are needed?",),
            "sell": ("It sells every {unit} for {b} dollars. How many dollars does it get?",),
            "goal": ("An order asks for {b} {units}. How many more {units} must be made?",),
        },
    ),
}
