"""Run as a script in a fresh process: what a folder translates with vLLM. It must not import this package.

Reads a JSON request on standard input, writes the answer as the last line of standard output.
"""

import json
import os
import resource
import sys
import time

import numpy as np
import psutil
import transformers
import vllm
import vllm.platforms

SAMPLE_RATE = 16_000
SHARE = 0.7  # of the memory that is free


def main() -> None:
    """Load the folder, translate the samples one at a time."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM's processes write there
    request = json.load(sys.stdin)
    processor = transformers.AutoProcessor.from_pretrained(request["folder"])
    sampling = vllm.SamplingParams(temperature=0, max_tokens=request["max_new_tokens"])
    memory = psutil.virtual_memory()
    on_cpu = vllm.platforms.current_platform.is_cpu()  # where vLLM would take 92 % of all memory there is
    model = vllm.LLM(
        request["folder"],
        dtype=request["dtype"],
        max_model_len=request["context"],
        max_num_seqs=1,
        enforce_eager=True,
        **({"gpu_memory_utilization": SHARE * memory.available / memory.total} if on_cpu else {}),
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
    mean = sum(seconds) / len(seconds) if seconds else None
    print(json.dumps(answer | {"peak_bytes": peak, "seconds_per_clip": mean}), file=answers, flush=True)


if __name__ == "__main__":
    main()
