# ruff: noqa: E501 - the tables have one entry a line, however long, so that they can be proof-read
"""Everyday actions: verbs, and the words for when, how often, how many, and in what mood things are done.

Homophones that speech cannot tell apart are left out on purpose.
"""

from __future__ import annotations

from tools.mini.lexicon import parse_fixed, parse_verbs

ACTIONS = parse_verbs("""
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
ACTIVITIES = parse_verbs("""
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
MOTIONS = parse_verbs("""
go goes went going to | gehen gehe geht gegangen sein | acc | 去{o} 去了{o} | place
walk walks walked walking to | laufen laufe läuft gelaufen sein | acc | 走路去{o} 走路去了{o} | place
come comes came coming to | kommen komme kommt gekommen sein | acc | 来{o} 来{o}了 | place
drive drives drove driving to | fahren fahre fährt gefahren sein | acc | 开车去{o} 开车去了{o} | place city
travel travels traveled traveling to | reisen reise reist gereist sein | acc | 去{o}旅行 去{o}旅行了 | city
fly flies flew flying to | fliegen fliege fliegt geflogen sein | acc | 坐飞机去{o} 坐飞机去了{o} | city
""")
GIVING = parse_verbs("""
give gives gave giving | geben gebe gibt gegeben | acc | 给{p}{o} 给了{p}{o} | gift small text
show shows showed showing | zeigen zeige zeigt gezeigt | acc | 给{p}看{o} 给{p}看了{o} | small device vehicle clothes animal home
send sends sent sending | schicken schicke schickt geschickt | acc | 给{p}寄{o} 给{p}寄了{o} | gift lay clothes
sell sells sold selling | verkaufen verkaufe verkauft verkauft | acc | 卖给{p}{o} 卖给了{p}{o} | vehicle device furniture
lend lends lent lending | leihen leihe leiht geliehen | acc | 借给{p}{o} 借给了{p}{o} | text vehicle device
tell tells told telling | erzählen erzähle erzählt erzählt | acc | 给{p}讲{o} 给{p}讲了{o} | plot
""")

PAST_TIMES = parse_fixed("""
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
FUTURE_TIMES = parse_fixed("""
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
HABIT_TIMES = parse_fixed("""
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
FREQUENCY = parse_fixed("""
often | oft | 经常
always | immer | 总是
sometimes | manchmal | 有时候
usually | normalerweise | 通常
rarely | selten | 很少
""")
NUMBERS = parse_fixed("""
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
BIG_NUMBERS = parse_fixed("""
fifteen | fünfzehn | 十五
twenty | zwanzig | 二十
thirty | dreißig | 三十
forty | vierzig | 四十
fifty | fünfzig | 五十
sixty | sechzig | 六十
ninety | neunzig | 九十
""")
TRANSPORT = parse_fixed("""
by bus | mit dem Bus | 坐公交车
by train | mit dem Zug | 坐火车
by taxi | mit dem Taxi | 坐出租车
by car | mit dem Auto | 开车
by subway | mit der U-Bahn | 坐地铁
by ship | mit dem Schiff | 坐船
""")
MODALS = parse_fixed("""
can | kann kann können | 能 | 不能
must | muss muss müssen | 必须 |
should | sollte sollte sollten | 应该 | 不应该
want to | will will wollen | 想 | 不想
have to | muss muss müssen | 得 | 不用
would like to | möchte möchte möchten | 想要 |
may | darf darf dürfen | 可以 | 不可以
""")
THOUGHTS = parse_fixed("""
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
