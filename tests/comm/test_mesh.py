"""Connections that the calling thread serves: order, sizes, and ends; ranks are threads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_triton.comm.mesh import Incoming, Mesh

WORLD = 3
LIMIT = 20.0  # seconds


def on_ranks(call: Callable[[int], Any], ranks: range = range(WORLD)) -> list[Any]:
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(call, ranks))


@pytest.fixture
def meshes() -> Iterator[list[Mesh]]:
    store = dist.HashStore()
    made = on_ranks(lambda rank: Mesh(store, rank, WORLD, LIMIT))
    yield made
    for mesh in made:
        mesh.close()


def message(source: int, target: int, key: int, words: int = 4) -> np.ndarray:
    """Its key, its bytes, and what tells it from others."""
    data = np.full(words, source * 100 + target * 10 + key, dtype=np.int64)
    data[:2] = key, data.nbytes
    return data


def send(mesh: Mesh, rank: int, key: int, words: int = 4) -> Incoming:
    incoming = Incoming(torch.empty(64, dtype=torch.uint8), 16, WORLD)
    messages = [message(rank, target, key, words).view(np.uint8).data for target in range(WORLD)]
    mesh.exchange(key, messages, incoming)
    return incoming


def check(mesh: Mesh, rank: int, key: int, incoming: Incoming, words: int = 4) -> None:
    assert mesh.wait(incoming, time.monotonic() + LIMIT)
    for source in range(WORLD):
        if source != rank:
            start = incoming.starts[source]
            received = incoming.bytes[start : start + 8 * words].view(np.int64)
            assert received.tolist() == message(source, rank, key, words).tolist()


def test_messages_come_in_any_order_of_their_keys(meshes):
    """Of keys that a rank waits for last, or does not yet expect."""

    def run(rank):
        keys = [*range(1, 6)][:: -1 if rank == 1 else 1]
        if rank == 2:
            time.sleep(0.2)
        sent = {key: send(meshes[rank], rank, key) for key in keys}
        for key in sorted(keys, key=lambda key: (key * (rank + 2)) % 7):
            check(meshes[rank], rank, key, sent[key])

    on_ranks(run)


@pytest.mark.parametrize("words", [2, 8191, 8192, 8193, 3_000_000])
def test_sizes(meshes, words):
    """Also larger than sockets hold: sending waits for nobody, and a thread finishes it."""

    def run(rank):
        first, second = (send(meshes[rank], rank, key, words) for key in (1, 2))
        assert_all_sent.wait(LIMIT)
        check(meshes[rank], rank, 2, second, words)
        check(meshes[rank], rank, 1, first, words)

    assert_all_sent = threading.Barrier(WORLD)
    on_ranks(run)


def test_a_message_arrives_though_its_sender_does_something_else(meshes):
    sent = [send(meshes[rank], rank, 1, 3_000_000) for rank in range(WORLD)]
    check(meshes[0], 0, 1, sent[0], 3_000_000)
    assert sent[0].unsent
    meshes[0].close()
    for rank in (1, 2):
        check(meshes[rank], rank, 1, sent[rank], 3_000_000)


def test_two_threads_of_a_rank(meshes):
    """One of them reads for both."""
    sent = {key: [send(meshes[rank], rank, key) for rank in (0, 1)] for key in (1, 2)}
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(check, meshes[0], 0, key, sent[key][0]) for key in (1, 2)]
        time.sleep(0.1)
        for key in (2, 1):
            send(meshes[2], 2, key)
        for wait in waits:
            wait.result()


def test_a_late_message(meshes):
    incoming = send(meshes[0], 0, 1)
    assert not meshes[0].wait(incoming, time.monotonic() + 0.05)
    send(meshes[1], 1, 1)
    assert not meshes[0].wait(incoming, time.monotonic() + 0.05)
    send(meshes[2], 2, 1)
    check(meshes[0], 0, 1, incoming)


def test_a_rank_that_leaves(meshes):
    """What it has sent still counts, unread as its own mail may be."""
    first, second = (send(meshes[0], 0, key) for key in (1, 2))
    send(meshes[1], 1, 1)
    send(meshes[2], 2, 1)
    assert meshes[0].closed() == set()
    meshes[1].close()
    check(meshes[0], 0, 1, first)
    assert meshes[0].closed() == meshes[2].closed() == {1}
    with pytest.raises(ConnectionError, match="rank 1 closed"):
        meshes[0].wait(second, time.monotonic() + LIMIT)


def test_a_rank_that_does_not_come():
    store = dist.HashStore()
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(Mesh, store, rank, WORLD, 0.5) for rank in (0, 2)]
        for mesh in made:
            with pytest.raises((OSError, RuntimeError)):
                mesh.result()
    assert time.monotonic() - began < LIMIT


def test_strangers_are_turned_away(monkeypatch):
    store = dist.HashStore()
    listen = socket.create_server

    def with_stranger(address, **options):
        server = listen(address, **options)
        stranger = socket.create_connection(server.getsockname()[:2])
        stranger.sendall(bytes(20))
        strangers.append(stranger)
        return server

    strangers: list[socket.socket] = []
    monkeypatch.setattr(socket, "create_server", with_stranger)
    made = on_ranks(lambda rank: Mesh(store, rank, WORLD, LIMIT))
    monkeypatch.undo()
    on_ranks(lambda rank: check(made[rank], rank, 1, send(made[rank], rank, 1)))
    for one in (*strangers, *made):
        one.close()
