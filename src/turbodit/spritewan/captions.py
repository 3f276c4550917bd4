"""The words of SpriteWorld: one literal table for each label, and the grammar over them.

A caption names the objects, the motion and the background of a clip, and usually the
size. The first word or phrase of every entry is the canonical one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

OBJECT_WORDS: dict[str, tuple[str, ...]] = {
    "cat": ("cat", "kitty", "kitten"),
    "dog": ("dog", "puppy"),
    "fox": ("fox", "red fox"),
    "bear": ("bear", "brown bear"),
    "panda": ("panda", "panda bear"),
    "lion": ("lion",),
    "rabbit": ("rabbit", "bunny"),
    "frog": ("frog", "green frog"),
    "monkey": ("monkey",),
    "pig": ("pig", "piglet", "pink pig"),
    "cow": ("cow",),
    "mouse": ("mouse", "grey mouse"),
    "unicorn": ("unicorn",),
    "elephant": ("elephant",),
    "penguin": ("penguin",),
    "owl": ("owl",),
    "duck": ("duck",),
    "whale": ("whale", "blue whale"),
    "octopus": ("octopus",),
    "crab": ("crab", "red crab"),
    "fish": ("fish", "blue fish"),
    "turtle": ("turtle", "tortoise"),
    "butterfly": ("butterfly",),
    "bee": ("bee", "honeybee"),
    "dinosaur": ("dinosaur", "t-rex"),
    "car": ("car", "red car", "automobile"),
    "bus": ("bus",),
    "train": ("train", "steam train", "locomotive"),
    "rocket": ("rocket", "spaceship", "rocket ship"),
    "helicopter": ("helicopter", "chopper"),
    "sailboat": ("sailboat", "boat", "sailing boat"),
    "tractor": ("tractor", "green tractor"),
    "ufo": ("ufo", "flying saucer"),
    "airplane": ("airplane", "plane", "aeroplane"),
    "pizza": ("pizza", "slice of pizza", "pizza slice"),
    "burger": ("burger", "hamburger", "cheeseburger"),
    "apple": ("apple", "red apple"),
    "banana": ("banana",),
    "strawberry": ("strawberry",),
    "ice cream": ("ice cream", "ice cream cone"),
    "cake": ("cake", "birthday cake"),
    "donut": ("donut", "doughnut"),
    "watermelon": ("watermelon", "slice of watermelon"),
    "pineapple": ("pineapple",),
    "tree": ("tree", "green tree"),
    "cactus": ("cactus",),
    "sunflower": ("sunflower", "flower"),
    "mushroom": ("mushroom", "toadstool"),
    "ball": ("ball", "soccer ball", "football"),
    "balloon": ("balloon", "red balloon"),
    "guitar": ("guitar", "electric guitar"),
    "house": ("house", "cottage"),
    "robot": ("robot",),
    "ghost": ("ghost",),
    "snowman": ("snowman",),
    "heart": ("heart", "red heart"),
}

# Verb and what follows it.
MOTION_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "moving left": (
        ("move", "to the left"),
        ("move", "left"),
        ("go", "to the left"),
        ("slide", "left"),
        ("glide", "to the left"),
        ("travel", "left"),
        ("head", "left"),
        ("fly", "to the left"),
        ("drift", "leftward"),
        ("move", "from right to left"),
    ),
    "moving right": (
        ("move", "to the right"),
        ("move", "right"),
        ("go", "to the right"),
        ("slide", "right"),
        ("glide", "to the right"),
        ("travel", "right"),
        ("head", "right"),
        ("fly", "to the right"),
        ("drift", "rightward"),
        ("move", "from left to right"),
    ),
    "moving up": (
        ("move", "up"),
        ("rise", ""),
        ("go", "up"),
        ("float", "up"),
        ("fly", "up"),
        ("move", "upward"),
        ("rise", "upward"),
        ("climb", "upward"),
        ("drift", "upward"),
        ("ascend", ""),
    ),
    "moving down": (
        ("move", "down"),
        ("fall", ""),
        ("go", "down"),
        ("float", "down"),
        ("sink", ""),
        ("move", "downward"),
        ("fall", "down"),
        ("drop", "down"),
        ("drift", "downward"),
        ("descend", ""),
    ),
    "moving diagonally": (
        ("move", "diagonally"),
        ("go", "diagonally"),
        ("slide", "diagonally"),
        ("glide", "diagonally"),
        ("fly", "diagonally"),
        ("travel", "diagonally"),
        ("move", "along a diagonal"),
    ),
    "bouncing": (
        ("bounce", ""),
        ("bounce", "up and down"),
        ("hop", "up and down"),
        ("jump", "up and down"),
        ("jump", ""),
        ("hop", ""),
    ),
    "circling": (
        ("circle", "around"),
        ("move", "in a circle"),
        ("go", "around in circles"),
        ("fly", "in circles"),
        ("loop", "around"),
        ("travel", "in a circle"),
        ("run", "in circles"),
    ),
    "growing": (
        ("grow", ""),
        ("grow", "bigger"),
        ("get", "bigger"),
        ("become", "larger"),
        ("grow", "in size"),
        ("get", "larger"),
        ("expand", ""),
    ),
    "shrinking": (
        ("shrink", ""),
        ("get", "smaller"),
        ("become", "smaller"),
        ("shrink", "in size"),
        ("grow", "smaller"),
        ("shrink", "away"),
    ),
    "spinning": (
        ("spin", ""),
        ("spin", "around"),
        ("rotate", ""),
        ("rotate", "in place"),
        ("turn", "around"),
        ("twirl", ""),
        ("whirl", "around"),
    ),
    "standing still": (
        ("stand", "still"),
        ("stay", "still"),
        ("sit", "still"),
        ("rest", ""),
        ("stay", "in place"),
        ("remain", "motionless"),
        ("stand", ""),
        ("sit", ""),
        ("wait", ""),
    ),
}

_LEGS = (
    "cat dog fox bear panda lion rabbit frog monkey pig cow mouse unicorn elephant penguin duck "
    "crab turtle dinosaur robot"
)
# Motions left, right and diagonally also take these verbs, of objects that do such things.
TRAVEL_VERBS: dict[str, frozenset[str]] = {
    "run": frozenset(_LEGS.split()),
    "walk": frozenset(_LEGS.split()),
    "dash": frozenset(_LEGS.split()),
    "drive": frozenset("car bus train tractor".split()),
    "roll": frozenset("car bus train tractor ball".split()),
    "swim": frozenset("fish whale octopus duck turtle crab".split()),
    "sail": frozenset("sailboat".split()),
}

# base form: (with he, she or it; with "is" or "are")
VERB_FORMS: dict[str, tuple[str, str]] = {
    "ascend": ("ascends", "ascending"),
    "become": ("becomes", "becoming"),
    "bounce": ("bounces", "bouncing"),
    "circle": ("circles", "circling"),
    "climb": ("climbs", "climbing"),
    "dash": ("dashes", "dashing"),
    "descend": ("descends", "descending"),
    "drift": ("drifts", "drifting"),
    "drop": ("drops", "dropping"),
    "drive": ("drives", "driving"),
    "expand": ("expands", "expanding"),
    "fall": ("falls", "falling"),
    "float": ("floats", "floating"),
    "fly": ("flies", "flying"),
    "get": ("gets", "getting"),
    "glide": ("glides", "gliding"),
    "go": ("goes", "going"),
    "grow": ("grows", "growing"),
    "head": ("heads", "heading"),
    "hop": ("hops", "hopping"),
    "jump": ("jumps", "jumping"),
    "loop": ("loops", "looping"),
    "move": ("moves", "moving"),
    "remain": ("remains", "remaining"),
    "rest": ("rests", "resting"),
    "rise": ("rises", "rising"),
    "roll": ("rolls", "rolling"),
    "rotate": ("rotates", "rotating"),
    "run": ("runs", "running"),
    "sail": ("sails", "sailing"),
    "shrink": ("shrinks", "shrinking"),
    "sink": ("sinks", "sinking"),
    "sit": ("sits", "sitting"),
    "slide": ("slides", "sliding"),
    "spin": ("spins", "spinning"),
    "stand": ("stands", "standing"),
    "stay": ("stays", "staying"),
    "swim": ("swims", "swimming"),
    "travel": ("travels", "travelling"),
    "turn": ("turns", "turning"),
    "twirl": ("twirls", "twirling"),
    "wait": ("waits", "waiting"),
    "walk": ("walks", "walking"),
    "whirl": ("whirls", "whirling"),
}


@dataclass(frozen=True)
class Place:
    """Phrases for a background: with any motion, with one across the ground, as a noun."""

    anywhere: tuple[str, ...]
    crossing: tuple[str, ...]
    nouns: tuple[str, ...]


BACKGROUND_WORDS: dict[str, Place] = {
    "meadow": Place(
        ("over a meadow", "in a meadow", "in a green field", "in a grassy field", "on the grass"),
        ("across a meadow", "through a green field", "through the grass"),
        ("meadow", "green field", "grass"),
    ),
    "night sky": Place(
        ("in the night sky", "under the stars", "at night", "in a starry sky", "among the stars"),
        ("across the night sky", "through the night", "through a starry sky"),
        ("night sky", "starry night", "night"),
    ),
    "desert": Place(
        ("in the desert", "in a sandy desert", "over the dunes", "in front of pyramids"),
        ("across the desert", "through the desert", "across the sand"),
        ("desert", "sandy desert"),
    ),
    "ocean": Place(
        ("over the ocean", "at sea", "on the ocean", "above the waves", "over the sea"),
        ("across the ocean", "across the sea"),
        ("ocean", "sea", "blue sea"),
    ),
    "snow": Place(
        ("on a snowy field", "in the snow", "on the snow", "in a winter landscape"),
        ("through the snow", "across a snowy field", "across the snow"),
        ("snow", "snowy field", "winter landscape"),
    ),
    "city": Place(
        ("in the city", "in front of a city skyline", "in a city", "in a town", "on a street"),
        ("through the city", "down a city street", "through a town"),
        ("city", "city skyline", "city street"),
    ),
    "forest": Place(
        ("in a forest", "in the woods", "in front of a forest", "among the trees"),
        ("through a forest", "through the woods", "through the forest"),
        ("forest", "woods"),
    ),
    "brick wall": Place(
        ("in front of a brick wall", "against a brick wall", "before a wall of bricks"),
        ("past a brick wall", "by a brick wall"),
        ("brick wall", "wall of bricks"),
    ),
    "checkerboard": Place(
        ("on a checkerboard", "over a checkerboard", "in front of a checkered background"),
        ("across a checkerboard", "across a checkered pattern"),
        ("checkerboard", "checkered background", "chessboard"),
    ),
    "sunset": Place(
        ("at sunset", "in front of a sunset", "against the setting sun", "under a sunset sky"),
        ("across a sunset sky", "through the sunset"),
        ("sunset", "sunset sky"),
    ),
    "mountains": Place(
        ("in the mountains", "in front of mountains", "above the mountains", "near snowy peaks"),
        ("across the mountains", "through the mountains"),
        ("mountains", "mountain landscape", "snowy peaks"),
    ),
    "polka dots": Place(
        ("over polka dots", "on a polka dot background", "in front of polka dots"),
        ("across polka dots", "across a dotted background"),
        ("polka dots", "polka dot background"),
    ),
}

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}

OBJECTS = tuple(OBJECT_WORDS)
MOTIONS = tuple(MOTION_WORDS)
BACKGROUNDS = tuple(BACKGROUND_WORDS)
SIZES = tuple(SIZE_WORDS)

_TRAVELLING = frozenset({"moving left", "moving right", "moving diagonally"})
_VIDEO_WORDS = ("a video of", "an animation of", "a cartoon of", "a clip of")
_CONSONANT_SOUND = ("uf", "uni")  # begin with a vowel, yet take "a"


class Draws(Protocol):
    """A stream of random choices; `spritewan.world.Draws` is one."""

    def pick(self, options: Sequence[Any]) -> Any: ...

    def chance(self, probability: float) -> bool: ...


def canonical_caption(
    objects: Sequence[str], motion: str, background: str, size: str | None = None
) -> str:
    """The plainest caption of these labels: "a small cat moves to the left over a meadow"."""
    subject = " and ".join(_with_article(_sized(size, OBJECT_WORDS[o][0])) for o in objects)
    verb, rest = MOTION_WORDS[motion][0]
    place = BACKGROUND_WORDS[background].anywhere[0]
    return _join(subject, _present(verb, len(objects)), rest, place)


def paraphrase(
    objects: Sequence[str], motion: str, background: str, size: str, draws: Draws
) -> str:
    """One of the many captions of these labels, chosen by `draws`.

    The size is left out of two captions in five.
    """
    nouns = [draws.pick(OBJECT_WORDS[o]) for o in objects]
    if draws.chance(0.5):
        nouns.reverse()
    adjective = draws.pick(SIZE_WORDS[size]) if draws.chance(0.6) else None
    verb, rest = _motion_words(objects, motion, draws)
    places = BACKGROUND_WORDS[background]
    crossing = motion in _TRAVELLING and draws.chance(0.4)
    place = draws.pick(places.crossing if crossing else places.anywhere)
    number = len(nouns)
    sized = [_sized(adjective, noun) for noun in nouns]
    subject = _the(sized) if draws.chance(0.15) else " and ".join(map(_with_article, sized))
    be = "is" if number == 1 else "are"
    present, participle = _present(verb, number), VERB_FORMS[verb][1]

    form = draws.pick(("present", "present", "progressive", "fronted", "noun", "video", "tags"))
    if form == "present":
        text = _join(subject, present, rest, place)
    elif form == "progressive":
        text = _join(subject, be, participle, rest, place)
    elif form == "fronted":
        predicate = (present,) if draws.chance(0.5) else (be, participle)
        text = _join(f"{place},", subject, *predicate, rest)
    elif form == "noun":
        text = _join(subject, participle, rest, place)
    elif form == "video":
        text = _join(draws.pick(_VIDEO_WORDS), subject, participle, rest, place)
    else:
        tags = (" and ".join(sized), _join(participle, rest), draws.pick(places.nouns))
        text = ", ".join(tags)
    return _typed(text, draws)


def _motion_words(objects: Sequence[str], motion: str, draws: Draws) -> tuple[str, str]:
    verb, rest = draws.pick(MOTION_WORDS[motion])
    own_verbs = [v for v, able in TRAVEL_VERBS.items() if able.issuperset(objects)]
    if motion in _TRAVELLING and own_verbs and draws.chance(0.4):
        verb = draws.pick(own_verbs)
    return verb, rest


def _typed(text: str, draws: Draws) -> str:
    """As people type: with or without a capital and a full stop."""
    if draws.chance(0.5):
        return text
    text = text[0].upper() + text[1:]
    return text + "." if draws.chance(0.6) else text


def _present(verb: str, number: int) -> str:
    return VERB_FORMS[verb][0] if number == 1 else verb


def _sized(adjective: str | None, noun: str) -> str:
    return noun if adjective is None else f"{adjective} {noun}"


def _with_article(noun: str) -> str:
    vowel = noun[0] in "aeiou" and not noun.startswith(_CONSONANT_SOUND)
    return f"an {noun}" if vowel else f"a {noun}"


def _the(nouns: Sequence[str]) -> str:
    return " and ".join(f"the {noun}" for noun in nouns)


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)
