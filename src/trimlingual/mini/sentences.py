"""Sentences of the built-in corpus: a small English-German-Chinese grammar written for this project.

The tiny model that ships with trimlingual has to learn real translation from synthesised speech, so every sentence
comes with exactly one German and one Chinese rendering: the three are produced side by side from the same draw of
words, and both translations are a deterministic function of the English. A template names its slots; a slot is filled by a
function that draws words (a noun phrase, a whole clause ...) and that knows the forms the three languages need, asked
for by format specs: ``{x:dat}`` is a noun phrase in the dative, ``{c:sub}`` a clause with the verb at its end.

``everyday`` is what the base model learns from. ``research`` imitates talks at a computational-linguistics conference;
about half of its words are kept from the base model (``lexicon="background"``), so that fine-tuning has to teach them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from . import lexicon as lx
from .lexicon import Adjective, Fixed, Noun, Verb


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CANDIDATES = 3  # of so many words drawn for a slot the one least used so far is taken
DRAWS_PER_SENTENCE = 60  # how often we draw, for each sentence asked for, before we say that the grammar is exhausted
KINDS_OF_THING = _words("clothes furniture vehicle device small text gift")
KINDS_WITH_COLOR = _words("clothes furniture vehicle small gift")
POSSESSIVES = (("my", "mein", "我"), ("your", "Ihr", "你"), ("his", "sein", "他"), ("her", "ihr", "她"),
               ("our", "unser", "我们"), ("their", "ihr", "他们"))
PRICED = _words("clothes furniture vehicle device small gift")
FRESH = _words("bread fish butter salad milk juice cheese")
OPPOSITES = tuple(_words(g) for g in (
    "big small", "new old", "expensive cheap", "clean dirty", "interesting boring", "quiet loud", "big heavy",
    "new dirty", "fresh sweet healthy", "modern old", "small bright", "warm quiet"))
WELCOME = _words("big new beautiful cheap practical modern sweet warm clean interesting fast quiet bright")
UNWELCOME = _words("old small expensive heavy dirty boring long loud")
ONLY_PREDICATIVE = _words("dirty boring healthy quiet loud")  # odd in "she needs three dirty hats"
OWNERS = {en: (de, zh) for en, de, zh in POSSESSIVES}


@dataclass(frozen=True)
class Sentence:
    """One sentence in three languages."""

    en: str
    de: str
    zh: str
    domain: str


class Form(Protocol):
    """What fills a slot: it can be asked for a form, in a language, by a format spec."""

    def form(self, lang: str, spec: str) -> str: ...


@dataclass(frozen=True)
class View:
    """A slot's filler seen from one language, so that ``str.format`` templates can ask for forms."""

    filler: Form
    lang: str

    def __format__(self, spec: str) -> str:
        return self.filler.form(self.lang, spec)


@dataclass
class Draw:
    """The state of drawing one sentence: what is drawn so far, and the content words used.

    ``used`` counts the words of earlier sentences; of a few candidates the least used one is taken, which keeps words
    that fit few slots from being drowned by those that fit many.
    """

    rng: random.Random
    background: bool = False
    used: Counter[str] = field(default_factory=Counter)
    values: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    def pick(self, entries: Iterable[Any]) -> Any:
        """Choose a lexicon entry; in the background lexicon only among background words."""
        pool = [e for e in entries if not self.background or getattr(e, "background", True)]
        if not pool:
            raise _DeadEnd
        entry = min((self.rng.choice(pool) for _ in range(CANDIDATES)), key=lambda e: self.used[e.en])
        self.words.append(entry.en)
        return entry


class _DeadEnd(Exception):
    """The words drawn so far leave no word that fits: throw the draft away and draw again."""


def _join(*parts: str) -> str:
    return " ".join(p for p in parts if p)


def _by_person(spec: str, person: str) -> str:
    """Resolve agreement: ``1|3|p`` (am|is|are, bin|ist|sind), or two options where the first person follows one."""
    options = spec.split("|")
    return options["13p".index(person)] if len(options) == 3 else options[person == "p"]


# ----------------------------------------------------------------------------------------------- noun phrases
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
            return _by_person(spec, person)
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


PRONOUNS = {"I": ("ich", "我"), "you": ("Sie", "你"), "he": ("er", "他"), "she": ("sie", "她"), "we": ("wir", "我们"),
            "they": ("sie", "他们")}
PRONOUN_PERSON = {"I": "1", "he": "3", "she": "3", "you": "p", "we": "p", "they": "p"}


def _pronoun(en: str) -> Phrase:
    de, zh = PRONOUNS[en]
    return Phrase(en, dict.fromkeys(lx.CASES, de), zh, PRONOUN_PERSON[en], en)


def phrase(noun: Noun, det: str, adjective: Adjective | None = None, number: str = "s",
           count: Fixed | None = None) -> Phrase:
    """Build a noun phrase; ``det`` is the, a, this, no, a possessive or empty, ``count`` a number word (plural)."""
    plural = number == "p" or count is not None
    gender = "p" if plural else noun.gender
    name = noun.plural if plural else noun.en
    attribute = adjective.en if adjective else ""
    following = attribute or name
    en_det = {"a": "an" if following[0] in "aeiou" and not following.startswith("use") else "a",
              "this": "these" if plural else "this"}.get(det, det)
    word = {"the": "der", "this": "dies", "a": "ein", "no": "kein", "which": "welch"}.get(det) or OWNERS.get(
        det, ("", ""))[0]

    def german(word: str, number_word: str = "") -> dict[str, str]:
        return {case: _join(
            lx.german_article(word, case, gender) if word else number_word,
            adjective.de_stem + lx.german_adjective_ending(word, case, gender) if adjective else "",
            noun.german(case, "p" if plural else "s"),
        ) for case in lx.CASES}

    human = "human" in noun.tags
    core = (adjective.zh if adjective else "") + noun.zh + ("们" if human and plural and not count else "")
    counted = {"a": "一" + noun.measure, "this": "这些" if plural else "这" + noun.measure,
               "which": "哪" + noun.measure}.get(det, "")
    if det == "the" and human and not plural:
        counted = "那" + noun.measure
    if det in OWNERS:  # 我妈妈 without 的, and no second 的 right before an adjective that has one: 我漂亮的猫
        close = "kin" in noun.tags and not plural and len(OWNERS[det][1]) == 1
        counted = OWNERS[det][1] + ("" if close or (adjective and adjective.zh.endswith("的")) else "的")
    if count:
        counted = count.zh + noun.measure
    sex = "p" if plural else next((s for s in "mf" if s in noun.tags), "")
    return Phrase(_join(count.en if count else en_det, attribute, name), german(word, count.de if count else ""),
                  counted + core, "p" if plural else "3", sex, noun, counted, core,
                  german("kein") if det in ("a", "") and not count else None)


def _fitting(noun: Noun) -> list[Adjective]:
    """Adjectives that make sense with a noun (no heavy ideas, no clever tables)."""
    kinds = set(noun.tags)
    if "mass" in kinds:
        return [a for a in lx.ADJECTIVES if a.en == "fresh" and noun.en in FRESH]
    if "human" in kinds:
        return [] if "kin" in kinds else [a for a in lx.ADJECTIVES if "person" in a.tags]
    if kinds & KINDS_OF_THING:
        kinds.add("thing")
    if kinds & PRICED:
        kinds.add("priced")
    if kinds & PRICED:
        kinds.add("sized")
    if kinds & {"furniture"}:
        kinds.add("heavy")
    fits = [a for a in lx.ADJECTIVES if a.tags & kinds]
    return fits + list(lx.COLORS) if kinds & KINDS_WITH_COLOR else fits


def _at_odds(one: str, other: str) -> bool:
    """Whether two adjectives cannot be said of the same thing (or say the same twice)."""
    return one == other or any(one in group and other in group for group in OPPOSITES)


Slot = Callable[[Draw], Form]


def _object(d: Draw, noun: Noun, dets: str, adjectives: float = 0.45) -> Phrase:
    """A noun phrase around ``noun``, its determiner drawn from the space-separated ``dets``."""
    det = d.rng.choice(dets.split())
    fits = _fitting(noun)
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
        return phrase(noun, "", adjective, "p", d.pick(lx.NUMBERS[:4] if few else lx.NUMBERS))
    return phrase(noun, det, adjective)


def _person(d: Draw, subject: bool = False) -> Phrase:
    """Somebody: a name, a relative or colleague, or "the teacher"."""
    roll = d.rng.random()
    if roll < 0.2:
        name = d.pick(lx.NAMES)
        return Phrase(name.en, dict.fromkeys(lx.CASES, name.de), name.zh, "3", name.extra)
    noun = d.pick(lx.PEOPLE)
    owned = bool(noun.tags & {"kin", "own"}) and (d.rng.random() < 0.7 or "the" not in noun.tags)
    det = d.rng.choice(POSSESSIVES)[0] if owned else "the"
    many = "plural_only" in noun.tags or ("many" in noun.tags and d.rng.random() < 0.15)
    adjective = d.pick(_fitting(noun)) if _fitting(noun) and d.rng.random() < (0.1 if subject else 0.3) else None
    return phrase(noun, det, adjective, "p" if many else "s")


def subject(d: Draw) -> Phrase:
    """Who does it: a pronoun or somebody."""
    if d.rng.random() < 0.45:
        return _pronoun(d.rng.choice(list(PRONOUNS)))
    return _person(d, subject=True)


def others(d: Draw) -> Phrase:
    """A subject one may ask about: anybody but oneself."""
    if d.rng.random() < 0.45:
        return _pronoun(d.rng.choice(("you", "he", "she", "we", "they")))
    return _person(d, subject=True)


def person(d: Draw) -> Phrase:
    """Somebody, as an object."""
    return _person(d)


def thing(tags: str = "", dets: str = "the this own", adjectives: float = 0.45) -> Slot:
    """A slot for a thing of one of the kinds in ``tags``."""
    kinds = set(tags.split())
    pool = [n for n in lx.THINGS if not kinds or n.tags & kinds]
    return lambda d: _object(d, d.pick(pool), dets, adjectives)


# ------------------------------------------------------------------------------------------------ predicates
@dataclass(frozen=True)
class Predicate:
    """A verb with its complements, ready for all clause types.

    German word order: ``before`` (objects), then "nicht", then ``after`` (directions, bare objects), then the closing
    verb; ``negated`` holds the first three as one string, because "kein" replaces "nicht" with indefinite objects.
    """

    verb: Verb
    tail: str
    before: str
    after: str
    negated: str
    zh: str
    zh_done: str
    zh_negated: str
    personal: bool = False


def _predicate(verb: Verb, obj: Phrase | None = None, receiver: Phrase | None = None) -> Predicate:
    tail = _join(verb.particle, receiver.en if receiver else "", obj.en if obj else "")
    before = _join(receiver.de["dat"] if receiver else "",
                   obj.de[verb.case] if obj and not verb.preposition else "")
    after = _join(verb.mid, f"{verb.preposition} {obj.de[verb.case]}" if obj and verb.preposition else "")
    negated = _join(before, "nicht", after)
    if verb.mid_neg and not obj:
        negated = verb.mid_neg
    elif obj and obj.de_none and not verb.preposition:
        negated = _join(receiver.de["dat"] if receiver else "", obj.de_none[verb.case], after)
    names = {"o": obj.zh if obj else "", "p": receiver.zh if receiver else ""}
    bare = {**names, "o": obj.zh_core if obj and obj.de_none else names["o"]}
    return Predicate(verb, tail, before, after, negated, verb.zh.format(**names), verb.zh_done.format(**names),
                     verb.zh.format(**bare), "person" in verb.tags and not verb.preposition)


ONCE = _words("sell choose hide find lend draw")


def _transitive(d: Draw, negated: bool, past: bool, habit: bool) -> Predicate:
    verb = d.pick(v for v in lx.ACTIONS if (v.past or not past) and not (habit and v.en in ONCE))
    if "person" in verb.tags:
        return _predicate(verb, _person(d))
    measured = [m for m in lx.MEASURED if any(f"measured_{kind}" in verb.tags for kind in m.extra.split())]
    if measured and not negated and d.rng.random() < 0.35:
        m = d.pick(measured)
        return _predicate(verb, Phrase(m.en, dict.fromkeys(lx.CASES, m.de), m.zh))
    dets = "the the this own a many" + ("" if negated else " a these count")
    if verb.en in ("buy", "eat", "try", "order", "bake", "cook", "drink", "choose", "write", "draw"):
        dets = "the this a a many" + ("" if negated else " a count")
    if verb.en in ("open", "close", "turn", "clean", "repair", "wash", "use", "feed", "carry"):
        dets = "the the this own own"
    return _predicate(verb, _object(d, d.pick(n for n in lx.THINGS if n.tags & verb.tags), dets))


def _motion(d: Draw) -> Predicate:
    verb = d.pick(lx.MOTIONS)
    if "city" in verb.tags and ("place" not in verb.tags or d.rng.random() < 0.5):
        city = d.pick(lx.CITIES)
        en, de, zh = city.en, f"nach {city.de}", city.zh
    else:
        place = d.rng.choice(lx.PLACES)
        d.words.append(place.noun.en)
        en, de, zh = f"the {place.noun.en}", place.to_de, place.noun.zh
    filled = replace(verb, mid=de, mid_neg=f"nicht {de}")
    return replace(_predicate(filled), tail=f"to {en}", zh=verb.zh.format(o=zh), zh_done=verb.zh_done.format(o=zh),
                   zh_negated=verb.zh.format(o=zh))


def _giving(d: Draw, negated: bool, habit: bool) -> Predicate:
    verb = d.pick(v for v in lx.GIVING if not (habit and v.en in ONCE))
    counted = not negated and verb.en in ("give", "show", "send")
    thing_given = _object(d, d.pick(n for n in lx.THINGS if n.tags & verb.tags),
                          "the this own a" + (" a count" if counted else ""))
    return _predicate(verb, thing_given, _person(d))


def predicate(d: Draw, negated: bool = False, past: bool = False, indoor: bool = False,
              habit: bool = False) -> Predicate:
    """Draw what somebody does, over all kinds of predicates; ``habit`` leaves out what is not done every day."""
    roll = d.rng.random()
    if indoor:
        return _predicate(d.pick(v for v in lx.ACTIVITIES if "indoor" in v.tags))
    if roll < 0.58:
        return _transitive(d, negated, past, habit)
    if roll < 0.72:
        return _motion(d)
    if roll < 0.84:
        return _giving(d, negated, habit)
    return _predicate(d.pick(lx.ACTIVITIES))


# --------------------------------------------------------------------------------------------------- clauses
SEIN = {"1": "bin", "3": "ist", "p": "sind"}
HABEN = {"1": "habe", "3": "hat", "p": "haben"}
WERDEN = {"1": "werde", "3": "wird", "p": "werden"}


@dataclass(frozen=True)
class Clause:
    """A clause that can be said as a statement, a question, a subordinate clause or an infinitive.

    Tenses: present, progressive, past (German Perfekt), future, modal.
    """

    subject: Phrase
    predicate: Predicate
    tense: str
    time: Fixed | None = None
    modal: Fixed | None = None
    negated: bool = False
    frequency: Fixed | None = None

    def form(self, lang: str, spec: str) -> str:
        if "|" in spec or spec == "pron":
            return self.subject.form(lang, spec)
        if spec == "subject":
            return {"en": self.subject.en, "de": self.subject.de["nom"], "zh": self.subject.zh}[lang]
        return {"en": self._english, "de": self._german, "zh": self._chinese}[lang](spec)

    def _english_verb(self) -> tuple[str, str]:
        """Auxiliary (empty: none) and the rest of the verb group."""
        verb, third = self.predicate.verb, self.subject.person == "3"
        do = "does" if third else "do"
        if self.tense == "past":
            return ("did", f"not {verb.en}") if self.negated else ("", verb.past)
        if self.tense == "progressive":
            return _by_person("am|is|are", self.subject.person), verb.ing
        if self.tense == "future":
            return "will", _join("not" if self.negated else "", verb.en)
        if self.modal is None:
            return (do, f"not {verb.en}") if self.negated else ("", verb.es if third else verb.en)
        if self.modal.en in ("want to", "have to"):
            if self.negated:
                return do, f"not {self.modal.en} {verb.en}"
            inflected = {"want to": "wants to", "have to": "has to"}[self.modal.en] if third else self.modal.en
            return "", f"{inflected} {verb.en}"
        if self.modal.en == "would like to":
            return "would", f"like to {verb.en}"
        return self.modal.en, _join("not" if self.negated else "", verb.en)

    def _english(self, spec: str) -> str:
        tail, time = self.predicate.tail, self.time.en if self.time else ""
        if spec == "inf":
            return _join(self.predicate.verb.en, tail)
        if spec == "ing":
            return _join(self.predicate.verb.ing, tail)
        auxiliary, rest = self._english_verb()
        often = self.frequency.en if self.frequency else ""
        if spec == "q":
            if not auxiliary:
                base = f"{self.modal.en} {self.predicate.verb.en}" if self.modal else self.predicate.verb.en
                auxiliary = "did" if self.tense == "past" else "does" if self.subject.person == "3" else "do"
                rest = base
            return _join(auxiliary, self.subject.en, often, rest, tail, time)
        group = _join(auxiliary, rest).replace("can not ", "cannot ")
        if spec == "front":
            return _join(time, self.subject.en, often, group, tail)
        return _join(self.subject.en, often, group, tail, time)

    def _german(self, spec: str) -> str:
        p, verb, person = self.predicate, self.predicate.verb, self.subject.person
        if spec == "zu":
            return _join(p.before, p.after, verb.zu_infinitive())
        if spec in ("inf", "nominal"):
            return _join(p.before, p.after, verb.prefix + verb.de)
        if self.tense == "past":
            finite, closing = (SEIN if verb.aux == "sein" else HABEN)[person], verb.participle
        elif self.tense == "future":
            finite, closing = WERDEN[person], verb.prefix + verb.de
        elif self.modal:
            finite, closing = self.modal.de.split()["13p".index(person)], verb.prefix + verb.de
        else:
            finite, closing = verb.present(person), verb.prefix
        subject, time = self.subject.de["nom"], self.time.de if self.time else ""
        adverb = "gerade" if self.tense == "progressive" else self.frequency.de if self.frequency else ""
        field_ = p.negated if self.negated else _join(p.before, p.after)
        if p.personal:  # definite persons stand before the time: Er hat Laura gestern (nicht) angerufen
            field_ = _join("nicht" if self.negated else "", p.after)
            if spec == "front":
                adverb = _join(p.before, adverb)
            else:
                time = _join(p.before, time)
        if spec == "imperative":
            return _join(verb.de, "Sie bitte", p.before, p.after, verb.prefix)
        if spec == "sub":
            end = closing + finite if closing and closing == verb.prefix else _join(closing, finite)
            return _join(subject, time, adverb, field_, end)
        if spec == "front":
            return _join(time, finite, subject, adverb, field_, closing)
        if spec == "v1":
            return _join(finite, subject, time, adverb, field_, closing)
        if spec == "gern":
            return _join(subject, finite, time, "gern", field_, closing)
        if spec == "rest":  # after a fronted phrase, with the subject left out: "um ... und ..."
            return _join(finite, time, adverb, field_, closing)
        return _join(subject, finite, time, adverb, field_, closing)

    def _chinese(self, spec: str) -> str:
        p = self.predicate
        if spec == "vp":
            return p.zh
        if spec == "done":
            return p.zh_done
        inserted = spec[1:] if spec.startswith("+") else ""
        if self.tense == "past":
            group = "没" + p.zh_negated if self.negated else p.zh_done
        elif self.tense == "progressive":
            group = "正在" + p.zh
        elif self.tense == "future":
            group = "不会" + p.zh_negated if self.negated else "会" + p.zh
        elif self.modal:
            group = self.modal.extra + p.zh_negated if self.negated else self.modal.zh + p.zh
        else:
            group = "不" + p.zh_negated if self.negated else p.zh
        time, often = self.time.zh if self.time else "", self.frequency.zh if self.frequency else ""
        if spec == "front":
            return time + self.subject.zh + often + group
        if spec == "how" and self.modal:
            return self.subject.zh + self.modal.zh + "怎么" + p.zh
        if spec == "pred":
            return time + often + group
        return self.subject.zh + time + inserted + often + group


NO_PROGRESSIVE = ("去", "来", "走路去", "开车去", "坐飞机去", "早", "待")  # 正在去 sounds wrong


def clause(tense: str, times: tuple[Fixed, ...] = (), negated: bool = False, modals: str = "", often: bool = False,
           who: str = "", indoor: bool = False) -> Slot:
    """A slot for a clause with a drawn subject (or the pronouns in ``who``), predicate, time and modal verb."""

    def fill(d: Draw) -> Clause:
        if who == "who":
            doer = Phrase("who", {"nom": "wer"}, "谁")
        else:
            doer = _pronoun(d.rng.choice(who.split())) if who else subject(d)
        modal = d.pick([m for m in lx.MODALS if m.en.replace(" ", "_") in modals.split()]) if modals else None
        habit = tense in ("progressive", "present")
        done = predicate(d, negated, tense == "past", indoor, habit)
        if tense == "progressive" and done.zh.startswith(NO_PROGRESSIVE):
            raise _DeadEnd
        time = d.pick(times) if times else None
        return Clause(doer, done, tense, time, modal, negated, d.pick(lx.FREQUENCY) if often else None)

    return fill


# ------------------------------------------------------------------------------------------- other slot fillers
@dataclass(frozen=True)
class Plain:
    """Something that has one form a language, plus optional named extra forms."""

    en: str
    de: str
    zh: str
    forms: dict[tuple[str, str], str] = field(default_factory=dict)

    def form(self, lang: str, spec: str) -> str:
        if spec:
            return self.forms[lang, spec]
        return {"en": self.en, "de": self.de, "zh": self.zh}[lang]


def one_of(entries: Iterable[Fixed], but: str = "") -> Slot:
    """A slot for an uninflected entry; ``but`` names a slot whose filler must not be drawn again."""
    pool = tuple(entries)

    def fill(d: Draw) -> Plain:
        taken = d.values[but].en if but else ""
        e = d.pick(f for f in pool if f.en != taken)
        return Plain(e.en, e.de, e.zh)

    return fill


def _quality(a: Adjective) -> Plain:
    return Plain(a.en, a.de, a.zh_root, {("en", "more"): a.more, ("de", "more"): a.de_more, ("de", "stem"): a.de_stem,
                                         ("zh", "more"): a.zh_root})


def quality_of(slot: str, names: frozenset[str] = frozenset()) -> Slot:
    """A predicative adjective that fits the noun phrase in another slot, if need be one of ``names``."""

    def fill(d: Draw) -> Plain:
        noun = d.values[slot].noun
        return _quality(d.pick(a for a in _fitting(noun) if "color" not in a.tags and (a.en in names or not names)
                               and not any(_at_odds(a.en, said) for said in d.words)))

    return fill


def another_like(slot: str, dets: str) -> Slot:
    """A thing of the same kind as in another slot, but not the same thing."""

    def fill(d: Draw) -> Phrase:
        noun = d.values[slot].noun
        kinds = noun.tags & (KINDS_OF_THING | {"animal", "fruit", "home", "room"})
        return _object(d, d.pick(n for n in lx.THINGS if n.tags & kinds and n is not noun), dets, 0.0)

    return fill


def place(form: str = "at", only: str = "") -> Slot:
    """A place (one of those in ``only``): ``at`` (in the park), or as a ``noun`` phrase with "the"."""
    pool = [p for p in lx.PLACES if not only or p.noun.en in only.split()]

    def fill(d: Draw) -> Form:
        p = d.rng.choice(pool)
        d.words.append(p.noun.en)
        if form == "noun":
            return phrase(p.noun, "the")
        return Plain(p.at_en, p.at_de, p.at_zh, {("en", "to"): f"to the {p.noun.en}", ("de", "to"): p.to_de,
                                                 ("zh", "to"): p.noun.zh})

    return fill


def spot_for(slot: str) -> Slot:
    """A place in the house where the thing of another slot may be."""

    def fill(d: Draw) -> Plain:
        noun = d.values[slot].noun
        s = d.pick(s for s in lx.SPOTS if set(s.extra.split()) & noun.tags)
        return Plain(s.en, s.de, s.zh)

    return fill


def relative(d: Draw) -> Phrase:
    """A noun with a relative clause: the book that Anna bought yesterday."""
    verb = d.pick(v for v in lx.ACTIONS if v.past and not v.preposition and v.case == "acc" and "person" not in v.tags
                  and v.en in ("buy", "sell", "repair", "wash", "borrow", "choose", "find", "write", "draw", "use"))
    noun = d.pick(n for n in lx.THINGS if n.tags & verb.tags and "mass" not in n.tags and "food" not in n.tags)
    doer, time = subject(d), d.pick(lx.PAST_TIMES)
    head = phrase(noun, "the")
    link = lx.german_article("der", "acc", noun.gender)
    said = f", {link} {doer.de['nom']} {time.de} {verb.participle} {HABEN[doer.person]},"
    zh = f"{doer.zh}{time.zh}{verb.zh.format(o='')}的{noun.zh}"
    return Phrase(f"{head.en} that {doer.en} {verb.past} {time.en}", {c: head.de[c] + said for c in lx.CASES}, zh, "3",
                  "", noun)


def states(d: Draw) -> Plain:
    """How somebody feels; ``bare`` is the Chinese word without 很."""
    s = d.pick(lx.STATES)
    return Plain(s.en, s.de, s.zh, {("zh", "bare"): s.zh[1:]})


CONTRACTIONS = {"von dem": "vom", "in dem": "im", "zu dem": "zum", "zu der": "zur", "an dem": "am", "in das": "ins",
                "an das": "ans"}


def _contracted(de: str) -> str:
    """Contract prepositions with the article (im, vom, zum ...); our relative clauses never open with one."""
    return re.sub(r"\b(?:von|in|zu|an) (?:dem|der|das)\b", lambda m: CONTRACTIONS.get(m[0], m[0]), de)


# -------------------------------------------------------------------------------------------------- templates
@dataclass(frozen=True)
class Template:
    """A sentence pattern in three languages; slots are filled in order, so later ones may look at earlier ones."""

    en: str
    de: str
    zh: str
    slots: dict[str, Slot]
    background: bool = True

    def draft(self, rng: random.Random, domain: str, background: bool,
              used: Counter[str]) -> tuple[Sentence, list[str]]:
        """Draw one sentence and the list of its content words; raises _DeadEnd when no word fits a slot."""
        d = Draw(rng, background, used)
        for name, slot in self.slots.items():
            d.values[name] = slot(d)
        texts = []
        for lang, text in (("en", self.en), ("de", self.de), ("zh", self.zh)):
            said = text.format(**{k: View(v, lang) for k, v in d.values.items()})
            said = said.replace(",.", ".").replace(",,", ",")
            if lang == "de":
                said = _contracted(said)
            texts.append(said[0].upper() + said[1:])
        en, de, zh = texts
        return Sentence(en, de, zh, domain), d.words


def _t(en: str, de: str, zh: str, /, **slots: Slot) -> Template:
    return Template(en, de, zh, slots)


def _full(en: str, de: str, zh: str, /, **slots: Slot) -> Template:
    """A research template outside the background lexicon."""
    return Template(en, de, zh, slots, background=False)


PAST, FUTURE, HABIT, SEASONS = lx.PAST_TIMES, lx.FUTURE_TIMES, lx.HABIT_TIMES, lx.HABIT_TIMES[7:]
FEEL = "I he she we they"
_BUYABLE = "clothes furniture vehicle device text"

EVERYDAY: tuple[Template, ...] = (
    # statements, negations, fronted times
    _t("{c}.", "{c}.", "{c}。", c=clause("past", PAST)),
    _t("{c:front}.", "{c:front}.", "{c:front}。", c=clause("past", PAST)),
    _t("{c}.", "{c}.", "{c}。", c=clause("past", PAST, negated=True)),
    _t("{c}.", "{c}.", "{c}。", c=clause("present", HABIT)),
    _t("{c:front}.", "{c:front}.", "{c:front}。", c=clause("present", SEASONS, often=True)),
    _t("{c}.", "{c}.", "{c}。", c=clause("present", SEASONS, often=True)),
    _t("{c} right now.", "{c}.", "{c}。", c=clause("progressive")),
    _t("{c}.", "{c}.", "{c}。", c=clause("future", FUTURE)),
    _t("{c:front}.", "{c:front}.", "{c:front}。", c=clause("future", FUTURE)),
    _t("{c}.", "{c}.", "{c}。", c=clause("future", FUTURE, negated=True)),
    _t("{c}.", "{c}.", "{c}。", c=clause("modal", FUTURE, modals="can must have_to")),
    _t("{c}.", "{c}.", "{c}。", c=clause("modal", FUTURE, modals="want_to would_like_to should may")),
    _t("{c}.", "{c}.", "{c}。", c=clause("modal", FUTURE, modals="can should want_to have_to may", negated=True)),
    # questions
    _t("{c:q}?", "{c:v1}?", "{c}吗？", c=clause("past", PAST, who="you he she they")),
    _t("{c:q}?", "{c:v1}?", "{c}吗？", c=clause("future", FUTURE)),
    _t("{c:q}?", "{c:v1}?", "{c}吗？", c=clause("present", HABIT)),
    _t("{c:q}?", "{c:v1}?", "{c}吗？", c=clause("modal", FUTURE, modals="can want_to may")),
    _t("Why {c:q}?", "Warum {c:v1}?", "{c:+为什么}？", c=clause("past", PAST)),
    _t("Why {c:q}?", "Warum {c:v1}?", "{c:+为什么}？", c=clause("modal", FUTURE, modals="should want_to have_to")),
    _t("When {c:q}?", "Wann {c:v1}?", "{c:+什么时候}？", c=clause("future")),
    _t("When {c:q}?", "Wann {c:v1}?", "{c:+什么时候}？", c=clause("modal", modals="can want_to should must")),
    _t("{c}?", "{c}?", "{c}？", c=clause("past", PAST, who="who")),
    _t("{c}?", "{c}?", "{c}？", c=clause("modal", FUTURE, modals="can want_to must", who="who")),
    # requests
    _t("Please {c:inf}.", "{c:imperative}.", "请{c:vp}。", c=clause("present", who="you")),
    _t("Let us {c:inf} {t}.", "Lassen Sie uns {t} {c:inf}.", "我们{t}{c:vp}吧。", c=clause("present", who="we"),
       t=one_of(FUTURE)),
    _t("Please put {x} {s}.", "Legen Sie {x:acc} bitte {s}.", "请把{x}放在{s}。", x=thing("lay"),
       s=one_of(lx.SURFACES)),
    _t("{p} put {x} {s} yesterday.", "{p} {p:habe|hat|haben} gestern {x:acc} {s} gelegt.",
       "{p}昨天把{x}放在了{s}。", p=subject, x=thing("lay"), s=one_of(lx.SURFACES)),
    # infinitives
    _t("{c:subject} {c:like|likes|like} to {c:inf}.", "{c:gern}.", "{c:subject}喜欢{c:vp}。", c=clause("present")),
    _t("{c:subject} forgot to {c:inf}.", "{c:subject} {c:habe|hat|haben} vergessen, {c:zu}.",
       "{c:subject}忘了{c:vp}。", c=clause("present")),
    _t("{c:subject} decided to {c:inf} {t}.", "{c:subject} {c:habe|hat|haben} beschlossen, {t} {c:zu}.",
       "{c:subject}决定{t}{c:vp}。", c=clause("present"), t=one_of(FUTURE)),
    _t("{p} {p:am|is|are} going {q:to} to buy {x}.", "{p} {p:gehe|geht|gehen} {q:to}, um {x:acc} zu kaufen.",
       "{p}要去{q:to}买{x}。", p=subject, q=place(only="market supermarket"), x=thing("buy clothes gift", "a many", 0.6)),
    _t("It is important to {c:inf} {t}.", "Es ist wichtig, {t} {c:zu}.", "{t}{c:vp}很重要。",
       c=clause("present", who="we"), t=one_of(FUTURE)),
    # subordinate clauses
    _t("{c} because {c:pron} {c:am|is|are} {s}.", "{c}, weil {c:pron} {s} {c:bin|ist|sind}.",
       "{c}，因为{c:pron}{s}。", c=clause("modal", modals="want_to should must", who=FEEL), s=states),
    _t("{c} because {c:pron} {c:was|was|were} {s}.", "{c}, weil {c:pron} {s} {c:war|war|waren}.",
       "{c}，因为{c:pron}{s}。", c=clause("past", PAST, negated=True), s=states),
    _t("Because {c:pron} {c:was|was|were} {s}, {c:subject} did not {c:inf}.",
       "Weil {c:pron} {s} {c:war|war|waren}, {c:front}.", "因为{c:pron}{s}，所以{c}。",
       c=clause("past", negated=True, who=FEEL), s=states),
    _t("When {c:subject} {c:am|is|are} {s}, {c}.", "Wenn {c:subject} {s} {c:bin|ist|sind}, {c:front}.",
       "{c:subject}{s:bare}的时候，{c:pred}。", c=clause("present", often=True, who="I you he she we they", indoor=True),
       s=states),
    _t("When {p} {p:am|is|are} {s}, {p:pron} {p:drink|drinks|drink} {m}.",
       "Wenn {p} {s} {p:bin|ist|sind}, {p:trinke|trinkt|trinken} {p:pron} {m}.", "{p}{s:bare}的时候会喝{m}。",
       p=subject, s=states, m=one_of(m for m in lx.MEASURED if "drink" in m.extra)),
    _t("If it rains {t}, {c}.", "Wenn es {t} regnet, {c:front}.", "如果{t}下雨，{c:subject}就{c:pred}。",
       t=one_of(FUTURE[:6]), c=clause("future", indoor=True)),
    _t("If {c:subject} {c:have|has|have} time, {c:pron} will {c:inf}.",
       "Wenn {c:subject} Zeit {c:habe|hat|haben}, {c:werde|wird|werden} {c:pron} {c:inf}.",
       "如果{c:subject}有时间，{c:pron}就会{c:vp}。", c=clause("present")),
    _t("Although {c:pron} {c:was|was|were} {s}, {c}.", "Obwohl {c:pron} {s} {c:war|war|waren}, {c:front}.",
       "虽然{c:pron}{s}，但是{c}。", c=clause("past", who=FEEL), s=states),
    _t("Before {c:pron} {c:go|goes|go} to work, {c}.",
       "Bevor {c:pron} zur Arbeit {c:gehe|geht|gehen}, {c:front}.", "{c:pron}上班之前{c:pred}。",
       c=clause("present", often=True, who="I you he she we they")),
    _t("{c}, but {c:pron} {c:have|has|have} no time.", "{c}, aber {c:pron} {c:habe|hat|haben} keine Zeit.",
       "{c}，但是{c:pron}没有时间。", c=clause("modal", FUTURE, modals="want_to should must")),
    _t("{k} that {c}.", "{k}, dass {c:sub}.", "{k}，{c}。", k=one_of(lx.THOUGHTS[:8]), c=clause("past", PAST)),
    _t("{k} that {c}.", "{k}, dass {c:sub}.", "{k}，{c}。", k=one_of(lx.THOUGHTS[:8]), c=clause("future", FUTURE)),
    _t("{k} that {c}.", "{k}, dass {c:sub}.", "{k}，{c}。", k=one_of(lx.THOUGHTS[:2] + lx.THOUGHTS[4:8]),
       c=clause("modal", FUTURE, modals="can should must have_to")),
    _t("I do not know why {c}.", "Ich weiß nicht, warum {c:sub}.", "我不知道{c:+为什么}。", c=clause("past", PAST)),
    _t("Do you know when {c}?", "Wissen Sie, wann {c:sub}?", "你知道{c:+什么时候}吗？",
       c=clause("future", who="he she we they")),
    _t("Nobody knows where {x} {x:is|are}.", "Niemand weiß, wo {x} {x:ist|sind}.", "没有人知道{x}在哪里。",
       x=thing("small pet text", "own own these", 0.5)),
    _t("{r} is very {a}.", "{r} ist sehr {a}.", "{r}非常{a}。", r=relative, a=quality_of("r")),
    # being and having
    _t("{x} {x:is|are} very {a}.", "{x} {x:ist|sind} sehr {a}.", "{x}非常{a}。",
       x=thing("", "the this own these", 0.35), a=quality_of("x")),
    _t("{x} {x:is|are} not {a} enough.", "{x} {x:ist|sind} nicht {a} genug.", "{x}不够{a}。",
       x=thing("", "the this own these", 0.35), a=quality_of("x", WELCOME)),
    _t("{x:Is|Are} {x} really so {a}?", "{x:Ist|Sind} {x} wirklich so {a}?", "{x}真的这么{a}吗？",
       x=thing("", "the this own", 0.3), a=quality_of("x")),
    _t("{x} {x:is|are} {a:more} than {y}.", "{x} {x:ist|sind} {a:more} als {y}.", "{x}比{y}{a}。",
       x=thing(_BUYABLE + " animal fruit home room", "the this own", 0.2), y=another_like("x", "the own this"),
       a=quality_of("x")),
    _t("{x} {x:was|were} {a} but {b}.", "{x} {x:war|waren} {a}, aber {b}.", "{x}很{a}，但是很{b}。",
       x=thing(_BUYABLE + " animal fruit home room", "the this own", 0.1), a=quality_of("x", WELCOME),
       b=quality_of("x", UNWELCOME)),
    _t("There {x:is|are} {x} {s}.", "{s} {x:gibt|gibt} es {x:acc}.", "{s}有{x}。",
       x=thing("small pet furniture animal", "a count count", 0.6), s=spot_for("x")),
    _t("{x} {x:is|are} {s}.", "{x} {x:ist|sind} {s}.", "{x}在{s}。", x=thing("small pet furniture lay", "the own these"),
       s=spot_for("x")),
    _t("{x:Is|Are} {x} still {s}?", "{x:Ist|Sind} {x} noch {s}?", "{x}还在{s}吗？",
       x=thing("small pet furniture lay", "the own"), s=spot_for("x")),
    _t("{x} is sleeping {s}.", "{x} schläft {s}.", "{x}在{s}睡觉。", x=thing("pet", "the own this a"), s=spot_for("x")),
    _t("Where {x:is|are} {x}?", "Wo {x:ist|sind} {x}?", "{x}在哪里？", x=thing("small pet text", "own the these", 0.6)),
    _t("How much does {x} cost {q}?", "Wie viel kostet {x} {q}?", "{x}在{q}卖多少钱？",
       x=thing("clothes small furniture device priced gift", "this a", 0.6),
       q=one_of((Fixed("in the supermarket", "im Supermarkt", "超市"), Fixed("at the market", "auf dem Markt", "市场上"),
                 Fixed("in this shop", "in diesem Geschäft", "这家商店")))),
    _t("{x} {x:costs|cost} {n} euros.", "{x} {x:kostet|kosten} {n} Euro.", "{x}要{n}欧元。",
       x=thing("clothes small furniture device priced gift", "the this these", 0.7), n=one_of(lx.BIG_NUMBERS)),
    _t("{p} {p:have|has|have} {x}.", "{p} {p:habe|hat|haben} {x:acc}.", "{p}有{x}。", p=subject,
       x=thing("clothes furniture vehicle device animal home", "a count many", 0.8)),
    _t("{p} {p:need|needs|need} {x}.", "{p} {p:brauche|braucht|brauchen} {x:acc}.", "{p}需要{x}。", p=subject,
       x=thing("clothes furniture vehicle device small", "a count count many", 0.8)),
    _t("{p} {p:do|does|do} not have {x} at home.", "{p} {p:habe|hat|haben} zu Hause {x:no_acc}.",
       "{p}家里没有{x:core}。", p=subject, x=thing("food drink buy furniture device small", "many a", 0.35)),
    _t("{x} {p:do|does|do} {p} want to buy?", "{x:acc} {p:will|will|wollen} {p} kaufen?", "{p}想买{x}？",
       x=thing(_BUYABLE + " small gift fruit", "which", 0.7), p=others),
    _t("How many {x} {p:do|does|do} {p} need?", "Wie viele {x:acc} {p:brauche|braucht|brauchen} {p}?",
       "{p}需要多少{x:core}？", p=others, x=thing("clothes furniture small fruit veg", "many", 0.35)),
    _t("{p} {p:like|likes|like} {x} more than {y}.", "{p} {p:mag|mag|mögen} {x:acc} lieber als {y:acc}.",
       "比起{y}，{p}更喜欢{x}。", p=subject, x=thing("food drink", "many", 0.2), y=thing("food drink fruit", "many", 0.0)),
    _t("{p} {p:am|is|are} afraid of {x}.", "{p} {p:habe|hat|haben} Angst vor {x:dat}.", "{p}害怕{x}。", p=subject,
       x=thing("animal", "many this", 0.8)),
    # people, time, weather, travel
    _t("{p} {p:was|was|were} {s} {t}.", "{p} {p:war|war|waren} {t} {s}.", "{p}{t}{s}。", p=subject, s=states,
       t=one_of(PAST)),
    _t("{p} {p:was|was|were} {q} {t}.", "{p} {p:war|war|waren} {t} {q}.", "{p}{t}在{q}。", p=subject, q=place(),
       t=one_of(PAST)),
    _t("{p} met {o} {q} {t}.", "{p} {p:habe|hat|haben} {o:acc} {t} {q} getroffen.", "{p}{t}在{q}遇到了{o}。", p=subject,
       o=person, q=place(), t=one_of(PAST)),
    _t("{p} {p:go|goes|go} {q:to} with {o} {t}.", "{p} {p:gehe|geht|gehen} {t} mit {o:dat} {q:to}.",
       "{p}{t}和{o}一起去{q:to}。", p=subject, o=person, q=place(), t=one_of(HABIT)),
    _t("{p} {p:live|lives|live} in {x} near {q}.", "{p} {p:wohne|wohnt|wohnen} in {x:dat} in der Nähe {q:gen}.",
       "{p}住在{q}附近的{x}里。", p=subject, x=thing("home", "a", 1.0), q=place("noun")),
    _t("{p} will travel to {k} {v} {t}.", "{p} {p:werde|wird|werden} {t} {v} nach {k} reisen.",
       "{p}{t}会{v}去{k}旅行。", p=subject, k=one_of(lx.CITIES), v=one_of(lx.TRANSPORT), t=one_of(FUTURE)),
    _t("It takes {n} minutes to get {q:to} {v}.", "Es dauert {n} Minuten, um {v} {q:to} zu kommen.",
       "{v}去{q:to}需要{n}分钟。", n=one_of(lx.BIG_NUMBERS), q=place(), v=one_of(lx.TRANSPORT)),
    _t("The train to {k} leaves {t} at {n}.", "Der Zug nach {k} fährt {t} um {n} Uhr ab.", "去{k}的火车{t}{n}点出发。",
       k=one_of(lx.CITIES), n=one_of((*lx.NUMBERS[1:8], Fixed("eleven", "elf", "十一"))),
       t=one_of((*FUTURE[:4:3], FUTURE[4], FUTURE[5], FUTURE[6], FUTURE[7]))),
    _t("Have you ever been to {k} with {o}?", "Waren Sie schon einmal mit {o:dat} in {k}?", "你和{o}去过{k}吗？",
       k=one_of(lx.CITIES), o=person),
    _t("{p} {p:have|has|have} been learning {g} for {n} years.", "{p} {p:lerne|lernt|lernen} seit {n} Jahren {g}.",
       "{p}学{g}已经{n}年了。", p=subject, g=one_of(lx.LANGUAGES), n=one_of(lx.NUMBERS)),
    _t("{p} {p:speak|speaks|speak} {g} better than {h}.", "{p} {p:spreche|spricht|sprechen} besser {g} als {h}.",
       "{p}的{g}说得比{h}好。", p=subject, g=one_of(lx.LANGUAGES), h=one_of(lx.LANGUAGES, "g")),
    _t("{o} works as {j} in {q}.", "{o} arbeitet als {j} in {q}.", "{o}在{q}当{j}。",
       o=lambda d: phrase(d.pick(n for n in lx.PEOPLE if "kin" in n.tags), d.rng.choice(POSSESSIVES)[0]),
       j=lambda d: _job(d), q=one_of(lx.CITIES)),
    _t("{o} is {n} years old.", "{o} ist {n} Jahre alt.", "{o}{n}岁。",
       o=lambda d: phrase(d.pick(n for n in lx.PEOPLE if "kin" in n.tags), d.rng.choice(POSSESSIVES)[0]),
       n=one_of((*lx.BIG_NUMBERS[3:], Fixed("seventy", "siebzig", "七十")))),
    _t("{b} {b:has|have} hurt since {t}.", "{b} {b:tut|tun} seit {t} weh.", "{b}从{t}开始疼。",
       b=lambda d: _body(d), t=one_of((Fixed("yesterday", "gestern", "昨天"),
                                       Fixed("last night", "gestern Abend", "昨天晚上"),
                                       Fixed("this morning", "heute Morgen", "今天早上"),
                                       Fixed("Monday", "Montag", "周一"), Fixed("Friday", "Freitag", "周五")))),
    _t("It will be {a} in {k} {t}.", "In {k} wird es {t} {a} sein.", "{k}{t}会很{a}。", a=one_of(lx.WEATHER[:3]),
       k=one_of(lx.CITIES), t=one_of(FUTURE[:8])),
    _t("It was {a} and {b} in {k} {t}.", "In {k} war es {t} {a} und {b}.", "{k}{t}很{a}，而且{b}。",
       a=one_of(lx.WEATHER[:3]), b=one_of(lx.WEATHER[3:]), k=one_of(lx.CITIES), t=one_of(PAST)),
)


def _job(d: Draw) -> Phrase:
    """A profession after "as": German leaves out the article and follows the person's sex where we have the word."""
    female = d.values["o"].sex == "f"
    noun = d.pick(n for n in lx.JOBS if ("f" in n.tags) == female and n.en != "policeman")
    return replace(phrase(noun, "a"), de=dict.fromkeys(lx.CASES, noun.de), zh=noun.zh)


def _body(d: Draw) -> Phrase:
    return phrase(d.pick(lx.BODY), d.rng.choice(POSSESSIVES[:4])[0])


# ------------------------------------------------------------------------------------------- research: slots
LAYER_POSITIONS = (
    Adjective("first", "", "erste", "erst", "", "第一", "第一", frozenset()),
    Adjective("second", "", "zweite", "zweit", "", "第二", "第二", frozenset()),
    Adjective("third", "", "dritte", "dritt", "", "第三", "第三", frozenset()),
    Adjective("last", "", "letzte", "letzt", "", "最后一", "最后一", frozenset()),
)
MILLIONS = tuple(Fixed(en, de, zh) for en, de, zh in (
    ("ten", "zehn", "一千万"), ("twenty", "zwanzig", "两千万"), ("thirty", "dreißig", "三千万"),
    ("fifty", "fünfzig", "五千万"), ("ninety", "neunzig", "九千万")))


def _noun(d: Draw, tags: str) -> Noun:
    kinds = set(tags.split())
    return d.pick(n for n in lx.RESEARCH_NOUNS if n.tags & kinds and n.en not in d.words)


def _research_fitting(noun: Noun) -> list[Adjective]:
    """Research adjectives that make sense with a noun."""
    kinds = noun.tags | ({"object_neural"} if noun.en in ("model", "encoder", "decoder", "architecture") else set())
    allowed = {"problem": "simple important difficult new", "hypothesis": "simple important",
               "idea": "new simple useful good"}
    names = allowed.get(noun.en, "").split()
    return [a for a in lx.RESEARCH_ADJECTIVES if (a.en in names if names else a.tags & kinds)]


def _research_phrase(d: Draw, noun: Noun, dets: str, adjectives: float) -> Phrase:
    det = d.rng.choice(dets.split())
    fits = [a for a in _research_fitting(noun) if a.en not in d.words]
    adjective = d.pick(fits) if fits and d.rng.random() < adjectives else None
    if not noun.plural:
        return phrase(noun, "" if det in ("a", "many") else "the", adjective)
    if det in ("many", "these", "ours") or "always_many" in noun.tags:
        return phrase(noun, {"many": "", "a": "", "these": "this", "ours": "our"}.get(det, det), adjective, "p")
    return phrase(noun, det, adjective)


def topic(tags: str, dets: str = "the our this", adjectives: float = 0.35) -> Slot:
    """A research noun phrase around a noun of one of the kinds in ``tags``."""
    return lambda d: _research_phrase(d, _noun(d, tags), dets, adjectives)


def bare(tags: str) -> Slot:
    """A research noun without article (technique names: distillation, pruning)."""
    return lambda d: phrase(_noun(d, tags), "")


def layer(d: Draw) -> Phrase:
    """The third layer of the encoder: with the German genitive."""
    piece = phrase(d.pick(n for n in lx.RESEARCH_NOUNS if n.en == "layer"), "the", d.pick(LAYER_POSITIONS))
    whole = phrase(d.pick(n for n in lx.RESEARCH_NOUNS if n.en in ("encoder", "decoder", "model")), "the")
    return replace(piece, en=f"{piece.en} of {whole.en}", zh=f"{whole.zh}的{piece.zh}",
                   de={c: f"{piece.de[c]} {whole.de['gen']}" for c in lx.CASES})


def judged(slot: str = "x", tags: str = "compare") -> Slot:
    """A predicative research adjective of one of the kinds in ``tags`` that fits the noun in another slot."""

    def fill(d: Draw) -> Plain:
        kinds = set(tags.split())
        names = {"fast", "slow"} if {"fast", "slow"} & set(d.words) else set()
        noun = d.values[slot].noun if slot in d.values else None
        picky = noun is not None and noun.en in ("idea", "problem", "hypothesis")
        fits = _research_fitting(noun) if noun and picky else lx.RESEARCH_ADJECTIVES
        data = noun is not None and "data" in noun.tags
        return _quality(d.pick(a for a in fits if a.en not in d.words and a.en not in names and a.en != "new"
                               and (picky or a.tags & kinds)
                               and (not data or "data" in a.tags)))

    return fill


@dataclass(frozen=True)
class Work(Clause):
    """What researchers do; adds the nominalised German infinitive (zum Trainieren des Encoders)."""

    obj: Phrase | None = None

    def form(self, lang: str, spec: str) -> str:
        if spec == "nominal" and self.obj:
            verb = self.predicate.verb
            bare = self.obj.de_none and self.obj.person == "p"  # a genitive needs an article to show: "von" instead
            whose = f"von {self.obj.de['dat']}" if bare else self.obj.de["gen"]
            return f"{(verb.prefix + verb.de).capitalize()} {whose}"
        return super().form(lang, spec)


def work(tense: str = "present", who: str = "we", dets: str = "the our this", adjectives: float = 0.35,
         modals: str = "", times: tuple[Fixed, ...] = (), but: str = "", only: str = "") -> Slot:
    """A clause about research work (we train the small encoder), without or only with certain verbs."""

    def fill(d: Draw) -> Work:
        taken, allowed = set(but.split()), set(only.split())
        verb = d.pick(v for v in lx.RESEARCH_VERBS if v.en not in d.words and v.en not in taken
                      and (not allowed or v.en in allowed))
        noun = _noun(d, " ".join(verb.tags))
        many = ("data" in noun.tags and "corpus" not in noun.tags) or verb.en == "compare"
        obj = _research_phrase(d, noun, "these ours many" if many else dets, adjectives)
        modal = d.pick([m for m in lx.MODALS if m.en.replace(" ", "_") in modals.split()]) if modals else None
        doer = _pronoun(d.rng.choice(who.split()))
        return Work(doer, _predicate(verb, obj), tense, d.rng.choice(times) if times else None, modal, obj=obj)

    return fill


def trained(background: bool) -> Slot:
    """A verb for the passive: was trained (wurde ... trainiert, 是用...训练的)."""
    names = ("train", "evaluate", "test") if not background else ("test",)

    def fill(d: Draw) -> Plain:
        v = d.pick(v for v in lx.RESEARCH_VERBS if v.en in names)
        return Plain(v.past, v.participle, v.zh.format(o=""))

    return fill


_NEW = "propose present release"
_GAIN = "use improve build develop choose train compress simplify initialize annotate collect"
RESEARCH: tuple[Template, ...] = (
    _t("In this talk we compare {x} with {y}.", "In diesem Vortrag vergleichen wir {x:acc} mit {y:dat}.",
       "在这个报告中，我们比较{x}和{y}。", x=topic("object"), y=topic("object way")),
    _t("The results show that {x} is {a:more} than {y}.", "Die Ergebnisse zeigen, dass {x} {a:more} ist als {y}.",
       "结果表明，{x}比{y}更{a}。", x=topic("agent"), y=topic("agent", adjectives=0.2), a=judged(tags="compare slower")),
    _t("{x} is {a:more} than {y}.", "{x} ist {a:more} als {y}.", "{x}比{y}更{a}。", x=topic("agent object"),
       y=topic("agent", adjectives=0.5), a=judged(tags="compare slower")),
    _t("Is {x} really {a:more} than {y}?", "Ist {x} wirklich {a:more} als {y}?", "{x}真的比{y}更{a}吗？",
       x=topic("agent way"), y=topic("agent way"), a=judged()),
    _t("{c} in our experiments.", "In unseren Experimenten {c:v1}.", "在我们的实验中，{c}。", c=work("past")),
    _t("{c}.", "{c}.", "{c}。", c=work("past", "we they", times=PAST[1:3])),
    _t("{c}.", "{c}.", "{c}。", c=work("modal", modals="want_to can must should", adjectives=0.7)),
    _t("Why {c:q}?", "Warum {c:v1}?", "{c:+为什么}？", c=work("past", "you they", adjectives=0.7)),
    _t("Can we {c:inf} with less data?", "Können wir mit weniger Daten {c:inf}?", "我们能用更少的数据{c:vp}吗？",
       c=work(adjectives=0.5, only="train evaluate improve test build develop initialize simplify")),
    _t("How {c:q}?", "Wie {c:v1}?", "{c:how}？", c=work("modal", "we you they", modals="should", adjectives=0.7)),
    _t("{m} is {a} but not very {b}.", "{m} ist {a}, aber nicht sehr {b}.", "{m}很{a}，但是不太{b}。",
       m=topic("way object", "this our", 0.2), a=judged("m"), b=judged("m")),
    _t("{x} makes fewer mistakes than {y}.", "{x} macht weniger Fehler als {y}.", "{x}犯的错误比{y}少。",
       x=topic("agent"), y=topic("agent")),
    _t("First we {c:inf}, then we {e:inf}.", "Zuerst {c:v1}, dann {e:v1}.", "我们先{c:vp}，然后{e:vp}。",
       c=work(adjectives=0.1), e=work(adjectives=0.1)),
    _t("Before we {c:inf}, we {e:inf}.", "Bevor {c:sub}, {e:v1}.", "在{c:vp}之前，我们{e:vp}。",
       c=work(adjectives=0.1), e=work(adjectives=0.1)),
    _t("It is {a} to {c:inf}.", "Es ist {a}, {c:zu}.", "{c:vp}很{a}。", c=work(dets="this the a", adjectives=0.5),
       a=judged("", tags="issue")),
    _t("{s} of {x} depends on {y}.", "{s} {x:gen} hängt von {y:dat} ab.", "{x}的{s}取决于{y}。",
       s=topic("score", "the"), x=topic("agent", "the our"), y=topic("data part corpus", "the")),
    _t("{x} works well for many languages.", "{x} funktioniert für viele Sprachen gut.", "{x}对很多语言都很有效。",
       x=topic("agent way", "the our this", 0.7)),
    _t("Does {x} also work for {y}?", "Funktioniert {x} auch für {y:acc}?", "{x}对{y}也有效吗？",
       x=topic("agent way"), y=topic("data topic people", "many", 0.6)),
    _t("We found {n} mistakes in {x}.", "Wir haben {n} Fehler in {x:dat} gefunden.", "我们在{x}中发现了{n}个错误。",
       n=one_of((*lx.NUMBERS[:4], *lx.NUMBERS[6:8])), x=topic("data", "the our these", 0.6)),
    _t("{x} that we {v} is very {a}.", "{x}, {x:rel} wir {v} haben, ist sehr {a}.", "我们{v}的{x:core}非常{a}。",
       x=lambda d: _relative_head(d), v=lambda d: _relative_verb(d), a=judged()),
    _t("We do not know why {x} is so {a}.", "Wir wissen nicht, warum {x} so {a} ist.", "我们不知道{x}为什么这么{a}。",
       x=topic("agent object way issue"), a=judged()),
    _t("If {x} is not {a} enough, we {c:inf}.", "Wenn {x} nicht {a} genug ist, {c:v1}.", "如果{x}不够{a}，我们就{c:vp}。",
       x=topic("agent way", "the our", 0.1), a=judged(), c=work(adjectives=0.1, only=_GAIN)),
    _t("Thank you for the question about {x}.", "Vielen Dank für die Frage zu {x:dat}.", "谢谢你关于{x}的问题。",
       x=topic("object way data issue score topic study", "the our this", 0.6)),
    _t("Without {x}, {y} is not very {a}.", "Ohne {x:acc} ist {y} nicht sehr {a}.", "没有{x}，{y}就不太{a}。",
       x=topic("data part object", "the this"), y=topic("agent way", "the our"), a=judged("y")),
    _t("{x} can also be used for {y}.", "{x} kann auch für {y:acc} verwendet werden.", "{x}也可以用于{y}。",
       x=topic("agent way data", "the our this", 0.5), y=topic("topic data people", "many", 0.5)),
    _t("I think that {c}.", "Ich denke, dass {c:sub}.", "我觉得{c}。",
       c=work("modal", "we you they", modals="should can must", adjectives=0.5)),
    _t("We do not have enough {x} to {c:inf}.", "Wir haben nicht genug {x:acc}, um {c:zu}.", "我们没有足够的{x}来{c:vp}。",
       x=topic("data", "many"), c=work(adjectives=0.1)),
    _t("Instead of {c:ing}, we {e:inf}.", "Anstatt {c:zu}, {e:v1}.", "我们不{c:vp}，而是{e:vp}。",
       c=work(adjectives=0.15), e=work(adjectives=0.15)),
    _t("We increase {s} by {c:ing}.", "Wir erhöhen {s:acc}, indem {c:sub}.", "我们通过{c:vp}来提高{s}。",
       s=topic("score", "the"), c=work(dets="the a this", adjectives=0.6, only=_GAIN)),
    _t("Both {x} and {y} are {a}.", "Sowohl {x} als auch {y} sind {a}.", "{x}和{y}都很{a}。",
       x=topic("agent way", "the our", 0.4), y=topic("agent way", "the our", 0.4), a=judged()),
    _t("How good is {s} of {x}?", "Wie gut ist {s} {x:gen}?", "{x}的{s}怎么样？", s=topic("score", "the", 0.0),
       x=topic("agent quality_of", "the our this", 0.5)),
    _t("{x} translates {y} without mistakes.", "{x} übersetzt {y:acc} ohne Fehler.", "{x}翻译{y}时没有错误。",
       x=topic("agent", "the our this", 0.4), y=topic("wording", "many these the", 0.5)),
    _t("The biggest problem is {s} of {x}.", "Das größte Problem ist {s} {x:gen}.", "最大的问题是{x}的{s}。",
       s=topic("score", "the", 0.0), x=topic("agent quality_of", "the our this", 0.5)),
    _t("{x} is {a} for {y}.", "{x} ist für {y:acc} {a}.", "{x}对{y}来说很{a}。", x=topic("agent way", "the our this", 0.4),
       y=topic("people topic", "many", 0.4), a=judged()),
    _t("We study {z} with {x}.", "Wir untersuchen {z:acc} mit {x:dat}.", "我们用{x}研究{z}。",
       z=topic("issue topic", "the this our many", 0.5), x=topic("agent data", "the this a", 0.5)),
    _t("The second part of the talk describes {x}.", "Der zweite Teil des Vortrags beschreibt {x:acc}.",
       "报告的第二部分描述{x}。", x=topic("object way data issue study", "the our a", 0.6)),
    # outside the background lexicon
    _full("{z} {z:is|are} still an important problem for {x}.",
          "{z} {z:ist|sind} noch ein wichtiges Problem für {x:acc}.",
          "{z}对{x}来说还是一个重要的问题。", z=topic("cost topic bad", "the", 0.0), x=topic("agent", "the our this", 0.4)),
    _full("Our hypothesis is that {x} is {a:more} than {y}.", "Unsere Hypothese ist, dass {x} {a:more} ist als {y}.",
          "我们的假设是，{x}比{y}更{a}。", x=topic("agent way", "the this", 0.3), y=topic("agent", "the our", 0.3),
          a=judged(tags="compare slower")),
    _full("How important is {x}?", "Wie wichtig ist {x}?", "{x}有多重要？", x=lambda d: layer(d)),
    _full("We only train {x}.", "Wir trainieren nur {x:acc}.", "我们只训练{x}。", x=lambda d: layer(d)),
    _full("Without {z}, {x} becomes {a:more}.", "Ohne {z:acc} wird {x} {a:more}.", "没有{z}，{x}变得更{a}。",
          z=lambda d: layer(d), x=topic("agent", "the our"), a=judged(tags="compare slower")),
    _full("We propose {m} for {c:ing}.", "Wir schlagen {m:acc} zum {c:nominal} vor.",
          "我们提出{m:count}用于{c:vp}的{m:core}。", m=topic("way", "a", 0.7), c=work(but=_NEW, adjectives=0.1)),
    _full("In this talk we present {m} for {c:ing}.", "In diesem Vortrag stellen wir {m:acc} zum {c:nominal} vor.",
          "在这个报告中，我们介绍{m:count}用于{c:vp}的{m:core}。", m=topic("way", "a", 0.4),
          c=work(but=_NEW, adjectives=0.1)),
    _full("Removing {x} hurts {s} only a little.", "Das Entfernen {x:gen} verschlechtert {s:acc} nur wenig.",
          "去除{x}只会略微降低{s}。", x=lambda d: _removable(d), s=topic("score", "the our")),
    _full("{x} needs less memory than {y}.", "{x} braucht weniger Speicher als {y}.", "{x}需要的内存比{y}少。",
          x=topic("agent"), y=topic("agent")),
    _full("{x} has {n} million parameters.", "{x} hat {n} Millionen Parameter.", "{x}有{n}个参数。",
          x=topic("agent", adjectives=0.8), n=one_of(MILLIONS)),
    _full("{x} reduces {z} without hurting {s}.", "{x} reduziert {z:acc}, ohne {s:acc} zu verschlechtern.",
          "{x}减少了{z}，而没有降低{s}。", x=topic("way technique agent", "our this"), z=topic("cost bad", "the"),
          s=topic("score", "the")),
    _full("{x} was {v} on {y}.", "{x} wurde auf {y:dat} {v}.", "{x}是在{y}上{v}的。", x=topic("agent object"),
          v=trained(False), y=topic("corpus", "a the many")),
    _full("With the help of {t}, {x} becomes {a:more}.", "Mithilfe von {t:dat} wird {x} {a:more}.",
          "借助{t}，{x}变得更{a}了。", t=bare("technique"), x=topic("agent"), a=judged()),
    _full("We combine {t} with {u} to {c:inf}.", "Wir kombinieren {t:acc} mit {u:dat}, um {c:zu}.",
          "我们把{t}和{u}结合起来，以{c:vp}。", t=bare("technique"), u=bare("technique"),
          c=work(only="train compress simplify improve build", adjectives=0.1)),
    _full("After {t:core}, {x} is almost as {a} as {y}.", "Nach {t:dat} ist {x} fast so {a} wie {y}.",
          "{t}之后，{x}几乎和{y}一样{a}。", t=topic("technique", "the", 0.0), x=topic("object", adjectives=0.1),
          y=topic("agent", "the our", 0.2), a=judged()),
    _full("Because of {z}, it is difficult to {c:inf}.", "Wegen {z:gen} ist es schwierig, {c:zu}.", "因为{z}，{c:vp}很困难。",
          z=topic("cost bad", "the", 0.0), c=work(adjectives=0.3)),
    _full("We test {h} on {b}.", "Wir testen {h:acc} auf {b:dat}.", "我们在{b}上测试{h}。",
          h=topic("guess way object", "this our", 0.3), b=topic("corpus", "a the many", 0.7)),
    _full("On {b}, {x} reaches a higher {s} than {y}.", "Auf {b:dat} erreicht {x} eine höhere {s} als {y}.",
          "在{b}上，{x}的{s}比{y}更高。", b=topic("corpus", "the our this"), x=topic("agent", adjectives=0.2),
          s=bare("score"), y=topic("agent", adjectives=0.1)),
    _full("{x} learns to ignore {z} in {y}.", "{x} lernt, {z:acc} in {y:dat} zu ignorieren.", "{x}学会忽略{y}中的{z}。",
          x=topic("agent"), z=topic("bad", "the", 0.0), y=topic("data", "the these")),
    _full("{x} and {y} use the same vocabulary.", "{x} und {y} verwenden dasselbe Vokabular.", "{x}和{y}使用相同的词表。",
          x=topic("agent", "the our"), y=topic("agent", "the our")),
    _full("We measure {s} of {x} on {b}.", "Wir messen {s:acc} {x:gen} auf {b:dat}.", "我们在{b}上测量{x}的{s}。",
          s=topic("score cost", "the"), x=topic("agent", "the our"), b=topic("corpus", "a the")),
    _full("{t} is {a:more} than {u} for {x}.", "{t} ist für {x:acc} {a:more} als {u}.", "对{x}来说，{t}比{u}更{a}。",
          t=bare("technique"), u=bare("technique"), x=topic("agent"), a=judged()),
)


def _relative_verb(d: Draw) -> Plain:
    noun = d.values["x"].noun
    v = d.pick(v for v in lx.RESEARCH_VERBS if v.tags & noun.tags and not v.prefix)
    return Plain(v.past, v.participle, v.zh.format(o=""))


@dataclass(frozen=True)
class _Head(Phrase):
    """A noun phrase that a German relative pronoun follows (accusative)."""

    def form(self, lang: str, spec: str) -> str:
        if spec == "rel" and self.noun:
            return lx.german_article("der", "acc", self.noun.gender)
        return super().form(lang, spec)


def _relative_head(d: Draw) -> Phrase:
    made = _research_phrase(d, _noun(d, "object way"), "the", 0.3)
    return _Head(made.en, made.de, made.zh, made.person, made.sex, made.noun, made.zh_count, made.zh_core)


def _removable(d: Draw) -> Phrase:
    return layer(d) if d.rng.random() < 0.5 else _research_phrase(d, _noun(d, "part data"), "the these", 0.3)


# --------------------------------------------------------------------------------------------------------- API
def normalised(en: str) -> str:
    """The key by which sentences are compared: casefolded words, no punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", "", en.casefold()).split())


def _drafts(templates: tuple[Template, ...], num: int, seed: int, domain: str, background: bool,
            exclude: set[str]) -> list[tuple[Sentence, list[str]]]:
    """Draw distinct sentences, the templates taking turns so that all patterns are used evenly."""
    rng = random.Random(f"{domain}-{background}-{seed}")
    used: Counter[str] = Counter()
    seen = set(exclude)
    out: list[tuple[Sentence, list[str]]] = []
    for _ in range(DRAWS_PER_SENTENCE * num + 1000):
        if len(out) >= num:
            return out
        try:
            sentence, words = rng.choice(templates).draft(rng, domain, background, used)
        except _DeadEnd:
            continue
        key = normalised(sentence.en)
        if key in seen or not 4 <= key.count(" ") + 1 <= 14 or _repeats(words):
            continue
        seen.add(key)
        used.update(words)
        out.append((sentence, words))
    raise ValueError(f"the {domain} grammar gave only {len(out)} distinct sentences of the {num} asked for; "
                     "ask for fewer, or exclude fewer")


def _repeats(words: list[str]) -> bool:
    """Whether a content word occurs twice, as in "my friend helps my friend"."""
    return len(set(words)) < len(words)


def everyday(num: int, seed: int) -> list[Sentence]:
    """Draw ``num`` distinct everyday sentences."""
    return [s for s, _ in _drafts(EVERYDAY, num, seed, "everyday", False, set())]


def _research_templates(lexicon: str) -> tuple[Template, ...]:
    if lexicon not in ("full", "background"):
        raise ValueError(f"lexicon must be 'full' or 'background', not {lexicon!r}")
    return RESEARCH if lexicon == "full" else tuple(t for t in RESEARCH if t.background)


def research(num: int, seed: int, lexicon: str = "full") -> list[Sentence]:
    """Draw ``num`` distinct conference-talk sentences from the "full" or only the "background" lexicon."""
    drafts = _drafts(_research_templates(lexicon), num, seed, "research", lexicon == "background", set())
    return [s for s, _ in drafts]


CONTENT_WEIGHT = 4  # how much more a rare lexicon entry counts there than a rare inflected form
WINDOW = 250  # how many candidates the balanced sampling of in_domain_splits looks at


def _gaps(en: str) -> set[str]:
    """The sentence with each word in turn left open: two sentences that differ in one word share one of these."""
    words = normalised(en).split()
    return {" ".join([*words[:i], "*", *words[i + 1:]]) for i in range(len(words))}


def in_domain_splits(num_train: int, num_select: int, num_test: int, seed: int) -> dict[str, list[Sentence]]:
    """Draw train, select and test sentences of the research domain.

    Train is balanced over the lexicon (each time the candidate whose words are rarest so far), because a word that the
    fine-tuning data shows once cannot be learned from it. Select and test use only words that train has, and differ
    from every sentence of the other splits in at least two words, so that they measure translation and not memory.
    """
    total = num_train + num_select + num_test
    pool = _drafts(RESEARCH, 10 * total + 1000, seed, "research", False, set())
    taken: set[str] = set()
    splits: dict[str, list[Sentence]] = {"train": [], "select": [], "test": []}

    def choose(name: str, num: int, known: set[str] | None) -> None:
        counts: Counter[str] = Counter()
        window: list[tuple[Sentence, Counter[str]]] = []
        while len(splits[name]) < num:
            while pool and len(window) < WINDOW:
                sentence, words = pool.pop()
                spoken = set(normalised(sentence.en).split())
                if not _gaps(sentence.en) & taken and (known is None or spoken <= known):
                    weights = Counter(spoken)
                    weights.update({w: CONTENT_WEIGHT for w in words})
                    window.append((sentence, weights))
            if not window:
                raise ValueError(f"only {len(splits[name])} of {num} {name} sentences could be drawn; ask for fewer")
            best = max(window, key=lambda w: sum(n * (1 + counts[x]) ** -2 for x, n in w[1].items()))
            window.remove(best)
            splits[name].append(best[0])
            counts.update(set(best[1]))
        taken.update(gap for s in splits[name] for gap in _gaps(s.en))

    choose("train", num_train, None)
    vocabulary = {w for s in splits["train"] for w in normalised(s.en).split()}
    choose("select", num_select, vocabulary)
    choose("test", num_test, vocabulary)
    return splits


def base_corpus(num_everyday: int, num_research: int, seed: int, exclude: set[str]) -> list[Sentence]:
    """What the base model is trained on: everyday speech, and research talk within the background lexicon."""
    keys = {normalised(e) for e in exclude}
    everyday_part = _drafts(EVERYDAY, num_everyday, seed, "everyday", False, keys)
    keys |= {normalised(s.en) for s, _ in everyday_part}
    background = _research_templates("background")
    return [s for s, _ in everyday_part + _drafts(background, num_research, seed, "research", True, keys)]
