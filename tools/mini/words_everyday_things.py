"""Everyday people, things, places, and how they are: the nouns and adjectives of the built-in corpus.

The lists were written for this project. Homophones that speech cannot tell apart (meat/meet, hour/our, write/right,
sea/see, ate/eight ...) are left out on purpose: the model that learns from these sentences hears them, it never reads.
"""

from __future__ import annotations

from tools.mini.lexicon import Place, parse_adjectives, parse_fixed, parse_nouns, parse_rows

THINGS = parse_nouns("""
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

PEOPLE = parse_nouns(
    """
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
""",
    "human",
)

JOBS = tuple(n for n in PEOPLE if "job" in n.tags)

NAMES = parse_fixed("""
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
    Place(parse_nouns(" | ".join(r[:3]) + " | place")[0], r[3], r[4], r[5], r[6]) for r in parse_rows(_PLACE_TABLE)
)
CITIES = parse_fixed("""
Berlin | Berlin | 柏林
Paris | Paris | 巴黎
London | London | 伦敦
Vienna | Wien | 维也纳
Rome | Rom | 罗马
Munich | München | 慕尼黑
Beijing | Peking | 北京
Shanghai | Shanghai | 上海
""")
LANGUAGES = parse_fixed("""
German | Deutsch | 德语
English | Englisch | 英语
French | Französisch | 法语
Spanish | Spanisch | 西班牙语
Chinese | Chinesisch | 中文
Italian | Italienisch | 意大利语
""")

# Where a thing can be: English | German | Chinese | what may be there
SPOTS = parse_fixed("""
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
SURFACES = parse_fixed("""
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
MEASURED = parse_fixed("""
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
BODY = parse_nouns("""
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

ADJECTIVES = parse_adjectives("""
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
COLORS = parse_adjectives("""
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
STATES = parse_fixed("""
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
WEATHER = parse_fixed("""
cold | kalt | 冷
warm | warm | 暖和
hot | heiß | 热
windy | windig | 刮风
sunny | sonnig | 晴朗
cloudy | bewölkt | 多云
foggy | neblig | 有雾
rainy | regnerisch | 下雨
""")
