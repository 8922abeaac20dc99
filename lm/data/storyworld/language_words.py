"""The words of the invented language Ilvani, beside their English, and how its words are built.

Every stem keeps to one class of vowels, back (a, o, u) or front (e, i), and every suffix takes its
vowels from the class of the word it is attached to. Data and spelling only; `language` has the
grammar.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

BACK, FRONT = "aou", "ei"
VOWELS = BACK + FRONT


class Noun(NamedTuple):
    """English singular and plural, and the stem."""

    one: str
    many: str
    stem: str


class Verb(NamedTuple):
    """English base, third person singular and past, and the stem."""

    base: str
    sings: str
    past: str
    stem: str


def _nouns(table: str) -> tuple[Noun, ...]:
    rows = [row.split() for row in table.strip().splitlines()]
    return tuple(Noun(row[0], row[1] if len(row) == 3 else row[0] + "s", row[-1]) for row in rows)


def _verbs(table: str) -> tuple[Verb, ...]:
    return tuple(Verb(*row.split()) for row in table.strip().splitlines())


def _words(table: str) -> dict[str, str]:
    return dict(row.split() for row in table.strip().splitlines())


# Who acts: animals and people.
ANIMALS = _nouns("""
    dog kolu
    cat mire
    bird tivi
    fox foxes raswa
    rabbit hopal
    bear gurom
    hen kelde
    frog bolok
    horse tarun
    mouse mice pisi
""")

PEOPLE = _nouns("""
    boy dovan
    girl selin
    king rokar
    queen levise
    farmer hatul
    baker penir
""")

BEINGS = ANIMALS + PEOPLE

THINGS = _nouns("""
    ball bomu
    kite fili
    book tekis
    box boxes kasto
    apple ilem
    cake nuda
    key dzike
    lamp lorum
    letter vesir
    hat tuvo
    shell shene
    stone gorda
    basket puruk
    cup mivek
""")

PLACES = _nouns("""
    park vando
    garden felinde
    forest sumar
    river nire
    house tolma
    tree edir
    bench benches lukas
    wall gabu
    bridge verin
    market zomal
    hill keti
    gate pirse
""")

# Names are borrowed as they are; their last vowel decides.
NAMES = ("Tom", "Mia", "Ben", "Anna", "Sam", "Lily", "Max", "Rosie")

ADJECTIVES = _words("""
    old varu
    small minik
    big orom
    red sile
    blue zuga
    green lehen
    white alba
    yellow girel
    happy teril
    hungry hamba
    brave dorok
    quiet shili
    clever kened
""")

LOOKS = tuple(ADJECTIVES)[:8]  # what things and places can be, too

# What is done, to someone or something.
TRANSITIVE = _verbs("""
    find finds found lun
    see sees saw vek
    carry carries carried tolg
    chase chases chased rav
    help helps helped mile
    love loves loved shen
    hide hides hid kudo
    push pushes pushed bran
    wash washes washed nisi
    watch watches watched tel
    want wants wanted hom
    follow follows followed desi
""")

# What is done to something for someone.
GIVING = _verbs("""
    give gives gave dan
    show shows showed peri
    send sends sent zolu
    throw throws threw fir
""")

INTRANSITIVE = _verbs("""
    sleep sleeps slept num
    sing sings sang lalu
    dance dances danced sharu
    play plays played vili
    wait waits waited stoma
    laugh laughs laughed gig
    sit sits sat pan
    shout shouts shouted krel
""")

GOING = _verbs("""
    run runs ran turu
    walk walks walked sed
    jump jumps jumped hop
    return returns returned revi
""")

ADVERBS = _words("""
    quickly zivi
    slowly maru
    again eni
    today solan
    often pede
    happily teriles
""")

NUMBERS = _words("""
    two dua
    three teri
    four kova
    many multo
""")

# English preposition → suffix, for those that are cases in Ilvani ...
CASES = {"in": "vA", "on": "tUl", "from": "dUr", "with": "kUm", "to": "lA"}
# ... and → postposition.
POSTPOSITIONS = _words("""
    under posu
    behind tere
    near nimi
""")

PLURAL, DEFINITE, ACCUSATIVE, GENITIVE, ALSO = "rU", "sA", "(A)m", "nU", "pA"
PAST, PRESENT, FUTURE = "tA", "jU", "bAr"
NOT, MANY, RELATIVE = "(A)z", "(A)n", "kA"

THAT = "ke"
JOINED = {"and": "ta", "but": "mo"}  # between main clauses
BECAUSE, WHEN = "sun", "lir"  # at the end of a clause


@functools.cache
def attach(stem: str, *suffixes: str) -> str:
    """`stem` with `suffixes`, in harmony.

    In a suffix, A stands for a or e and U for u or i, as the last vowel of the word before it is
    back or front; a vowel in parentheses is spoken only after a consonant.
    """
    word = stem
    for suffix in suffixes:
        back = next((c for c in reversed(word.lower()) if c in VOWELS), "a") in BACK
        a, u = ("a", "u") if back else ("e", "i")
        link, _, rest = suffix.rpartition(")")
        if link and word[-1] not in VOWELS:
            rest = link[1:] + rest
        word += rest.replace("A", a).replace("U", u)
    return word
