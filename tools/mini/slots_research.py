"""Slots of the research domain: noun phrases, judgements and clauses around the words of conference talks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tools.mini.clauses import Clause, predicate_of
from tools.mini.grammar import Draw, Plain, Slot, quality
from tools.mini.lexicon import CASES, Adjective, Fixed, Noun, german_article
from tools.mini.phrases import Phrase, phrase, pronoun
from tools.mini.words_everyday_actions import MODALS
from tools.mini.words_research import RESEARCH_ADJECTIVES, RESEARCH_NOUNS, RESEARCH_VERBS

LAYER_POSITIONS = (
    Adjective("first", "", "erste", "erst", "", "第一", "第一", frozenset()),
    Adjective("second", "", "zweite", "zweit", "", "第二", "第二", frozenset()),
    Adjective("third", "", "dritte", "dritt", "", "第三", "第三", frozenset()),
    Adjective("last", "", "letzte", "letzt", "", "最后一", "最后一", frozenset()),
)
MILLIONS = tuple(
    Fixed(en, de, zh)
    for en, de, zh in (
        ("ten", "zehn", "一千万"),
        ("twenty", "zwanzig", "两千万"),
        ("thirty", "dreißig", "三千万"),
        ("fifty", "fünfzig", "五千万"),
        ("ninety", "neunzig", "九千万"),
    )
)


def _noun(d: Draw, tags: str) -> Noun:
    kinds = set(tags.split())
    return d.pick(n for n in RESEARCH_NOUNS if n.tags & kinds and n.en not in d.words)


def _research_fitting(noun: Noun) -> list[Adjective]:
    """Research adjectives that make sense with a noun."""
    kinds = noun.tags | ({"object_neural"} if noun.en in ("model", "encoder", "decoder", "architecture") else set())
    allowed = {
        "problem": "simple important difficult new",
        "hypothesis": "simple important",
        "idea": "new simple useful good",
    }
    names = allowed.get(noun.en, "").split()
    return [a for a in RESEARCH_ADJECTIVES if (a.en in names if names else a.tags & kinds)]


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
    piece = phrase(d.pick(n for n in RESEARCH_NOUNS if n.en == "layer"), "the", d.pick(LAYER_POSITIONS))
    whole = phrase(d.pick(n for n in RESEARCH_NOUNS if n.en in ("encoder", "decoder", "model")), "the")
    return replace(
        piece,
        en=f"{piece.en} of {whole.en}",
        zh=f"{whole.zh}的{piece.zh}",
        de={c: f"{piece.de[c]} {whole.de['gen']}" for c in CASES},
    )


def judged(slot: str = "x", tags: str = "compare") -> Slot:
    """A predicative research adjective of one of the kinds in ``tags`` that fits the noun in another slot."""

    def fill(d: Draw) -> Plain:
        kinds = set(tags.split())
        names = {"fast", "slow"} if {"fast", "slow"} & set(d.words) else set()
        noun = d.values[slot].noun if slot in d.values else None
        picky = noun is not None and noun.en in ("idea", "problem", "hypothesis")
        fits = _research_fitting(noun) if noun and picky else RESEARCH_ADJECTIVES
        data = noun is not None and "data" in noun.tags
        return quality(
            d.pick(
                a
                for a in fits
                if a.en not in d.words
                and a.en not in names
                and a.en != "new"
                and (picky or a.tags & kinds)
                and (not data or "data" in a.tags)
            )
        )

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


def work(
    tense: str = "present",
    who: str = "we",
    dets: str = "the our this",
    adjectives: float = 0.35,
    modals: str = "",
    times: tuple[Fixed, ...] = (),
    but: str = "",
    only: str = "",
) -> Slot:
    """A clause about research work (we train the small encoder), without or only with certain verbs."""

    def fill(d: Draw) -> Work:
        taken, allowed = set(but.split()), set(only.split())
        verb = d.pick(
            v for v in RESEARCH_VERBS if v.en not in d.words and v.en not in taken and (not allowed or v.en in allowed)
        )
        noun = _noun(d, " ".join(verb.tags))
        many = ("data" in noun.tags and "corpus" not in noun.tags) or verb.en == "compare"
        obj = _research_phrase(d, noun, "these ours many" if many else dets, adjectives)
        modal = d.pick([m for m in MODALS if m.en.replace(" ", "_") in modals.split()]) if modals else None
        doer = pronoun(d.rng.choice(who.split()))
        return Work(doer, predicate_of(verb, obj), tense, d.rng.choice(times) if times else None, modal, obj=obj)

    return fill


def trained(background: bool) -> Slot:
    """A verb for the passive: was trained (wurde ... trainiert, 是用...训练的)."""
    names = ("train", "evaluate", "test") if not background else ("test",)

    def fill(d: Draw) -> Plain:
        v = d.pick(v for v in RESEARCH_VERBS if v.en in names)
        return Plain(v.past, v.participle, v.zh.format(o=""))

    return fill


def relative_verb(d: Draw) -> Plain:
    """What we did with the head in slot ``x``, for its relative clause."""
    noun = d.values["x"].noun
    v = d.pick(v for v in RESEARCH_VERBS if v.tags & noun.tags and not v.prefix)
    return Plain(v.past, v.participle, v.zh.format(o=""))


@dataclass(frozen=True)
class _Head(Phrase):
    """A noun phrase that a German relative pronoun follows (accusative)."""

    def form(self, lang: str, spec: str) -> str:
        if spec == "rel" and self.noun:
            return german_article("der", "acc", self.noun.gender)
        return super().form(lang, spec)


def relative_head(d: Draw) -> Phrase:
    """A noun phrase that a relative clause follows: the model that we trained."""
    made = _research_phrase(d, _noun(d, "object way"), "the", 0.3)
    return _Head(made.en, made.de, made.zh, made.person, made.sex, made.noun, made.zh_count, made.zh_core)


def removable(d: Draw) -> Phrase:
    """What one may try to do without: a layer, parameters or data."""
    return layer(d) if d.rng.random() < 0.5 else _research_phrase(d, _noun(d, "part data"), "the these", 0.3)
