"""The languages, in one table: how each is named in a prompt, written and scored. No torch, no third-party imports.

A region or script (`zh-TW`, `pt_BR`, `cmn_Hans_CN`) follows its primary subtag in everything but its name. A language that is not in
the table needs a name in the recipe (`task.language_names`); it is then taken to be spaced, and answers in it are not checked.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

# Scripts are the first word of a character's Unicode name, but for Han, whose characters are named CJK.
LATIN, CYRILLIC, HAN, ARABIC, DEVANAGARI = "LATIN", "CYRILLIC", "HAN", "ARABIC", "DEVANAGARI"


@dataclass(frozen=True)
class Language:
    """One language. `name` is the English one, as the published prompt spells it ("into German:")."""

    name: str
    scripts: tuple[str, ...] = (LATIN,)
    spaced: bool = True  # whether words have spaces between them
    bleu_tokenizer: str = "13a"  # sacreBLEU's; `char` where it has none for a language without spaces
    needs: str | None = None  # what that tokenizer wants installed

    @property
    def main_metric(self) -> str:
        """chrF where words are not spaced, chrF++ elsewhere (the paper's choice for Chinese and German)."""
        return "chrfpp" if self.spaced else "chrf"


LANGUAGES: dict[str, Language] = {
    "ar": Language("Arabic", (ARABIC,)),
    "bg": Language("Bulgarian", (CYRILLIC,)),
    "bn": Language("Bengali", ("BENGALI",)),
    "ca": Language("Catalan"),
    "cs": Language("Czech"),
    "cy": Language("Welsh"),
    "da": Language("Danish"),
    "de": Language("German"),
    "el": Language("Greek", ("GREEK",)),
    "en": Language("English"),
    "es": Language("Spanish"),
    "et": Language("Estonian"),
    "fa": Language("Persian", (ARABIC,)),
    "fi": Language("Finnish"),
    "fr": Language("French"),
    "he": Language("Hebrew", ("HEBREW",)),
    "hi": Language("Hindi", (DEVANAGARI,)),
    "hr": Language("Croatian"),
    "hu": Language("Hungarian"),
    "id": Language("Indonesian"),
    "it": Language("Italian"),
    "ja": Language("Japanese", (HAN, "HIRAGANA", "KATAKANA"), False, "ja-mecab", "sacrebleu[ja]"),
    "km": Language("Khmer", ("KHMER",), False, "char"),
    "ko": Language("Korean", ("HANGUL", HAN), True, "ko-mecab", "sacrebleu[ko]"),
    "lo": Language("Lao", ("LAO",), False, "char"),
    "lt": Language("Lithuanian"),
    "lv": Language("Latvian"),
    "mn": Language("Mongolian", (CYRILLIC, "MONGOLIAN")),
    "mr": Language("Marathi", (DEVANAGARI,)),
    "ms": Language("Malay"),
    "my": Language("Burmese", ("MYANMAR",), False, "char"),
    "nl": Language("Dutch"),
    "no": Language("Norwegian"),
    "pl": Language("Polish"),
    "pt": Language("Portuguese"),
    "ro": Language("Romanian"),
    "ru": Language("Russian", (CYRILLIC,)),
    "sk": Language("Slovak"),
    "sl": Language("Slovenian"),
    "sr": Language("Serbian", (CYRILLIC, LATIN)),
    "sv": Language("Swedish"),
    "sw": Language("Swahili"),
    "ta": Language("Tamil", ("TAMIL",)),
    "te": Language("Telugu", ("TELUGU",)),
    "th": Language("Thai", ("THAI",), False, "char"),
    "tl": Language("Filipino"),
    "tr": Language("Turkish"),
    "uk": Language("Ukrainian", (CYRILLIC,)),
    "ur": Language("Urdu", (ARABIC,)),
    "vi": Language("Vietnamese"),
    "yue": Language("Cantonese", (HAN,), False, "zh"),
    "zh": Language("Chinese", (HAN,), False, "zh"),
}
# Other codes of the same languages, as ISO 639-3 and data sets have them.
ALIASES = {"cmn": "zh", "fil": "tl", "iw": "he", "nb": "no", "nn": "no", "pes": "fa", "prs": "fa"}
# Regions that are asked for by a name of their own. Any other region has its language's.
REGIONAL_NAMES = {
    "pt-br": "Brazilian Portuguese", "pt-pt": "European Portuguese", "zh-hans": "Simplified Chinese",
    "zh-hant": "Traditional Chinese", "zh-hk": "Traditional Chinese", "zh-tw": "Traditional Chinese",
}  # fmt: skip
# Languages that are written so much alike that one is never held to be the wrong one where the other was asked for.
ALIKE = (("zh", "yue"), ("id", "ms"), ("hr", "sr"), ("no", "da"), ("cs", "sk"), ("hi", "mr"))
UNSPACED = {"HAN", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}
UNKNOWN = Language("")


def primary(code: str) -> str:
    """The language of a code with or without region: `zh` of `zh-TW`, `cmn_Hans_CN` and `zh`."""
    first = code.replace("_", "-").split("-")[0].lower()
    return ALIASES.get(first, first)


def language(code: str) -> Language:
    """The table's entry; one with the defaults, and no name, for a language that it does not have."""
    return LANGUAGES.get(primary(code), UNKNOWN)


def language_name(code: str) -> str | None:
    """English name, for the prompt; None for a language that the table does not have."""
    parts = code.replace("_", "-").lower().split("-")
    named = [REGIONAL_NAMES.get(f"{primary(code)}-{part}") for part in parts[1:]]
    return next((name for name in named if name), language(code).name or None)


def alike(one: str, other: str) -> bool:
    """Whether two codes are of one language, or of two that are written alike."""
    pair = {primary(one), primary(other)}
    return len(pair) == 1 or any(pair <= set(group) for group in ALIKE)


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """Script of a letter; None for anything else (digits, punctuation, symbols)."""
    if not character.isalpha():
        return None
    words = [word for word in unicodedata.name(character, "").split() if word not in ("FULLWIDTH", "HALFWIDTH")]
    return None if not words else HAN if words[0] == "CJK" else words[0]


def count_scripts(text: str) -> Counter[str]:
    """How many words of each script; where words are not spaced, how many letters."""
    counts: Counter[str] = Counter()
    before = None
    for character in text:
        script = script_of(character)
        if script and (script in UNSPACED or script != before):
            counts[script] += 1
        # A mark inside a word (an apostrophe, a vowel sign) does not end it; a space does.
        before = script or (before if not character.isspace() else None)
    return counts
