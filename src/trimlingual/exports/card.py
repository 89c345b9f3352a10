"""The Hub's model card of what ships: metadata that the Hub reads, and what a person must know before use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from trimlingual.evaluation.results import read_result
from trimlingual.exports.shipped import read_shipped
from trimlingual.exports.target import Finished, Outcome
from trimlingual.exports.vllm import dtype_of
from trimlingual.models.errors import ModelError
from trimlingual.models.family import Family, family_of_processor
from trimlingual.models.loading import BUILTIN, is_on_hub, load_processor, resolve_base
from trimlingual.recipe import HubSource, Recipe, Runtime, Source
from trimlingual.report.tables import METRIC_NAMES, outcome_row, outcome_text
from trimlingual.run.version import version

LICENSE = ("license", "license_name", "license_link")
OWN_LICENSE = {"license": "apache-2.0"}  # of the built-in model: this package's


def model_card(finished: Finished, runtime: Runtime, outcomes: Sequence[Outcome]) -> str:
    """The whole card: metadata, results, how it was made, how it is used, limits."""
    recipe, lineage, processor = finished.recipe, finished.model.lineage, load_processor(finished.model.path)
    family = family_of_processor(processor)
    result = read_result(finished.evaluation_dir) if finished.evaluation_dir else None
    base_license = license_of(lineage.base, family)
    shipped = read_shipped(finished.model.path)
    prompt = recipe.task.prompt_for(recipe.task.target_languages[0])
    environment = Environment(
        loader=PackageLoader("trimlingual", "report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("model_card.md.j2").render(
        recipe=recipe,
        runtime=runtime,
        lineage=lineage,
        family=family,
        text_only=bool(recipe.export and recipe.export.gguf.text_only),
        context=finished.context,
        vllm_dtype=dtype_of(finished),
        num_filled_up=processor.feature_extractor.n_samples if family.hears_padding(processor) else None,
        window_s=family.window_s(processor),
        clip_s=shipped.clip_s if shipped else None,
        result=result,
        size=outcomes[0].disk_bytes,
        outcomes=[(outcome_row(asdict(outcome)), outcome_text(asdict(outcome))) for outcome in outcomes],
        removed=lineage.removed("decoder"),
        version=version(),
        packages=_packages(family, lineage.quantization),
        messages=messages_for_curl(family.conversation(recipe.task.system_prompt, prompt)),
        conversation=json.dumps(family.conversation(recipe.task.system_prompt, prompt), ensure_ascii=False),
        languages=[recipe.task.language_name(code) for code in recipe.task.target_languages],
        base=lineage.to_ship().base.removeprefix(BUILTIN),
        is_random=finished.is_random,
        on_hub=is_on_hub(lineage.base),
        license=base_license,
        datasets=datasets(recipe),
    )
    return f"---\n{metadata(finished, runtime, result, base_license).to_yaml()}\n---\n\n{text}"


def _packages(family: Family, quantization: Mapping[str, Any] | None) -> list[str]:
    """What the Python code on the card needs beside torch and transformers, as pip names it."""
    return ["accelerate", "soundfile", *family.packages, *([quantization["method"]] if quantization else [])]


def messages_for_curl(conversation: Sequence[Mapping[str, Any]]) -> str:
    """A chat about `clip.wav` as JSON inside a shell's `<<END`, where $, ` and backslashes must not be read by the shell."""
    sound = {"type": "input_audio", "input_audio": {"format": "wav", "data": "CLIP"}}
    lines = []
    for message in conversation:
        content = message["content"]
        if not isinstance(content, str):
            content = [sound if piece["type"] == "audio" else piece for piece in content]
        line = re.sub(r"[\\$`]", r"\\\g<0>", json.dumps({**message, "content": content}, ensure_ascii=False))
        lines.append(line.replace('"data": "CLIP"', '"data": "$(base64 -w0 clip.wav)"'))
    return "[\n  " + ",\n  ".join(lines) + "]"


def metadata(
    finished: Finished, runtime: Runtime, result: Mapping[str, Any] | None, base_license: Mapping[str, str]
) -> ModelCardData:
    """What the Hub reads. What is not known is left out: a base that is not on the Hub, a license that nothing names."""
    recipe, lineage = finished.recipe, finished.model.lineage
    known: dict[str, Any] = dict(base_license)
    if is_on_hub(lineage.base):
        known["base_model"] = lineage.base
        known["base_model_relation"] = "quantized" if lineage.quantization or runtime == "gguf" else "finetune"
    if found := datasets(recipe):
        known["datasets"] = found
    results = list(_results(recipe, result)) if result and not finished.is_random else []
    if results:
        known |= {"eval_results": results, "metrics": sorted({each.metric_type for each in results})}
    return ModelCardData(
        model_name=recipe.name,
        library_name="gguf" if runtime == "gguf" else "transformers",
        pipeline_tag="audio-text-to-text",
        language=list(dict.fromkeys(["en", *recipe.task.target_languages])),
        tags=["speech-translation", "model-compression", "trimlingual"],
        **known,
    )


def license_of(base: str, family: Family) -> dict[str, str]:
    """License metadata of a base model: as its own card has it where that is on this machine, else as its family's file knows it.

    Empty where neither does.
    """
    if base.startswith(BUILTIN):
        return OWN_LICENSE
    try:
        path = resolve_base(base, download=False, weights=False) / "README.md"
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ModelError, OSError, ValueError, yaml.YAMLError):
        data = {}
    found = {key: str(data[key]) for key in LICENSE if data.get(key)}
    return found or dict(family.licenses.get(base, {}))


def datasets(recipe: Recipe) -> list[str]:
    """Hub ids of the recipe's data, each once."""
    data = recipe.data
    return list(
        dict.fromkeys(
            name for source in (data.train, data.select, data.test, data.out_of_domain) if (name := _hub_id(source))
        )
    )


def _hub_id(source: Source | int | None) -> str | None:
    """The set's name on the Hub, of a source that is one."""
    return source.path if isinstance(source, HubSource) and is_on_hub(source.path) else None


def _results(recipe: Recipe, result: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The model-index: every score of every language on the test split, with the signature it was computed with."""
    source = recipe.data.train if isinstance(recipe.data.test, int) else recipe.data.test
    name, split = _hub_id(source), result["split"]
    for code, scores in result["languages"].items():
        values = {(metric, None): scores[metric]["value"] for metric in METRIC_NAMES}
        values |= {("comet", model): value for model, value in scores.get("comet", {}).items()}
        for (metric, model), value in values.items():
            signature = scores[metric]["signature"] if model is None else model
            yield EvalResult(
                task_type="translation",
                task_name=f"Speech translation, en to {code}",
                dataset_type=name or "custom",
                dataset_name=f"{name or recipe.name}, {split['num_clips']} held-out clips",
                dataset_config=f"en-{code}",
                dataset_split=split["name"],
                dataset_args={"sha256_prefix": split["hash"], "num_clips": split["num_clips"]},
                metric_type="chrf" if metric == "chrfpp" else metric,
                metric_name=METRIC_NAMES.get(metric, "COMET"),
                metric_value=round(value, 4),
                metric_args={"signature": signature},
            )
