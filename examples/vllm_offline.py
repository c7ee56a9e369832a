"""vLLM on CPUs: a tiny random Qwen3-MoE whose experts are spread over 2 data-parallel ranks.

    make .venv/vllm/.ready
    .venv/vllm/bin/python examples/vllm_offline.py

The first command makes an environment with vLLM for CPUs and this package. The second generates
with one process of stock vLLM, then with two ranks that hold half of the experts each, and prints

    one process, stock: 4 sequences of 8 tokens
    rank 0 of 2: 2 sequences, equal to those of one process
    rank 1 of 2: 2 sequences, equal to those of one process

On GPUs the same switch serves: MOE_TRITON_VLLM=1 vllm serve MODEL --data-parallel-size W
--enable-expert-parallel.
"""

import multiprocessing
import os
import socket
import tempfile

PROMPTS = [[11, 5, 77, 30], [8, 90, 2], [61, 62, 63, 64, 65], [120, 7, 7, 19, 54, 3]]
RANKS = 2
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in the rank's own process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else vLLM wants a NUMA node for each rank
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main():
    os.environ.update(SETTINGS)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(path)
        outputs = context.Queue()
        run(context, [(path, outputs, 1, 0, 0, None)])
        expected = outputs.get()[1]
        print(f"one process, stock: {len(expected)} sequences of {len(expected[0])} tokens")
        os.environ["MOE_TRITON_VLLM"] = "1"
        port, barrier = free_port(), context.Barrier(RANKS)
        run(context, [(path, outputs, RANKS, rank, port, barrier) for rank in range(RANKS)])
        for rank, tokens in sorted(outputs.get() for _ in range(RANKS)):
            verdict = "equal to" if tokens == expected[rank::RANKS] else "DIFFERENT FROM"
            print(
                f"rank {rank} of {RANKS}: {len(tokens)} sequences, {verdict} those of one process"
            )


def run(context, arguments):
    processes = [context.Process(target=generate, args=one) for one in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def generate(path, outputs, ranks, rank, port, barrier):
    if ranks > 1:
        os.environ |= {
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": str(rank),
            "VLLM_DP_SIZE": str(ranks),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=path,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        distributed_executor_backend="uni",
        enable_expert_parallel=ranks > 1,
    )
    sampling = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS[rank::ranks]]
    results = llm.generate(prompts, sampling, use_tqdm=False)
    outputs.put((rank, [list(result.outputs[0].token_ids) for result in results]))
    if barrier is not None:
        barrier.wait()  # a rank that leaves early keeps the others waiting
    llm.llm_engine.engine_core.shutdown()
    outputs.close()
    outputs.join_thread()
    os._exit(0)


def write_checkpoint(path):
    """Write a Qwen3-MoE with 8 experts, with random weights that make logits distinct."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen3MoeConfig(
        vocab_size=160,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        norm_topk_prob=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                std = 0.2 if "embed" in name else weight.shape[-1] ** -0.5
                weight.normal_(std=std, generator=generator)
    model.save_pretrained(path)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
