# ruff: noqa: E501 - the tables have one entry a line, however long, so that they can be proof-read
"""Words of talks at a computational-linguistics conference: nouns, adjectives and verbs of the research domain.

A leading ``*`` marks a word that the "background" lexicon leaves out: the base model never hears it, so that
fine-tuning has to teach it.
"""

from __future__ import annotations

from tools.mini.lexicon import parse_adjectives, parse_nouns, parse_verbs

RESEARCH_NOUNS = parse_nouns("""
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
RESEARCH_ADJECTIVES = parse_adjectives("""
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
RESEARCH_VERBS = parse_verbs("""
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
