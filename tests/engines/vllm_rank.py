"""One data-parallel rank of vLLM, which generates for every case of a job. Runs where vLLM is.

    python vllm_rank.py JOB RANK

JOB is a JSON file: "ranks", "port", "ports" for each case, "folder", and "cases", each with a
"name", "engine" arguments of ``vllm.LLM``, and for each rank "prompts" and the "tokens" to generate
for each. Results go to FOLDER/NAME.RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank = int(sys.argv[2])
    os.environ |= {
        # The engine core in this process, which halves the start-up.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM refuses several workers on one NUMA node otherwise.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": job.get("log", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    import torch.distributed as dist

    store = None
    if job["ranks"] > 1:
        store = dist.TCPStore("127.0.0.1", job["port"], job["ranks"], rank == 0)
    for number, case in enumerate(job["cases"]):
        if job["ranks"] > 1:
            os.environ |= {
                "VLLM_DP_RANK": str(rank),
                "VLLM_DP_RANK_LOCAL": str(rank),
                "VLLM_DP_SIZE": str(job["ranks"]),
                "VLLM_DP_MASTER_IP": "127.0.0.1",
                "VLLM_DP_MASTER_PORT": str(job["port"] + job["ports"] * (number + 1)),
            }
        result = generate(case, rank, lambda name=f"done {number}": meet(store, name, job["ranks"]))
        path = Path(job["folder"], f"{case['name']}.{rank}.json")
        path.write_text(json.dumps(result), encoding="utf-8")
    # vLLM's threads would keep the process for minutes.
    os._exit(0)


def meet(store, name: str, ranks: int) -> None:
    if store is not None:
        store.add(name, 1)
        limit = time.monotonic() + 300
        while store.add(name, 0) < ranks:
            assert time.monotonic() < limit, "a rank did not come"
            time.sleep(0.02)


def generate(case: dict, rank: int, everyone) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 128,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }
    start = time.perf_counter()
    llm = LLM(**(options | case["engine"]))
    loaded = time.perf_counter()
    prompts = case["prompts"][rank]
    sampling = [
        SamplingParams(
            max_tokens=tokens, temperature=0, detokenize=False, logprobs=5, ignore_eos=True
        )
        for tokens in case["tokens"][rank]
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    generated = time.perf_counter()
    results = []
    for output in outputs:
        one = output.outputs[0]
        results.append(
            {
                "tokens": list(one.token_ids),
                "logprobs": [
                    {str(token): entry.logprob for token, entry in step.items()}
                    for step in one.logprobs
                ],
            }
        )
    preemptions = 0
    if not case["engine"].get("disable_log_stats", True):
        preemptions = sum(
            metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
        )
    everyone()
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {
        "outputs": results,
        "load_s": loaded - start,
        "generate_s": generated - loaded,
        "preemptions": preemptions,
    }


if __name__ == "__main__":
    main()
