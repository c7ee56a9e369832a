"""SGLang, which generates for every case of a job. Runs where SGLang is.

    python sglang_engine.py JOB 0

JOB is a JSON file: "folder", and "cases", each with a "name", "engine" arguments of ``sgl.Engine``,
"prompts", and "tokens" to generate for each. Results go to FOLDER/NAME.0.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def generate(case: dict) -> dict:
    import sglang

    ranks = case["engine"].get("tp_size", 1)
    # One entry for each rank; cores may repeat.
    cores = os.cpu_count() or 1
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(n % cores) for n in range(ranks))
    options = {
        "device": "cpu",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "disable_radix_cache": True,
        "disable_overlap_schedule": True,
        "max_total_tokens": 2048,
        "log_level": "warning",
    }
    start = time.perf_counter()
    engine = sglang.Engine(**(options | case["engine"]))
    loaded = time.perf_counter()
    sampling = [
        {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        for tokens in case["tokens"]
    ]
    outputs = engine.generate(
        input_ids=case["prompts"], sampling_params=sampling, return_logprob=True
    )
    generated = time.perf_counter()
    engine.shutdown()
    results = [
        {
            "tokens": output["output_ids"],
            "logprobs": [
                {str(token): logprob}
                for logprob, token, _ in output["meta_info"]["output_token_logprobs"]
            ],
        }
        for output in outputs
    ]
    return {"outputs": results, "load_s": loaded - start, "generate_s": generated - loaded}


def main() -> None:
    os.environ |= {
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for case in job["cases"]:
        path = Path(job["folder"], f"{case['name']}.0.json")
        path.write_text(json.dumps(generate(case)), encoding="utf-8")


if __name__ == "__main__":  # SGLang spawns processes that import this file
    main()
