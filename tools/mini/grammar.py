"""How sentences are made: templates in three languages whose slots are filled by functions that draw words.

English, German and Chinese are produced side by side from the same draw of words, and both translations are a
deterministic function of the English. A template names its slots; what fills a slot (a noun phrase, a whole clause ...)
knows the forms that the three languages need, asked for by format specs: ``{x:dat}`` is a noun phrase in the dative,
``{c:sub}`` a clause with the verb at its end.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tools.mini.lexicon import Adjective, Fixed

CANDIDATES = 3  # of so many words drawn for a slot the one least used so far is taken
CONTRACTIONS = {
    "von dem": "vom",
    "in dem": "im",
    "zu dem": "zum",
    "zu der": "zur",
    "an dem": "am",
    "in das": "ins",
    "an das": "ans",
}


def word_set(text: str) -> frozenset[str]:
    """The space-separated words of ``text``."""
    return frozenset(text.split())


def join(*parts: str) -> str:
    """Put the parts that are not empty beside each other, with spaces."""
    return " ".join(p for p in parts if p)


def by_person(spec: str, person: str) -> str:
    """Resolve agreement: ``1|3|p`` (am|is|are, bin|ist|sind), or two options where the first person follows one."""
    options = spec.split("|")
    return options["13p".index(person)] if len(options) == 3 else options[person == "p"]


class DeadEnd(Exception):
    """The words drawn so far leave no word that fits: throw the draft away and draw again."""


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
            raise DeadEnd
        entry = min((self.rng.choice(pool) for _ in range(CANDIDATES)), key=lambda e: self.used[e.en])
        self.words.append(entry.en)
        return entry


Slot = Callable[[Draw], Form]


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


def quality(a: Adjective) -> Plain:
    """A predicative adjective with its comparative."""
    return Plain(
        a.en,
        a.de,
        a.zh_root,
        {("en", "more"): a.more, ("de", "more"): a.de_more, ("de", "stem"): a.de_stem, ("zh", "more"): a.zh_root},
    )


@dataclass(frozen=True)
class Template:
    """A sentence pattern in three languages; slots are filled in order, so later ones may look at earlier ones."""

    en: str
    de: str
    zh: str
    slots: dict[str, Slot]
    background: bool = True

    def draft(self, rng: random.Random, background: bool, used: Counter[str]) -> tuple[tuple[str, str, str], list[str]]:
        """Draw the three texts and the list of their content words; raises DeadEnd when no word fits a slot."""
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
        return (en, de, zh), d.words


def pattern(en: str, de: str, zh: str, /, **slots: Slot) -> Template:
    """A template within the background lexicon, its slots in the order in which they are filled."""
    return Template(en, de, zh, slots)


def full_pattern(en: str, de: str, zh: str, /, **slots: Slot) -> Template:
    """A research template outside the background lexicon."""
    return Template(en, de, zh, slots, background=False)


def _contracted(de: str) -> str:
    """Contract prepositions with the article (im, vom, zum ...); our relative clauses never open with one."""
    return re.sub(r"\b(?:von|in|zu|an) (?:dem|der|das)\b", lambda m: CONTRACTIONS.get(m[0], m[0]), de)
