# ruff: noqa: E501 - the tables have one entry a line, however long, so that they can be proof-read
"""Words of the built-in corpus: English, German and Chinese side by side, with what inflection needs to know.

The lists were written for this project. They are kept as small text tables (one entry a line, columns separated by
``|``) because a native speaker can proof-read a table far more easily than a page of constructor calls; the tables are
parsed into frozen dataclasses on import. Homophones that speech cannot tell apart (meat/meet, hour/our, write/right,
sea/see, ate/eight ...) are left out on purpose: the model that learns from these sentences hears them, it never reads.
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


def _rows(table: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")] for line in table.strip().splitlines() if line.strip()]


def _nouns(table: str, *more_tags: str) -> tuple[Noun, ...]:
    """Columns: English, plural (+ adds s, - none) | German, gender, plural (= same, - none) | Chinese, measure | tags.

    A leading ``*`` marks a word that the "background" lexicon of the research domain leaves out.
    """
    out = []
    for en, de, zh, tags in _rows(table):
        background = not en.startswith("*")
        *word, plural = en.lstrip("*").split()
        single = " ".join(word)
        many = {"+": single + "s", "-": ""}.get(plural, plural)
        german, gender, german_many = de.split()
        german_many = {"=": german, "-": ""}.get(german_many, german_many)
        chinese, measure = zh.split()
        out.append(Noun(single, many, german, gender, german_many, chinese, measure, frozenset((*tags.split(), *more_tags)), background))
    return tuple(out)


def _adjectives(table: str) -> tuple[Adjective, ...]:
    """Columns: English, comparative (+ more ...) | German, stem (=), comparative | Chinese attribute, root | tags."""
    out = []
    for en, de, zh, tags in _rows(table):
        background = not en.startswith("*")
        word, more = en.lstrip("*").split(maxsplit=1)
        german, stem, german_more = de.split()
        root = zh.split()[-1]
        out.append(Adjective(word, f"more {word}" if more == "+" else more, german, german if stem == "=" else stem,
                             german_more, zh.split()[0], root, frozenset(tags.split()), background))
    return tuple(out)


def _verbs(table: str) -> tuple[Verb, ...]:
    """Columns: English base, 3rd, past, -ing (+ particle) | German prefix-infinitive, ich, er, participle [aux]
    | government | Chinese, perfective | object tags | optional German middle, negated middle."""
    out = []
    for row in _rows(table):
        en, de, government, zh, tags = row[:5]
        background = not en.startswith("*")
        base, es, past, ing, *particle = en.lstrip("*").split()
        infinitive, ich, er, participle, *aux = de.split()
        prefix, _, stem = infinitive.rpartition("-")
        preposition, _, case = government.rpartition("+")
        plain, done = zh.split()
        mid = row[5] if len(row) > 5 else ""
        negated = row[6] if len(row) > 6 else f"nicht {mid}".strip()
        out.append(Verb(base, es, "" if past == "-" else past, ing, " ".join(particle), stem, ich, er, participle,
                        prefix, aux[0] if aux else "haben", case, preposition, plain, done, frozenset(tags.split()),
                        mid, negated, background))
    return tuple(out)


def _fixed(table: str) -> tuple[Fixed, ...]:
    return tuple(Fixed(*row) for row in _rows(table))


# ------------------------------------------------------------------------------------------------ everyday: nouns
THINGS = _nouns("""
apple + | Apfel m Äpfel | 苹果 个 | food buy fruit
orange + | Orange f Orangen | 橙子 个 | food buy fruit
banana + | Banane f Bananen | 香蕉 根 | food buy fruit
tomato tomatoes | Tomate f Tomaten | 西红柿 个 | food buy veg
potato potatoes | Kartoffel f Kartoffeln | 土豆 个 | food buy veg dish
carrot + | Karotte f Karotten | 胡萝卜 根 | food buy veg
egg + | Ei n Eier | 鸡蛋 个 | food buy dish
cake + | Kuchen m = | 蛋糕 个 | food buy bake
pizza + | Pizza f Pizzen | 披萨 个 | food order bake
sandwich sandwiches | Sandwich n Sandwiches | 三明治 个 | food order
cookie + | Keks m Kekse | 饼干 块 | food buy bake
bread - | Brot n - | 面包 个 | mass food buy bake
rice - | Reis m - | 米饭 碗 | mass food order dish
soup - | Suppe f - | 汤 碗 | mass food order dish
cheese - | Käse m - | 奶酪 块 | mass food buy
fish - | Fisch m - | 鱼 条 | mass food order buy
salad - | Salat m - | 沙拉 份 | mass food order
butter - | Butter f - | 黄油 块 | mass buy
chocolate - | Schokolade f - | 巧克力 块 | mass food buy
water - | Wasser n - | 水 杯 | mass drink
coffee - | Kaffee m - | 咖啡 杯 | mass drink order
tea - | Tee m - | 茶 杯 | mass drink order
milk - | Milch f - | 牛奶 杯 | mass drink
juice - | Saft m - | 果汁 杯 | mass drink order
beer - | Bier n - | 啤酒 杯 | mass drink order
wine - | Wein m - | 葡萄酒 杯 | mass drink order
shirt + | Hemd n Hemden | 衬衫 件 | clothes
coat + | Mantel m Mäntel | 大衣 件 | clothes
jacket + | Jacke f Jacken | 夹克 件 | clothes
dress dresses | Kleid n Kleider | 连衣裙 条 | clothes
sweater + | Pullover m = | 毛衣 件 | clothes
scarf scarves | Schal m Schals | 围巾 条 | clothes
hat + | Hut m Hüte | 帽子 顶 | clothes
blanket + | Decke f Decken | 毯子 条 | clothes
bag + | Tasche f Taschen | 包 个 | small open
umbrella + | Regenschirm m Regenschirme | 雨伞 把 | small
table + | Tisch m Tische | 桌子 张 | furniture
chair + | Stuhl m Stühle | 椅子 把 | furniture
lamp + | Lampe f Lampen | 灯 盏 | furniture switch
bed + | Bett n Betten | 床 张 | furniture
sofa + | Sofa n Sofas | 沙发 个 | furniture
mirror + | Spiegel m = | 镜子 面 | furniture
clock + | Uhr f Uhren | 钟 个 | furniture device
box boxes | Kiste f Kisten | 箱子 个 | furniture open
car + | Auto n Autos | 汽车 辆 | vehicle
bicycle + | Fahrrad n Fahrräder | 自行车 辆 | vehicle
computer + | Computer m = | 电脑 台 | device switch
phone + | Handy n Handys | 手机 部 | device small
camera + | Kamera f Kameras | 相机 台 | device small
radio + | Radio n Radios | 收音机 台 | device switch
television + | Fernseher m = | 电视机 台 | device switch
fridge + | Kühlschrank m Kühlschränke | 冰箱 台 | device open
heater + | Heizung f Heizungen | 暖气 台 | switch repair
guitar + | Gitarre f Gitarren | 吉他 把 | device
book + | Buch n Bücher | 书 本 | text lay priced
newspaper + | Zeitung f Zeitungen | 报纸 份 | text lay priced
letter + | Brief m Briefe | 信 封 | text lay written
magazine + | Zeitschrift f Zeitschriften | 杂志 本 | text lay priced
story stories | Geschichte f Geschichten | 故事 个 | written plot
postcard + | Postkarte f Postkarten | 明信片 张 | written lay post
key + | Schlüssel m = | 钥匙 把 | small lay
ticket + | Fahrkarte f Fahrkarten | 车票 张 | small lay
photo + | Foto n Fotos | 照片 张 | small lay
gift + | Geschenk n Geschenke | 礼物 份 | small gift
cup + | Tasse f Tassen | 杯子 个 | small dishes
plate + | Teller m = | 盘子 个 | small dishes
knife knives | Messer n = | 刀 把 | small dishes
spoon + | Löffel m = | 勺子 把 | small dishes
bottle + | Flasche f Flaschen | 瓶子 个 | small open
flower + | Blume f Blumen | 花 朵 | gift
ball + | Ball m Bälle | 球 个 | small
pen + | Stift m Stifte | 笔 支 | small lay
dog + | Hund m Hunde | 狗 只 | animal pet
cat + | Katze f Katzen | 猫 只 | animal pet
horse + | Pferd n Pferde | 马 匹 | animal
bird + | Vogel m Vögel | 鸟 只 | animal
cow + | Kuh f Kühe | 奶牛 头 | animal
rabbit + | Kaninchen n = | 兔子 只 | animal pet
door + | Tür f Türen | 门 扇 | shut open
window + | Fenster n = | 窗户 扇 | shut open
room + | Zimmer n = | 房间 个 | room
kitchen + | Küche f Küchen | 厨房 个 | room
bathroom + | Badezimmer n = | 浴室 个 | room
house houses | Haus n Häuser | 房子 座 | home
apartment + | Wohnung f Wohnungen | 公寓 套 | home room
""")

PEOPLE = _nouns("""
mother + | Mutter f Mütter | 妈妈 位 | kin f
father + | Vater m Väter | 爸爸 位 | kin m
sister + | Schwester f Schwestern | 妹妹 个 | kin many f
brother + | Bruder m Brüder | 弟弟 个 | kin many m
grandmother + | Großmutter f Großmütter | 奶奶 位 | kin f
grandfather + | Großvater m Großväter | 爷爷 位 | kin m
uncle + | Onkel m = | 叔叔 位 | kin many m
aunt + | Tante f Tanten | 阿姨 位 | kin many f
daughter + | Tochter f Töchter | 女儿 个 | kin many f
friend + | Freund m Freunde | 朋友 个 | own many m
neighbor + | Nachbar m Nachbarn | 邻居 个 | weak own the many m
colleague + | Kollege m Kollegen | 同事 个 | weak own many m
boss bosses | Chef m Chefs | 老板 个 | own the m
teacher + | Lehrer m = | 老师 位 | own the job many m
doctor + | Arzt m Ärzte | 医生 位 | own the job many m
student + | Student m Studenten | 学生 个 | weak the many m
customer + | Kunde m Kunden | 顾客 位 | weak the many m
waiter + | Kellner m = | 服务员 个 | the job m
nurse + | Krankenschwester f Krankenschwestern | 护士 位 | the job many f
policeman policemen | Polizist m Polizisten | 警察 个 | weak the job m
farmer + | Bauer m Bauern | 农民 个 | weak the job many m
engineer + | Ingenieur m Ingenieure | 工程师 位 | job m
singer + | Sänger m = | 歌手 位 | job the m
man men | Mann m Männer | 男人 个 | the age m
woman women | Frau f Frauen | 女人 个 | the age f
boy + | Junge m Jungen | 男孩 个 | weak the age m
child children | Kind n Kinder | 孩子 个 | plural_only many own the
""", "human")

JOBS = tuple(n for n in PEOPLE if "job" in n.tags)

NAMES = _fixed("""
Anna | Anna | 安娜 | f
Maria | Maria | 玛丽亚 | f
Laura | Laura | 劳拉 | f
Tom | Tom | 汤姆 | m
Peter | Peter | 彼得 | m
David | David | 大卫 | m
""")

_PLACE_TABLE = """
park + | Park m Parks | 公园 个 | in the park | im Park | in den Park | 公园里
market + | Markt m Märkte | 市场 个 | at the market | auf dem Markt | auf den Markt | 市场上
museum + | Museum n Museen | 博物馆 座 | in the museum | im Museum | ins Museum | 博物馆里
library libraries | Bibliothek f Bibliotheken | 图书馆 座 | in the library | in der Bibliothek | in die Bibliothek | 图书馆里
restaurant + | Restaurant n Restaurants | 餐馆 家 | in the restaurant | im Restaurant | ins Restaurant | 餐馆里
supermarket + | Supermarkt m Supermärkte | 超市 家 | in the supermarket | im Supermarkt | in den Supermarkt | 超市里
bakery bakeries | Bäckerei f Bäckereien | 面包店 家 | in the bakery | in der Bäckerei | in die Bäckerei | 面包店里
pharmacy pharmacies | Apotheke f Apotheken | 药店 家 | in the pharmacy | in der Apotheke | in die Apotheke | 药店里
hospital + | Krankenhaus n Krankenhäuser | 医院 家 | in the hospital | im Krankenhaus | ins Krankenhaus | 医院里
station + | Bahnhof m Bahnhöfe | 火车站 个 | at the station | am Bahnhof | zum Bahnhof | 火车站
airport + | Flughafen m Flughäfen | 机场 个 | at the airport | am Flughafen | zum Flughafen | 机场
theater + | Theater n = | 剧院 家 | in the theater | im Theater | ins Theater | 剧院里
cinema + | Kino n Kinos | 电影院 家 | in the cinema | im Kino | ins Kino | 电影院里
office + | Büro n Büros | 办公室 间 | in the office | im Büro | ins Büro | 办公室里
hotel + | Hotel n Hotels | 酒店 家 | in the hotel | im Hotel | ins Hotel | 酒店里
church churches | Kirche f Kirchen | 教堂 座 | in the church | in der Kirche | in die Kirche | 教堂里
forest + | Wald m Wälder | 森林 片 | in the forest | im Wald | in den Wald | 森林里
beach beaches | Strand m Strände | 海滩 片 | at the beach | am Strand | an den Strand | 海滩上
lake + | See m Seen | 湖边 个 | at the lake | am See | an den See | 湖边
city center + | Stadtzentrum n Stadtzentren | 市中心 个 | in the city center | im Stadtzentrum | ins Stadtzentrum | 市中心
village + | Dorf n Dörfer | 村子 个 | in the village | im Dorf | ins Dorf | 村子里
"""
PLACES = tuple(
    Place(_nouns(" | ".join(r[:3]) + " | place")[0], r[3], r[4], r[5], r[6]) for r in _rows(_PLACE_TABLE)
)

# Where a thing can be: English | German | Chinese | what may be there
SPOTS = _fixed("""
on the table | auf dem Tisch | 桌子上 | small
under the table | unter dem Tisch | 桌子下面 | small pet
on the chair | auf dem Stuhl | 椅子上 | small pet
under the bed | unter dem Bett | 床下面 | small pet
on the bed | auf dem Bett | 床上 | small pet
next to the door | neben der Tür | 门旁边 | small pet furniture
in front of the window | vor dem Fenster | 窗户前面 | furniture pet
behind the sofa | hinter dem Sofa | 沙发后面 | small pet
in the kitchen | in der Küche | 厨房里 | small pet furniture
in the garden | im Garten | 花园里 | pet furniture animal
in the bathroom | im Badezimmer | 浴室里 | small furniture
in the car | im Auto | 汽车里 | small pet
in the bag | in der Tasche | 包里 | lay
behind the house | hinter dem Haus | 房子后面 | animal pet
in front of the house | vor dem Haus | 房子前面 | animal pet
""")
SURFACES = _fixed("""
on the table | auf den Tisch | 桌子上
on the chair | auf den Stuhl | 椅子上
on the bed | auf das Bett | 床上
in the bag | in die Tasche | 包里
in the box | in die Kiste | 箱子里
next to the computer | neben den Computer | 电脑旁边
next to the lamp | neben die Lampe | 灯旁边
under the newspaper | unter die Zeitung | 报纸下面
behind the radio | hinter das Radio | 收音机后面
""")
MEASURED = _fixed("""
a cup of coffee | eine Tasse Kaffee | 一杯咖啡 | drink
a cup of tea | eine Tasse Tee | 一杯茶 | drink
a glass of water | ein Glas Wasser | 一杯水 | drink
a glass of milk | ein Glas Milch | 一杯牛奶 | drink
a glass of juice | ein Glas Saft | 一杯果汁 | drink
a bottle of wine | eine Flasche Wein | 一瓶葡萄酒 | drink buy
a bottle of water | eine Flasche Wasser | 一瓶水 | drink buy
a bottle of beer | eine Flasche Bier | 一瓶啤酒 | drink buy
a bowl of soup | eine Schüssel Suppe | 一碗汤 | food
a bowl of rice | eine Schüssel Reis | 一碗米饭 | food
a piece of cake | ein Stück Kuchen | 一块蛋糕 | food
a piece of cheese | ein Stück Käse | 一块奶酪 | food buy
a kilo of apples | ein Kilo Äpfel | 一公斤苹果 | buy
a kilo of potatoes | ein Kilo Kartoffeln | 一公斤土豆 | buy
a kilo of tomatoes | ein Kilo Tomaten | 一公斤西红柿 | buy
""")
BODY = _nouns("""
back + | Rücken m = | 背 个 | body
head + | Kopf m Köpfe | 头 个 | body
arm + | Arm m Arme | 胳膊 个 | body
leg + | Bein n Beine | 腿 个 | body
foot feet | Fuß m Füße | 脚 个 | body
hand + | Hand f Hände | 手 个 | body
neck + | Hals m Hälse | 脖子 个 | body
stomach + | Bauch m Bäuche | 肚子 个 | body
shoulder + | Schulter f Schultern | 肩膀 个 | body
""")

# ------------------------------------------------------------------------------------------- everyday: adjectives
ADJECTIVES = _adjectives("""
new newer | neu = neuer | 新 | thing home
old older | alt = älter | 旧 | thing home
big bigger | groß = größer | 大 | sized food animal home room
small smaller | klein = kleiner | 小 | sized food animal home room
beautiful + | schön = schöner | 漂亮的 漂亮 | clothes furniture vehicle gift animal home
expensive + | teuer teur teurer | 贵的 贵 | priced home
cheap cheaper | billig = billiger | 便宜的 便宜 | priced home
heavy heavier | schwer = schwerer | 重的 重 | heavy
practical + | praktisch = praktischer | 实用的 实用 | clothes furniture vehicle device
modern + | modern = moderner | 现代的 现代 | home device
fresh fresher | frisch = frischer | 新鲜的 新鲜 | food
sweet sweeter | süß = süßer | 甜的 甜 | fruit
healthy healthier | gesund = gesünder | 健康的 健康 | fruit veg
warm warmer | warm = wärmer | 暖和的 暖和 | clothes home room
clean cleaner | sauber = sauberer | 干净的 干净 | clothes dishes home room
dirty dirtier | schmutzig = schmutziger | 脏的 脏 | clothes dishes
interesting + | interessant = interessanter | 有趣的 有趣 | text plot
boring + | langweilig = langweiliger | 无聊的 无聊 | text plot
long longer | lang = länger | 长的 长 | plot
fast faster | schnell = schneller | 快的 快 | vehicle
loud louder | laut = lauter | 吵的 吵 | animal
quiet quieter | ruhig = ruhiger | 安静的 安静 | home room
bright brighter | hell = heller | 明亮的 明亮 | home room
friendly friendlier | freundlich = freundlicher | 友好的 友好 | person
young younger | jung = jünger | 年轻的 年轻 | person
strong stronger | stark = stärker | 强壮的 强壮 | person
clever + | klug = klüger | 聪明的 聪明 | person
tall taller | groß = größer | 高个子 高 | person
famous + | berühmt = berühmter | 有名的 有名 | person
patient + | geduldig = geduldiger | 耐心的 耐心 | person
polite + | höflich = höflicher | 有礼貌的 有礼貌 | person
""")
COLORS = _adjectives("""
red + | rot = roter | 红色 | color
blue + | blau = blauer | 蓝色 | color
green + | grün = grüner | 绿色 | color
black + | schwarz = schwärzer | 黑色 | color
white + | weiß = weißer | 白色 | color
yellow + | gelb = gelber | 黄色 | color
brown + | braun = brauner | 棕色 | color
gray + | grau = grauer | 灰色 | color
""")
# What people feel: English | German | Chinese (with 很)
STATES = _fixed("""
tired | müde | 很累
hungry | hungrig | 很饿
thirsty | durstig | 很渴
happy | glücklich | 很高兴
sad | traurig | 很难过
busy | beschäftigt | 很忙
nervous | nervös | 很紧张
angry | wütend | 很生气
bored | gelangweilt | 很无聊
curious | neugierig | 很好奇
lonely | einsam | 很孤独
""")
WEATHER = _fixed("""
cold | kalt | 冷
warm | warm | 暖和
hot | heiß | 热
windy | windig | 刮风
sunny | sonnig | 晴朗
cloudy | bewölkt | 多云
foggy | neblig | 有雾
rainy | regnerisch | 下雨
""")

# ------------------------------------------------------------------------------------------------ everyday: verbs
ACTIONS = _verbs("""
buy buys bought buying | kaufen kaufe kauft gekauft | acc | 买{o} 买了{o} | clothes furniture vehicle device buy small gift text home measured_buy
sell sells sold selling | verkaufen verkaufe verkauft verkauft | acc | 卖{o} 卖了{o} | furniture vehicle device home animal
eat eats ate eating | essen esse isst gegessen | acc | 吃{o} 吃了{o} | food measured_food
drink drinks drank drinking | trinken trinke trinkt getrunken | acc | 喝{o} 喝了{o} | drink measured_drink
cook cooks cooked cooking | kochen koche kocht gekocht | acc | 煮{o} 煮了{o} | dish
bake bakes baked baking | backen backe backt gebacken | acc | 烤{o} 烤了{o} | bake
try tries tried trying | probieren probiere probiert probiert | acc | 尝{o} 尝了{o} | food order
order orders ordered ordering | bestellen bestelle bestellt bestellt | acc | 点{o} 点了{o} | order
read reads - reading | lesen lese liest gelesen | acc | 看{o} 看了{o} | text plot
write writes wrote writing | schreiben schreibe schreibt geschrieben | acc | 写{o} 写了{o} | written
translate translates translated translating | übersetzen übersetze übersetzt übersetzt | acc | 翻译{o} 翻译了{o} | text plot
repair repairs repaired repairing | reparieren repariere repariert repariert | acc | 修理{o} 修理了{o} | vehicle device repair
clean cleans cleaned cleaning | putzen putze putzt geputzt | acc | 打扫{o} 打扫了{o} | room
wash washes washed washing | waschen wasche wäscht gewaschen | acc | 洗{o} 洗了{o} | clothes dishes vehicle
open opens opened opening | öffnen öffne öffnet geöffnet | acc | 打开{o} 打开了{o} | open
close closes closed closing | schließen schließe schließt geschlossen | acc | 关上{o} 关上了{o} | shut
look looks looked looking for | suchen suche sucht gesucht | acc | 找{o} 找了{o} | small pet text
find finds found finding | finden finde findet gefunden | acc | 找到{o} 找到了{o} | small pet
borrow borrows borrowed borrowing | aus-leihen leihe leiht ausgeliehen | acc | 借{o} 借了{o} | text vehicle device dishes
choose chooses chose choosing | aus-suchen suche sucht ausgesucht | acc | 挑选{o} 挑选了{o} | clothes gift furniture device
carry carries carried carrying | tragen trage trägt getragen | acc | 搬{o} 搬了{o} | furniture
use uses used using | benutzen benutze benutzt benutzt | acc | 用{o} 用了{o} | device vehicle dishes
draw draws drew drawing | zeichnen zeichne zeichnet gezeichnet | acc | 画{o} 画了{o} | animal home vehicle
feed feeds fed feeding | füttern füttere füttert gefüttert | acc | 喂{o} 喂了{o} | animal
watch watches watched watching | beobachten beobachte beobachtet beobachtet | acc | 观察{o} 观察了{o} | animal
hide hides hid hiding | verstecken verstecke versteckt versteckt | acc | 藏{o} 藏了{o} | small gift
turn turns turned turning on | ein-schalten schalte schaltet eingeschaltet | acc | 打开{o} 打开了{o} | switch
bring brings brought bringing along | mit-bringen bringe bringt mitgebracht | acc | 带来{o} 带来了{o} | small gift buy
visit visits visited visiting | besuchen besuche besucht besucht | acc | 看望{o} 看望了{o} | person
call calls called calling | an-rufen rufe ruft angerufen | acc | 给{o}打电话 给{o}打了电话 | person
help helps helped helping | helfen helfe hilft geholfen | dat | 帮助{o} 帮助了{o} | person
thank thanks thanked thanking | danken danke dankt gedankt | dat | 感谢{o} 感谢了{o} | person
invite invites invited inviting | ein-laden lade lädt eingeladen | acc | 邀请{o} 邀请了{o} | person
pick picks picked picking up | ab-holen hole holt abgeholt | acc | 接{o} 接了{o} | person
meet meets met meeting | treffen treffe trifft getroffen | acc | 见{o} 见了{o} | person
ask asks asked asking | fragen frage fragt gefragt | acc | 问{o} 问了{o} | person
wait waits waited waiting for | warten warte wartet gewartet | auf+acc | 等{o} 等了{o} | person
talk talks talked talking with | sprechen spreche spricht gesprochen | mit+dat | 和{o}聊天 和{o}聊了天 | person
play plays played playing with | spielen spiele spielt gespielt | mit+dat | 和{o}玩 和{o}玩了 | pet
listen listens listened listening to | zu-hören höre hört zugehört | dat | 听{o}说话 听{o}说话了 | person
""")
# Ready-made predicates: the particle column holds the rest of the English predicate.
ACTIVITIES = _verbs("""
stay stays stayed staying at home | bleiben bleibe bleibt geblieben sein | acc | 待在家里 待在家里 | indoor | zu Hause
go goes went going for a walk | gehen gehe geht gegangen sein | acc | 去散步 去散步了 | | spazieren
go goes went going shopping | gehen gehe geht gegangen sein | acc | 去购物 去购物了 | | einkaufen
go goes went going to bed early | gehen gehe geht gegangen sein | acc | 早点睡觉 早早睡觉了 | indoor | früh ins Bett
go goes went going to the doctor | gehen gehe geht gegangen sein | acc | 去看医生 去看医生了 | | zum Arzt
play plays played playing football | spielen spiele spielt gespielt | acc | 踢足球 踢了足球 | | Fußball
play plays played playing the piano | spielen spiele spielt gespielt | acc | 弹钢琴 弹了钢琴 | indoor | Klavier
play plays played playing cards | spielen spiele spielt gespielt | acc | 打牌 打了牌 | indoor | Karten
get gets got getting up early | auf-stehen stehe steht aufgestanden sein | acc | 早起 早早起床了 | | früh
swim swims swam swimming in the lake | schwimmen schwimme schwimmt geschwommen sein | acc | 在湖里游泳 在湖里游了泳 | | im See
watch watches watched watching a film | sehen sehe sieht gesehen | acc | 看电影 看了电影 | indoor | einen Film | keinen Film
listen listens listened listening to music | hören höre hört gehört | acc | 听音乐 听了音乐 | indoor | Musik | keine Musik
sing sings sang singing a song | singen singe singt gesungen | acc | 唱歌 唱了歌 | | ein Lied | kein Lied
dance dances danced dancing with friends | tanzen tanze tanzt getanzt | acc | 和朋友跳舞 和朋友跳了舞 | | mit Freunden
work works worked working in the garden | arbeiten arbeite arbeitet gearbeitet | acc | 在花园里干活 在花园里干了活 | | im Garten
work works worked working in the office | arbeiten arbeite arbeitet gearbeitet | acc | 在办公室工作 在办公室工作了 | | im Büro
study studies studied studying for the exam | lernen lerne lernt gelernt | acc | 准备考试 准备了考试 | indoor | für die Prüfung
do does did doing the homework | machen mache macht gemacht | acc | 做作业 做了作业 | indoor | die Hausaufgaben | die Hausaufgaben nicht
cook cooks cooked cooking dinner | kochen koche kocht gekocht | acc | 做晚饭 做了晚饭 | indoor | Abendessen | kein Abendessen
make makes made making breakfast | machen mache macht gemacht | acc | 做早饭 做了早饭 | indoor | Frühstück | kein Frühstück
rest rests rested resting on the sofa | entspannen entspanne entspannt entspannt | acc | 在沙发上休息 在沙发上休息了 | indoor | auf dem Sofa
ride rides rode riding a horse | reiten reite reitet geritten sein | acc | 骑马 骑了马 | | auf einem Pferd
learn learns learned learning new words | lernen lerne lernt gelernt | acc | 学习新单词 学习了新单词 | indoor | neue Wörter | keine neuen Wörter
""")
# "go/drive/walk ... to a place or city": the object is filled in by the grammar.
MOTIONS = _verbs("""
go goes went going to | gehen gehe geht gegangen sein | acc | 去{o} 去了{o} | place
walk walks walked walking to | laufen laufe läuft gelaufen sein | acc | 走路去{o} 走路去了{o} | place
come comes came coming to | kommen komme kommt gekommen sein | acc | 来{o} 来{o}了 | place
drive drives drove driving to | fahren fahre fährt gefahren sein | acc | 开车去{o} 开车去了{o} | place city
travel travels traveled traveling to | reisen reise reist gereist sein | acc | 去{o}旅行 去{o}旅行了 | city
fly flies flew flying to | fliegen fliege fliegt geflogen sein | acc | 坐飞机去{o} 坐飞机去了{o} | city
""")
GIVING = _verbs("""
give gives gave giving | geben gebe gibt gegeben | acc | 给{p}{o} 给了{p}{o} | gift small text
show shows showed showing | zeigen zeige zeigt gezeigt | acc | 给{p}看{o} 给{p}看了{o} | small device vehicle clothes animal home
send sends sent sending | schicken schicke schickt geschickt | acc | 给{p}寄{o} 给{p}寄了{o} | gift lay clothes
sell sells sold selling | verkaufen verkaufe verkauft verkauft | acc | 卖给{p}{o} 卖给了{p}{o} | vehicle device furniture
lend lends lent lending | leihen leihe leiht geliehen | acc | 借给{p}{o} 借给了{p}{o} | text vehicle device
tell tells told telling | erzählen erzähle erzählt erzählt | acc | 给{p}讲{o} 给{p}讲了{o} | plot
""")

# ------------------------------------------------------------------------------------- everyday: times and numbers
PAST_TIMES = _fixed("""
yesterday | gestern | 昨天
last week | letzte Woche | 上周
last month | letzten Monat | 上个月
last night | gestern Abend | 昨天晚上
this morning | heute Morgen | 今天早上
last Monday | letzten Montag | 上周一
last Friday | letzten Freitag | 上周五
two days ago | vor zwei Tagen | 两天前
three weeks ago | vor drei Wochen | 三周前
last weekend | letztes Wochenende | 上周末
""")
FUTURE_TIMES = _fixed("""
tomorrow | morgen | 明天
tonight | heute Abend | 今天晚上
next week | nächste Woche | 下周
next month | nächsten Monat | 下个月
tomorrow morning | morgen früh | 明天早上
tomorrow evening | morgen Abend | 明天晚上
next Tuesday | nächsten Dienstag | 下周二
next Thursday | nächsten Donnerstag | 下周四
this afternoon | heute Nachmittag | 今天下午
after lunch | nach dem Mittagessen | 午饭后
in three days | in drei Tagen | 三天后
this weekend | dieses Wochenende | 这个周末
""")
HABIT_TIMES = _fixed("""
every day | jeden Tag | 每天
every morning | jeden Morgen | 每天早上
every evening | jeden Abend | 每天晚上
every week | jede Woche | 每周
every Wednesday | jeden Mittwoch | 每周三
every Saturday | jeden Samstag | 每周六
every Sunday | jeden Sonntag | 每周日
after work | nach der Arbeit | 下班后
in the afternoon | am Nachmittag | 下午
on weekends | am Wochenende | 周末
in the evening | am Abend | 晚上
before breakfast | vor dem Frühstück | 早饭前
in summer | im Sommer | 夏天
in winter | im Winter | 冬天
""")
FREQUENCY = _fixed("""
often | oft | 经常
always | immer | 总是
sometimes | manchmal | 有时候
usually | normalerweise | 通常
rarely | selten | 很少
""")
NUMBERS = _fixed("""
two | zwei | 两
three | drei | 三
four | vier | 四
five | fünf | 五
six | sechs | 六
seven | sieben | 七
nine | neun | 九
ten | zehn | 十
twelve | zwölf | 十二
""")
BIG_NUMBERS = _fixed("""
fifteen | fünfzehn | 十五
twenty | zwanzig | 二十
thirty | dreißig | 三十
forty | vierzig | 四十
fifty | fünfzig | 五十
sixty | sechzig | 六十
ninety | neunzig | 九十
""")
CITIES = _fixed("""
Berlin | Berlin | 柏林
Paris | Paris | 巴黎
London | London | 伦敦
Vienna | Wien | 维也纳
Rome | Rom | 罗马
Munich | München | 慕尼黑
Beijing | Peking | 北京
Shanghai | Shanghai | 上海
""")
LANGUAGES = _fixed("""
German | Deutsch | 德语
English | Englisch | 英语
French | Französisch | 法语
Spanish | Spanisch | 西班牙语
Chinese | Chinesisch | 中文
Italian | Italienisch | 意大利语
""")
TRANSPORT = _fixed("""
by bus | mit dem Bus | 坐公交车
by train | mit dem Zug | 坐火车
by taxi | mit dem Taxi | 坐出租车
by car | mit dem Auto | 开车
by subway | mit der U-Bahn | 坐地铁
by ship | mit dem Schiff | 坐船
""")
MODALS = _fixed("""
can | kann kann können | 能 | 不能
must | muss muss müssen | 必须 |
should | sollte sollte sollten | 应该 | 不应该
want to | will will wollen | 想 | 不想
have to | muss muss müssen | 得 | 不用
would like to | möchte möchte möchten | 想要 |
may | darf darf dürfen | 可以 | 不可以
""")
THOUGHTS = _fixed("""
I think | Ich denke | 我觉得
I believe | Ich glaube | 我相信
I hope | Ich hoffe | 我希望
I know | Ich weiß | 我知道
she says | sie sagt | 她说
he says | er sagt | 他说
we know | wir wissen | 我们知道
they believe | sie glauben | 他们相信
it is good | es ist gut | 很好
""")

# ------------------------------------------------------------------------------------------------------- research
RESEARCH_NOUNS = _nouns("""
model + | Modell n Modelle | 模型 个 | agent object
system + | System n Systeme | 系统 个 | agent object
program + | Programm n Programme | 程序 个 | agent object
method + | Methode f Methoden | 方法 种 | way
idea + | Idee f Ideen | 想法 个 | way thought
result + | Ergebnis n Ergebnisse | 结果 个 | study
experiment + | Experiment n Experimente | 实验 个 | study
problem + | Problem n Probleme | 问题 个 | issue
language + | Sprache f Sprachen | 语言 种 | topic
sentence + | Satz m Sätze | 句子 个 | data wording
text + | Text m Texte | 文本 个 | data wording
translation + | Übersetzung f Übersetzungen | 翻译 个 | topic quality_of
quality - | Qualität f - | 质量 个 | score
speed - | Geschwindigkeit f - | 速度 个 | score
mistake + | Fehler m = | 错误 个 | bad always_many
language model + | Sprachmodell n Sprachmodelle | 语言模型 个 | agent object
speaker + | Sprecher m = | 说话人 个 | people
*encoder + | Encoder m = | 编码器 个 | agent object part
*decoder + | Decoder m = | 解码器 个 | agent object part
*adapter + | Adapter m = | 适配器 个 | agent object part
*baseline + | Baseline f Baselines | 基线 个 | agent
*architecture + | Architektur f Architekturen | 架构 种 | object
*dataset + | Datensatz m Datensätze | 数据集 个 | data corpus
*corpus corpora | Korpus n Korpora | 语料库 个 | data corpus bare_gen
*recording + | Aufnahme f Aufnahmen | 录音 段 | data wording
*transcript + | Transkript n Transkripte | 转录文本 份 | data wording
*summary summaries | Zusammenfassung f Zusammenfassungen | 摘要 份 | data wording quality_of
*layer + | Schicht f Schichten | 层 个 | piece
*parameter + | Parameter m = | 参数 个 | part always_many
*vocabulary vocabularies | Vokabular n Vokabulare | 词表 个 | part
*accuracy - | Genauigkeit f - | 准确率 个 | score
*latency - | Latenz f - | 延迟 个 | cost
*memory - | Speicher m - | 内存 个 | cost
*noise - | Rauschen n - | 噪声 个 | bad
*speech translation - | Sprachübersetzung f - | 语音翻译 个 | topic
*dialect + | Dialekt m Dialekte | 方言 种 | topic
*distillation - | Destillation f - | 蒸馏 个 | technique
*compression - | Kompression f - | 压缩 个 | technique
*quantization - | Quantisierung f - | 量化 个 | technique
*pruning - | Pruning n - | 剪枝 个 | technique
*benchmark + | Benchmark m Benchmarks | 基准 个 | corpus
*hypothesis hypotheses | Hypothese f Hypothesen | 假设 个 | issue guess
""")
RESEARCH_ADJECTIVES = _adjectives("""
new newer | neu = neuer | 新 | way object data people study
small smaller | klein = kleiner | 小 | object data
large larger | groß = größer | 大型 大 | object data
simple simpler | einfach = einfacher | 简单 | way object issue study
fast faster | schnell = schneller | 快速 快 | way object compare
slow slower | langsam = langsamer | 慢的 慢 | slower
useful + | nützlich = nützlicher | 有用的 有用 | way data compare
important + | wichtig = wichtiger | 重要的 重要 | issue study
difficult + | schwierig = schwieriger | 困难的 困难 | issue
good better | gut = besser | 好的 好 | way compare
*robust + | robust = robuster | 鲁棒 | way object compare
*efficient + | effizient = effizienter | 高效 | way object compare
*accurate + | genau = genauer | 准确 | way object compare
*reliable + | zuverlässig = zuverlässiger | 可靠 | way object data compare
*multilingual + | mehrsprachig = mehrsprachiger | 多语言 | object data
*neural + | neuronal = neuronaler | 神经 | object_neural
*automatic + | automatisch = automatischer | 自动 | way object
*compact + | kompakt = kompakter | 紧凑 | object
*noisy noisier | verrauscht = verrauschter | 有噪声的 有噪声 | data
*synthetic + | synthetisch = synthetischer | 合成 | data
*public + | öffentlich = öffentlicher | 公开 | corpus
""")
RESEARCH_VERBS = _verbs("""
use uses used using | verwenden verwende verwendet verwendet | acc | 使用{o} 使用了{o} | object data way
compare compares compared comparing | vergleichen vergleiche vergleicht verglichen | acc | 比较{o} 比较了{o} | object way data
test tests tested testing | testen teste testet getestet | acc | 测试{o} 测试了{o} | object way
improve improves improved improving | verbessern verbessere verbessert verbessert | acc | 改进{o} 改进了{o} | object way
build builds built building | bauen baue baut gebaut | acc | 构建{o} 构建了{o} | object corpus
describe describes described describing | beschreiben beschreibe beschreibt beschrieben | acc | 描述{o} 描述了{o} | way object data issue study
develop develops developed developing | entwickeln entwickle entwickelt entwickelt | acc | 开发{o} 开发了{o} | way object
choose chooses chose choosing | aus-wählen wähle wählt ausgewählt | acc | 选择{o} 选择了{o} | object data way
study studies studied studying | untersuchen untersuche untersucht untersucht | acc | 研究{o} 研究了{o} | issue way topic
*train trains trained training | trainieren trainiere trainiert trainiert | acc | 训练{o} 训练了{o} | object
*evaluate evaluates evaluated evaluating | evaluieren evaluiere evaluiert evaluiert | acc | 评估{o} 评估了{o} | object way
*compress compresses compressed compressing | komprimieren komprimiere komprimiert komprimiert | acc | 压缩{o} 压缩了{o} | object
*analyze analyzes analyzed analyzing | analysieren analysiere analysiert analysiert | acc | 分析{o} 分析了{o} | data object issue study
*release releases released releasing | veröffentlichen veröffentliche veröffentlicht veröffentlicht | acc | 发布{o} 发布了{o} | corpus object
*collect collects collected collecting | sammeln sammle sammelt gesammelt | acc | 收集{o} 收集了{o} | data
*annotate annotates annotated annotating | annotieren annotiere annotiert annotiert | acc | 标注{o} 标注了{o} | data
*propose proposes proposed proposing | vor-schlagen schlage schlägt vorgeschlagen | acc | 提出{o} 提出了{o} | way
*present presents presented presenting | vor-stellen stelle stellt vorgestellt | acc | 介绍{o} 介绍了{o} | way object data
*simplify simplifies simplified simplifying | vereinfachen vereinfache vereinfacht vereinfacht | acc | 简化{o} 简化了{o} | object way
*initialize initializes initialized initializing | initialisieren initialisiere initialisiert initialisiert | acc | 初始化{o} 初始化了{o} | object
""")
