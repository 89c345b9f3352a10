"""Everyday patterns around noun phrases: being and having, people, time, weather and travel."""

from __future__ import annotations

from tools.mini.grammar import Template, one_of, pattern, word_set
from tools.mini.lexicon import Fixed
from tools.mini.phrases import (
    POSSESSIVES,
    another_like,
    body,
    job,
    others,
    person,
    phrase,
    place,
    quality_of,
    spot_for,
    states,
    subject,
    thing,
)
from tools.mini.words_everyday_actions import (
    BIG_NUMBERS,
    FUTURE_TIMES,
    HABIT_TIMES,
    NUMBERS,
    PAST_TIMES,
    TRANSPORT,
)
from tools.mini.words_everyday_things import CITIES, LANGUAGES, PEOPLE, WEATHER

PAST, FUTURE, HABIT = PAST_TIMES, FUTURE_TIMES, HABIT_TIMES
_BUYABLE = "clothes furniture vehicle device text"
WELCOME = word_set("big new beautiful cheap practical modern sweet warm clean interesting fast quiet bright")
UNWELCOME = word_set("old small expensive heavy dirty boring long loud")

PHRASE_PATTERNS: tuple[Template, ...] = (
    # being and having
    pattern(
        "{x} {x:is|are} very {a}.",
        "{x} {x:ist|sind} sehr {a}.",
        "{x}非常{a}。",
        x=thing("", "the this own these", 0.35),
        a=quality_of("x"),
    ),
    pattern(
        "{x} {x:is|are} not {a} enough.",
        "{x} {x:ist|sind} nicht {a} genug.",
        "{x}不够{a}。",
        x=thing("", "the this own these", 0.35),
        a=quality_of("x", WELCOME),
    ),
    pattern(
        "{x:Is|Are} {x} really so {a}?",
        "{x:Ist|Sind} {x} wirklich so {a}?",
        "{x}真的这么{a}吗？",
        x=thing("", "the this own", 0.3),
        a=quality_of("x"),
    ),
    pattern(
        "{x} {x:is|are} {a:more} than {y}.",
        "{x} {x:ist|sind} {a:more} als {y}.",
        "{x}比{y}{a}。",
        x=thing(_BUYABLE + " animal fruit home room", "the this own", 0.2),
        y=another_like("x", "the own this"),
        a=quality_of("x"),
    ),
    pattern(
        "{x} {x:was|were} {a} but {b}.",
        "{x} {x:war|waren} {a}, aber {b}.",
        "{x}很{a}，但是很{b}。",
        x=thing(_BUYABLE + " animal fruit home room", "the this own", 0.1),
        a=quality_of("x", WELCOME),
        b=quality_of("x", UNWELCOME),
    ),
    pattern(
        "There {x:is|are} {x} {s}.",
        "{s} {x:gibt|gibt} es {x:acc}.",
        "{s}有{x}。",
        x=thing("small pet furniture animal", "a count count", 0.6),
        s=spot_for("x"),
    ),
    pattern(
        "{x} {x:is|are} {s}.",
        "{x} {x:ist|sind} {s}.",
        "{x}在{s}。",
        x=thing("small pet furniture lay", "the own these"),
        s=spot_for("x"),
    ),
    pattern(
        "{x:Is|Are} {x} still {s}?",
        "{x:Ist|Sind} {x} noch {s}?",
        "{x}还在{s}吗？",
        x=thing("small pet furniture lay", "the own"),
        s=spot_for("x"),
    ),
    pattern(
        "{x} is sleeping {s}.", "{x} schläft {s}.", "{x}在{s}睡觉。", x=thing("pet", "the own this a"), s=spot_for("x")
    ),
    pattern(
        "Where {x:is|are} {x}?", "Wo {x:ist|sind} {x}?", "{x}在哪里？", x=thing("small pet text", "own the these", 0.6)
    ),
    pattern(
        "How much does {x} cost {q}?",
        "Wie viel kostet {x} {q}?",
        "{x}在{q}卖多少钱？",
        x=thing("clothes small furniture device priced gift", "this a", 0.6),
        q=one_of(
            (
                Fixed("in the supermarket", "im Supermarkt", "超市"),
                Fixed("at the market", "auf dem Markt", "市场上"),
                Fixed("in this shop", "in diesem Geschäft", "这家商店"),
            )
        ),
    ),
    pattern(
        "{x} {x:costs|cost} {n} euros.",
        "{x} {x:kostet|kosten} {n} Euro.",
        "{x}要{n}欧元。",
        x=thing("clothes small furniture device priced gift", "the this these", 0.7),
        n=one_of(BIG_NUMBERS),
    ),
    pattern(
        "{p} {p:have|has|have} {x}.",
        "{p} {p:habe|hat|haben} {x:acc}.",
        "{p}有{x}。",
        p=subject,
        x=thing("clothes furniture vehicle device animal home", "a count many", 0.8),
    ),
    pattern(
        "{p} {p:need|needs|need} {x}.",
        "{p} {p:brauche|braucht|brauchen} {x:acc}.",
        "{p}需要{x}。",
        p=subject,
        x=thing("clothes furniture vehicle device small", "a count count many", 0.8),
    ),
    pattern(
        "{p} {p:do|does|do} not have {x} at home.",
        "{p} {p:habe|hat|haben} zu Hause {x:no_acc}.",
        "{p}家里没有{x:core}。",
        p=subject,
        x=thing("food drink buy furniture device small", "many a", 0.35),
    ),
    pattern(
        "{x} {p:do|does|do} {p} want to buy?",
        "{x:acc} {p:will|will|wollen} {p} kaufen?",
        "{p}想买{x}？",
        x=thing(_BUYABLE + " small gift fruit", "which", 0.7),
        p=others,
    ),
    pattern(
        "How many {x} {p:do|does|do} {p} need?",
        "Wie viele {x:acc} {p:brauche|braucht|brauchen} {p}?",
        "{p}需要多少{x:core}？",
        p=others,
        x=thing("clothes furniture small fruit veg", "many", 0.35),
    ),
    pattern(
        "{p} {p:like|likes|like} {x} more than {y}.",
        "{p} {p:mag|mag|mögen} {x:acc} lieber als {y:acc}.",
        "比起{y}，{p}更喜欢{x}。",
        p=subject,
        x=thing("food drink", "many", 0.2),
        y=thing("food drink fruit", "many", 0.0),
    ),
    pattern(
        "{p} {p:am|is|are} afraid of {x}.",
        "{p} {p:habe|hat|haben} Angst vor {x:dat}.",
        "{p}害怕{x}。",
        p=subject,
        x=thing("animal", "many this", 0.8),
    ),
    # people, time, weather, travel
    pattern(
        "{p} {p:was|was|were} {s} {t}.",
        "{p} {p:war|war|waren} {t} {s}.",
        "{p}{t}{s}。",
        p=subject,
        s=states,
        t=one_of(PAST),
    ),
    pattern(
        "{p} {p:was|was|were} {q} {t}.",
        "{p} {p:war|war|waren} {t} {q}.",
        "{p}{t}在{q}。",
        p=subject,
        q=place(),
        t=one_of(PAST),
    ),
    pattern(
        "{p} met {o} {q} {t}.",
        "{p} {p:habe|hat|haben} {o:acc} {t} {q} getroffen.",
        "{p}{t}在{q}遇到了{o}。",
        p=subject,
        o=person,
        q=place(),
        t=one_of(PAST),
    ),
    pattern(
        "{p} {p:go|goes|go} {q:to} with {o} {t}.",
        "{p} {p:gehe|geht|gehen} {t} mit {o:dat} {q:to}.",
        "{p}{t}和{o}一起去{q:to}。",
        p=subject,
        o=person,
        q=place(),
        t=one_of(HABIT),
    ),
    pattern(
        "{p} {p:live|lives|live} in {x} near {q}.",
        "{p} {p:wohne|wohnt|wohnen} in {x:dat} in der Nähe {q:gen}.",
        "{p}住在{q}附近的{x}里。",
        p=subject,
        x=thing("home", "a", 1.0),
        q=place("noun"),
    ),
    pattern(
        "{p} will travel to {k} {v} {t}.",
        "{p} {p:werde|wird|werden} {t} {v} nach {k} reisen.",
        "{p}{t}会{v}去{k}旅行。",
        p=subject,
        k=one_of(CITIES),
        v=one_of(TRANSPORT),
        t=one_of(FUTURE),
    ),
    pattern(
        "It takes {n} minutes to get {q:to} {v}.",
        "Es dauert {n} Minuten, um {v} {q:to} zu kommen.",
        "{v}去{q:to}需要{n}分钟。",
        n=one_of(BIG_NUMBERS),
        q=place(),
        v=one_of(TRANSPORT),
    ),
    pattern(
        "The train to {k} leaves {t} at {n}.",
        "Der Zug nach {k} fährt {t} um {n} Uhr ab.",
        "去{k}的火车{t}{n}点出发。",
        k=one_of(CITIES),
        n=one_of((*NUMBERS[1:8], Fixed("eleven", "elf", "十一"))),
        t=one_of((*FUTURE[:4:3], FUTURE[4], FUTURE[5], FUTURE[6], FUTURE[7])),
    ),
    pattern(
        "Have you ever been to {k} with {o}?",
        "Waren Sie schon einmal mit {o:dat} in {k}?",
        "你和{o}去过{k}吗？",
        k=one_of(CITIES),
        o=person,
    ),
    pattern(
        "{p} {p:have|has|have} been learning {g} for {n} years.",
        "{p} {p:lerne|lernt|lernen} seit {n} Jahren {g}.",
        "{p}学{g}已经{n}年了。",
        p=subject,
        g=one_of(LANGUAGES),
        n=one_of(NUMBERS),
    ),
    pattern(
        "{p} {p:speak|speaks|speak} {g} better than {h}.",
        "{p} {p:spreche|spricht|sprechen} besser {g} als {h}.",
        "{p}的{g}说得比{h}好。",
        p=subject,
        g=one_of(LANGUAGES),
        h=one_of(LANGUAGES, "g"),
    ),
    pattern(
        "{o} works as {j} in {q}.",
        "{o} arbeitet als {j} in {q}.",
        "{o}在{q}当{j}。",
        o=lambda d: phrase(d.pick(n for n in PEOPLE if "kin" in n.tags), d.rng.choice(POSSESSIVES)[0]),
        j=job,
        q=one_of(CITIES),
    ),
    pattern(
        "{o} is {n} years old.",
        "{o} ist {n} Jahre alt.",
        "{o}{n}岁。",
        o=lambda d: phrase(d.pick(n for n in PEOPLE if "kin" in n.tags), d.rng.choice(POSSESSIVES)[0]),
        n=one_of((*BIG_NUMBERS[3:], Fixed("seventy", "siebzig", "七十"))),
    ),
    pattern(
        "{b} {b:has|have} hurt since {t}.",
        "{b} {b:tut|tun} seit {t} weh.",
        "{b}从{t}开始疼。",
        b=body,
        t=one_of(
            (
                Fixed("yesterday", "gestern", "昨天"),
                Fixed("last night", "gestern Abend", "昨天晚上"),
                Fixed("this morning", "heute Morgen", "今天早上"),
                Fixed("Monday", "Montag", "周一"),
                Fixed("Friday", "Freitag", "周五"),
            )
        ),
    ),
    pattern(
        "It will be {a} in {k} {t}.",
        "In {k} wird es {t} {a} sein.",
        "{k}{t}会很{a}。",
        a=one_of(WEATHER[:3]),
        k=one_of(CITIES),
        t=one_of(FUTURE[:8]),
    ),
    pattern(
        "It was {a} and {b} in {k} {t}.",
        "In {k} war es {t} {a} und {b}.",
        "{k}{t}很{a}，而且{b}。",
        a=one_of(WEATHER[:3]),
        b=one_of(WEATHER[3:]),
        k=one_of(CITIES),
        t=one_of(PAST),
    ),
)
