"""Clauses of the built-in corpus: what somebody does, as a statement, a question, a subordinate clause or an infinitive."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tools.mini.grammar import DeadEnd, Draw, Slot, by_person, join, word_set
from tools.mini.lexicon import CASES, Fixed, Verb, german_article
from tools.mini.phrases import Phrase, object_phrase, person, phrase, pronoun, subject
from tools.mini.words_everyday_actions import ACTIONS, ACTIVITIES, FREQUENCY, GIVING, MODALS, MOTIONS, PAST_TIMES
from tools.mini.words_everyday_things import CITIES, MEASURED, PLACES, THINGS

ONCE = word_set("sell choose hide find lend draw")
SEIN = {"1": "bin", "3": "ist", "p": "sind"}
HABEN = {"1": "habe", "3": "hat", "p": "haben"}
WERDEN = {"1": "werde", "3": "wird", "p": "werden"}
NO_PROGRESSIVE = ("去", "来", "走路去", "开车去", "坐飞机去", "早", "待")  # 正在去 sounds wrong


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


def predicate_of(verb: Verb, obj: Phrase | None = None, receiver: Phrase | None = None) -> Predicate:
    """A verb with its object (with its preposition, if the verb has one) and the person who receives it."""
    tail = join(verb.particle, receiver.en if receiver else "", obj.en if obj else "")
    before = join(receiver.de["dat"] if receiver else "", obj.de[verb.case] if obj and not verb.preposition else "")
    after = join(verb.mid, f"{verb.preposition} {obj.de[verb.case]}" if obj and verb.preposition else "")
    negated = join(before, "nicht", after)
    if verb.mid_neg and not obj:
        negated = verb.mid_neg
    elif obj and obj.de_none and not verb.preposition:
        negated = join(receiver.de["dat"] if receiver else "", obj.de_none[verb.case], after)
    names = {"o": obj.zh if obj else "", "p": receiver.zh if receiver else ""}
    bare = {**names, "o": obj.zh_core if obj and obj.de_none else names["o"]}
    return Predicate(
        verb,
        tail,
        before,
        after,
        negated,
        verb.zh.format(**names),
        verb.zh_done.format(**names),
        verb.zh.format(**bare),
        "person" in verb.tags and not verb.preposition,
    )


def _transitive(d: Draw, negated: bool, past: bool, habit: bool) -> Predicate:
    verb = d.pick(v for v in ACTIONS if (v.past or not past) and not (habit and v.en in ONCE))
    if "person" in verb.tags:
        return predicate_of(verb, person(d))
    measured = [m for m in MEASURED if any(f"measured_{kind}" in verb.tags for kind in m.extra.split())]
    if measured and not negated and d.rng.random() < 0.35:
        m = d.pick(measured)
        return predicate_of(verb, Phrase(m.en, dict.fromkeys(CASES, m.de), m.zh))
    dets = "the the this own a many" + ("" if negated else " a these count")
    if verb.en in ("buy", "eat", "try", "order", "bake", "cook", "drink", "choose", "write", "draw"):
        dets = "the this a a many" + ("" if negated else " a count")
    if verb.en in ("open", "close", "turn", "clean", "repair", "wash", "use", "feed", "carry"):
        dets = "the the this own own"
    return predicate_of(verb, object_phrase(d, d.pick(n for n in THINGS if n.tags & verb.tags), dets))


def _motion(d: Draw) -> Predicate:
    verb = d.pick(MOTIONS)
    if "city" in verb.tags and ("place" not in verb.tags or d.rng.random() < 0.5):
        city = d.pick(CITIES)
        en, de, zh = city.en, f"nach {city.de}", city.zh
    else:
        place = d.rng.choice(PLACES)
        d.words.append(place.noun.en)
        en, de, zh = f"the {place.noun.en}", place.to_de, place.noun.zh
    filled = replace(verb, mid=de, mid_neg=f"nicht {de}")
    return replace(
        predicate_of(filled),
        tail=f"to {en}",
        zh=verb.zh.format(o=zh),
        zh_done=verb.zh_done.format(o=zh),
        zh_negated=verb.zh.format(o=zh),
    )


def _giving(d: Draw, negated: bool, habit: bool) -> Predicate:
    verb = d.pick(v for v in GIVING if not (habit and v.en in ONCE))
    counted = not negated and verb.en in ("give", "show", "send")
    thing_given = object_phrase(
        d, d.pick(n for n in THINGS if n.tags & verb.tags), "the this own a" + (" a count" if counted else "")
    )
    return predicate_of(verb, thing_given, person(d))


def predicate(
    d: Draw, negated: bool = False, past: bool = False, indoor: bool = False, habit: bool = False
) -> Predicate:
    """Draw what somebody does, over all kinds of predicates; ``habit`` leaves out what is not done every day."""
    roll = d.rng.random()
    if indoor:
        return predicate_of(d.pick(v for v in ACTIVITIES if "indoor" in v.tags))
    if roll < 0.58:
        return _transitive(d, negated, past, habit)
    if roll < 0.72:
        return _motion(d)
    if roll < 0.84:
        return _giving(d, negated, habit)
    return predicate_of(d.pick(ACTIVITIES))


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
            return by_person("am|is|are", self.subject.person), verb.ing
        if self.tense == "future":
            return "will", join("not" if self.negated else "", verb.en)
        if self.modal is None:
            return (do, f"not {verb.en}") if self.negated else ("", verb.es if third else verb.en)
        if self.modal.en in ("want to", "have to"):
            if self.negated:
                return do, f"not {self.modal.en} {verb.en}"
            inflected = {"want to": "wants to", "have to": "has to"}[self.modal.en] if third else self.modal.en
            return "", f"{inflected} {verb.en}"
        if self.modal.en == "would like to":
            return "would", f"like to {verb.en}"
        return self.modal.en, join("not" if self.negated else "", verb.en)

    def _english(self, spec: str) -> str:
        tail, time = self.predicate.tail, self.time.en if self.time else ""
        if spec == "inf":
            return join(self.predicate.verb.en, tail)
        if spec == "ing":
            return join(self.predicate.verb.ing, tail)
        auxiliary, rest = self._english_verb()
        often = self.frequency.en if self.frequency else ""
        if spec == "q":
            if not auxiliary:
                base = f"{self.modal.en} {self.predicate.verb.en}" if self.modal else self.predicate.verb.en
                auxiliary = "did" if self.tense == "past" else "does" if self.subject.person == "3" else "do"
                rest = base
            return join(auxiliary, self.subject.en, often, rest, tail, time)
        group = join(auxiliary, rest).replace("can not ", "cannot ")
        if spec == "front":
            return join(time, self.subject.en, often, group, tail)
        return join(self.subject.en, often, group, tail, time)

    def _german(self, spec: str) -> str:
        p, verb, person = self.predicate, self.predicate.verb, self.subject.person
        if spec == "zu":
            return join(p.before, p.after, verb.zu_infinitive())
        if spec in ("inf", "nominal"):
            return join(p.before, p.after, verb.prefix + verb.de)
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
        field_ = p.negated if self.negated else join(p.before, p.after)
        if p.personal:  # definite persons stand before the time: Er hat Laura gestern (nicht) angerufen
            field_ = join("nicht" if self.negated else "", p.after)
            if spec == "front":
                adverb = join(p.before, adverb)
            else:
                time = join(p.before, time)
        if spec == "imperative":
            return join(verb.de, "Sie bitte", p.before, p.after, verb.prefix)
        if spec == "sub":
            end = closing + finite if closing and closing == verb.prefix else join(closing, finite)
            return join(subject, time, adverb, field_, end)
        if spec == "front":
            return join(time, finite, subject, adverb, field_, closing)
        if spec == "v1":
            return join(finite, subject, time, adverb, field_, closing)
        if spec == "gern":
            return join(subject, finite, time, "gern", field_, closing)
        if spec == "rest":  # after a fronted phrase, with the subject left out: "um ... und ..."
            return join(finite, time, adverb, field_, closing)
        return join(subject, finite, time, adverb, field_, closing)

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


def clause(
    tense: str,
    times: tuple[Fixed, ...] = (),
    negated: bool = False,
    modals: str = "",
    often: bool = False,
    who: str = "",
    indoor: bool = False,
) -> Slot:
    """A slot for a clause with a drawn subject (or the pronouns in ``who``), predicate, time and modal verb."""

    def fill(d: Draw) -> Clause:
        if who == "who":
            doer = Phrase("who", {"nom": "wer"}, "谁")
        else:
            doer = pronoun(d.rng.choice(who.split())) if who else subject(d)
        modal = d.pick([m for m in MODALS if m.en.replace(" ", "_") in modals.split()]) if modals else None
        habit = tense in ("progressive", "present")
        done = predicate(d, negated, tense == "past", indoor, habit)
        if tense == "progressive" and done.zh.startswith(NO_PROGRESSIVE):
            raise DeadEnd
        time = d.pick(times) if times else None
        return Clause(doer, done, tense, time, modal, negated, d.pick(FREQUENCY) if often else None)

    return fill


def relative(d: Draw) -> Phrase:
    """A noun with a relative clause: the book that Anna bought yesterday."""
    verb = d.pick(
        v
        for v in ACTIONS
        if v.past
        and not v.preposition
        and v.case == "acc"
        and "person" not in v.tags
        and v.en in ("buy", "sell", "repair", "wash", "borrow", "choose", "find", "write", "draw", "use")
    )
    noun = d.pick(n for n in THINGS if n.tags & verb.tags and "mass" not in n.tags and "food" not in n.tags)
    doer, time = subject(d), d.pick(PAST_TIMES)
    head = phrase(noun, "the")
    link = german_article("der", "acc", noun.gender)
    said = f", {link} {doer.de['nom']} {time.de} {verb.participle} {HABEN[doer.person]},"
    zh = f"{doer.zh}{time.zh}{verb.zh.format(o='')}的{noun.zh}"
    return Phrase(
        f"{head.en} that {doer.en} {verb.past} {time.en}", {c: head.de[c] + said for c in CASES}, zh, "3", "", noun
    )
