"""Grade-school word problems in GSM8K's schema, generated from a seed.

A problem is a sentence template filled with names, objects and small integers. Its answer holds
one worked step a line (`a op b = c` with + - *) and the last line `#### c`. A fifth of the
templates (`HELD_OUT`) appears only in test. For the others a hash of the question says which split
it belongs to, so that no problem is in both, whatever the counts and seeds.

Only `random.Random(str).random()` is drawn from: its sequence is the same on every platform and
Python version, and nothing depends on the hash seed.
"""

from __future__ import annotations

import hashlib
import random
from typing import Literal

Split = Literal["train", "test"]
TRAIN_SIZE, TEST_SIZE = 3200, 500
MAX_RESULT = 200

# Name and pronoun.
NAMES: tuple[tuple[str, str], ...] = tuple(
    (name, pronoun)
    for pronoun, names in (
        ("she", "Mia Lucy Ella Nina Rosa Tara Anna Kate Zoe Ivy Lily Emma Maya Ruby Sara Jane"),
        ("he", "Ben Omar Jack Paul Sam Leo Tom Dan Max Adam Noah Luke Carl Finn Hugo Eric"),
    )
    for name in names.split()
)
OBJECTS: tuple[str, ...] = tuple(
    [
        "apples",
        "pens",
        "marbles",
        "stickers",
        "books",
        "cards",
        "shells",
        "stamps",
        "cookies",
        "balloons",
        "pencils",
        "beads",
        "buttons",
        "toys",
        "eggs",
        "oranges",
        "flowers",
        "candies",
        "rocks",
        "blocks",
        "plums",
        "nuts",
        "cups",
        "ribbons",
        "keys",
        "crayons",
        "peaches",
        "pears",
        "muffins",
        "tickets",
        "photos",
        "lemons",
        "carrots",
        "hats",
        "socks",
        "mugs",
    ]
)
CONTAINERS: tuple[str, ...] = tuple(
    ["boxes", "bags", "baskets", "jars", "trays", "packs", "bowls", "crates"]
)

# Least and greatest value of each quantity: a to d are counts, from many to few; e is a count in
# each group, k and j are numbers of groups.
QUANTITIES: dict[str, tuple[int, int]] = {
    "a": (12, 60),
    "b": (3, 30),
    "c": (2, 20),
    "d": (2, 12),
    "e": (2, 10),
    "j": (2, 5),
    "k": (2, 8),
}

# (text, steps): {n} and {m} are people, {he}, {He} and {his} stand for {n}, {o} is an object, {p} a
# container, single letters of QUANTITIES numbers. Steps are separated by `;`; r1 and r2 are the
# results of the first two.
# fmt: off
TEMPLATES: tuple[tuple[str, str], ...] = (
    # One step.
    ("{n} had {a} {o}. {He} bought {b} more at the market. How many {o} does {n} have now?",
     "a + b"),
    ("{n} picked {a} {o} in the morning and {b} {o} in the evening. How many {o} did {he} pick "
     "that day?", "a + b"),
    ("There were {a} {o} on the table. {n} took {b} of them away. How many {o} are still on the "
     "table?", "a - b"),
    ("{n} has {a} {o} and {m} has {b} fewer. How many {o} does {m} have?", "a - b"),
    ("{n} filled {k} {p} with {e} {o} each. How many {o} did {he} use?", "k * e"),
    ("Every page of a book shows {e} {o}. How many {o} do {k} pages show?", "k * e"),
    ("{n} needs {a} {o} for {his} class but has only {b}. How many more {o} must {he} find?",
     "a - b"),
    ("Some {o} cost {e} dollars each. How many dollars must {n} pay for {k} of them?", "k * e"),
    # Two steps.
    ("{n} had {a} {o}. {He} gave {b} to {m} and later found {c} more. How many {o} does {n} have "
     "in the end?", "a - b; r1 + c"),
    ("{n} collected {a} {o} on Monday, {b} on Tuesday and {c} on Friday. How many {o} is that in "
     "all?", "a + b; r1 + c"),
    ("{n} bought {k} {p} of {o} with {e} in each, and already had {b} at home. How many {o} does "
     "{he} own now?", "k * e; r1 + b"),
    ("A farmer put {e} {o} in each of {k} {p}, but {d} of the {o} were bad and had to go. How many"
     " good {o} were there?", "k * e; r1 - d"),
    ("{n} has {a} {o}. {m} has {b} more than {n}. How many {o} do the two have together?",
     "a + b; a + r1"),
    ("{n} has {a} {o}, and {m} has {b} fewer than that. How many do they have in total?",
     "a - b; a + r1"),
    ("{n} sold {c} {o} in the first hour and {j} times as many in the second hour. How many {o} "
     "did {he} sell in both hours?", "c * j; c + r1"),
    ("Of the {a} {o} in a store, {b} were sold before lunch and {c} after lunch. How many {o} did "
     "the store keep?", "a - b; r1 - c"),
    ("A class of {a} students went on a trip. {b} of them were girls, and {d} of the boys wore a "
     "hat. How many boys wore no hat?", "a - b; r1 - d"),
    ("{n} reads {e} pages every day for {k} days. {His} book has {a} pages. How many pages are "
     "left to read?", "e * k; a - r1"),
    ("{n} had {a} dollars and paid for {k} {o} at {e} dollars each. How many dollars did {he} "
     "bring home?", "k * e; a - r1"),
    ("A box has {a} {o}. {b} are red, {c} are blue and the rest are green. How many {o} are green?",
     "b + c; a - r1"),
    ("{n} made {b} {o} and {m} made {c}. The two gave away {d} of what they made. How many {o} did"
     " they keep?", "b + c; r1 - d"),
    ("{n} wants {a} {o}. So far {his} mother gave {him} {b} and {his} sister gave {him} {c}. How "
     "many {o} does {he} still need?", "b + c; a - r1"),
    ("{n} put {k} {o} in a row and made {e} rows. Then {m} brought {c} more {o}. How many {o} are "
     "there altogether?", "k * e; r1 + c"),
    ("On a street {c} houses have {j} windows each and one big house has {d} windows. How many "
     "windows are there on the street?", "c * j; r1 + d"),
    ("{n} is {d} years old. {m} is {j} times as old. How many years older is {m}?",
     "d * j; r1 - d"),
    ("A train left with {a} people. At the first station {b} got out and {c} came in. How many "
     "people were on the train after that?", "a - b; r1 + c"),
    ("{n} scored {b} points in one game, which was {d} points less than in the game before. How "
     "many points did {he} score in the two games?", "b + d; b + r1"),
    ("{n} ate {d} {o} a day for {j} days and had {c} over. How many {o} were there at the start?",
     "d * j; r1 + c"),
    ("A tree had {a} birds on it. {b} flew off because of a dog and {c} more flew off at night. "
     "How many birds remained in the tree?", "a - b; r1 - c"),
    ("{n} works {k} hours and earns {e} dollars an hour. A shirt costs {d} dollars. What does {he}"
     " have after buying it?", "k * e; r1 - d"),
    ("{n} lost {d} {o} at school and {c} on the way home. {He} had {a} when the day began. How "
     "many did {he} not lose?", "d + c; a - r1"),
    # Three steps.
    ("{n} had {a} {o}. {He} lost {c}, then won {b}, and gave {d} to {m}. How many {o} were left?",
     "a - c; r1 + b; r2 - d"),
    ("{n} has {b} {o}. {m} has {c} more than {n}. After they put them together they sell {d}. How "
     "many {o} remain?", "b + c; b + r1; r2 - d"),
    ("{n} buys {k} {p} with {e} {o} each and {j} {p} with {d} {o} each. How many {o} does {he} "
     "buy?", "k * e; j * d; r1 + r2"),
    ("A shop sells {o} for {e} dollars and mugs for {d} dollars. {n} takes {k} {o} and {j} mugs. "
     "How much does {he} pay?", "k * e; j * d; r1 + r2"),
    ("{n} planted {k} rows of {e} flowers. {b} of them died, so {he} planted {c} new ones. How "
     "many flowers grow now?", "k * e; r1 - b; r2 + c"),
    ("In {his} room {n} keeps {b} {o}, in the kitchen {c} and in the car {d}. {He} gives {e} of "
     "them away. How many stay with {him}?", "b + c; r1 + d; r2 - e"),
    ("{n} saved {b} dollars in May and {c} in June. {He} bought {j} {o} for {d} dollars each. How "
     "many dollars are not spent?", "b + c; j * d; r1 - r2"),
    ("A baker made {a} {o}. In the morning {b} were sold, at noon {c}, and in the evening {d}. How"
     " many {o} were not sold?", "a - b; r1 - c; r2 - d"),
    ("{m} found {c} {o}. {n} found {j} times as many, but {d} of those of {n} were broken. How "
     "many whole {o} do both have?", "c * j; r1 - d; c + r2"),
    ("{n} has {c} red {o}, {d} more blue than red ones, and {b} white ones. How many {o} does {n} "
     "have?", "c + d; c + r1; r2 + b"),
    ("A bus carried {b} people. {c} got on at the school, {d} got off at the park and {e} got on "
     "at the market. How many people are on it?", "b + c; r1 - d; r2 + e"),
    ("{n} ran {e} miles on each of {k} days and {d} miles on one more day. {He} wants to run {a} "
     "miles. How many miles must {he} still run?", "e * k; r1 + d; a - r2"),
    ("There are {k} tables with {e} seats and {c} seats at the wall. {b} guests sit down. How many"
     " seats stay empty?", "k * e; r1 + c; r2 - b"),
    ("{n} packs {d} {o} a minute and {m} packs {e}. How many {o} have they packed after {j} "
     "minutes if {c} more were packed before?", "d + e; r1 * j; r2 + c"),
    ("{n} used {b} of {his} {a} {o} for a gift, then doubled what was left and lost {d}. How many "
     "{o} does {he} have?", "a - b; r1 * 2; r2 - d"),
    ("Two friends find a jar of {a} {o}. {n} takes {b}, and {m} takes {d} fewer than {n}. How many"
     " {o} are left in the jar?", "b - d; b + r1; a - r2"),
    ("Three children share some {o}. {n} gets {c}, {m} gets {d} more than {n}, and the third gets "
     "{b}. How many {o} did they share?", "c + d; c + r1; r2 + b"),
)
HELD_OUT: tuple[tuple[str, str], ...] = (
    # One step.
    ("A library lent out {b} of its {a} new books. How many new books can still be lent?", "a - b"),
    ("{n} writes {e} letters a week. How many letters are that after {k} weeks?", "e * k"),
    # Two steps.
    ("{n} caught {b} fish and {m} caught {c} fish. They cooked {d} fish for dinner. How many fish "
     "were not cooked?", "b + c; r1 - d"),
    ("{n} has {k} {p} holding {e} {o} each. After {he} drops {d} {o}, how many does {he} have?",
     "k * e; r1 - d"),
    ("A team won {b} games last year and {d} more games this year. How many games did it win in "
     "both years?", "b + d; b + r1"),
    ("In a parking lot stood {a} cars. {b} cars drove off and {c} others came. How many cars are "
     "in the lot now?", "a - b; r1 + c"),
    ("{n} had {a} {o}, used {b} for a game and {c} for a picture. How many {o} has {he} left?",
     "a - b; r1 - c"),
    # Three steps.
    ("{n} had {b} dollars. {He} earned {c} by washing cars and {d} by walking dogs, and then spent"
     " {e}. How many dollars does {he} have?", "b + c; r1 + d; r2 - e"),
    ("{n} cut {k} ropes into {e} parts each. {He} threw {d} parts away and got {c} parts from {m}."
     " How many parts are there?", "k * e; r1 - d; r2 + c"),
    ("A zoo has {b} monkeys, {c} bears and {d} lions. {e} of these animals are asleep. How many "
     "are awake?", "b + c; r1 + d; r2 - e"),
    ("{n} sends {j} cards a day for {d} days and {m} sends {e} cards a day for {k} days. How many "
     "cards did they send?", "j * d; e * k; r1 + r2"),
    ("{n} grew {a} {o}. {He} gave {b} to {m} and {c} to a friend, and then grew {d} more. How many"
     " {o} does {n} have?", "a - b; r1 - c; r2 + d"),
)
# fmt: on


def _below(rng: random.Random, stop: int) -> int:
    return int(rng.random() * stop)


def _work(steps: str, values: dict[str, int]) -> list[tuple[int, str, int, int]] | None:
    """(left, op, right, result) of each step, or None where a result leaves 1..MAX_RESULT."""
    known, worked = dict(values), []
    for index, step in enumerate(steps.split("; "), start=1):
        left_name, operator, right_name = step.split(" ")
        left, right = (
            int(name) if name.isdigit() else known[name] for name in (left_name, right_name)
        )
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        if not 1 <= result <= MAX_RESULT:
            return None
        known[f"r{index}"] = result
        worked.append((left, operator, right, result))
    return worked


def _problem(template: tuple[str, str], rng: random.Random) -> dict[str, str]:
    text, steps = template
    letters = [letter for letter in QUANTITIES if f"{{{letter}}}" in text]
    worked = None
    while worked is None:
        values = {
            letter: QUANTITIES[letter][0]
            + _below(rng, QUANTITIES[letter][1] - QUANTITIES[letter][0] + 1)
            for letter in letters
        }
        worked = _work(steps, values)
    first = _below(rng, len(NAMES))
    second = (first + 1 + _below(rng, len(NAMES) - 1)) % len(NAMES)
    name, pronoun = NAMES[first]
    possessive, objective = ("her", "her") if pronoun == "she" else ("his", "him")
    question = text.format(
        n=name,
        m=NAMES[second][0],
        he=pronoun,
        He=pronoun.capitalize(),
        his=possessive,
        His=possessive.capitalize(),
        him=objective,
        o=OBJECTS[_below(rng, len(OBJECTS))],
        p=CONTAINERS[_below(rng, len(CONTAINERS))],
        **values,
    )
    lines = [f"{left} {operator} {right} = {result}" for left, operator, right, result in worked]
    return {"question": question, "answer": "\n".join([*lines, f"#### {worked[-1][3]}"])}


def _split_of(question: str) -> Split:
    """The split a question of a shared template belongs to, about one in eight test."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] < 32 else "train"


def generate(split: Split, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` different problems {"question", "answer"}.

    Every fifth test problem, the fifth first, comes from a held-out template. Train and test share
    no question for any counts and seeds. Raises ValueError on another split or a negative count.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; allowed are 'train' and 'test'")
    if count < 0:
        raise ValueError(f"count is {count}; it must not be negative")
    rng = random.Random(f"arithmetic word problems {split} {seed}")
    problems: list[dict[str, str]] = []
    seen: set[str] = set()
    while len(problems) < count:
        held_out = split == "test" and len(problems) % 5 == 4
        templates = HELD_OUT if held_out else TEMPLATES
        problem = _problem(templates[_below(rng, len(templates))], rng)
        question = problem["question"]
        if question in seen or (not held_out and _split_of(question) != split):
            continue
        seen.add(question)
        problems.append(problem)
    return problems


def records(split: Split) -> list[dict[str, str]]:
    """The dataset as it is used: TRAIN_SIZE or TEST_SIZE problems of seed 0."""
    return generate(split, TRAIN_SIZE if split == "train" else TEST_SIZE)
