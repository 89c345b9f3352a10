"""Run as a script in a fresh process: what a folder translates with plain transformers. It must not import this package.

Reads a JSON request on standard input, writes the answer as the last line of standard output.
"""

import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration


def main() -> None:
    """Load the folder, translate the samples with `generate()`, one at a time."""
    request = json.load(sys.stdin)
    folder = request["folder"]
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model, loading = Qwen2AudioForConditionalGeneration.from_pretrained(
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
    said = []
    for item in request["items"]:
        conversation = [
            {"role": "system", "content": request["system_prompt"]},
            {
                "role": "user",
                "content": [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": item["prompt"]}],
            },
        ]
        text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, audio=[np.load(item["samples"])], sampling_rate=16000, return_tensors="pt").to(
            model.device
        )
        inputs["input_features"] = inputs["input_features"].to(model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
    assert not any(name.partition(".")[0] == "trimlingual" for name in sys.modules)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "keys": keys, "said": said}))


if __name__ == "__main__":
    main()
