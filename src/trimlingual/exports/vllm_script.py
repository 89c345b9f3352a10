"""Run as a script in a fresh process: what a folder translates with vLLM. It must not import this package.

Reads a JSON request on standard input, writes the answer as the last line of standard output.
"""

import json
import resource
import sys
import time

import numpy as np
import transformers
import vllm

SAMPLE_RATE = 16_000


def main() -> None:
    """Load the folder, translate the samples one at a time."""
    request = json.load(sys.stdin)
    processor = transformers.AutoProcessor.from_pretrained(request["folder"])
    sampling = vllm.SamplingParams(temperature=0, max_tokens=request["max_new_tokens"])
    model = vllm.LLM(
        request["folder"],
        dtype=request["dtype"],
        max_model_len=request["context"],
        max_num_seqs=1,
        enforce_eager=True,
        limit_mm_per_prompt={"audio": 1},
    )
    said, seconds = [], []
    for item in request["items"]:
        prompt = processor.apply_chat_template(item["conversation"], tokenize=False, add_generation_prompt=True)
        audio = {"audio": (np.load(item["samples"]), SAMPLE_RATE)}
        started = time.perf_counter()
        (answer,) = model.generate({"prompt": prompt, "multi_modal_data": audio}, sampling, use_tqdm=False)
        said.append(answer.outputs[0].text.strip())
        seconds.append(time.perf_counter() - started)
    # The engine is a process of its own; Linux counts in KiB.
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    answer = {"versions": {"vllm": vllm.__version__, "transformers": transformers.__version__}, "said": said}
    print(
        json.dumps(answer | {"peak_bytes": peak, "seconds_per_clip": sum(seconds) / len(seconds) if seconds else None})
    )


if __name__ == "__main__":
    main()
