"""Text from a tiny random Qwen3-MoE whose experts are spread over 4 processes.

    pip install ".[transformers]"
    torchrun --nproc-per-node 4 examples/transformers_generate.py
    torchrun --nproc-per-node 4 examples/transformers_generate.py --quant int8

Each process holds a quarter of the experts and continues a prompt of its own, then again with the
unmodified model, which holds all experts. Nothing is downloaded: the weights are random, the same
in every run, and the vocabulary has 64 words. The first command prints

    rank 0 of 4, 4 of 16 experts
        every token goes to | it few few last few few row row row it
        10 of 10 words equal the unmodified model's; logits within 0.0001 standard deviations
    rank 1 of 4, 4 of 16 experts
        some bytes come in light | few few many many from from window from many from
        10 of 10 words equal the unmodified model's; logits within 0.0001 standard deviations
    rank 2 of 4, 4 of 16 experts
        wait for the | bytes out for few out sum sum sum sum sum
        10 of 10 words equal the unmodified model's; logits within 0.0001 standard deviations
    rank 3 of 4, 4 of 16 experts
        each rank and its own row | a every every last last to to to to to
        10 of 10 words equal the unmodified model's; logits within 0.0001 standard deviations

and the second, which sends tokens as int8,

    rank 0 of 4, 4 of 16 experts
        every token goes to | it few few last few few row row row it
        10 of 10 words equal the unmodified model's; logits within 0.02 standard deviations
    rank 1 of 4, 4 of 16 experts
        some bytes come in light | few few many many from from window right from many
        7 of 10 words equal the unmodified model's; logits within 0.02 standard deviations
    rank 2 of 4, 4 of 16 experts
        wait for the | bytes out for few out sum sum sum sum sum
        10 of 10 words equal the unmodified model's; logits within 0.03 standard deviations
    rank 3 of 4, 4 of 16 experts
        each rank and its own row | a every every last last to to to to to
        10 of 10 words equal the unmodified model's; logits within 0.03 standard deviations
"""

import argparse
import math
import shutil
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from moe_triton.integrations import transformers as integration

VOCABULARY = """
a all and bytes come copy each east every expert few first five flag for four from gate goes
half heavy here home in it its last layer left light long many near next of on one order out own
paths rank ready right road row short six some sum ten that the then there they to token two
wait west window with word
"""
WORDS = VOCABULARY.split()
PROMPTS = (
    "every token goes to",
    "some bytes come in light",
    "wait for the",
    "each rank and its own row",
)
NEW_WORDS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quant", choices=["int8"], help="format of sent tokens")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    paths = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(paths)
    if rank == 0:
        write_checkpoint(paths[0])
    dist.barrier()

    # The two added lines: register a name with transformers, and use it in the configuration.
    integration.register("moe_triton", quant=arguments.quant)
    config = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="moe_triton")
    spread = AutoModelForCausalLM.from_pretrained(paths[0], distributed_config=config)
    whole = AutoModelForCausalLM.from_pretrained(paths[0])
    dist.barrier()
    if rank == 0:
        shutil.rmtree(paths[0])

    prompt = PROMPTS[rank % len(PROMPTS)]
    words, logits = generate(spread, prompt)
    expected_words, expected_logits = generate(whole, prompt)
    equal = sum(word == expected for word, expected in zip(words, expected_words, strict=True))
    error = (logits - expected_logits).abs().max() / expected_logits.std()
    within = 0.0001 if error <= 0.0001 else math.ceil(error * 100) / 100
    report(
        f"rank {rank} of {ranks}, {spread.model.layers[0].mlp.experts.num_experts} of "
        f"{whole.config.num_experts} experts",
        f"    {prompt} | {' '.join(words)}",
        f"    {equal} of {NEW_WORDS} words equal the unmodified model's; logits within "
        f"{within} standard deviations",
    )
    integration.close_exchanges()
    dist.destroy_process_group()


def write_checkpoint(path):
    """Write a Qwen3-MoE with 16 experts, with random weights that make logits distinct."""
    config = Qwen3MoeConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                std = 0.2 if "embed" in name else weight.shape[-1] ** -0.5
                weight.normal_(std=std, generator=generator)
    model.save_pretrained(path)


@torch.no_grad()
def generate(model, prompt):
    """Generate words; returns them and the logits of the prompt."""
    ids = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
    # All ranks must run the layers equally often, so each generates the same number of words.
    tokens = model.generate(
        ids, do_sample=False, min_new_tokens=NEW_WORDS, max_new_tokens=NEW_WORDS
    )
    return [WORDS[token] for token in tokens[0, ids.shape[1] :]], model(ids).logits


def report(*lines):
    """Print every rank's lines in rank order."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, lines)
    if dist.get_rank() == 0:
        for rank_lines in gathered:
            print(*rank_lines, sep="\n")


if __name__ == "__main__":
    main()
