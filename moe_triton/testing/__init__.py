"""For tests and benchmarks: worlds of threads or processes, and inputs with known skew."""

from __future__ import annotations

from .inputs import routing_hot, routing_uniform, routing_zipf, tokens, weights
from .pool import close_pool, pool_pids
from .processes import Processes, start_processes
from .run import lockstep, run_local, run_processes
from .world import RankContext, WorkerDiedError

__all__ = [
    "Processes",
    "RankContext",
    "WorkerDiedError",
    "close_pool",
    "lockstep",
    "pool_pids",
    "routing_hot",
    "routing_uniform",
    "routing_zipf",
    "run_local",
    "run_processes",
    "start_processes",
    "tokens",
    "weights",
]
