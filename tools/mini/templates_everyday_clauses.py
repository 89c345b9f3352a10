"""Everyday patterns around a whole clause: statements, questions, requests, infinitives and subordinate clauses."""

from __future__ import annotations

from tools.mini.clauses import clause, relative
from tools.mini.grammar import Template, one_of, pattern
from tools.mini.phrases import place, quality_of, states, subject, thing
from tools.mini.words_everyday_actions import FUTURE_TIMES, HABIT_TIMES, PAST_TIMES, THOUGHTS
from tools.mini.words_everyday_things import MEASURED, SURFACES

PAST, FUTURE, HABIT, SEASONS = PAST_TIMES, FUTURE_TIMES, HABIT_TIMES, HABIT_TIMES[7:]
FEEL = "I he she we they"

CLAUSE_PATTERNS: tuple[Template, ...] = (
    # statements, negations, fronted times
    pattern("{c}.", "{c}.", "{c}。", c=clause("past", PAST)),
    pattern("{c:front}.", "{c:front}.", "{c:front}。", c=clause("past", PAST)),
    pattern("{c}.", "{c}.", "{c}。", c=clause("past", PAST, negated=True)),
    pattern("{c}.", "{c}.", "{c}。", c=clause("present", HABIT)),
    pattern("{c:front}.", "{c:front}.", "{c:front}。", c=clause("present", SEASONS, often=True)),
    pattern("{c}.", "{c}.", "{c}。", c=clause("present", SEASONS, often=True)),
    pattern("{c} right now.", "{c}.", "{c}。", c=clause("progressive")),
    pattern("{c}.", "{c}.", "{c}。", c=clause("future", FUTURE)),
    pattern("{c:front}.", "{c:front}.", "{c:front}。", c=clause("future", FUTURE)),
    pattern("{c}.", "{c}.", "{c}。", c=clause("future", FUTURE, negated=True)),
    pattern("{c}.", "{c}.", "{c}。", c=clause("modal", FUTURE, modals="can must have_to")),
    pattern("{c}.", "{c}.", "{c}。", c=clause("modal", FUTURE, modals="want_to would_like_to should may")),
    pattern("{c}.", "{c}.", "{c}。", c=clause("modal", FUTURE, modals="can should want_to have_to may", negated=True)),
    # questions
    pattern("{c:q}?", "{c:v1}?", "{c}吗？", c=clause("past", PAST, who="you he she they")),
    pattern("{c:q}?", "{c:v1}?", "{c}吗？", c=clause("future", FUTURE)),
    pattern("{c:q}?", "{c:v1}?", "{c}吗？", c=clause("present", HABIT)),
    pattern("{c:q}?", "{c:v1}?", "{c}吗？", c=clause("modal", FUTURE, modals="can want_to may")),
    pattern("Why {c:q}?", "Warum {c:v1}?", "{c:+为什么}？", c=clause("past", PAST)),
    pattern("Why {c:q}?", "Warum {c:v1}?", "{c:+为什么}？", c=clause("modal", FUTURE, modals="should want_to have_to")),
    pattern("When {c:q}?", "Wann {c:v1}?", "{c:+什么时候}？", c=clause("future")),
    pattern("When {c:q}?", "Wann {c:v1}?", "{c:+什么时候}？", c=clause("modal", modals="can want_to should must")),
    pattern("{c}?", "{c}?", "{c}？", c=clause("past", PAST, who="who")),
    pattern("{c}?", "{c}?", "{c}？", c=clause("modal", FUTURE, modals="can want_to must", who="who")),
    # requests
    pattern("Please {c:inf}.", "{c:imperative}.", "请{c:vp}。", c=clause("present", who="you")),
    pattern(
        "Let us {c:inf} {t}.",
        "Lassen Sie uns {t} {c:inf}.",
        "我们{t}{c:vp}吧。",
        c=clause("present", who="we"),
        t=one_of(FUTURE),
    ),
    pattern(
        "Please put {x} {s}.", "Legen Sie {x:acc} bitte {s}.", "请把{x}放在{s}。", x=thing("lay"), s=one_of(SURFACES)
    ),
    pattern(
        "{p} put {x} {s} yesterday.",
        "{p} {p:habe|hat|haben} gestern {x:acc} {s} gelegt.",
        "{p}昨天把{x}放在了{s}。",
        p=subject,
        x=thing("lay"),
        s=one_of(SURFACES),
    ),
    # infinitives
    pattern("{c:subject} {c:like|likes|like} to {c:inf}.", "{c:gern}.", "{c:subject}喜欢{c:vp}。", c=clause("present")),
    pattern(
        "{c:subject} forgot to {c:inf}.",
        "{c:subject} {c:habe|hat|haben} vergessen, {c:zu}.",
        "{c:subject}忘了{c:vp}。",
        c=clause("present"),
    ),
    pattern(
        "{c:subject} decided to {c:inf} {t}.",
        "{c:subject} {c:habe|hat|haben} beschlossen, {t} {c:zu}.",
        "{c:subject}决定{t}{c:vp}。",
        c=clause("present"),
        t=one_of(FUTURE),
    ),
    pattern(
        "{p} {p:am|is|are} going {q:to} to buy {x}.",
        "{p} {p:gehe|geht|gehen} {q:to}, um {x:acc} zu kaufen.",
        "{p}要去{q:to}买{x}。",
        p=subject,
        q=place(only="market supermarket"),
        x=thing("buy clothes gift", "a many", 0.6),
    ),
    pattern(
        "It is important to {c:inf} {t}.",
        "Es ist wichtig, {t} {c:zu}.",
        "{t}{c:vp}很重要。",
        c=clause("present", who="we"),
        t=one_of(FUTURE),
    ),
    # subordinate clauses
    pattern(
        "{c} because {c:pron} {c:am|is|are} {s}.",
        "{c}, weil {c:pron} {s} {c:bin|ist|sind}.",
        "{c}，因为{c:pron}{s}。",
        c=clause("modal", modals="want_to should must", who=FEEL),
        s=states,
    ),
    pattern(
        "{c} because {c:pron} {c:was|was|were} {s}.",
        "{c}, weil {c:pron} {s} {c:war|war|waren}.",
        "{c}，因为{c:pron}{s}。",
        c=clause("past", PAST, negated=True),
        s=states,
    ),
    pattern(
        "Because {c:pron} {c:was|was|were} {s}, {c:subject} did not {c:inf}.",
        "Weil {c:pron} {s} {c:war|war|waren}, {c:front}.",
        "因为{c:pron}{s}，所以{c}。",
        c=clause("past", negated=True, who=FEEL),
        s=states,
    ),
    pattern(
        "When {c:subject} {c:am|is|are} {s}, {c}.",
        "Wenn {c:subject} {s} {c:bin|ist|sind}, {c:front}.",
        "{c:subject}{s:bare}的时候，{c:pred}。",
        c=clause("present", often=True, who="I you he she we they", indoor=True),
        s=states,
    ),
    pattern(
        "When {p} {p:am|is|are} {s}, {p:pron} {p:drink|drinks|drink} {m}.",
        "Wenn {p} {s} {p:bin|ist|sind}, {p:trinke|trinkt|trinken} {p:pron} {m}.",
        "{p}{s:bare}的时候会喝{m}。",
        p=subject,
        s=states,
        m=one_of(m for m in MEASURED if "drink" in m.extra),
    ),
    pattern(
        "If it rains {t}, {c}.",
        "Wenn es {t} regnet, {c:front}.",
        "如果{t}下雨，{c:subject}就{c:pred}。",
        t=one_of(FUTURE[:6]),
        c=clause("future", indoor=True),
    ),
    pattern(
        "If {c:subject} {c:have|has|have} time, {c:pron} will {c:inf}.",
        "Wenn {c:subject} Zeit {c:habe|hat|haben}, {c:werde|wird|werden} {c:pron} {c:inf}.",
        "如果{c:subject}有时间，{c:pron}就会{c:vp}。",
        c=clause("present"),
    ),
    pattern(
        "Although {c:pron} {c:was|was|were} {s}, {c}.",
        "Obwohl {c:pron} {s} {c:war|war|waren}, {c:front}.",
        "虽然{c:pron}{s}，但是{c}。",
        c=clause("past", who=FEEL),
        s=states,
    ),
    pattern(
        "Before {c:pron} {c:go|goes|go} to work, {c}.",
        "Bevor {c:pron} zur Arbeit {c:gehe|geht|gehen}, {c:front}.",
        "{c:pron}上班之前{c:pred}。",
        c=clause("present", often=True, who="I you he she we they"),
    ),
    pattern(
        "{c}, but {c:pron} {c:have|has|have} no time.",
        "{c}, aber {c:pron} {c:habe|hat|haben} keine Zeit.",
        "{c}，但是{c:pron}没有时间。",
        c=clause("modal", FUTURE, modals="want_to should must"),
    ),
    pattern("{k} that {c}.", "{k}, dass {c:sub}.", "{k}，{c}。", k=one_of(THOUGHTS[:8]), c=clause("past", PAST)),
    pattern("{k} that {c}.", "{k}, dass {c:sub}.", "{k}，{c}。", k=one_of(THOUGHTS[:8]), c=clause("future", FUTURE)),
    pattern(
        "{k} that {c}.",
        "{k}, dass {c:sub}.",
        "{k}，{c}。",
        k=one_of(THOUGHTS[:2] + THOUGHTS[4:8]),
        c=clause("modal", FUTURE, modals="can should must have_to"),
    ),
    pattern(
        "I do not know why {c}.", "Ich weiß nicht, warum {c:sub}.", "我不知道{c:+为什么}。", c=clause("past", PAST)
    ),
    pattern(
        "Do you know when {c}?",
        "Wissen Sie, wann {c:sub}?",
        "你知道{c:+什么时候}吗？",
        c=clause("future", who="he she we they"),
    ),
    pattern(
        "Nobody knows where {x} {x:is|are}.",
        "Niemand weiß, wo {x} {x:ist|sind}.",
        "没有人知道{x}在哪里。",
        x=thing("small pet text", "own own these", 0.5),
    ),
    pattern("{r} is very {a}.", "{r} ist sehr {a}.", "{r}非常{a}。", r=relative, a=quality_of("r")),
)
