"""Small real parts: models made in memory, clips that are real files, the built-in mini model."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are small: threads would spend their time waiting for each other
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell does so with what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "trimlingual-tests")  # not the user's own

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import ModelCard

if not torch.cuda.is_available():  # before Triton is imported, since its own functions are interpreted as well
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AudioFlamingo3Config, Qwen2AudioConfig, VoxtralConfig, WhisperFeatureExtractor

import trimlingual
from tools.mini.qwen2_audio import BLUEPRINT as QWEN2_AUDIO
from trimlingual.data.audio import SAMPLE_RATE
from trimlingual.data.sources import Clip
from trimlingual.data.splits import Split
from trimlingual.models.family import Family, family_named
from trimlingual.models.folders import FAMILIES, library_problem
from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.saving import save_model
from trimlingual.recipe import DecodeSettings, ModelSettings, SharedSettings, TaskSettings
from trimlingual.run.artifacts import hash_file
from trimlingual.run.lineage import Lineage, ModelFolder, read_lineage
from trimlingual.training.trainer import TranslationTrainer

from .processes import Command

WINDOW_S = 2
TEXTS = [
    "Der Hund sieht den kleinen Ball.", "Wir trainieren das Modell.", "Das ist gut.", "Die Ergebnisse sind besser.",
    "狗看见小球。", "我们训练模型。", "这很好。", "结果更好。",
]  # fmt: skip


_warn = warnings.warn


def _strict(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **kwargs: Any) -> None:
    """`warnings.warn`, but an error where a deprecated call stands in this package, whatever line the library blames."""
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, (DeprecationWarning, FutureWarning)):
        frame: Any = sys._getframe(1)
        library = _package(frame)
        while frame is not None and _package(frame) == library:
            frame = frame.f_back
        if frame is not None and _package(frame) == "trimlingual":
            raise kind(f"{frame.f_globals['__name__']}, line {frame.f_lineno}: {message}")
    _warn(message, category, stacklevel + 1, *args, **kwargs)


def _package(frame: Any) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def pytest_configure() -> None:
    warnings.warn = _strict


# A test marked so runs once for each model family; any other runs for the family of the built-in model.
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, indirect=True, scope="session")


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> Family:
    """The family whose small models a test uses."""
    named = family_named(getattr(request, "param", "qwen2_audio"))
    for file in FAMILIES[named.model_type]:
        if problem := library_problem(file):
            pytest.skip(problem)
    return named


@pytest.fixture(scope="session")
def processor(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A processor with a small vocabulary and, where the family leaves the choice, a window of two seconds."""
    if family.model_type != "qwen2_audio":
        (tiny,) = [shape for name, shape in family.shapes.items() if name.endswith("-tiny")]
        return family.random_processor({**tiny, "mels": 80, "window_s": WINDOW_S}, tmp_path_factory.mktemp("processor"))
    made = QWEN2_AUDIO.processor(TEXTS)
    made.feature_extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW_S)
    return made


@pytest.fixture(scope="session")
def make_model(family: Family, processor: Any) -> Callable[..., Any]:
    """Random models of chosen shape. The spread of the weights is wide, so that outputs are varied and some answers end."""

    def make(
        layers: int = 4,
        heads: int = 4,
        kv_heads: int = 2,
        width: int = 64,
        encoder_layers: int = 2,
        tied: bool = False,
        seed: int = 0,
    ) -> Any:
        torch.manual_seed(seed)
        tokenizer = processor.tokenizer
        text = {
            "hidden_size": width, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": len(tokenizer), "tie_word_embeddings": tied,
            "max_position_embeddings": 512, "initializer_range": 0.15, "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
        config = {"qwen2_audio": _qwen2_audio, "voxtral": _voxtral, "audioflamingo3": _audioflamingo3}[
            family.model_type
        ](text, encoder_layers)
        config.tie_word_embeddings = tied
        config.audio_token_id = family.audio_token(processor)
        model = family.build(config).eval()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.do_sample = False
        return model

    return make


def _qwen2_audio(text: dict[str, Any], encoder_layers: int) -> Any:
    audio = {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": 80, "d_model": 64, "encoder_layers": encoder_layers,
        "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "max_source_positions": WINDOW_S * 50,
    }  # fmt: skip
    return Qwen2AudioConfig(audio_config=audio, text_config={"model_type": "qwen2", **text})


def _audioflamingo3(text: dict[str, Any], encoder_layers: int) -> Any:
    audio = {
        "model_type": "audioflamingo3_encoder", "num_mel_bins": 80, "hidden_size": 64, "num_hidden_layers": encoder_layers,
        "num_attention_heads": 2, "intermediate_size": 64, "max_source_positions": WINDOW_S * 50,
    }  # fmt: skip
    return AudioFlamingo3Config(audio_config=audio, text_config={"model_type": "qwen2", **text})


def _voxtral(text: dict[str, Any], encoder_layers: int) -> Any:
    """Its decoder's heads are wider than its width has room for, as in the published models."""
    audio = {
        "model_type": "voxtral_encoder", "hidden_size": 64, "num_hidden_layers": encoder_layers, "num_attention_heads": 2,
        "intermediate_size": 256, "initializer_range": 0.15,
    }  # fmt: skip
    text = text | {"model_type": "llama", "head_dim": 32, "max_position_embeddings": 2048, "rope_theta": 1e8}
    return VoxtralConfig(audio_config=audio, text_config=text)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], processor: Any) -> Path:
    """A saved random model of 6 decoder layers."""
    folder = tmp_path_factory.mktemp("model")
    save_model(make_model(layers=6), processor, folder, "float32")
    return folder


@pytest.fixture
def lineage(model_dir: Path) -> Lineage:
    return read_lineage(model_dir, "tiny")


def assert_names_its_base(adapter: Path, base: str) -> None:
    """Wherever PEFT names what an adapter belongs to, it is `base`, and no path of this machine."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    card = ModelCard.load(adapter / "README.md").data
    assert config["base_model_name_or_path"] == card.base_model == base
    assert [tag for tag in card.tags if tag.startswith("base_model")] == [f"base_model:adapter:{base}"]


def write_clip(path: Path, duration_s: float, seed: int) -> None:
    """A file of shaped noise; every seed sounds different."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * rng.uniform(80, 400) * time * (1 + 0.1 * np.sin(2 * np.pi * 3 * time)))
    soundfile.write(path, (0.3 * tone + 0.05 * rng.standard_normal(len(time))).astype(np.float32), SAMPLE_RATE)


def make_clips(folder: Path, count: int, first_seed: int = 0, longer_s: float = 0.0) -> list[Clip]:
    """Clips of very different length (0.3 to 1.9 s, and `longer_s`) with references in both languages."""
    clips = []
    for i in range(count):
        path = folder / f"clip-{first_seed + i}.wav"
        duration = longer_s + 0.3 + 1.6 * ((i * 7) % 11) / 11
        write_clip(path, duration, first_seed + i)
        references = {"de": TEXTS[i % 4], "zh": TEXTS[4 + i % 4]}
        info = soundfile.info(path)
        clips.append(Clip(path.stem, path, references, f"sentence {i}", info.frames / SAMPLE_RATE, hash_file(path)))
    return clips


@pytest.fixture
def split(family: Family, processor: Any, tmp_path: Path) -> Split:
    """Clips of one window; where a model takes longer ones, fewer, and one of them in two chunks of its encoder."""
    if family.window_s(processor) == WINDOW_S:
        return Split("select", tuple(make_clips(tmp_path, 7)))
    longer = processor.feature_extractor.chunk_length + 0.5
    return Split("select", (*make_clips(tmp_path, 4), *make_clips(tmp_path, 1, first_seed=4, longer_s=longer)))


@pytest.fixture
def task() -> TaskSettings:
    return TaskSettings(target_languages=["de", "zh"])


@pytest.fixture
def decode_settings() -> DecodeSettings:
    return DecodeSettings(batch_size=4, max_new_tokens=12)


@pytest.fixture
def model_settings() -> ModelSettings:
    return ModelSettings(base="tiny", dtype="float32", storage_dtype="float32", device="cpu")


@pytest.fixture
def shared(task: TaskSettings, model_settings: ModelSettings, decode_settings: DecodeSettings) -> SharedSettings:
    return SharedSettings(task, model_settings, decode_settings)


@pytest.fixture
def given(model_dir: Path, lineage: Lineage) -> ModelFolder:
    """The saved random model."""
    return ModelFolder(model_dir, lineage)


@pytest.fixture
def data(split: Split, examples: list[Example]) -> TrainingData:
    """The test file's examples."""
    return TrainingData(split.clips, examples)


@pytest.fixture(scope="session")
def manifests(tmp_path_factory) -> list[str]:
    """A few of the built-in clips as manifests."""
    source = Path(trimlingual.__file__).parent / "mini" / "data"
    folder = tmp_path_factory.mktemp("manifests")
    overrides = []
    for split, count in (("train", 24), ("select", 6), ("test", 8)):
        lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        records = [json.loads(line) for line in lines]
        for record in records:
            record["audio"] = str(source / record["audio"])
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
        overrides.append(f"data.{split}={{kind: manifest, path: '{folder / split}.jsonl'}}")
    return overrides


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """A function that starts `trimlingual` in a process, or in several that work together; what still runs at the end is killed."""
    started: list[Command] = []

    def begin(
        words: list[str], processes: int = 1, command_line: str = "trimlingual.cli", **environment: str
    ) -> Command:
        started.append(Command(words, tmp_path_factory.mktemp("said"), processes, environment, command_line))
        return started[-1]

    yield begin
    for command in started:
        command.kill()


class _Killed(Exception):
    pass


@pytest.fixture
def killed_in_step() -> Callable[[int], Any]:
    """A context in which training dies in the step after so many."""

    @contextmanager
    def context(done: int) -> Iterator[None]:
        training_step = TranslationTrainer.training_step

        def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == done:
                raise _Killed
            return training_step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TranslationTrainer, "training_step", dies)
            with pytest.raises(_Killed):
                yield

    return context
