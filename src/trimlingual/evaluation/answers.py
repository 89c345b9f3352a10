"""Whether an answer is in the language that was asked for, and whether it turns in a circle.

Where the scripts differ they decide: a Chinese answer has Han in it. Else py3langid does (Lui & Baldwin 2012; its model ships with the
package, so it needs no network and gives the same answer every time). It must be sure: a short text, or one full of names, can be
read as many languages. What cannot be told is not held against the model. Measured rates stand in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from trimlingual.recipe.languages import LANGUAGES, alike, count_scripts, language, primary

MIN_UNITS = 3  # words, or letters where words are not spaced; fewer cannot be told
OWN_SHARE = 0.5  # of them in the language's own scripts: names and terms often stay in Latin letters
SURE = 0.9  # probability, among the table's languages, from which another language is believed


def is_wrong_language(text: str, asked: str) -> bool:
    """Whether `text` is surely in another language than `asked` (a code). False for what is too short or cannot be told."""
    if primary(asked) not in LANGUAGES:
        return False
    counts = count_scripts(text)
    total = sum(counts.values())
    if total < MIN_UNITS:
        return False
    if sum(counts[script] for script in language(asked).scripts) < OWN_SHARE * total:
        return True
    found, probability = _identify(text)
    return probability >= SURE and not alike(found, asked)


def wrong_languages(texts: Sequence[str], asked: str) -> list[bool]:
    """`is_wrong_language` of each text."""
    return [is_wrong_language(text, asked) for text in texts]


def has_repetition_loop(text: str, asked: str, max_repeats: int) -> bool:
    """Whether an n-gram (n = 1 to 4) stands more than `max_repeats` times in a row; over characters where words are not spaced."""
    units = text.split() if language(asked).spaced else list(text)
    for n in range(1, 5):
        run = n
        for i in range(n, len(units)):
            run = run + 1 if units[i] == units[i - n] else n
            if run > n * max_repeats:
                return True
    return False


def strict(texts: Sequence[str], wrong: Sequence[bool]) -> list[str]:
    """The texts as a strict score counts them: an answer in the wrong language is no answer."""
    return ["" if bad else text for text, bad in zip(texts, wrong, strict=True)]


@lru_cache(maxsize=4096)
def _identify(text: str) -> tuple[str, float]:
    """Code and probability of the likeliest of the table's languages."""
    found, probability = _identifier().classify(text)
    return str(found), float(probability)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([code for code in LANGUAGES if code in identifier.labels])
    return identifier
