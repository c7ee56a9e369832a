"""Times on a GPU, by device events; the copy that they are compared with; clocks and power.

A call is timed over several sets of inputs and outputs, together larger than the L2 cache where
there is enough work, and after other memory went through that cache. "Eager" is one call between
two events, the host's part included wherever the device waits for it. "Graph" is a captured graph
of one call for each set, divided by their number.
"""

import dataclasses
import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import torch

MOST_SETS = 32
SECONDS = 0.1  # of measuring, for each way
FEWEST, MOST = 10, 200  # samples
MOST_BYTES = 2**34  # of all sets
OTHER_BYTES = 2**29  # that go through the cache before a call, at least


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
    def of(cls, microseconds: Sequence[float]) -> "Time":
        quartiles = statistics.quantiles(microseconds, n=4)
        return cls(statistics.median(microseconds), quartiles[2] - quartiles[0], len(microseconds))


class Timer:
    """Times calls on the current CUDA or ROCm device; ``cuda`` is ``torch.cuda``, or a test's."""

    def __init__(self, device: torch.device, cuda=torch.cuda, seconds: float = SECONDS) -> None:
        self.device, self.cuda, self.seconds = device, cuda, seconds
        self.cache_bytes = int(cuda.get_device_properties(device).L2_cache_size)
        # So long to read that most calls are launched before it ends.
        size = max(4 * self.cache_bytes, OTHER_BYTES)
        self._others = torch.ones(size // 4, dtype=torch.float32, device=device)
        self._copies: dict[int, Time] = {}

    def num_sets(self, num_bytes: int) -> int:
        """Sets of so many bytes each that a call is timed over."""
        wanted = -(-3 * self.cache_bytes // max(num_bytes, 1))
        return max(2, min(wanted, MOST_SETS, MOST_BYTES // max(num_bytes, 1)))

    def eager(self, calls: Sequence[Callable[[], object]]) -> Time:
        """One call of each in turn, as often as there is time for."""
        for call in calls:
            call()
        return self._samples(lambda number: calls[number % len(calls)]())

    def graph(self, calls: Sequence[Callable[[], object]]) -> Time:
        """All calls in one graph; the time of one of them."""
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for call in calls:
                call()
        self.cuda.current_stream().wait_stream(stream)
        self.cuda.synchronize()
        graph = self.cuda.CUDAGraph()
        # What the calls return has to live as long as the graph writes to it.
        with self.cuda.graph(graph):
            kept = [call() for call in calls]
        graph.replay()
        time_of_all = self._samples(lambda _: graph.replay())
        del kept
        count = len(calls)
        return Time(time_of_all.median / count, time_of_all.spread / count, time_of_all.samples)

    def host(self, calls: Sequence[Callable[[], object]]) -> float:
        """Microseconds that the host needs for a call, without the device's work."""
        times = []
        for call in list(calls)[:10]:
            self.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        self.cuda.synchronize()
        return statistics.median(times)

    def copy(self, num_bytes: int) -> Time:
        """A copy on the device that reads and writes ``num_bytes`` together, as a graph."""
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
        """Each sample after a flush, between events of its own; a first few say how many fit."""
        start = time.perf_counter()
        found = self._measure(call, FEWEST, 0)
        each = (time.perf_counter() - start) / FEWEST
        more = min(int(self.seconds / max(each, 1e-9)), MOST) - FEWEST
        # Those of the first round still warm something up.
        return Time.of(self._measure(call, more, FEWEST) if more >= FEWEST else found)

    def _measure(self, call: Callable[[int], object], count: int, first: int) -> list[float]:
        events = []
        for number in range(first, first + count):
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self._others.sum()  # read, not written: lines to write back would cost the call
            start.record()
            call(number)
            end.record()
            events.append((start, end))
        self.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]


class Clocks:
    """Clocks, power and temperature of the first GPU, from NVML or else nvidia-smi."""

    FIELDS = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
    EVERY = 20  # seconds; nvidia-smi takes one to answer

    def __init__(self, uuid: str | None = None) -> None:
        self.source, self._read, self._last = "unknown", dict, (float("-inf"), {})
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = (
                pynvml.nvmlDeviceGetHandleByUUID(uuid)
                if uuid
                else pynvml.nvmlDeviceGetHandleByIndex(0)
            )
            self.source, self._read = "nvml", functools.partial(_from_nvml, pynvml, handle)
        except Exception as error:  # noqa: BLE001 - nothing of this may end a run
            self.why = f"NVML: {error!r}"
            if _from_smi(uuid):
                self.source = "nvidia-smi"
                self._read = functools.partial(self._at_times, functools.partial(_from_smi, uuid))

    def read(self) -> dict[str, float | str]:
        """``FIELDS``, those that are known, and where they are from."""
        try:
            return {"clocks_from": self.source, **self._read()}
        except Exception as error:  # noqa: BLE001 - nothing of this may end a run
            return {"clocks_from": f"unknown: {error!r}"}

    def _at_times(self, read: Callable[[], dict]) -> dict:
        now = time.monotonic()
        if now - self._last[0] > self.EVERY:
            self._last = (now, read())
        return self._last[1]


def _from_nvml(pynvml, handle) -> dict[str, float]:
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
        said = subprocess.run(
            [*command, "-i", uuid or "0"], capture_output=True, text=True, timeout=20, check=True
        )
        values = said.stdout.splitlines()[0].split(",")
        return dict(zip(Clocks.FIELDS, map(float, values), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
