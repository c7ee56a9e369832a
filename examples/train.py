"""A model with experts on every rank, trained under DistributedDataParallel, saved and resumed.

    torchrun --nproc-per-node 2 examples/train.py

DDP averages the gradients of what is replicated. The experts declare with ``local_experts`` that
they differ between ranks: DDP leaves them alone, and their gradients, sums over all tokens, are
divided by the number of ranks. After 20 steps each rank saves its state, trains 20 more, and does
the same 20 again from the checkpoint. Prints

    loss of the last steps below the first: True
    experts differ between ranks, the router does not: True
    resumed at step 20, same parameters after step 40: True
"""

import gc
import itertools
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moe_triton
from moe_triton.training import ignore_experts

EXPERTS, TOP_K, HIDDEN, TOKENS = 4, 2, 16, 32


class Experts(nn.Module):
    """The experts of this rank."""

    local_experts = True

    def __init__(self, count):
        super().__init__()
        self.w = nn.Parameter(torch.randn(count, HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(self, rows, offsets):
        bounds = itertools.pairwise([0, *offsets.tolist()])
        parts = [rows[start:end] for start, end in bounds]
        return torch.cat([(x @ w).tanh() for x, w in zip(parts, self.w, strict=True)])


class Layer(nn.Module):
    """A router, replicated, and experts."""

    def __init__(self, ep):
        super().__init__()
        self.ep = ep
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Experts(ep.num_local_experts)

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        recv = self.ep.dispatch(x, ids, weights)
        return self.ep.combine(self.experts(recv.x, recv.offsets), recv.handle)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        random = torch.Generator().manual_seed(1000 * dist.get_rank() + step)
        x = torch.randn(TOKENS, HIDDEN, generator=random)
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def prepare(ep):
    torch.manual_seed(dist.get_rank())
    model = Layer(ep)
    for parameter in ignore_experts(model):
        parameter.register_hook(lambda gradient: gradient / dist.get_world_size())
    model = DistributedDataParallel(model)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def on_all_ranks(condition):
    votes = torch.tensor(int(condition))
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def of_all_ranks(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.detach().contiguous())
    return gathered


def train_save_resume(checkpoint):
    results = {}
    with moe_triton.ExpertParallel(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        max_tokens=TOKENS,
        dtype=torch.float32,
        exact=True,
    ) as ep:
        model, optimizer = prepare(ep)
        losses = train(model, optimizer, range(20))
        state = {"step": 20, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, checkpoint)
        losses += train(model, optimizer, range(20, 40))
        results["loss of the last steps below the first"] = sum(losses[-5:]) < sum(losses[:5])
        first, second = of_all_ranks(model.module.experts.w)[:2]
        routers = of_all_ranks(model.module.router.weight)
        results["experts differ between ranks, the router does not"] = not torch.equal(
            first, second
        ) and torch.equal(*routers[:2])

        resumed, optimizer = prepare(ep)
        state = torch.load(checkpoint)
        resumed.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        train(resumed, optimizer, range(state["step"], 40))
        same = zip(model.parameters(), resumed.parameters(), strict=True)
        results[f"resumed at step {state['step']}, same parameters after step 40"] = all(
            torch.equal(one, other) for one, other in same
        )
    return results


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    checkpoint = Path(folder[0]) / f"rank-{rank}.pt"
    results = train_save_resume(checkpoint)
    checkpoint.unlink()
    for text, condition in results.items():
        everywhere = on_all_ranks(condition)
        if rank == 0:
            print(f"{text}: {everywhere}")
    if rank == 0:
        Path(folder[0]).rmdir()
    # With torch 2.13, DistributedDataParallel left to the end of a process aborts it now and then.
    gc.collect()
    dist.destroy_process_group()
    gc.collect()


if __name__ == "__main__":
    main()
