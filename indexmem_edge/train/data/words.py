"""Words to build generated text from: common ones, and invented names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

ADJECTIVES = """amber ancient bitter bold brave brisk broken calm careful cheerful clever cloudy coastal copper crooked
curious damp dusty eager early empty faded fancy fierce foggy forest frozen gentle giant golden graceful grey happy hidden
hollow honest humble icy idle ivory jolly keen late lively lonely loud lucky marble mellow mighty misty modest muddy narrow
noble northern odd old orange patient pale plain polite proud purple quick quiet rapid rare rough royal rusty salty scarlet
shady sharp shiny silent silver sleepy slender smooth snowy solid southern stormy strange sturdy sunny sweet swift tall
tame tender thirsty tidy tiny violet warm weary western wicked wild windy wise wooden young""".split()

NOUNS = """anchor apple arrow badge barrel basket beacon bell bench blanket bottle branch bridge bucket button cabin camera
candle canyon carpet castle cellar chimney circle clock cloud compass copper corner cottage cradle crystal curtain desert
diamond dolphin donkey drawer eagle engine falcon feather fiddle forest fountain garden glacier hammer harbor hazel helmet
island jacket kettle kitchen ladder lantern lemon library lizard locket magnet maple market meadow mirror monkey mountain
needle oasis orchard otter paddle palace parrot pebble pencil pepper piano pillow planet pocket rabbit ribbon river rocket
saddle salmon scarf shadow shelter signal spider stable statue summit table temple thunder ticket tiger timber tower
tunnel turtle valley velvet violin wagon walnut whistle willow window winter""".split()

THINGS = """access code|account number|badge number|booking reference|box number|case number|catalogue number|door code
extension|file number|flight number|gate code|identifier|invoice number|key|licence number|locker combination
membership number|order number|parcel number|passcode|password|phone number|pin|postal code|recipe number|reference
registration|room number|secret code|secret number|serial number|ticket number|token|tracking number|value|vault code""".replace("\n", "|").split("|")

PLACES = """Alder Hill|Brackenport|Clearwater|Dunmore|Eastwick|Fernley|Granby|Hollow Creek|Ironbridge|Juniper Falls|Kestrel Bay
Larkspur|Millbrook|Northgate|Oakham|Pinecrest|Quarry Lane|Ravenna|Stonefield|Thornton|Upper Vale|Westerly|Yarrow""".replace("\n", "|").split("|")

# fmt: off
FIRST_NAMES = """Ada Albert Alma Amos Anton Basil Bertha Blanche Boris Clara Clement Conrad Daphne Dora Edgar Edmund Ella Emil
Ernest Eva Felix Frieda Gustav Hanna Helga Henry Hugo Irene Ivan Jonas Julia Karl Klara Laura Leo Lena Louis Lydia Marta
Max Mina Nora Olga Oscar Otto Paula Peter Rosa Ruth Samuel Selma Simon Sophie Stella Thomas Tilda Viktor Vera Walter Wilma""".split()
LAST_NAMES = """Adler Amsel Archer Barrow Becker Berger Bishop Brandt Brook Carver Castellan Cole Cross Dahl Drake Engel Falk Ferris
Finch Fisk Forrester Frost Garner Graves Grieg Hale Hart Holm Hood Jensen Keller Kirk Lang Larsen Lind Lorenz Marsh Meyer
Miles Moss Nash Nolan Olsen Page Penn Quist Reed Rhodes Roth Sand Shaw Stark Stern Thorne Vale Vogel Wells West Winter Wolf""".split()
TRADES = """baker barber blacksmith bookbinder brewer butcher carpenter chemist clerk clockmaker cobbler cook dentist ferryman fisherman
gardener glazier goldsmith gunsmith hatter innkeeper joiner juggler lawyer locksmith mason miller miner nurse painter pilot plumber
potter printer saddler sailor sculptor shepherd singer stonecutter surgeon tailor tanner teacher translator weaver""".split()
FOODS = """almonds apricots asparagus bacon barley beans beetroot bread butter cabbage carrots celery cheese cherries chestnuts crab
cucumber dumplings eel eggs figs garlic goose grapes herring honey leeks lentils mackerel melons milk mushrooms mutton noodles
nuts oats olives onions oranges oysters pancakes peas peaches pears plums pork potatoes prawns pumpkin rice rye salmon shellfish
spinach strawberries tomatoes trout turnips veal walnuts""".split()
INSTRUMENTS = """accordion bagpipe banjo bassoon cello clarinet cornet drum dulcimer fiddle flute guitar harmonium harp lute mandolin
oboe organ piccolo trombone trumpet tuba viola zither""".split()
CITIES = """Athens|Baltimore|Bangkok|Barcelona|Beirut|Belfast|Bogota|Boston|Brisbane|Budapest|Cairo|Calcutta|Cape Town|Charleston|Chicago
Colombo|Copenhagen|Damascus|Delhi|Denver|Dublin|Durban|Edinburgh|Frankfurt|Glasgow|Havre|Helsinki|Honolulu|Istanbul|Jerusalem
Karachi|Kiev|Kyoto|Lima|Liverpool|Lucerne|Madrid|Manila|Marrakesh|Melbourne|Milan|Montreal|Munich|Nairobi|New Orleans|Norwich
Oslo|Ottawa|Oxford|Philadelphia|Porto|Quebec|Quito|Reykjavik|Rotterdam|Saint Louis|Samarkand|Santiago|Seattle|Shanghai
Sofia|Sydney|Tangier|Tunis|Turku|Valencia|Vancouver|Venice|Vienna|Warsaw|Yokohama|York""".replace("\n", "|").split("|")
LANGUAGES = """Arabic Armenian Basque Breton Catalan Chinese Czech Danish Dutch Finnish Flemish French Gaelic Georgian German Greek Hebrew
Hindi Hungarian Icelandic Italian Japanese Latin Latvian Malay Norwegian Persian Polish Portuguese Romanian Russian Spanish
Swahili Swedish Tamil Turkish Welsh Yiddish""".split()
TREES = """alder almond aspen bay beech birch box cedar cherry chestnut cypress elder fig fir hawthorn hazel holly juniper
larch laurel lime magnolia maple mulberry oak olive palm pear pine plane plum poplar quince rowan spruce sycamore willow yew""".split()
COLOURS = """black blue brown crimson golden green grey orange pink purple red scarlet silver violet white yellow""".split()
WEEKDAYS = """Monday Tuesday Wednesday Thursday Friday Saturday Sunday""".split()
# fmt: on

_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t tr v w y z".split()
_VOWELS = "a e i o u ai ea ee io oa ou".split()
_CODAS = "- - - l m n nd r rk s st t x th ck".split()


def invented(rng: np.random.Generator, syllables: int = 2) -> str:
    """A word that is in no dictionary."""
    parts = (f"{rng.choice(_ONSETS)}{rng.choice(_VOWELS)}{rng.choice(_CODAS)}" for _ in range(syllables))
    return "".join(parts).replace("-", "")


def digits(rng: np.random.Generator, n: int) -> str:
    return "".join(str(d) for d in (rng.integers(1, 10), *rng.integers(0, 10, n - 1)))


def hexadecimal(rng: np.random.Generator, n: int) -> str:
    return "".join("0123456789abcdef"[i] for i in rng.integers(0, 16, n))


def person(rng: np.random.Generator) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def two_words(rng: np.random.Generator) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


Form = Callable[[np.random.Generator], str]  # draws one of many things that look alike


def one_of(choices: Sequence[str]) -> Form:
    return lambda rng: str(rng.choice(choices))


def key_form(rng: np.random.Generator) -> Form:
    """Names of things: two words, an invented one, an identifier. Sometimes all begin with the same word or two."""
    draw, sep = rng.random(), str(rng.choice(["-", "-", " ", "_"]))
    if draw < 0.35:
        return lambda rng: f"{rng.choice(ADJECTIVES)}{sep}{rng.choice(NOUNS)}"
    if draw < 0.5:
        first = rng.choice(ADJECTIVES, 2)
        return lambda rng: f"{rng.choice(first)}{sep}{rng.choice(NOUNS)}"
    if draw < 0.65:
        syllables = int(rng.integers(2, 4))
        return lambda rng: invented(rng, syllables).capitalize()
    if draw < 0.75:
        return lambda rng: f"{invented(rng).capitalize()} {invented(rng).capitalize()}"
    if draw < 0.85:
        return one_of(NOUNS)
    if draw < 0.92:
        return one_of(PLACES)
    return identifier_form(rng)


def identifier_form(rng: np.random.Generator) -> Form:
    draw = rng.random()
    if draw < 0.4:
        return lambda rng: "-".join(hexadecimal(rng, n) for n in (8, 4, 4, 4, 12))
    if draw < 0.7:
        n = int(rng.integers(3, 7))
        return lambda rng: "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] for i in rng.integers(0, 26, n))
    n = int(rng.integers(3, 6))
    return lambda rng: f"{''.join(chr(65 + i) for i in rng.integers(0, 26, 2))}-{digits(rng, n)}"


def value_form(rng: np.random.Generator) -> Form:
    """What has to be remembered exactly."""
    draw = rng.random()
    if draw < 0.55:
        n = int(rng.integers(3, 10))
        return lambda rng: digits(rng, n)
    if draw < 0.75:
        return identifier_form(rng)
    if draw < 0.81:
        return lambda rng: f"{digits(rng, 3)}-{digits(rng, 4)}"
    if draw < 0.88:
        return lambda rng: f"{rng.integers(1, 29)} {rng.choice(['January', 'March', 'May', 'July', 'October', 'December'])} {rng.integers(1650, 2030)}"
    if draw < 0.95:
        return two_words
    return lambda rng: invented(rng, 3)


def key(rng: np.random.Generator) -> str:
    """The name of something."""
    return key_form(rng)(rng)


def value(rng: np.random.Generator) -> str:
    """What has to be remembered exactly."""
    return value_form(rng)(rng)


def distinct(form: Form, n: int, rng: np.random.Generator) -> list[str]:
    """n different ones."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[form(rng)] = None
    return list(found)
