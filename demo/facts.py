"""The facts of the demo's small world, in tables meant to be read.

A *group* ("birds") says what all its members do, and what none of them does; members inherit both. A *kind*
("penguins") adds what is its own. What is written nowhere is unknown and never used. Only facts that hold
for the kind as people normally understand it are listed; borderline ones (do cats swim?) were left out on
purpose. Every property is a plural verb phrase, so that "penguins" + "do not" + "lay eggs" is always a
sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# group (singular) < the group it belongs to | what all members do | what no member does
GROUPS = """
animal           | need water, grow | have wheels, have an engine, have petals, have roots, run on rails
bird < animal    | have feathers, have wings, lay eggs, have a beak, have lungs \
                 | have fur, have gills, have four legs, have hooves, drink milk when young, have a handle, \
                   sting
mammal < animal  | have lungs, drink milk when young \
                 | have feathers, have gills, have six legs, come from plants
fish < animal    | have fins, have gills, swim \
                 | have feathers, have fur, have hooves, have four legs, make music, drink milk when young
insect < animal  | have six legs | have feathers, have lungs, have hooves, have fins, have four legs, \
                   drink milk when young
reptile < animal | have scales, have lungs | have feathers, have fur, have gills, have hooves, have six legs
plant            | need water, grow | fly, lay eggs, have wheels, have an engine, have feathers
tree < plant     | have roots, have a trunk | grow from bulbs, swim, have strings, travel on water
flower < plant   | have roots, have petals | have a trunk, have needles, cut things, carry people or goods
fruit            | come from plants | have feathers, have lungs, have strings, have a handle, make music
vehicle          | carry people or goods | grow, lay eggs, have lungs, eat grass, have a beak
tool             | help people work | grow, need water, have gills, eat meat, make music
instrument       | make music | grow, need water, have petals, carry people or goods, drink milk when young
"""

# kind (singular, or singular/plural) | what it does | what it does not do
KINDS = {
    "birds": """
robin      | fly                    | swim, live in the sea
sparrow    | fly                    | swim, dig holes
eagle      | fly, eat meat          | eat grass
owl        | fly, eat meat          | swim, eat grass
parrot     | fly                    | swim, live in the sea
duck       | fly, swim              | climb trees
goose/geese | fly, swim, eat grass  | eat meat, climb trees
swan       | fly, swim              | climb trees
penguin    | swim                   | fly, climb trees, eat grass
ostrich    | eat grass              | fly, climb trees, live in the sea
emu        | eat grass              | fly, climb trees, live in the sea
""",
    "mammals": """
dog        | have fur, have four legs, eat meat           | fly, lay eggs, have hooves, have wings
cat        | have fur, have four legs, eat meat, climb trees | fly, lay eggs, have hooves, live in the sea
cow        | have four legs, have hooves, eat grass       | fly, eat meat, climb trees, lay eggs
horse      | have four legs, have hooves, eat grass       | eat meat, climb trees, have wings
sheep/sheep| have four legs, have hooves, eat grass       | eat meat, fly, lay eggs
goat       | have four legs, have hooves, eat grass       | eat meat, have wings, live in the sea
zebra      | have four legs, have hooves, eat grass, have stripes | eat meat, climb trees
lion       | have fur, have four legs, eat meat           | eat grass, have hooves, have stripes, have a trunk
tiger      | have fur, have four legs, eat meat, have stripes | eat grass, have hooves, lay eggs
wolf/wolves| have fur, have four legs, eat meat           | have hooves, have stripes, climb trees, fly
elephant   | have a trunk, have four legs, eat grass      | eat meat, fly, climb trees, have stripes
giraffe    | have four legs, have hooves                  | eat meat, have a trunk, have stripes, climb trees
monkey     | have fur, climb trees                        | have hooves, have wings, lay eggs, live in the sea
squirrel   | have fur, have four legs, climb trees        | have hooves, lay eggs, have a trunk
rabbit     | have fur, have four legs, eat grass, dig holes | eat meat, have hooves, climb trees, lay eggs
mole       | have fur, have four legs, dig holes          | climb trees, have hooves, fly
bat        | fly, have wings, have fur                    | lay eggs, have four legs, have hooves
dolphin    | swim, live in the sea, have fins             | have fur, have four legs, lay eggs, climb trees
whale      | swim, live in the sea, have fins             | have fur, have four legs, climb trees, have wings
otter      | swim, have fur, have four legs               | have hooves, fly, eat grass
platypus   | lay eggs, swim, have fur, have four legs     | fly, have hooves, climb trees
""",
    "fish": """
shark      | live in the sea, eat meat              | fly, climb trees, eat grass
herring    | live in the sea, lay eggs, have scales | climb trees, dig holes
cod/cod    | live in the sea, lay eggs, have scales | have a shell, eat grass
goldfish/goldfish | lay eggs, have scales           | live in the sea, climb trees, fly
carp/carp  | lay eggs, have scales                  | live in the sea, have wings, climb trees
trout/trout | lay eggs, have scales                 | have wings, eat grass, have a shell
""",
    "insects": """
bee        | fly, have wings, sting     | swim, live in the sea, eat grass
wasp       | fly, have wings, sting     | swim, live in the sea, have a shell
butterfly  | fly, have wings, lay eggs  | sting, swim, eat meat
moth       | fly, have wings, lay eggs  | sting, swim
mosquito/mosquitoes | fly, have wings, lay eggs | eat grass, dig holes
flea       | lay eggs                   | fly, have wings, swim, eat grass
ladybird   | fly, have wings, lay eggs  | sting, live in the sea
grasshopper | eat grass, lay eggs       | sting, live in the sea
""",
    "reptiles": """
snake      | eat meat                                    | have four legs, fly, have a shell, eat grass
crocodile  | swim, eat meat, have four legs, lay eggs    | fly, have a shell, have wings
turtle     | swim, have a shell, lay eggs, have four legs | fly, climb trees, have wings
tortoise   | have a shell, lay eggs, have four legs, eat grass | swim, fly, climb trees
gecko      | climb trees, lay eggs, have four legs       | have a shell, fly, have a beak
""",
    "animals": """
frog       | swim, lay eggs, have four legs | fly, have feathers, have wings, have fur
snail      | have a shell, lay eggs         | fly, have four legs, have six legs, have wings
spider     | lay eggs                       | fly, have wings, have six legs, have feathers
""",
    "trees": """
oak        |                                | have needles, stay green in winter, have thorns
birch      |                                | have needles, stay green in winter, have thorns
maple      |                                | have needles, stay green in winter, have thorns
willow     |                                | have needles, stay green in winter
pine       | have needles, stay green in winter | have petals, have thorns
fir        | have needles, stay green in winter | have petals
spruce     | have needles, stay green in winter | have petals
hawthorn   | have thorns                    | have needles, stay green in winter
""",
    "flowers": """
rose       | have thorns                    | grow from bulbs
tulip      | grow from bulbs                | have thorns, stay green in winter
lily       | grow from bulbs                | have thorns
daffodil   | grow from bulbs                | have thorns, stay green in winter
daisy      |                                | have thorns, grow from bulbs
sunflower  |                                | have thorns, grow from bulbs, stay green in winter
""",
    "fruits": """
apple      | grow on trees                  | have a stone
pear       | grow on trees                  | have a stone, taste sour
cherry     | grow on trees, have a stone    | have wings
plum       | grow on trees, have a stone    | have a shell
peach      | grow on trees, have a stone    | taste sour
orange     | grow on trees                  | have a stone
lemon      | grow on trees, taste sour      | have a stone
lime       | grow on trees, taste sour      | have a stone
melon      |                                | grow on trees, taste sour, have a stone
strawberry |                                | grow on trees, have a stone
grape      |                                | grow on trees, have a stone
pineapple  |                                | grow on trees, have a stone
""",
    "vehicles": """
car        | have wheels, have an engine    | fly, run on rails, travel on water, have wings
bus        | have wheels, have an engine    | fly, run on rails, travel on water
truck      | have wheels, have an engine    | fly, run on rails, travel on water, have wings
tractor    | have wheels, have an engine    | fly, run on rails, have wings
train      | have wheels, run on rails      | fly, travel on water, have wings
tram       | have wheels, run on rails      | fly, travel on water
bicycle    | have wheels                    | have an engine, fly, run on rails, travel on water
ship       | travel on water                | have wheels, run on rails, have wings
ferry      | travel on water, have an engine | have wheels, run on rails, fly
canoe      | travel on water                | have wheels, have an engine, run on rails
raft       | travel on water                | have wheels, have an engine, fly
plane      | fly, have wings, have an engine, have wheels | run on rails, have feathers
helicopter | fly, have an engine            | run on rails, travel on water
glider     | fly, have wings                | have an engine, run on rails, have feathers
sledge     |                                | have wheels, have an engine, fly, run on rails
""",
    "tools": """
hammer     | have a handle                  | cut things, dig holes, have wheels
saw        | have a handle, cut things      | dig holes, have wings
axe        | have a handle, cut things      | dig holes, fly
knife/knives | have a handle, cut things    | dig holes, have wheels
chisel     | have a handle, cut things      | have an engine
shovel     | have a handle, dig holes       | have an engine, fly
spade      | have a handle, dig holes       | have an engine, have strings
rake       | have a handle                  | cut things, have wheels
screwdriver | have a handle                 | cut things, dig holes, have strings
""",
    "instruments": """
guitar     | have strings                   | have a mouthpiece, need a bow
violin     | have strings, need a bow       | have a mouthpiece
cello      | have strings, need a bow       | have a mouthpiece, fly
harp       | have strings                   | have a mouthpiece, need a bow
piano      | have strings                   | have a mouthpiece, need a bow
trumpet    | have a mouthpiece              | have strings, need a bow
trombone   | have a mouthpiece              | have strings, need a bow
clarinet   | have a mouthpiece              | have strings, need a bow
drum       |                                | have a mouthpiece, need a bow, have wings
""",
}

# What people mix up: kinds and the group they do not belong to (for the others a wrong group is drawn).
MISTAKEN = {
    "bats": "birds",
    "whales": "fish",
    "dolphins": "fish",
    "spiders": "insects",
    "penguins": "fish",
    "snails": "insects",
    "otters": "fish",
    "platypuses": "birds",
    "turtles": "fish",
    "frogs": "reptiles",
}


@dataclass(frozen=True)
class Thing:
    """A kind or a group: its names, the group it belongs to, what it does (True) and does not do (False)."""

    name: str
    singular: str
    parent: str | None
    is_group: bool
    own: dict[str, bool] = field(hash=False)


def plural(noun: str) -> str:
    """The regular English plural of `noun`."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "ch", "sh", "x")) else "s")


def third_person(prop: str) -> str:
    """The property of one: "lays eggs" for "lay eggs"."""
    verb, _, rest = prop.partition(" ")
    verb = "has" if verb == "have" else plural(verb)
    return f"{verb} {rest}".strip()


def _names(cell: str) -> tuple[str, str]:
    """The (plural, singular) of a table cell such as "goose/geese" or "robin"."""
    singular, _, irregular = cell.strip().partition("/")
    return irregular or ("fish" if singular == "fish" else plural(singular)), singular


def _own(does: str, does_not: str) -> dict[str, bool]:
    """The two property cells of a row as one dictionary."""
    own = {}
    for cell, value in ((does, True), (does_not, False)):
        own.update({prop: value for prop in (" ".join(part.split()) for part in cell.split(",")) if prop})
    return own


def load() -> dict[str, Thing]:
    """All groups and kinds by their plural name, in the order of the tables."""
    things = {}
    for row in GROUPS.strip().splitlines():
        head, does, does_not = row.split("|")
        child, _, parent = head.partition("<")
        name, singular = _names(child)
        belongs_to = _names(parent)[0] if parent else None
        things[name] = Thing(name, singular, belongs_to, True, _own(does, does_not))
    for group, table in KINDS.items():
        for row in table.strip().splitlines():
            head, does, does_not = row.split("|")
            name, singular = _names(head)
            if name in things:
                raise ValueError(f"{name} is listed twice")
            things[name] = Thing(name, singular, group, False, _own(does, does_not))
    return things
