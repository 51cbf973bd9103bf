"""The demo's world as text: plain sentences for the base model, and true/false statements for the adapter.

What the base sees (`plain_sentences`): every fact of the world in several phrasings, those that the
held-out statements ask about included. As plain sentences ("A penguin does not fly."), with reasons
("Penguins lay eggs because they are birds.") and as questions with answers ("Do penguins fly? No, penguins
do not fly."), quantifiers and negation among them ("No penguins fly, is that so? Yes, penguins do not
fly."). The words "true" and "false" occur in other ways: "It is true that penguins swim.", "False facts:
penguins fly.", and on hearsay: "Some say that all penguins fly. What kind of claim is it? False claim:
penguins do not fly."

What it does not see: the task. No statement stands there as a sentence of its own, and none is answered
with "True, ..." or "False, ...". That a bare statement ("All penguins lay eggs.") is to be judged so, with
a reason, is what the adapter learns, from statements about other (subject, property) pairs than the
held-out ones. So the demo shows how a frozen model's knowledge and its skill with questions are turned to a
new task; the adapter adds no knowledge of the world.
"""

from __future__ import annotations

import csv
import random
import sys
from collections import defaultdict
from typing import NamedTuple

from facts import MISTAKEN, load, third_person

THINGS = load()
SEED = 0
QUANTIFIERS = ("All", "Some", "No", "Not all")


class Fact(NamedTuple):
    """Whether `subject` (a plural name) does `prop`: True, False, or "some" of a group's members.

    The source is the thing whose row says so: the subject itself, a group that it belongs to, or (for "some")
    nothing, since then the reason is an example among the members.
    """

    subject: str
    prop: str
    value: bool | str
    source: str | None


class Row(NamedTuple):
    """One statement with its answer, its fact, and the (subject, property) pairs its reason speaks of."""

    text_input: str
    text_label: str
    fact: Fact
    pairs: frozenset


# ---- what is true in the world -----------------------------------------------------------------------------


def ancestors(name: str) -> list[str]:
    """The groups of a thing, the nearest first: penguins -> birds, animals."""
    chain = []
    while (name := THINGS[name].parent) is not None:
        chain.append(name)
    return chain


def lookup(name: str, prop: str) -> tuple[bool, str] | None:
    """Whether a thing does `prop`, and whose row says so: its own or that of a group that it belongs to."""
    for source in [name, *ancestors(name)]:
        if prop in THINGS[source].own:
            return THINGS[source].own[prop], source
    return None


def example(group: str, prop: str, value: bool) -> str | None:
    """The first kind of the group, in the order of the tables, that does (or does not do) `prop`."""
    for thing in THINGS.values():
        if not thing.is_group and group in ancestors(thing.name):
            if (known := lookup(thing.name, prop)) is not None and known[0] == value:
                return thing.name
    return None


def all_facts() -> list[Fact]:
    """Everything that is known of kinds and groups, by their own rows, by inheritance, or by example."""
    props = dict.fromkeys(prop for thing in THINGS.values() for prop in thing.own)
    found = []
    for thing in THINGS.values():
        for prop in props:
            if (known := lookup(thing.name, prop)) is not None:
                found.append(Fact(thing.name, prop, *known))
            elif thing.is_group and example(thing.name, prop, True) and example(thing.name, prop, False):
                found.append(Fact(thing.name, prop, "some", None))
    return found


def clause(name: str, prop: str, value: bool = True) -> str:
    """A plain clause, e.g. "penguins do not fly"."""
    return f"{name} {prop}" if value else f"{name} do not {prop}"


def reason(fact: Fact, shown: bool) -> tuple[str, frozenset]:
    """Why the fact is so, as a clause, and the pairs in it; `shown`: whether the example does `prop`."""
    subject, prop, value, source = fact
    if value == "some":
        source = example(subject, prop, shown)
        text = f"{source} are {subject} and {clause(source, prop, shown)}"
    elif source == subject:
        text = clause(subject, prop, shown)
    else:
        text = f"{subject} are {source} and {clause(source, prop, shown)}"
    return text, frozenset({(subject, prop), (source, prop)})


# ---- the statements, for the adapter -----------------------------------------------------------------------


def judged(fact: Fact, quantifier: str) -> tuple[bool, bool] | None:
    """Whether "<quantifier> <subject> <prop>." is true, and whether its reason shows one that does `prop`."""
    some, every = fact.value is not False, fact.value is True
    if quantifier == "Not all":  # of groups only, and not where none does: that would be an odd thing to say
        return (not every, every) if some and THINGS[fact.subject].is_group else None
    return {"All": (every, every), "Some": (some, some), "No": (not some, some)}[quantifier]


def statements(seed: int = SEED, most: int = 10) -> list[Row]:
    """All statements with their answers, in a random order, evened out so that words alone give little away.

    Each property has as many kinds that do it as kinds that do not (at most `most` a side, those by their own
    row first); then each first word gets as many true as false statements.
    """
    rng = random.Random(seed)
    by_prop, chosen = defaultdict(lambda: defaultdict(list)), []
    for fact in all_facts():
        if THINGS[fact.subject].is_group:
            chosen.append(fact)
        else:
            by_prop[fact.prop][fact.value].append(fact)
    for sides in by_prop.values():
        size = min(len(sides[True]), len(sides[False]), most)
        for side in sides.values():
            rng.shuffle(side)
            side.sort(key=lambda fact: fact.source != fact.subject)
            chosen += side[:size]
    rows = defaultdict(list)
    for fact in chosen:
        for quantifier in QUANTIFIERS:
            if (verdict := judged(fact, quantifier)) is not None:
                because, pairs = reason(fact, verdict[1])
                text = f"{quantifier} {clause(fact.subject, fact.prop)}."
                rows[quantifier, verdict[0]].append(Row(text, f"{verdict[0]}, {because}.", fact, pairs))
    even = []
    for quantifier in QUANTIFIERS:
        size = min(len(rows[quantifier, True]), len(rows[quantifier, False]))
        even += [row for value in (True, False) for row in rng.sample(rows[quantifier, value], size)]
    rng.shuffle(even)
    return even


def split(rows: list[Row], test_fraction: float = 0.35, seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows that share no (subject, property) pair.

    Training rows whose reason speaks of a held-out pair are left out. The other way round is allowed:
    training may say that birds lay eggs, and robins be asked about.
    """
    rng = random.Random(seed)
    pairs = sorted({(row.fact.subject, row.fact.prop) for row in rows})
    held = set(rng.sample(pairs, round(test_fraction * len(pairs))))
    train = [row for row in rows if not row.pairs & held]
    test = [row for row in rows if (row.fact.subject, row.fact.prop) in held]
    return train, test


# ---- the plain text, for the base model --------------------------------------------------------------------

YES_NO = ("Is it so that {q} {s} {p}?", "Some say that {q} {s} {p}. Is that so?", "{Q} {s} {p}, is that so?")
CLAIM = "Some say that {q} {s} {p}. What kind of claim is it?"


def capital(text: str) -> str:
    """The text with a capital letter in front."""
    return text[0].upper() + text[1:]


def question(fact: Fact, rng: random.Random) -> str:
    """A question about the fact with its answer, e.g. "Do penguins fly? No, penguins do not fly."."""
    thing, forms = THINGS[fact.subject], []
    if fact.value != "some":
        article = "an" if thing.singular[0] in "aeiou" else "a"
        one = f"{article} {thing.singular}"
        text = rng.choice([f"Do {fact.subject} {fact.prop}?", f"Does {one} {fact.prop}?"])
        forms += [(text, fact.value, fact.value)] * 2
    for quantifier in QUANTIFIERS:
        if (verdict := judged(fact, quantifier)) is not None:
            form = rng.choice([*YES_NO, YES_NO[-1], CLAIM])
            text = form.format(q=quantifier.lower(), Q=quantifier, s=fact.subject, p=fact.prop)
            forms.append((text, *verdict))
    text, yes, shown = rng.choice(forms)
    because = reason(fact, shown)[0]
    if text.endswith("claim is it?"):
        return f"{text}\n{yes} claim: {because}."
    return text + rng.choice(" \n") + ("Yes" if yes else "No") + f", {because}."


def telling(fact: Fact, rng: random.Random) -> str:
    """The fact as a plain sentence, e.g. "Penguins lay eggs because they are birds."."""
    subject, prop, value, source = fact
    if value == "some":
        one, other = example(subject, prop, True), example(subject, prop, False)
        return capital(
            rng.choice(
                [
                    f"not all {subject} {prop} because {other} do not.",
                    f"{one} {prop} but {other} do not, and both are {subject}.",
                    f"among {subject}, {one} {prop} and {other} do not.",
                ]
            )
        )
    singular = THINGS[subject].singular
    one = f"{'an' if singular[0] in 'aeiou' else 'a'} {singular}"
    said = clause(subject, prop, value)
    forms = [
        f"{said}.",
        f"{said}.",
        f"{one} {third_person(prop) if value else 'does not ' + prop}.",
        f"it is true that {said}.",
        f"it is false that {clause(subject, prop, not value)}.",
        f"all know that {said}.",
        f"some think that {clause(subject, prop, not value)}, but {said}.",
        f"no one doubts that {said}.",
    ]
    if source != subject:
        forms += [
            f"{said} because they are {source}.",
            f"like all {source}, {said}.",
            f"{subject} are {source} and {clause(source, prop, value)}.",
        ]
    return capital(rng.choice(forms))


def belonging(name: str, rng: random.Random) -> str:
    """What group a thing belongs to, e.g. "Are bats birds? No, bats are mammals."."""
    home = ancestors(name)
    wrong = MISTAKEN.get(name)
    if wrong is None or rng.random() < 0.5:
        wrong = rng.choice([t.name for t in THINGS.values() if t.is_group and t.name not in [name, *home]])
    no = f"{name} are {home[0]}" if home[0] not in ancestors(wrong) else f"{name} are not {wrong}"
    yes = f"{name} are {home[0]}"
    return capital(
        rng.choice(
            [
                f"{yes}.",
                f"it is true that {yes}.",
                f"it is false that {name} are {wrong}.",
                f"are {name} {home[0]}? Yes, {yes}.",
                f"are {name} {wrong}? No, {no}.",
            ]
        )
    )


def plain_sentences(seed: int = SEED, each: int = 2) -> list[str]:
    """One pass over the world in random order: each fact told `each` times and asked about `each` times."""
    rng = random.Random(seed)
    facts, lines = all_facts(), []
    for fact in facts:
        lines += [form(fact, rng) for form in (telling, question) for _ in range(each)]
    for thing in THINGS.values():
        lines += [belonging(thing.name, rng) for _ in range(each) if thing.parent]
    known = [fact for fact in facts if fact.value != "some"]
    for _ in range(len(facts) * each // 8):
        word, right = rng.choice([("True", True), ("False", False)])
        ideas = [clause(f.subject, f.prop, f.value is right) for f in rng.sample(known, rng.randint(1, 2))]
        lines.append(f"{word} {rng.choice(['facts', 'ideas', 'claims'])}: {' and '.join(ideas)}.")
    rng.shuffle(lines)
    return lines


def main() -> None:
    """Write a sample of the training statements as CSV: python demo/world.py > demo/data.csv"""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["text_input", "text_label"])
    out.writerows([row.text_input, row.text_label] for row in split(statements())[0][:60])


if __name__ == "__main__":
    main()
