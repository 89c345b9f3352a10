"""Run as a script in a fresh process: what a folder translates with plain transformers. It must not import this package.

Reads a JSON request on standard input, writes the answer as the last line of standard output.
"""

import base64
import io
import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers

SAMPLE_RATE = 16_000


def margin(model, processor, inputs, ids, recorded):
    """By how much this model prefers its own next token to the recorded one where the two answers part, as a difference of logits.

    `ids` are its own new tokens, `recorded` is a text. Infinite where one answer merely ends before the other.
    """
    tokenizer = processor.tokenizer
    theirs = [*tokenizer(recorded, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    parted = next((i for i, pair in enumerate(zip(ids, theirs)) if pair[0] != pair[1]), None)
    if parted is None:
        return float("inf")
    prompt = inputs["input_ids"]
    forced = torch.cat([prompt, torch.tensor([ids[:parted]], dtype=prompt.dtype, device=prompt.device)], dim=1)
    logits = model(**{**inputs, "input_ids": forced, "attention_mask": torch.ones_like(forced)}).logits[0, -1].float()
    return float(logits[ids[parted]] - logits[theirs[parted]])


def main() -> None:
    """Load the folder, translate the samples with `generate()`, one at a time."""
    sys.modules["kernels"] = None  # type: ignore[assignment]  # bitsandbytes would have it download code and run that
    request = json.load(sys.stdin)
    folder = request["folder"]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model, loading = getattr(transformers, request["model_class"]).from_pretrained(
        folder,
        dtype=getattr(torch, request["dtype"]),
        device_map={"": request["device"]},
        use_safetensors=True,
        output_loading_info=True,
    )
    model.eval()
    keys = {
        kind: sorted(map(str, loading.get(kind) or ()))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    said, margins, seconds = [], [], []
    for item in request["items"]:
        inputs = model_inputs(processor, item["conversation"], np.load(item["samples"]), request["chat_reads_audio"])
        inputs = inputs.to(model.device)
        inputs["input_features"] = inputs["input_features"].to(model.dtype)
        with torch.inference_mode():
            started = time.perf_counter()
            ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            said.append(processor.decode(ids, skip_special_tokens=True).strip())
            seconds.append(time.perf_counter() - started)
            recorded = item.get("recorded", said[-1])
            margins.append(0.0 if recorded == said[-1] else margin(model, processor, inputs, ids.tolist(), recorded))
    assert not any(name.partition(".")[0] == "trimlingual" for name in sys.modules)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    answer = {"versions": versions, "keys": keys, "said": said, "margins": margins, "peak_bytes": peak}
    print(json.dumps(answer | {"seconds_per_clip": sum(seconds) / len(seconds) if seconds else None}))


def model_inputs(
    processor: Any, conversation: list[dict[str, Any]], samples: np.ndarray, chat_reads_audio: bool
) -> Any:
    """What the processor makes of one chat about one clip, samples (S,) at 16 kHz: the arguments of the model's own forward.

    With `chat_reads_audio` the chat template takes the clip from the conversation, else the processor is given it beside the text.
    """
    if not chat_reads_audio:
        text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return processor(text=text, audio=[samples], sampling_rate=SAMPLE_RATE, return_tensors="pt")
    import soundfile  # not every environment has it, and only a chat that takes the clip itself needs it

    wav = io.BytesIO()
    soundfile.write(wav, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    encoded = base64.b64encode(wav.getvalue()).decode("ascii")
    for piece in conversation[-1]["content"]:
        if piece["type"] == "audio":
            piece["base64"] = encoded
    return processor.apply_chat_template(conversation)


if __name__ == "__main__":
    main()
