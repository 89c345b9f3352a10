"""Noun phrases of the built-in corpus in all their forms, and the everyday slots that are filled with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tools.mini.grammar import Draw, Form, Plain, Slot, by_person, join, quality, word_set
from tools.mini.lexicon import CASES, Adjective, Fixed, Noun, german_adjective_ending, german_article
from tools.mini.words_everyday_actions import NUMBERS
from tools.mini.words_everyday_things import (
    ADJECTIVES,
    BODY,
    COLORS,
    JOBS,
    NAMES,
    PEOPLE,
    PLACES,
    SPOTS,
    STATES,
    THINGS,
)

KINDS_OF_THING = word_set("clothes furniture vehicle device small text gift")
KINDS_WITH_COLOR = word_set("clothes furniture vehicle small gift")
POSSESSIVES = (
    ("my", "mein", "我"),
    ("your", "Ihr", "你"),
    ("his", "sein", "他"),
    ("her", "ihr", "她"),
    ("our", "unser", "我们"),
    ("their", "ihr", "他们"),
)
PRICED = word_set("clothes furniture vehicle device small gift")
FRESH = word_set("bread fish butter salad milk juice cheese")
OPPOSITES = tuple(
    word_set(g)
    for g in (
        "big small",
        "new old",
        "expensive cheap",
        "clean dirty",
        "interesting boring",
        "quiet loud",
        "big heavy",
        "new dirty",
        "fresh sweet healthy",
        "modern old",
        "small bright",
        "warm quiet",
    )
)
ONLY_PREDICATIVE = word_set("dirty boring healthy quiet loud")  # odd in "she needs three dirty hats"
OWNERS = {en: (de, zh) for en, de, zh in POSSESSIVES}
PRONOUNS = {
    "I": ("ich", "我"),
    "you": ("Sie", "你"),
    "he": ("er", "他"),
    "she": ("sie", "她"),
    "we": ("wir", "我们"),
    "they": ("sie", "他们"),
}
PRONOUN_PERSON = {"I": "1", "he": "3", "she": "3", "you": "p", "we": "p", "they": "p"}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase in all its forms. ``person`` is 1, 3 or p (plural, and "you", which is the polite Sie)."""

    en: str
    de: dict[str, str]
    zh: str
    person: str = "3"
    sex: str = ""
    noun: Noun | None = None
    zh_count: str = ""
    zh_core: str = ""
    de_none: dict[str, str] | None = None

    def form(self, lang: str, spec: str) -> str:
        if "|" in spec:
            person = self.person
            if lang == "en" and person == "1" and spec.count("|") == 1:
                person = "p"  # I buy, you buy, they buy - but she buys
            return by_person(spec, person)
        if spec == "pron":
            return self.pronoun()[("en", "de", "zh").index(lang)]
        if lang == "en":
            return self.noun.en if spec == "core" and self.noun else self.en
        if lang == "de":
            return (self.de_none or self.de)[spec[3:]] if spec.startswith("no_") else self.de[spec or "nom"]
        return {"": self.zh, "count": self.zh_count, "core": self.zh_core}[spec]

    def pronoun(self) -> tuple[str, str, str]:
        """The pronoun that refers back to this phrase as a subject."""
        if self.sex in PRONOUNS:
            return self.sex, *PRONOUNS[self.sex]
        return {"m": ("he", "er", "他"), "f": ("she", "sie", "她"), "p": ("they", "sie", "他们")}[self.sex]


def pronoun(en: str) -> Phrase:
    """A personal pronoun as a subject."""
    de, zh = PRONOUNS[en]
    return Phrase(en, dict.fromkeys(CASES, de), zh, PRONOUN_PERSON[en], en)


def phrase(
    noun: Noun, det: str, adjective: Adjective | None = None, number: str = "s", count: Fixed | None = None
) -> Phrase:
    """Build a noun phrase; ``det`` is the, a, this, no, a possessive or empty, ``count`` a number word (plural)."""
    plural = number == "p" or count is not None
    gender = "p" if plural else noun.gender
    name = noun.plural if plural else noun.en
    attribute = adjective.en if adjective else ""
    following = attribute or name
    en_det = {
        "a": "an" if following[0] in "aeiou" and not following.startswith("use") else "a",
        "this": "these" if plural else "this",
    }.get(det, det)
    word = {"the": "der", "this": "dies", "a": "ein", "no": "kein", "which": "welch"}.get(det) or OWNERS.get(
        det, ("", "")
    )[0]

    def german(word: str, number_word: str = "") -> dict[str, str]:
        return {
            case: join(
                german_article(word, case, gender) if word else number_word,
                adjective.de_stem + german_adjective_ending(word, case, gender) if adjective else "",
                noun.german(case, "p" if plural else "s"),
            )
            for case in CASES
        }

    human = "human" in noun.tags
    core = (adjective.zh if adjective else "") + noun.zh + ("们" if human and plural and not count else "")
    counted = {
        "a": "一" + noun.measure,
        "this": "这些" if plural else "这" + noun.measure,
        "which": "哪" + noun.measure,
    }.get(det, "")
    if det == "the" and human and not plural:
        counted = "那" + noun.measure
    if det in OWNERS:  # 我妈妈 without 的, and no second 的 right before an adjective that has one: 我漂亮的猫
        close = "kin" in noun.tags and not plural and len(OWNERS[det][1]) == 1
        counted = OWNERS[det][1] + ("" if close or (adjective and adjective.zh.endswith("的")) else "的")
    if count:
        counted = count.zh + noun.measure
    sex = "p" if plural else next((s for s in "mf" if s in noun.tags), "")
    return Phrase(
        join(count.en if count else en_det, attribute, name),
        german(word, count.de if count else ""),
        counted + core,
        "p" if plural else "3",
        sex,
        noun,
        counted,
        core,
        german("kein") if det in ("a", "") and not count else None,
    )


def fitting(noun: Noun) -> list[Adjective]:
    """Adjectives that make sense with a noun (no heavy ideas, no clever tables)."""
    kinds = set(noun.tags)
    if "mass" in kinds:
        return [a for a in ADJECTIVES if a.en == "fresh" and noun.en in FRESH]
    if "human" in kinds:
        return [] if "kin" in kinds else [a for a in ADJECTIVES if "person" in a.tags]
    if kinds & KINDS_OF_THING:
        kinds.add("thing")
    if kinds & PRICED:
        kinds.add("priced")
    if kinds & PRICED:
        kinds.add("sized")
    if kinds & {"furniture"}:
        kinds.add("heavy")
    fits = [a for a in ADJECTIVES if a.tags & kinds]
    return fits + list(COLORS) if kinds & KINDS_WITH_COLOR else fits


def _at_odds(one: str, other: str) -> bool:
    """Whether two adjectives cannot be said of the same thing (or say the same twice)."""
    return one == other or any(one in group and other in group for group in OPPOSITES)


def object_phrase(d: Draw, noun: Noun, dets: str, adjectives: float = 0.45) -> Phrase:
    """A noun phrase around ``noun``, its determiner drawn from the space-separated ``dets``."""
    det = d.rng.choice(dets.split())
    fits = fitting(noun)
    fits = [a for a in fits if a.en not in ONLY_PREDICATIVE]
    adjective = d.pick(fits) if fits and d.rng.random() < adjectives else None
    if det == "own":
        det = d.rng.choice(POSSESSIVES)[0]
    if "mass" in noun.tags:
        return phrase(noun, {"a": "", "many": "", "count": "", "these": "this"}.get(det, det), adjective)
    if det == "many":
        return phrase(noun, "", adjective, "p")
    if det == "these":
        return phrase(noun, "this", adjective, "p")
    if det == "count":
        few = noun.tags & {"home", "vehicle"}
        return phrase(noun, "", adjective, "p", d.pick(NUMBERS[:4] if few else NUMBERS))
    return phrase(noun, det, adjective)


def _person(d: Draw, subject: bool = False) -> Phrase:
    """Somebody: a name, a relative or colleague, or "the teacher"."""
    roll = d.rng.random()
    if roll < 0.2:
        name = d.pick(NAMES)
        return Phrase(name.en, dict.fromkeys(CASES, name.de), name.zh, "3", name.extra)
    noun = d.pick(PEOPLE)
    owned = bool(noun.tags & {"kin", "own"}) and (d.rng.random() < 0.7 or "the" not in noun.tags)
    det = d.rng.choice(POSSESSIVES)[0] if owned else "the"
    many = "plural_only" in noun.tags or ("many" in noun.tags and d.rng.random() < 0.15)
    adjective = d.pick(fitting(noun)) if fitting(noun) and d.rng.random() < (0.1 if subject else 0.3) else None
    return phrase(noun, det, adjective, "p" if many else "s")


def subject(d: Draw) -> Phrase:
    """Who does it: a pronoun or somebody."""
    if d.rng.random() < 0.45:
        return pronoun(d.rng.choice(list(PRONOUNS)))
    return _person(d, subject=True)


def others(d: Draw) -> Phrase:
    """A subject one may ask about: anybody but oneself."""
    if d.rng.random() < 0.45:
        return pronoun(d.rng.choice(("you", "he", "she", "we", "they")))
    return _person(d, subject=True)


def person(d: Draw) -> Phrase:
    """Somebody, as an object."""
    return _person(d)


def thing(tags: str = "", dets: str = "the this own", adjectives: float = 0.45) -> Slot:
    """A slot for a thing of one of the kinds in ``tags``."""
    kinds = set(tags.split())
    pool = [n for n in THINGS if not kinds or n.tags & kinds]
    return lambda d: object_phrase(d, d.pick(pool), dets, adjectives)


def quality_of(slot: str, names: frozenset[str] = frozenset()) -> Slot:
    """A predicative adjective that fits the noun phrase in another slot, if need be one of ``names``."""

    def fill(d: Draw) -> Plain:
        noun = d.values[slot].noun
        return quality(
            d.pick(
                a
                for a in fitting(noun)
                if "color" not in a.tags
                and (a.en in names or not names)
                and not any(_at_odds(a.en, said) for said in d.words)
            )
        )

    return fill


def another_like(slot: str, dets: str) -> Slot:
    """A thing of the same kind as in another slot, but not the same thing."""

    def fill(d: Draw) -> Phrase:
        noun = d.values[slot].noun
        kinds = noun.tags & (KINDS_OF_THING | {"animal", "fruit", "home", "room"})
        return object_phrase(d, d.pick(n for n in THINGS if n.tags & kinds and n is not noun), dets, 0.0)

    return fill


def place(form: str = "at", only: str = "") -> Slot:
    """A place (one of those in ``only``): ``at`` (in the park), or as a ``noun`` phrase with "the"."""
    pool = [p for p in PLACES if not only or p.noun.en in only.split()]

    def fill(d: Draw) -> Form:
        p = d.rng.choice(pool)
        d.words.append(p.noun.en)
        if form == "noun":
            return phrase(p.noun, "the")
        return Plain(
            p.at_en,
            p.at_de,
            p.at_zh,
            {("en", "to"): f"to the {p.noun.en}", ("de", "to"): p.to_de, ("zh", "to"): p.noun.zh},
        )

    return fill


def spot_for(slot: str) -> Slot:
    """A place in the house where the thing of another slot may be."""

    def fill(d: Draw) -> Plain:
        noun = d.values[slot].noun
        s = d.pick(s for s in SPOTS if set(s.extra.split()) & noun.tags)
        return Plain(s.en, s.de, s.zh)

    return fill


def job(d: Draw) -> Phrase:
    """A profession after "as": German leaves out the article and follows the person's sex where we have the word."""
    female = d.values["o"].sex == "f"
    noun = d.pick(n for n in JOBS if ("f" in n.tags) == female and n.en != "policeman")
    return replace(phrase(noun, "a"), de=dict.fromkeys(CASES, noun.de), zh=noun.zh)


def body(d: Draw) -> Phrase:
    """A part of somebody's body."""
    return phrase(d.pick(BODY), d.rng.choice(POSSESSIVES[:4])[0])


def states(d: Draw) -> Plain:
    """How somebody feels; ``bare`` is the Chinese word without 很."""
    s = d.pick(STATES)
    return Plain(s.en, s.de, s.zh, {("zh", "bare"): s.zh[1:]})
