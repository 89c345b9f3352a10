# ruff: noqa: E501 - the table of translations has one sentence a line
"""The built-in corpus: its grammar is checked against hand-made translations, its splits against what they promise."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest

from tools.mini import grammar, lexicon, sentences
from tools.mini.sentences import EVERYDAY, Sentence, normalised
from tools.mini.templates_research import RESEARCH
from tools.mini.words_everyday_things import PEOPLE, THINGS
from tools.mini.words_research import RESEARCH_ADJECTIVES, RESEARCH_NOUNS, RESEARCH_VERBS

# Translated by hand, construction by construction; each must come out of the grammar word for word.
GOLD = """
You did not buy fresh cheese last night. | Sie haben gestern Abend keinen frischen Käse gekauft. | 你昨天晚上没买新鲜的奶酪。
Last month you tried a sweet apple. | Letzten Monat haben Sie einen süßen Apfel probiert. | 上个月你尝了一个甜的苹果。
The boy stayed at home yesterday. | Der Junge ist gestern zu Hause geblieben. | 那个男孩昨天待在家里。
He called Laura last week. | Er hat Laura letzte Woche angerufen. | 他上周给劳拉打了电话。
I will not use your clock next month. | Ich werde nächsten Monat Ihre Uhr nicht benutzen. | 我下个月不会用你的钟。
The woman may draw a dog this afternoon. | Die Frau darf heute Nachmittag einen Hund zeichnen. | 那个女人今天下午可以画一只狗。
He does not want to wait for my colleague tomorrow. | Er will morgen nicht auf meinen Kollegen warten. | 他明天不想等我的同事。
My friend is translating interesting stories right now. | Mein Freund übersetzt gerade interessante Geschichten. | 我的朋友正在翻译有趣的故事。
In the evening she always helps the student. | Am Abend hilft sie dem Studenten immer. | 晚上她总是帮助那个学生。
Did you feed this small cow last week? | Haben Sie letzte Woche diese kleine Kuh gefüttert? | 你上周喂了这头小奶牛吗？
Does he turn on the radio every morning? | Schaltet er jeden Morgen das Radio ein? | 他每天早上打开收音机吗？
Why did they drive to London two days ago? | Warum sind sie vor zwei Tagen nach London gefahren? | 他们两天前为什么开车去了伦敦？
When does Anna want to bring along these cups? | Wann will Anna diese Tassen mitbringen? | 安娜什么时候想带来这些杯子？
Who must bake the small cookie tomorrow evening? | Wer muss morgen Abend den kleinen Keks backen? | 谁明天晚上必须烤小饼干？
Please close the window. | Schließen Sie bitte das Fenster. | 请关上窗户。
Let us repair the car in three days. | Lassen Sie uns in drei Tagen das Auto reparieren. | 我们三天后修理汽车吧。
Please put my book on the chair. | Legen Sie mein Buch bitte auf den Stuhl. | 请把我的书放在椅子上。
The policeman forgot to invite the clever man. | Der Polizist hat vergessen, den klugen Mann einzuladen. | 那个警察忘了邀请那个聪明的男人。
They like to play football. | Sie spielen gern Fußball. | 他们喜欢踢足球。
Peter is going to the market to buy fresh potatoes. | Peter geht auf den Markt, um frische Kartoffeln zu kaufen. | 彼得要去市场买新鲜的土豆。
She should thank Tom because she is happy. | Sie sollte Tom danken, weil sie glücklich ist. | 她应该感谢汤姆，因为她很高兴。
Because he was busy, he did not walk to the theater. | Weil er beschäftigt war, ist er nicht ins Theater gelaufen. | 因为他很忙，所以他没走路去剧院。
When she is angry, she often listens to music. | Wenn sie wütend ist, hört sie oft Musik. | 她生气的时候，经常听音乐。
If it rains tomorrow, my uncle will make breakfast. | Wenn es morgen regnet, wird mein Onkel Frühstück machen. | 如果明天下雨，我叔叔就会做早饭。
Although we were tired, we flew to Beijing. | Obwohl wir müde waren, sind wir nach Peking geflogen. | 虽然我们很累，但是我们坐飞机去了北京。
She says that Tom has to call Anna this afternoon. | Sie sagt, dass Tom Anna heute Nachmittag anrufen muss. | 她说，汤姆今天下午得给安娜打电话。
I do not know why he closed the window last month. | Ich weiß nicht, warum er letzten Monat das Fenster geschlossen hat. | 我不知道他上个月为什么关上了窗户。
The table that the woman chose last night is very heavy. | Der Tisch, den die Frau gestern Abend ausgesucht hat, ist sehr schwer. | 那个女人昨天晚上挑选的桌子非常重。
Their horse is more beautiful than the rabbit. | Ihr Pferd ist schöner als das Kaninchen. | 他们的马比兔子漂亮。
There are ten green chairs in the kitchen. | In der Küche gibt es zehn grüne Stühle. | 厨房里有十把绿色椅子。
This expensive coat costs thirty euros. | Dieser teure Mantel kostet dreißig Euro. | 这件贵的大衣要三十欧元。
The engineer does not have a new phone at home. | Der Ingenieur hat zu Hause kein neues Handy. | 那位工程师家里没有新手机。
Which jacket do my aunts want to buy? | Welche Jacke wollen meine Tanten kaufen? | 我的阿姨们想买哪件夹克？
He is afraid of big dogs. | Er hat Angst vor großen Hunden. | 他害怕大狗。
Anna goes to the station with our neighbor after work. | Anna geht nach der Arbeit mit unserem Nachbarn zum Bahnhof. | 安娜下班后和我们的邻居一起去火车站。
She lives in a big apartment near the hospital. | Sie wohnt in einer großen Wohnung in der Nähe des Krankenhauses. | 她住在医院附近的一套大公寓里。
I gave my mother two red flowers yesterday. | Ich habe gestern meiner Mutter zwei rote Blumen gegeben. | 我昨天给了我妈妈两朵红色花。
They have been learning French for four years. | Sie lernen seit vier Jahren Französisch. | 他们学法语已经四年了。
Our daughter works as a nurse in Berlin. | Unsere Tochter arbeitet als Krankenschwester in Berlin. | 我们的女儿在柏林当护士。
We propose a simple method for training the encoder. | Wir schlagen eine einfache Methode zum Trainieren des Encoders vor. | 我们提出一种用于训练编码器的简单方法。
In this talk we present a method for annotating sentences. | In diesem Vortrag stellen wir eine Methode zum Annotieren von Sätzen vor. | 在这个报告中，我们介绍一种用于标注句子的方法。
The results show that the encoder is faster than our baseline. | Die Ergebnisse zeigen, dass der Encoder schneller ist als unsere Baseline. | 结果表明，编码器比我们的基线更快。
Removing the third layer of the decoder hurts the quality only a little. | Das Entfernen der dritten Schicht des Decoders verschlechtert die Qualität nur wenig. | 去除解码器的第三层只会略微降低质量。
The accuracy of our model depends on the small corpus. | Die Genauigkeit unseres Modells hängt vom kleinen Korpus ab. | 我们的模型的准确率取决于小语料库。
We increase the speed by compressing the system. | Wir erhöhen die Geschwindigkeit, indem wir das System komprimieren. | 我们通过压缩系统来提高速度。
Instead of proposing the idea, we build the dataset. | Anstatt die Idee vorzuschlagen, bauen wir den Datensatz. | 我们不提出想法，而是构建数据集。
The adapter that we built is very robust. | Der Adapter, den wir gebaut haben, ist sehr robust. | 我们构建的适配器非常鲁棒。
After pruning, this model is almost as good as our system. | Nach dem Pruning ist dieses Modell fast so gut wie unser System. | 剪枝之后，这个模型几乎和我们的系统一样好。
Because of the noise, it is difficult to analyze this corpus. | Wegen des Rauschens ist es schwierig, dieses Korpus zu analysieren. | 因为噪声，分析这个语料库很困难。
Our decoder was trained on a reliable dataset. | Unser Decoder wurde auf einem zuverlässigen Datensatz trainiert. | 我们的解码器是在一个可靠数据集上训练的。
How should we evaluate this language model? | Wie sollten wir dieses Sprachmodell evaluieren? | 我们应该怎么评估这个语言模型？
"""
GOLD_ROWS = [tuple(cell.strip() for cell in row.split("|")) for row in GOLD.strip().splitlines()]


class _Guided(random.Random):
    """Prefers the choices that occur in the sentence we want, so that the grammar finds it in few draws."""

    def __init__(self, wanted: str) -> None:
        super().__init__(1)
        self.wanted = wanted
        self.memo: dict[int, tuple[Any, bool]] = {}  # keeps the entries alive, so that their ids stay theirs

    def _fits(self, x: Any) -> bool:
        if id(x) not in self.memo:
            self.memo[id(x)] = x, _said(x, self.wanted)
        return self.memo[id(x)][1]

    def choice(self, seq: Any) -> Any:
        fitting = [x for x in seq if self._fits(x)] if len(seq) > 1 else seq
        if not fitting:
            raise grammar.DeadEnd
        return fitting[int(self.random() * len(fitting))]


def _said(entry: Any, wanted: str) -> bool:
    if isinstance(entry, tuple):
        entry = entry[0]
    if isinstance(entry, lexicon.Place):
        entry = entry.noun
    if isinstance(entry, str):
        kinds = ("own", "many", "count", "these", "ours")  # names of determiner groups, resolved later
        return entry in kinds or f" {entry.lower()} " in wanted
    if isinstance(entry, lexicon.Fixed) and entry.en in ("have to", "want to"):
        return re.search(f" {entry.en[:2]}\\w+ to ", wanted) is not None
    names = (getattr(entry, name, "") for name in ("en", "plural", "es", "past", "ing", "more"))
    return any(name and f" {name.casefold()} " in wanted for name in names)


def _find(en: str) -> Sentence | None:
    key = normalised(en)
    rng = _Guided(f" {key} ")
    spoken = set(key.split())
    fitting = []
    for domain, templates in (("everyday", EVERYDAY), ("research", RESEARCH)):
        for template in templates:
            literal = set(normalised(re.sub(r"\{[^}]*\}", "", template.en)).split())
            if literal <= spoken:
                fitting.append((len(literal), domain, template))
    for size in sorted({literal for literal, _, _ in fitting}, reverse=True):
        group = [(domain, template) for literal, domain, template in fitting if literal == size]
        for _ in range(600 if size else 3000):
            for domain, template in group:
                try:
                    texts, _ = template.draft(rng, False, Counter())
                except grammar.DeadEnd:
                    continue
                if normalised(texts[0]) == key:
                    return Sentence(*texts, domain)
    return None


@pytest.mark.parametrize(("en", "de", "zh"), GOLD_ROWS)
def test_gold_sentences(en: str, de: str, zh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CANDIDATES", 1)
    found = _find(en)
    assert found is not None, f"the grammar does not make {en!r}"
    assert (found.en, found.de, found.zh) == (en, de, zh)


@pytest.fixture(scope="module")
def everyday() -> list[Sentence]:
    return sentences.everyday(3500, seed=3)


@pytest.fixture(scope="module")
def research() -> list[Sentence]:
    return sentences.research(2000, seed=3)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Sentence]]:
    return sentences.in_domain_splits(360, 60, 120, seed=5)


def test_deterministic_and_seeded() -> None:
    assert sentences.everyday(50, 1) == sentences.everyday(50, 1)
    assert sentences.everyday(50, 1) != sentences.everyday(50, 2)
    assert sentences.research(50, 1) == sentences.research(50, 1)
    assert sentences.in_domain_splits(80, 5, 5, 1) == sentences.in_domain_splits(80, 5, 5, 1)


def test_distinct(everyday: list[Sentence], research: list[Sentence]) -> None:
    for made, num in ((everyday, 3500), (research, 2000)):
        assert len({normalised(s.en) for s in made}) == len(made) == num


def test_one_translation_for_each_sentence(everyday: list[Sentence], research: list[Sentence]) -> None:
    known: dict[str, tuple[str, str]] = {}
    again = [*sentences.everyday(1500, 8), *sentences.research(1500, 8), *sentences.research(800, 8, "background")]
    for s in [*everyday, *research, *again]:
        assert known.setdefault(normalised(s.en), (s.de, s.zh)) == (s.de, s.zh), s.en


def test_surface(everyday: list[Sentence], research: list[Sentence]) -> None:
    for s in everyday + research:
        assert re.fullmatch(r"[A-Z][A-Za-z ,]+[.?]", s.en), s
        assert re.fullmatch(r"[A-ZÄÖÜ][A-Za-zÄÖÜäöüß ,-]+[.?]", s.de), s
        assert re.fullmatch(r"[\u4e00-\u9fff，]+[。？]", s.zh), s
        assert "  " not in s.en + s.de, s
        assert 4 <= len(s.en.split()) <= 14, s
        assert not re.search(r"\bthese (?:\w+ )?\w+ (?:is|was|costs)\b", s.en.lower()), s
        assert s.en[-1] == s.de[-1] == {"。": ".", "？": "?"}[s.zh[-1]], s
        assert not re.search(r"\b(?:in|von|zu|an) dem\b|\bzu der\b|\b[Aa] [aeio]|的的", s.en + s.de + s.zh), s


def test_every_pattern_is_used(everyday: list[Sentence]) -> None:
    assert len(EVERYDAY) >= 60
    assert len(RESEARCH) >= 45
    assert 0.5 < sum(t.background for t in RESEARCH) / len(RESEARCH) < 0.7
    lengths = [len(s.en.split()) for s in everyday]
    assert 6 <= sum(lengths) / len(lengths) <= 11


def test_everyday_words_are_evenly_used(everyday: list[Sentence]) -> None:
    spoken = Counter(w for s in everyday for w in set(normalised(s.en).split()))
    rare = [n.en for n in (*THINGS, *PEOPLE) if spoken[n.en] + spoken[n.plural] < 5]
    assert not rare


def test_background_lexicon_leaves_words_out() -> None:
    made = sentences.research(1500, 4, "background")
    spoken = {w for s in made for w in normalised(s.en).split()}
    hidden = {n.en for n in (*RESEARCH_NOUNS, *RESEARCH_ADJECTIVES) if not n.background}
    hidden |= {f for v in RESEARCH_VERBS if not v.background for f in (v.en, v.es, v.past, v.ing)}
    assert not spoken & hidden
    with pytest.raises(ValueError, match="lexicon must be"):
        sentences.research(1, 1, "some")


def test_capacity_is_bounded_with_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "EVERYDAY", tuple(t for t in EVERYDAY if t.en.startswith("It will be"))[:1])
    with pytest.raises(ValueError, match="distinct sentences"):
        sentences.everyday(600, 1)


def test_duplicates_are_rare_enough_for_a_large_corpus() -> None:
    """Two independent draws of n from a space of N share about n*n/N sentences; few shared ones mean a large N."""
    shared = {s.en for s in sentences.everyday(3000, 21)} & {s.en for s in sentences.everyday(3000, 22)}
    assert len(shared) < 500


def test_splits_are_disjoint_and_far_apart(splits: dict[str, list[Sentence]]) -> None:
    assert {k: len(v) for k, v in splits.items()} == {"train": 360, "select": 60, "test": 120}
    gaps = {name: {g for s in made for g in sentences._gaps(s.en)} for name, made in splits.items()}
    for one, other in (("train", "select"), ("train", "test"), ("select", "test")):
        assert not {normalised(s.en) for s in splits[one]} & {normalised(s.en) for s in splits[other]}
        assert not gaps[one] & gaps[other], "sentences of two splits differ in one word only"


def test_train_teaches_every_word_of_select_and_test(splits: dict[str, list[Sentence]]) -> None:
    train = [f" {normalised(s.en)} " for s in splits["train"]]
    known = {w for s in train for w in s.split()}
    for name in ("select", "test"):
        assert {w for s in splits[name] for w in normalised(s.en).split()} <= known
    for entry in (*RESEARCH_NOUNS, *RESEARCH_ADJECTIVES, *RESEARCH_VERBS):
        forms = {getattr(entry, f, "") for f in ("en", "plural", "es", "past", "ing", "more")} - {""}
        times = sum(any(f" {form} " in s for form in forms) for s in train)
        assert times >= 6, f"{entry.en} occurs only {times} times in train"


def test_base_corpus_keeps_out_what_it_is_told(splits: dict[str, list[Sentence]]) -> None:
    first = sentences.base_corpus(300, 300, seed=1, exclude=set())
    out = {normalised(s.en) for s in first[::2]}
    second = sentences.base_corpus(300, 300, seed=1, exclude=out)
    assert Counter(s.domain for s in second) == {"everyday": 300, "research": 300}
    assert not out & {normalised(s.en) for s in second}
    assert len({normalised(s.en) for s in second}) == 600


def test_normalised() -> None:
    assert normalised("  If it rains,  I'll STAY. ") == "if it rains ill stay"
