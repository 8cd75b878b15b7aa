"""Words to build generated text from: common ones, and invented names."""

from __future__ import annotations

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


def key(rng: np.random.Generator) -> str:
    """The name of something: two words, an invented one, an identifier."""
    draw = rng.random()
    if draw < 0.5:
        return f"{rng.choice(ADJECTIVES)}{rng.choice(['-', '-', ' ', '_'])}{rng.choice(NOUNS)}"
    if draw < 0.65:
        return invented(rng, int(rng.integers(2, 4))).capitalize()
    if draw < 0.75:
        return f"{invented(rng).capitalize()} {invented(rng).capitalize()}"
    if draw < 0.85:
        return str(rng.choice(NOUNS))
    if draw < 0.92:
        return str(rng.choice(PLACES))
    return identifier(rng)


def identifier(rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < 0.4:
        return "-".join(hexadecimal(rng, n) for n in (8, 4, 4, 4, 12))
    if draw < 0.7:
        return "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] for i in rng.integers(0, 26, int(rng.integers(3, 7))))
    return f"{''.join(chr(65 + i) for i in rng.integers(0, 26, 2))}-{digits(rng, int(rng.integers(3, 6)))}"


def value(rng: np.random.Generator) -> str:
    """What has to be remembered exactly."""
    draw = rng.random()
    if draw < 0.5:
        return digits(rng, int(rng.integers(3, 10)))
    if draw < 0.7:
        return identifier(rng)
    if draw < 0.78:
        return f"{digits(rng, 3)}-{digits(rng, 4)}"
    if draw < 0.86:
        return f"{rng.integers(1, 29)} {rng.choice(['January', 'March', 'May', 'July', 'October', 'December'])} {rng.integers(1650, 2030)}"
    if draw < 0.94:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    return invented(rng, 3)
