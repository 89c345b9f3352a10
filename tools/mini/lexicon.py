"""What a word of the built-in corpus is: English, German and Chinese side by side, with what inflection needs to know.

The words themselves stand in the modules named ``words_...``, as small text tables (one entry a line, columns separated
by ``|``), because a native speaker can proof-read a table far more easily than a page of constructor calls. Here are the
frozen dataclasses that the tables are parsed into on import, the parsers, and the German inflection.
"""

from __future__ import annotations

from dataclasses import dataclass

CASES = ("nom", "acc", "dat", "gen")
# Rows: case; columns: masculine, feminine, neuter, plural.
_DER = {"nom": "der die das die", "acc": "den die das die", "dat": "dem der dem den", "gen": "des der des der"}
_EIN = {"nom": "- e - e", "acc": "en e - e", "dat": "em er em en", "gen": "es er es er"}
_WEAK = {"nom": "e e e en", "acc": "en e e en", "dat": "en en en en", "gen": "en en en en"}
_MIXED = {"nom": "er e es en", "acc": "en e es en", "dat": "en en en en", "gen": "en en en en"}
_STRONG = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en", "gen": "en er en er"}


def _cell(table: dict[str, str], case: str, gender: str) -> str:
    """Look up one cell of a declension table; ``gender`` is one of m, f, n and p (plural)."""
    return table[case].split()["mfnp".index(gender)].replace("-", "")


def german_article(word: str, case: str, gender: str) -> str:
    """Inflect a determiner: ``der``, ``dieser`` or a word of the ein-group (ein, kein, mein, unser ...)."""
    if word == "der":
        return _cell(_DER, case, gender)
    if word in ("dies", "welch"):  # endings of "der", spelled out
        return word + {"die": "e", "das": "es"}.get(_cell(_DER, case, gender), "e" + _cell(_DER, case, gender)[-1])
    if word == "ein" and gender == "p":
        return ""
    return word + _cell(_EIN, case, gender)


def german_adjective_ending(word: str, case: str, gender: str) -> str:
    """Ending of an adjective after the determiner ``word`` (empty: none, or an uninflected number)."""
    if word in ("der", "dies", "welch"):
        return _cell(_WEAK, case, gender)
    if word == "" or (word == "ein" and gender == "p"):
        return _cell(_STRONG, case, gender)
    return _cell(_MIXED, case, gender)


@dataclass(frozen=True)
class Noun:
    """A noun; ``weak`` is the German oblique form of n-declension nouns, ``plural`` is empty for mass nouns."""

    en: str
    plural: str
    de: str
    gender: str
    de_plural: str
    zh: str
    measure: str
    tags: frozenset[str]
    background: bool = True

    def german(self, case: str, number: str) -> str:
        """Inflect the noun: weak masculines, dative plural -n, genitive -(e)s."""
        if number == "p":
            return self.de_plural + ("n" if case == "dat" and self.de_plural.endswith(("e", "el", "er")) else "")
        if "weak" in self.tags and case != "nom":
            return self.de + ("n" if self.de[-1] in "er" and self.de != "Herr" else "en")
        if case == "gen" and self.gender in "mn":
            if "bare_gen" in self.tags:
                return self.de
            if self.de.endswith("nis"):
                return self.de + "ses"
            return self.de + ("es" if self.de[-1] in "sßzx" or self.de.endswith("sch") else "s")
        return self.de


@dataclass(frozen=True)
class Adjective:
    """An adjective; ``de_stem`` takes endings (teur-), ``zh`` goes before a noun, ``zh_root`` after 很, 比 or 不."""

    en: str
    more: str
    de: str
    de_stem: str
    de_more: str
    zh: str
    zh_root: str
    tags: frozenset[str]
    background: bool = True


@dataclass(frozen=True)
class Verb:
    """A verb with its government; ``zh`` and ``zh_done`` (perfective) mark the object's place with ``{o}``.

    ``mid`` is German material that stands right before the closing verb (a direction, a bare object), and ``mid_neg``
    its negated form. ``past`` is empty where the English past is spelled like the present (read): text could not
    tell the two apart.
    """

    en: str
    es: str
    past: str
    ing: str
    particle: str
    de: str
    ich: str
    er: str
    participle: str
    prefix: str
    aux: str
    case: str
    preposition: str
    zh: str
    zh_done: str
    tags: frozenset[str]
    mid: str = ""
    mid_neg: str = ""
    background: bool = True

    def present(self, person: str) -> str:
        """Finite German form without its separable prefix; persons are 1, 3 and p (plural and the polite Sie)."""
        return {"1": self.ich, "3": self.er, "p": self.de}[person]

    def zu_infinitive(self) -> str:
        """``zu kaufen``, but ``anzurufen`` with a separable prefix."""
        return f"{self.prefix}zu{self.de}" if self.prefix else f"zu {self.de}"


@dataclass(frozen=True)
class Place:
    """A place noun with its ready-made prepositional phrases (im Park / in den Park)."""

    noun: Noun
    at_en: str
    at_de: str
    to_de: str
    at_zh: str


@dataclass(frozen=True)
class Fixed:
    """An uninflected expression: time, frequency, city, language, number, name."""

    en: str
    de: str
    zh: str
    extra: str = ""


def parse_rows(table: str) -> list[list[str]]:
    """The stripped cells of each line that is not empty."""
    return [[c.strip() for c in line.split("|")] for line in table.strip().splitlines() if line.strip()]


def parse_nouns(table: str, *more_tags: str) -> tuple[Noun, ...]:
    """Columns: English, plural (+ adds s, - none) | German, gender, plural (= same, - none) | Chinese, measure | tags.

    In all tables a leading ``*`` marks a word that the "background" lexicon of the research domain leaves out.
    """
    out = []
    for en, de, zh, tags in parse_rows(table):
        background = not en.startswith("*")
        *word, plural = en.lstrip("*").split()
        single = " ".join(word)
        many = {"+": single + "s", "-": ""}.get(plural, plural)
        german, gender, german_many = de.split()
        german_many = {"=": german, "-": ""}.get(german_many, german_many)
        chinese, measure = zh.split()
        out.append(
            Noun(
                single,
                many,
                german,
                gender,
                german_many,
                chinese,
                measure,
                frozenset((*tags.split(), *more_tags)),
                background,
            )
        )
    return tuple(out)


def parse_adjectives(table: str) -> tuple[Adjective, ...]:
    """Columns: English, comparative (+ more ...) | German, stem (=), comparative | Chinese attribute, root | tags."""
    out = []
    for en, de, zh, tags in parse_rows(table):
        background = not en.startswith("*")
        word, more = en.lstrip("*").split(maxsplit=1)
        german, stem, german_more = de.split()
        root = zh.split()[-1]
        out.append(
            Adjective(
                word,
                f"more {word}" if more == "+" else more,
                german,
                german if stem == "=" else stem,
                german_more,
                zh.split()[0],
                root,
                frozenset(tags.split()),
                background,
            )
        )
    return tuple(out)


def parse_verbs(table: str) -> tuple[Verb, ...]:
    """Columns: English base, 3rd, past, -ing (+ particle) | German prefix-infinitive, ich, er, participle [aux]
    | government | Chinese, perfective | object tags | optional German middle, negated middle."""
    out = []
    for row in parse_rows(table):
        en, de, government, zh, tags = row[:5]
        background = not en.startswith("*")
        base, es, past, ing, *particle = en.lstrip("*").split()
        infinitive, ich, er, participle, *aux = de.split()
        prefix, _, stem = infinitive.rpartition("-")
        preposition, _, case = government.rpartition("+")
        plain, done = zh.split()
        mid = row[5] if len(row) > 5 else ""
        negated = row[6] if len(row) > 6 else f"nicht {mid}".strip()
        out.append(
            Verb(
                base,
                es,
                "" if past == "-" else past,
                ing,
                " ".join(particle),
                stem,
                ich,
                er,
                participle,
                prefix,
                aux[0] if aux else "haben",
                case,
                preposition,
                plain,
                done,
                frozenset(tags.split()),
                mid,
                negated,
                background,
            )
        )
    return tuple(out)


def parse_fixed(table: str) -> tuple[Fixed, ...]:
    """Columns: English | German | Chinese | optional extra."""
    return tuple(Fixed(*row) for row in parse_rows(table))
