"""Sentences of the built-in corpus: a small English-German-Chinese grammar written for this project.

The tiny model that ships with trimlingual has to learn real translation from synthesised speech, so every sentence
comes with exactly one German and one Chinese rendering, both a deterministic function of the English.

``everyday`` is what the base model learns from. ``research`` imitates talks at a computational-linguistics conference;
about half of its words are kept from the base model (``lexicon="background"``), so that fine-tuning has to teach them.
How a sentence is made stands in the modules below this one: the words in ``lexicon`` and ``words_...``, the machinery
in ``grammar``, ``phrases``, ``clauses`` and ``slots_research``, the patterns in ``templates_...``.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

from tools.mini.grammar import DeadEnd, Template
from tools.mini.templates_everyday_clauses import CLAUSE_PATTERNS
from tools.mini.templates_everyday_phrases import PHRASE_PATTERNS
from tools.mini.templates_research import RESEARCH

EVERYDAY = CLAUSE_PATTERNS + PHRASE_PATTERNS
DRAWS_PER_SENTENCE = 60  # how often we draw, for each sentence asked for, before we say that the grammar is exhausted
CONTENT_WEIGHT = 4  # how much more a rare lexicon entry counts in in_domain_splits than a rare inflected form
WINDOW = 250  # how many candidates its balanced sampling looks at


@dataclass(frozen=True)
class Sentence:
    """One sentence in three languages."""

    en: str
    de: str
    zh: str
    domain: str


def normalised(en: str) -> str:
    """The key by which sentences are compared: casefolded words, no punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", "", en.casefold()).split())


def _drafts(
    templates: tuple[Template, ...], num: int, seed: int, domain: str, background: bool, exclude: set[str]
) -> list[tuple[Sentence, list[str]]]:
    """Draw distinct sentences, the templates taking turns so that all patterns are used evenly."""
    rng = random.Random(f"{domain}-{background}-{seed}")
    used: Counter[str] = Counter()
    seen = set(exclude)
    out: list[tuple[Sentence, list[str]]] = []
    for _ in range(DRAWS_PER_SENTENCE * num + 1000):
        if len(out) >= num:
            return out
        try:
            texts, words = rng.choice(templates).draft(rng, background, used)
        except DeadEnd:
            continue
        sentence = Sentence(*texts, domain)
        key = normalised(sentence.en)
        if key in seen or not 4 <= key.count(" ") + 1 <= 14 or _repeats(words):
            continue
        seen.add(key)
        used.update(words)
        out.append((sentence, words))
    raise ValueError(
        f"the {domain} grammar gave only {len(out)} distinct sentences of the {num} asked for; "
        "ask for fewer, or exclude fewer"
    )


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


def _gaps(en: str) -> set[str]:
    """The sentence with each word in turn left open: two sentences that differ in one word share one of these."""
    words = normalised(en).split()
    return {" ".join([*words[:i], "*", *words[i + 1 :]]) for i in range(len(words))}


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
                    weights = Counter(
                        sorted(spoken)
                    )  # sorted: a set's order, and so the sums below, vary from run to run
                    weights.update({w: CONTENT_WEIGHT for w in sorted(words)})
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
