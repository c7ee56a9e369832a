"""SGLang on CPUs: a tiny random Qwen3-MoE whose experts are spread over 2 ranks.

    make .venv/sglang/.ready
    PYTHONPATH=tests/engines/sglang_aids .venv/sglang/bin/python examples/sglang_offline.py

The first command makes an environment with SGLang and this package. SGLang's kernels have no build
for CPUs on the index; PYTHONPATH adds stand-ins, which its layers in PyTorch do not call. The
second command generates with one process of stock SGLang, then with two ranks, and prints

    one process, stock: 4 sequences of 8 tokens
    2 ranks: 4 sequences, equal to those of one process

On GPUs the same switch serves: MOE_TRITON_SGLANG=1 python -m sglang.launch_server --model-path
MODEL --tp W --dp W --enable-dp-attention --moe-a2a-backend deepep.
"""

import os
import tempfile

from vllm_offline import PROMPTS, write_checkpoint

RANKS = 2
SETTINGS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",  # the cores of each rank
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
SPREAD = {
    "tp_size": RANKS,
    "dp_size": RANKS,
    "ep_size": RANKS,
    "enable_dp_attention": True,
    "moe_a2a_backend": "deepep",
}


def main():
    os.environ.update(SETTINGS)
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(path)
        expected = generate(path)
        print(f"one process, stock: {len(expected)} sequences of {len(expected[0])} tokens")
        os.environ["MOE_TRITON_SGLANG"] = "1"
        tokens = generate(path, **SPREAD)
        verdict = "equal to" if tokens == expected else "DIFFERENT FROM"
        print(f"{RANKS} ranks: {len(tokens)} sequences, {verdict} those of one process")


def generate(path, **options):
    import sglang

    engine = sglang.Engine(
        model_path=path,
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        attention_backend="torch_native",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        max_total_tokens=1024,
        log_level="error",
        **options,
    )
    sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    outputs = engine.generate(input_ids=PROMPTS, sampling_params=sampling)
    engine.shutdown()
    return [output["output_ids"] for output in outputs]


if __name__ == "__main__":  # SGLang spawns processes that import this file
    main()
