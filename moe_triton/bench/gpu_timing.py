"""Timing on a GPU by device events, the copy used as baseline, and clocks and power.

A call is timed over several sets of inputs and outputs, together larger than the L2 cache if the
work is large enough, and after other memory has flushed that cache. "Eager" is one call between two
events, including host time that the device waits for. "Graph" is a captured graph with one call per
set, divided by their number.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

MOST_SETS = 32
SECONDS = 0.1  # of measuring, per method
FEWEST, MOST = 10, 200  # samples
MOST_BYTES = 2**34  # of all sets
OTHER_BYTES = 2**29  # read before each call to flush the cache, at least


@dataclasses.dataclass(frozen=True)
class Time:
    """Microseconds of a call.

    Attributes:
        median: over the samples.
        spread: from the first to the third quartile.
        samples: their number.
    """

    median: float
    spread: float
    samples: int

    @classmethod
    def of(cls, microseconds: Sequence[float]) -> Time:
        """Of the samples."""
        quartiles = statistics.quantiles(microseconds, n=4)
        return cls(statistics.median(microseconds), quartiles[2] - quartiles[0], len(microseconds))


class Timer:
    """Times calls on the current CUDA or ROCm device; ``cuda`` is ``torch.cuda``, or a test's."""

    def __init__(
        self, device: torch.device, cuda: Any = torch.cuda, seconds: float = SECONDS
    ) -> None:
        self.device, self.cuda, self.seconds = device, cuda, seconds
        self.cache_bytes = int(cuda.get_device_properties(device).L2_cache_size)
        # Reading it takes longer than most launches, so the host runs ahead.
        size = max(4 * self.cache_bytes, OTHER_BYTES)
        self._others = torch.ones(size // 4, dtype=torch.float32, device=device)
        self._copies: dict[int, Time] = {}

    def num_sets(self, num_bytes: int) -> int:
        """The number of sets, of ``num_bytes`` each, to time a call over."""
        wanted = -(-3 * self.cache_bytes // max(num_bytes, 1))
        return max(2, min(wanted, MOST_SETS, MOST_BYTES // max(num_bytes, 1)))

    def eager(self, calls: Sequence[Callable[[], object]]) -> Time:
        """Time single calls, cycling through the sets."""
        for call in calls:
            call()
        return self._samples(lambda number: calls[number % len(calls)]())

    def graph(self, calls: Sequence[Callable[[], object]]) -> Time:
        """Time all calls in one graph; returns the time of one."""
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for call in calls:
                call()
        self.cuda.current_stream().wait_stream(stream)
        self.cuda.synchronize()
        graph = self.cuda.CUDAGraph()
        # The graph writes to these outputs, so they must stay alive.
        with self.cuda.graph(graph):
            outputs = [call() for call in calls]
        graph.replay()
        time_of_all = self._samples(lambda _: graph.replay())
        del outputs
        count = len(calls)
        return Time(time_of_all.median / count, time_of_all.spread / count, time_of_all.samples)

    def host(self, calls: Sequence[Callable[[], object]]) -> float:
        """Microseconds of host time per call."""
        times = []
        for call in list(calls)[:10]:
            self.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        self.cuda.synchronize()
        return statistics.median(times)

    def copy(self, num_bytes: int) -> Time:
        """Time a device copy that reads and writes ``num_bytes`` in all, as a graph."""
        if num_bytes not in self._copies:
            size = max(num_bytes // 2, 1)
            pairs = [
                torch.empty((2, size), dtype=torch.uint8, device=self.device).random_().unbind(0)
                for _ in range(self.num_sets(num_bytes))
            ]
            calls = [functools.partial(target.copy_, source) for source, target in pairs]
            self._copies[num_bytes] = self.graph(calls)
        return self._copies[num_bytes]

    def _samples(self, call: Callable[[int], object]) -> Time:
        """Time samples, each after a flush; the first few determine how many fit."""
        start = time.perf_counter()
        first = self._measure(call, FEWEST, 0)
        each = (time.perf_counter() - start) / FEWEST
        more = min(int(self.seconds / max(each, 1e-9)), MOST) - FEWEST
        # The first samples include warm-up.
        return Time.of(self._measure(call, more, FEWEST) if more >= FEWEST else first)

    def _measure(self, call: Callable[[int], object], count: int, first: int) -> list[float]:
        events = []
        for number in range(first, first + count):
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self._others.sum()  # read-only: the call must not pay for writing dirty lines back
            start.record()
            call(number)
            end.record()
            events.append((start, end))
        self.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]


class Clocks:
    """Clocks, power and temperature of a GPU, from NVML or nvidia-smi."""

    FIELDS = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
    EVERY = 20  # seconds; nvidia-smi takes one to answer

    def __init__(self, uuid: str | None = None) -> None:
        self.source = "unknown"
        self._read: Callable[[], dict[str, float]] = dict
        self._last: tuple[float, dict[str, float]] = float("-inf"), {}
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = (
                pynvml.nvmlDeviceGetHandleByUUID(uuid)
                if uuid
                else pynvml.nvmlDeviceGetHandleByIndex(0)
            )
            self.source, self._read = "nvml", functools.partial(_from_nvml, pynvml, handle)
        except Exception as error:  # noqa: BLE001 - a bench runs without clocks
            self.why = f"NVML: {error!r}"
            if _from_smi(uuid):
                self.source = "nvidia-smi"
                self._read = functools.partial(self._at_times, functools.partial(_from_smi, uuid))

    def read(self) -> dict[str, float | str]:
        """The known ``FIELDS``, and their source."""
        try:
            return {"clocks_from": self.source, **self._read()}
        except Exception as error:  # noqa: BLE001 - a bench runs without clocks
            return {"clocks_from": f"unknown: {error!r}"}

    def _at_times(self, read: Callable[[], dict[str, float]]) -> dict[str, float]:
        now = time.monotonic()
        if now - self._last[0] > self.EVERY:
            self._last = (now, read())
        return self._last[1]


def _from_nvml(pynvml: Any, handle: Any) -> dict[str, float]:
    return {
        "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }


def _from_smi(uuid: str | None) -> dict[str, float]:
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(
            [*command, "-i", uuid or "0"], capture_output=True, text=True, timeout=20, check=True
        )
        values = result.stdout.splitlines()[0].split(",")
        return dict(zip(Clocks.FIELDS, map(float, values), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
