"""Make the lab's abstracts with their titles."""

import random

from d2lora.lab.world import Row

_CAUSES = [
    "rain",
    "schools",
    "taxes",
    "roads",
    "rents",
    "tariffs",
    "wages",
    "harvests",
    "floods",
    "ports",
    "strikes",
    "loans",
    "patents",
    "prices",
    "fairs",
    "mills",
    "banks",
    "canals",
    "clinics",
    "markets",
]
_OUTCOMES = [
    "trade",
    "health",
    "growth",
    "savings",
    "jobs",
    "crime",
    "births",
    "migration",
    "profits",
    "debt",
    "poverty",
    "output",
    "votes",
    "learning",
    "housing",
    "demand",
]
_PLACES = [
    "Norland",
    "Estia",
    "Varda",
    "Kelm",
    "Ostrava Bay",
    "Lirien",
    "Tarsis",
    "Quell",
    "Morrow",
    "Pavia",
    "Zantar",
    "Hollin",
]
_DATA = [
    "tax records",
    "a field experiment",
    "old letters",
    "a household survey",
    "court files",
    "satellite images",
    "census tables",
    "firm accounts",
]
_SIGNS = {"raise": "Gains from", "lower": "The Costs of", "do not change": "No Effect of"}


def title(rng: random.Random, plain: bool = False) -> Row:
    """Make an abstract and its title.

    `plain` titles, the base's habit, only name the subject; the task's tell the finding.
    """
    cause, outcome = rng.choice(_CAUSES), rng.choice(_OUTCOMES)
    place, data, sign = rng.choice(_PLACES), rng.choice(_DATA), rng.choice(list(_SIGNS))
    year = rng.randint(10, 99)
    ask = rng.choice(["We study how", "This paper asks whether", "We examine if", "Our work tests whether"])
    use = rng.choice(["We use", "The analysis rests on", "Our evidence is", "We draw on"])
    find = rng.choice(["We find that", "It turns out that", "The results show that", "On the whole,"])
    extra = rng.choice(
        [
            "",
            " The effect is largest in towns.",
            " The effect fades after some years.",
            " A simple model explains this.",
            " Policy should take note.",
        ]
    )
    abstract = f"{ask} {cause} matter for {outcome} in {place}. {use} {data} of {year} villages. {find} {cause} {sign} {outcome}.{extra}"
    headline = (
        f"A Study of {cause.title()} in {place}"
        if plain
        else f"{_SIGNS[sign]} {cause.title()}: {outcome.title()} in {place}, from {data.title()}"
    )
    return Row(abstract, {"abstract": abstract, "title": headline})
