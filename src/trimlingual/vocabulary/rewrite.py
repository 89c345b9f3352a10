"""Vocabulary trimming: the tokens that the target languages and the prompts need, and a model with these alone.

Which tokens may go, and why the rest behaves as before, is in bpe.py. Here the model folder is rewritten: rows of the embedding and of
the output head, ids in the configurations, the tokenizer. Weights are taken from file to file, one shard at a time, so nothing is
loaded as a model, rounded or quantised again, and everything that is not a row of a token stays bit for bit.

Shapes: V rows before, K rows after, D decoder width.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from trimlingual.data.audio import DataError
from trimlingual.data.splits import DataSplits
from trimlingual.models.errors import ProofError
from trimlingual.models.family import family_of_processor
from trimlingual.models.folders import check_folder
from trimlingual.models.inputs import Prompter
from trimlingual.models.loading import load_processor
from trimlingual.models.saving import finish_saved
from trimlingual.models.tree import ROWS_BY_TOKEN, audio_token_id
from trimlingual.recipe import TaskSettings, VocabSettings
from trimlingual.run.artifacts import write_json, write_text
from trimlingual.run.lineage import ModelFolder
from trimlingual.vocabulary.bpe import Bpe, Kept, VocabError, choose
from trimlingual.vocabulary.files import TokenizerFile, tokenizer_file

BATCH = 1000  # sentences tokenised at a time
NUM_CHECKED = 1000  # counted sentences whose tokenisation is compared after trimming
# Configuration keys whose values are token ids.
TOKEN_ID_KEY = re.compile(r"(_token_ids?|_token_index|suppress_tokens)$")
# What safetensors calls the dtypes of weights that are not quantised.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class RowTensor:
    """A stored tensor with one row a token: which file, which name, (V, D)."""

    file: str
    name: str
    shape: tuple[int, int]


def trim_vocab(
    folder: ModelFolder,
    texts: Iterable[str],
    held_out: Mapping[str, Iterable[str]],
    task: TaskSettings,
    settings: VocabSettings,
    out_dir: Path,
) -> dict[str, Any]:
    """Write the model in `folder` to `out_dir` with the tokens that `texts`, the prompts and any byte need, and prove it.

    `held_out` names texts that were not counted: the coverage report says what share of them is tokenised as before. Works on plain
    and on 4-bit models. Raises ModelError when the folder holds no usable model, VocabError when the tokenizer is no byte-level BPE,
    the head or the embeddings are quantised, or `max_tokens` is too few; ProofError when the result is not what it should be.
    """
    model_dir = folder.path
    check_folder(model_dir, "trimmed")
    given = _read(model_dir, task)
    processor, bpe, config, generation = given.processor, given.bpe, given.config, given.generation
    rows = find_rows(model_dir, given.tied)
    counts, sample = count_tokens(processor, texts)
    kept = choose(
        bpe,
        counts,
        given.required,
        min_count=settings.min_count,
        max_tokens=settings.max_tokens,
        multiple=settings.pad_to_multiple,
    )
    removed = write_rows(model_dir, out_dir, rows, kept.ids, given.tied)
    _write_configs(config, generation, kept, out_dir)
    _write_tokenizer(given, kept, out_dir)
    folder.lineage.after("trim-vocab").save(out_dir)
    trimmed = prove(model_dir, out_dir, rows, given, kept)
    finish_saved(out_dir)
    if prompt_ids(trimmed, task) != [_renumber(ids, kept) for ids in given.prompts]:
        raise ProofError("a prompt is tokenised in another way after trimming")
    texts_by_name = {f"counted ({len(sample)} sentences)": sample, **held_out}
    return {
        "rows": {"before": rows[0].shape[0], "after": len(kept.ids)},
        "tokens": {**kept.numbers(), "special": len(bpe.added)},
        **removed,
        "counted": _counted_share(counts, kept),
        "coverage": {name: coverage(processor, trimmed, kept, lines, name) for name, lines in texts_by_name.items()},
    }


@dataclass(frozen=True)
class _Given:
    """What the folder says of the model to be trimmed, its weights left out."""

    processor: Any
    file: TokenizerFile
    tokenizer: Mapping[str, Any]  # what is in this file
    bpe: Bpe
    config: Any
    generation: dict[str, Any]
    tied: bool  # one tensor is embedding and output head
    prompts: list[list[int]]
    required: set[int]  # ids in the prompts and in the configurations


def _read(model_dir: Path, task: TaskSettings) -> _Given:
    """VocabError when the tokenizer is no byte-level BPE."""
    processor = load_processor(model_dir)
    file = tokenizer_file(processor, model_dir)
    tokenizer = file.read(processor, model_dir)
    bpe = file.bpe(tokenizer)
    config, generation = AutoConfig.from_pretrained(model_dir), _read_json(model_dir / "generation_config.json")
    prompts = prompt_ids(processor, task)
    named = _token_ids([_attributes(part) for part in _configs(config)], generation)
    return _Given(
        processor,
        file,
        tokenizer,
        bpe,
        config,
        generation,
        tied=any(getattr(part, "tie_word_embeddings", False) for part in (config, config.text_config)),
        prompts=prompts,
        required={*bpe.ids.values()}.intersection(named).union(*prompts),
    )


def vocab_problems(model_dir: Path, task: TaskSettings, settings: VocabSettings, weights: bool) -> Iterator[str]:
    """Why the model in a folder cannot be trimmed, before any text is counted; `weights` says whether its own weights are there."""
    try:
        given = _read(model_dir, task)
        choose(given.bpe, {}, given.required, max_tokens=settings.max_tokens, multiple=settings.pad_to_multiple)
        if weights:
            find_rows(model_dir, given.tied)
    except VocabError as error:
        yield str(error)


def prompt_ids(processor: Any, task: TaskSettings) -> list[list[int]]:
    """Token ids of the prompt, the audio left out, for each target language."""
    prompter = Prompter(processor, task)
    return [[*chain.from_iterable(prompter.parts(language))] for language in task.target_languages]


# ---- texts


def counted_texts(
    splits: DataSplits | None, languages: Sequence[str], settings: VocabSettings
) -> tuple[Iterator[str], dict[str, Iterable[str]]]:
    """What is counted (training references and text files) and what is held out (references of the selection split, files)."""

    def references(*names: str) -> Iterator[str]:
        for split in (getattr(splits, name) for name in names) if splits else ():
            for clip in split.clips if split else ():
                yield from (clip.references[language] for language in languages if language in clip.references)

    held_out: dict[str, Iterable[str]] = {path: read_lines(Path(path)) for path in settings.held_out}
    if splits:
        held_out = {"select": references("select"), **held_out}
    return chain(references("train", "out_of_domain"), *(read_lines(Path(path)) for path in settings.texts)), held_out


def read_lines(path: Path) -> Iterator[str]:
    """Sentences of a UTF-8 text file, one a line; DataError when it cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from (line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"text file {path} cannot be read ({error}); vocab.texts and vocab.held_out name UTF-8 files, one sentence a line"
        ) from error


def count_tokens(processor: Any, texts: Iterable[str]) -> tuple[Counter[int], list[str]]:
    """How often each token id stands in `texts`, and some of them, drawn from all alike. VocabError when there is no text.

    Languages take turns in the references and files follow them, so that neither the first texts nor every n-th would stand for all.
    """
    counts: Counter[int] = Counter()
    sample: list[str] = []
    num_texts, draw = 0, Random(0)
    for batch in _batches(texts):
        for text in batch:
            num_texts += 1
            if len(sample) < NUM_CHECKED:
                sample.append(text)
            elif (place := draw.randrange(num_texts)) < NUM_CHECKED:
                sample[place] = text
        counts.update(chain.from_iterable(_encode(processor, batch)))
    if not counts:
        raise VocabError("there is no text to count tokens on; name some under vocab.texts, one sentence a line")
    return counts, sample


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def _encode(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids as the model learns and gives them: what spells a special token is text."""
    spelled_out = family_of_processor(processor).spelled_out
    return processor.tokenizer(list(texts), add_special_tokens=False, **spelled_out)["input_ids"]


def _counted_share(counts: Counter[int], kept: Kept) -> dict[str, Any]:
    staying = kept.new_id
    used = sum(num for old, num in counts.items() if old in staying)
    return {"tokens": counts.total(), "different": len(counts), "share_tokens_kept": used / counts.total()}


def coverage(full: Any, trimmed: Any, kept: Kept, texts: Iterable[str], name: str) -> dict[str, Any]:
    """What going from the processor `full` to `trimmed` does to `texts`: sentences tokenised as before, tokens that are kept, and how
    many more tokens the rest takes.

    Raises ProofError when a sentence whose tokens are all kept is tokenised in another way, or any sentence decodes to another text.
    """
    found = Counter[str]()
    staying = kept.new_id
    for batch in _batches(texts):
        for text, before, after in zip(batch, _encode(full, batch), _encode(trimmed, batch)):
            unchanged = all(old in staying for old in before)
            if unchanged and [staying[old] for old in before] != after:
                raise ProofError(f"all tokens of {text!r} ({name}) are kept, but it is tokenised in another way")
            if full.tokenizer.decode(before) != trimmed.tokenizer.decode(after):
                raise ProofError(f"{text!r} ({name}) decodes to another text after trimming")
            found["sentences"] += 1
            found["sentences_unchanged"] += unchanged
            found["tokens"] += len(before)
            found["tokens_kept"] += sum(old in staying for old in before)
            found["extra_tokens"] += len(after) - len(before)
    return {
        **found,
        "share_sentences_unchanged": found["sentences_unchanged"] / max(1, found["sentences"]),
        "share_tokens_kept": found["tokens_kept"] / max(1, found["tokens"]),
    }


# ---- weights


def find_rows(folder: Path, tied: bool) -> list[RowTensor]:
    """The stored tensors with one row a token, the embedding first. VocabError when one is quantised or missing."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                if name.removesuffix("_packed").endswith(ROWS_BY_TOKEN):
                    stored = file.get_slice(name)
                    module = name.removesuffix("_packed").removesuffix("weight")
                    quantised = [other for other in names if other.startswith(module) and other != name]
                    if stored.get_dtype() not in FLOATS or quantised:
                        raise VocabError(
                            f"{name} in {folder} is quantised, so its rows cannot be taken out. Trim before quantising "
                            "(vocab.when: before), or keep it out of quantize.parts"
                        )
                    found.append(RowTensor(path.name, name, tuple(stored.get_shape())))
    found.sort(key=lambda row: [row.name.endswith(ending) for ending in ROWS_BY_TOKEN], reverse=True)
    if len(found) < (1 if tied else 2) or len({row.shape for row in found}) != 1:
        listed = ", ".join(f"{row.name} {row.shape}" for row in found) or "none"
        raise VocabError(
            f"{folder} must hold an embedding and an output head of the same shape ({' and '.join(ROWS_BY_TOKEN)}); it has: {listed}"
        )
    return found


def write_rows(
    model_dir: Path, out_dir: Path, rows: Sequence[RowTensor], ids: Sequence[int], tied: bool
) -> dict[str, int]:
    """Copy the weight files, of the `rows` tensors (V, D) only `ids`: (K, D). Returns parameters (tied: once) and bytes that went."""
    num_rows, width = rows[0].shape
    chosen = torch.tensor(list(ids))
    num_bytes = 0
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in sorted(model_dir.glob("*.safetensors")):
        names = {row.name for row in rows if row.file == path.name}
        if not names:
            shutil.copyfile(path, out_dir / path.name)
            continue
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            for name in names:
                full = tensors[name]
                tensors[name] = full.index_select(0, chosen)
                num_bytes += full.nbytes - tensors[name].nbytes
            save_file(tensors, out_dir / path.name, metadata=file.metadata())
    removed = {
        "parameters_removed": (num_rows - len(ids)) * width * (1 if tied else len(rows)),
        "bytes_removed": num_bytes,
    }
    index = _read_json(model_dir / "model.safetensors.index.json")
    if index:
        for key, gone in zip(("total_parameters", "total_size"), removed.values()):
            if key in index.get("metadata", {}):
                index["metadata"][key] -= gone
        write_json(out_dir / "model.safetensors.index.json", index)
    return removed


# ---- configurations and tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _configs(config: Any) -> list[Any]:
    """A configuration and those inside it."""
    return [config, *(getattr(config, name) for name in config.sub_configs)]


def _attributes(config: Any) -> dict[str, Any]:
    """The values of a configuration that are token ids; defaults too, which the file leaves out."""
    return {key: value for key, value in vars(config).items() if TOKEN_ID_KEY.search(key)}


def _token_ids(*values: Any) -> Iterator[int]:
    """Every token id in nested configuration values."""
    for value in values:
        if isinstance(value, Mapping):
            yield from chain.from_iterable(_token_ids(value[key]) for key in value if TOKEN_ID_KEY.search(key))
        elif isinstance(value, (list, tuple)):
            yield from _token_ids(*value)
        elif isinstance(value, int):
            yield value


def _renumber(value: Any, kept: Kept) -> Any:
    """New ids for old ones, in lists too. An id that names no token (a library's default for a larger model) becomes None."""
    if isinstance(value, (list, tuple)):
        return [new for old in value if (new := _renumber(old, kept)) is not None] or None
    return kept.new_id.get(value)


def _write_configs(config: Any, generation: Mapping[str, Any], kept: Kept, out_dir: Path) -> None:
    """config.json and generation_config.json with K rows and new ids."""
    for part in _configs(config):
        for key, value in _attributes(part).items():
            setattr(part, key, _renumber(value, kept))
    if audio_token_id(config) is None:
        raise VocabError(
            "the configuration's audio token is not in the tokenizer: model and processor do not belong together"
        )
    config.text_config.vocab_size = len(kept.ids)
    config.save_pretrained(out_dir)
    if generation:
        new = {key: _renumber(value, kept) if TOKEN_ID_KEY.search(key) else value for key, value in generation.items()}
        write_json(out_dir / "generation_config.json", new)


def _write_tokenizer(given: _Given, kept: Kept, out_dir: Path) -> None:
    """The processor's files, with the trimmed tokenizer in place of the one it writes."""
    given.processor.save_pretrained(out_dir)
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):  # older forms of the same; they would contradict it
        (out_dir / name).unlink(missing_ok=True)
    trimmed = given.file.trimmed(given.tokenizer, kept.ids)
    write_text(out_dir / given.file.name, json.dumps(trimmed, ensure_ascii=False) + "\n")
    settings = _read_json(out_dir / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        old = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {str(kept.new_id[int(number)]): token for number, token in old.items()}
        write_json(out_dir / "tokenizer_config.json", settings)


# ---- proof


def prove(model_dir: Path, out_dir: Path, rows: Sequence[RowTensor], given: _Given, kept: Kept) -> Any:
    """ProofError unless the saved rows equal the original's and the tokenizer, loaded plainly, has the ids it should.

    Returns the saved processor.
    """
    chosen = torch.tensor(kept.ids)
    for row in rows:
        with (
            safe_open(model_dir / row.file, framework="pt") as old,
            safe_open(out_dir / row.file, framework="pt") as new,
        ):
            if not torch.equal(old.get_tensor(row.name).index_select(0, chosen), new.get_tensor(row.name)):
                raise ProofError(f"the rows of {row.name} changed while trimming")
    new_ids = {token: kept.new_id[old] for token, old in given.bpe.ids.items() if old in kept.new_id}
    processor = load_processor(out_dir)
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(out_dir)):
        if (found := given.file.ids(tokenizer)) != new_ids:
            wrong = [token for token, new in found.items() if new_ids.get(token) != new]
            raise ProofError(
                f"the trimmed tokenizer gives {len(wrong)} token(s) other ids than their rows: {wrong[:5]}"
            )
    return processor
