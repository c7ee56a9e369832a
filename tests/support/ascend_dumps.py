"""The dump that msprobe 26.2.0 wrote of two layers over 4 ranks, and edits of it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch

DATA = Path(__file__).resolve().parents[1] / "compare" / "data"
DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
OUTPUTS = {
    "expand_x": 0,
    "dynamic_scales": 1,
    "assist_info_for_combine": 2,
    "expert_token_nums": 3,
    "ep_recv_counts": 4,
    "tp_recv_counts": 5,
    "expand_scales": 6,
    "x": 0,
}


class Dump:
    """A copy of the dump in a folder, with its tensors to read and to change."""

    def __init__(self, folder: Path, archive: str = "msprobe_4_ranks.zip") -> None:
        self.path = folder / "dump"
        with zipfile.ZipFile(DATA / archive) as file:
            file.extractall(self.path)

    def rank(self, rank: int) -> Path:
        return self.path / "step0" / f"rank{rank}"

    def file(self, rank: int, op: str, number: int, name: str | int) -> Path:
        """An output by name, an input by number, a keyword by name."""
        if name in OUTPUTS:
            part = f"output.{OUTPUTS[name]}"
        else:
            part = f"input.{name}" if isinstance(name, int) else f"kwargs.{name}"
        return self.rank(rank) / "dump_tensor_data" / f"NPU.{op}.{number}.forward.{part}.pt"

    def read(self, rank: int, op: str, number: int, name: str | int) -> torch.Tensor:
        return torch.load(self.file(rank, op, number, name), weights_only=True)

    def write(self, value, rank: int, op: str, number: int, name: str | int) -> None:
        torch.save(value, self.file(rank, op, number, name))

    def edit_json(self, rank: int, change) -> None:
        """Apply ``change`` to the calls of a rank's dump.json."""
        file = self.rank(rank) / "dump.json"
        value = json.loads(file.read_text())
        change(value["data"])
        file.write_text(json.dumps(value))
