"""The command line: output, exit codes, and that the demo detects wrong results."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
import torch

import moe_triton
from moe_triton import ExpertParallel, PeerTimeoutError
from moe_triton.cli import demo, doctor, main
from moe_triton.cli.demo_layer import Layer, dense
from moe_triton.cli.terminal import Terminal, milliseconds, size
from moe_triton.comm.shm import MemfdMemory
from moe_triton.layout import QUANTS

SMALL = ["demo", "--world-size", "2", "--tokens", "5"]


def lines(capsys) -> list[str]:
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 80
    assert not any("\033" in line for line in out), "not a terminal, so no colours"
    return out


# demo


@pytest.mark.parametrize(
    "arguments, transport",
    [
        pytest.param(SMALL, "shm", id="shared-expert-on-every-rank"),
        pytest.param(
            ["demo", "--world-size", "4", "--tokens", "3", "--seed", "7"],
            "shm",
            id="shared-expert-on-a-rank-of-its-own",
        ),
        pytest.param([*SMALL, "--transport", "collective"], "collective", id="gloo"),
        pytest.param(["demo", "--world-size", "1", "--tokens", "1"], "single", id="one-rank"),
    ],
)
def test_demo(capsys, arguments, transport):
    assert main(arguments) == 0
    out = lines(capsys)
    assert out[-1].startswith("OK  bf16 and int8 on ")
    labels = [line[:13].rstrip() for line in out]
    for label in ("dispatch", "experts", "combine", "bytes sent", "bytes saved", "max error"):
        assert label in labels
    (window,) = (line for line in out if line.startswith("window"))
    assert window.endswith(f"{transport} transport")
    assert ("0 B" in window) == (transport != "shm")


def test_demo_draws_what_ranks_and_experts_receive(capsys):
    assert main(["demo", "--world-size", "4", "--tokens", "32"]) == 0
    out = lines(capsys)
    title = next(i for i, line in enumerate(out) if line.startswith("tokens per expert and rank"))
    layer = Layer(4, 32)
    ids, _ = layer.gate(torch.cat([layer.tokens(rank) for rank in range(4)]))
    counts = ids.flatten().bincount(minlength=96).tolist()
    assert f"at most {max(counts)}, " in out[title]
    shared, *routed = (line.split() for line in out[title + 1 : title + 5])
    assert shared[:-1] == ["0", "shared", str(4 * 32)]
    for rank, (fields, start) in enumerate(zip(routed, (0, 32, 64), strict=True), 1):
        assert fields[:2] == [str(rank), f"{start}-{start + 31}"]
        assert fields[-2] == str(sum(counts[start : start + 32]))


def spoil(monkeypatch, method, change):
    """Let a method of ExpertParallel return ``change(rank, result)`` in the demo's processes."""
    run_processes = demo.run_processes

    def run_spoiled(world_size, fn, **options):
        def on_rank(ctx):
            original = getattr(ExpertParallel, method)

            def spoiled(self, *args, **kwargs):
                return change(ctx.rank, original(self, *args, **kwargs))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ExpertParallel, method, spoiled)
                return fn(ctx)

        return run_processes(world_size, on_rank, **options)

    monkeypatch.setattr(demo, "run_processes", run_spoiled)


def swap_rows(rank, out):
    return out[[1, 0, *range(2, len(out))]] if rank == 1 else out


def nudge(rank, out):
    out[-1, -1] += 0.1 * rank
    return out


def lose(rank, out):
    out[2, 7] = math.nan
    return out


def swap_received(rank, recv):
    last = int(recv.num_tokens) - 1
    return dataclasses.replace(recv, x=recv.x[[last, *range(1, last), 0]]) if rank == 0 else recv


def ignore_scales(rank, recv):
    return recv if recv.scales is None else dataclasses.replace(recv, scales=recv.scales * 1.02)


def drop_weights(rank, recv):
    handle = dataclasses.replace(recv.handle, weights=None)
    return dataclasses.replace(recv, handle=handle)


@pytest.mark.parametrize(
    "method, change, bf16_too",
    [
        ("combine", swap_rows, True),
        ("combine", nudge, True),
        ("combine", lose, True),
        ("dispatch", swap_received, True),
        ("dispatch", drop_weights, True),
        ("dispatch", ignore_scales, False),
    ],
)
def test_demo_detects_wrong_results(capsys, monkeypatch, method, change, bf16_too):
    spoil(monkeypatch, method, change)
    assert main(SMALL) == 1
    out = lines(capsys)
    formats = "bf16 and int8" if bf16_too else "int8"
    assert out[-1].startswith(f"WRONG  {formats} on 2 ranks")
    assert any(line.startswith("int8: ") for line in out)
    assert any(line.startswith("bf16: ") for line in out) == bf16_too


def test_demo_detects_other_bits_within_the_tolerance(capsys, monkeypatch):
    calls = []

    def change(rank, out):
        calls.append(out)
        if len(calls) == 3:
            out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(math.inf).to(out.dtype))
        return out

    spoil(monkeypatch, "combine", change)
    assert main(SMALL) == 1
    out = lines(capsys)
    assert "bf16: other bits in a later round on rank 0, 1" in out
    assert not any("differ from the dense layer" in line for line in out)


def test_demo_detects_wrong_counts(capsys, monkeypatch):
    def change(rank, recv):
        counts = recv.tokens_per_expert.flip(0) if rank == 1 else recv.tokens_per_expert
        return dataclasses.replace(recv, tokens_per_expert=counts)

    spoil(monkeypatch, "dispatch", change)
    assert main(SMALL) == 1
    assert any("rank 1 received" in line for line in lines(capsys))


@pytest.mark.parametrize(
    "error, traceback",
    [
        (PeerTimeoutError("ExpertParallel.dispatch", (1,), "rank 1 is gone"), False),
        (RuntimeError("out of\nmemory"), True),
    ],
    ids=["of-the-package", "of-anything-else"],
)
def test_demo_that_fails_is_wrong(capsys, monkeypatch, error, traceback):
    def fail(*args, **kwargs):
        error.failed_rank = 1
        raise error

    monkeypatch.setattr(demo, "run_processes", fail)
    assert main(SMALL) == 1
    captured = capsys.readouterr()
    text = str(error).replace("\n", " ")
    assert captured.out.splitlines()[-1] == f"WRONG  {type(error).__name__} on rank 1: {text}"
    assert ("Traceback" in captured.err) == traceback


def test_demo_needs_no_cloudpickle(tmp_path):
    code = (
        "import sys; sys.modules['cloudpickle'] = None; from moe_triton.cli import main; "
        f"sys.exit(main({SMALL}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("OK")


# The layer of the demo.


@pytest.mark.parametrize("world_size", range(1, 34))
def test_layer_has_experts_for_every_world(world_size):
    layer = Layer(world_size, 1)
    assert layer.num_experts % 8 == 0
    assert layer.num_experts == layer.topology.experts_per_rank * (world_size - world_size // 4)
    assert 48 <= layer.num_experts <= 200


def test_gate_chooses_like_deepseek_v3():
    layer = Layer(8, 512)
    ids, weights = layer.gate(layer.tokens(0))
    assert ids.shape == weights.shape == (512, 8)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert all(len({number // 12 for number in row}) <= 4 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(1), torch.full((512,), 2.5))
    counts = ids.flatten().bincount(minlength=96).float()
    assert counts.max() > 5 * counts.mean(), "a few experts should be popular"


def test_gate_does_not_depend_on_the_number_of_tokens():
    layer = Layer(2, 300)
    x = torch.cat([layer.tokens(0), layer.tokens(1)])
    for whole, part in zip(layer.gate(x), layer.gate(layer.tokens(1)), strict=True):
        assert torch.equal(whole[300:], part)


def test_dense_is_the_sum_of_each_tokens_experts():
    layer = Layer(2, 3, hidden=16, width=4)
    x = layer.tokens(0)
    ids, weights = layer.gate(x)
    inputs, shared = x.float(), 2 * x.float()
    (result,) = dense(layer, [inputs], [shared], ids, weights)
    for token in range(3):
        terms = [layer.expert(layer.shared_expert)(shared[token, None])[0]]
        for slot in range(8):
            row = layer.expert(int(ids[token, slot]))(inputs[token, None])[0]
            terms.append(weights[token, slot] * row)
        total = torch.stack(terms).sum(0)
        torch.testing.assert_close(result.out[token], total, rtol=1e-5, atol=1e-5)
        size = torch.stack(terms).abs().sum(0) + total.abs()
        torch.testing.assert_close(result.tolerance[token], 1.01 / 256 * size, rtol=1e-4, atol=1e-6)


# doctor


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = lines(capsys)
    text = "\n".join(out)
    for heading in ("versions", "devices", "back ends", "transports", "windows"):
        assert any(line.startswith(heading) for line in out)
    assert f"torch {torch.__version__}" in text
    assert any(line.startswith("  cpu        yes") for line in out)
    assert any(line.startswith("  local              yes") for line in out)
    # A2: 2 * (128 * 8 * 8 * 7168 * 2 + 2 MB); A3: 2 * 128 * 2 * 7296 * (8 * 32 + 9), and 2 MB.
    (row,) = (line.split() for line in out if line.startswith("  deepseek-v3"))
    assert row[1:3] == ["256/8/7168", "bf16"]
    assert row[-2:] == ["228", "947"]


def test_doctor_json(capsys):
    arguments = ["--model", "mixtral", "--world-size", "4", "--tokens", "64", "--quant", "int8"]
    assert main(["doctor", "--json", *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["moe_triton"] == moe_triton.__version__
    assert facts["devices"][0]["kind"] == "cpu"
    assert facts["backends"]["cpu"] == {"works": True, "cause": None}
    collectives = {f"collective ({backend})" for backend in ("gloo", "nccl", "hccl")}
    windows = {"local", "shm (memfd)", "shm (posix)", "symm_mem"}
    assert set(facts["transports"]) == windows | collectives
    for answer in (*facts["backends"].values(), *facts["transports"].values()):
        assert answer["works"] == (answer["cause"] is None)
    (window,) = facts["windows"]
    assert window["model"] == "mixtral"
    expected = moe_triton.window_bytes(
        world_size=4, num_experts=8, top_k=2, hidden=4096, max_tokens=64, quant="int8"
    )
    assert window["bytes"] == {
        "int8": {
            "dispatch": expected.dispatch,
            "combine": expected.combine,
            "total": expected.total,
        }
    }
    limited = moe_triton.window_bytes(
        world_size=4,
        num_experts=8,
        top_k=2,
        hidden=4096,
        max_tokens=64,
        max_recv_tokens=2 * 2 * 64,
        quant="int8",
    )
    assert window["even_share_bytes"] == {"int8": limited.total}
    assert limited.total < expected.total


@pytest.mark.parametrize("quant", [*QUANTS, "none", "all", None])
def test_doctor_with_a_limit_and_every_quantisation(capsys, quant):
    arguments = ["--model", "mixtral", "--tokens", "64", "--max-recv-tokens", "100"]
    arguments += [] if quant is None else ["--quant", quant]
    assert main(["doctor", "--json", *arguments]) == 0
    (window,) = json.loads(capsys.readouterr().out)["windows"]
    names = {"all": ["none", *QUANTS], None: ["none", "int8"]}.get(quant, [quant])
    assert list(window["bytes"]) == names
    for name in names:
        expected = moe_triton.window_bytes(
            world_size=8,
            num_experts=8,
            top_k=2,
            hidden=4096,
            max_tokens=64,
            max_recv_tokens=100,
            quant=None if name == "none" else name,
        )
        assert window["bytes"][name]["total"] == expected.total
        assert 100 * 8192 <= expected.combine < 104 * 8192, "one slot of 100 rows of 8 KB"
    assert main(["doctor", *arguments]) == 0
    out = lines(capsys)
    for name in names:
        assert any(f" {'bf16' if name == 'none' else name} " in line for line in out)
    assert "  sized for max_recv_tokens = 100; pages are allocated on use" in out


def test_doctor_with_custom_sizes(capsys):
    arguments = ["--model", "kimi-k2", "--experts", "64", "--top-k", "2", "--hidden", "512"]
    assert main(["doctor", *arguments]) == 0
    assert any(line.startswith("  custom       64/2/512 ") for line in lines(capsys))


def test_doctor_continues_if_a_model_does_not_fit_the_ranks(capsys):
    assert main(["doctor", "--world-size", "16"]) == 0
    assert any("8 experts cannot be divided over 16 ranks" in line for line in lines(capsys))


def test_doctor_gives_the_cause_of_a_broken_transport(capsys, monkeypatch):
    def refuse(self, num_bytes):
        raise OSError("memfd_create is not permitted here")

    monkeypatch.setattr(MemfdMemory, "allocate", refuse)
    assert main(["doctor"]) == 0
    assert "  shm (memfd)        no   memfd_create is not permitted here" in lines(capsys)


def test_doctor_warns(capsys, monkeypatch, tmp_path):
    providers = {"triton": ["triton", "pytorch-triton-rocm", "triton"]}
    monkeypatch.setattr(doctor.metadata, "packages_distributions", lambda: providers)
    driver = tmp_path / "driver"
    driver.touch()
    monkeypatch.setattr(doctor, "DRIVERS", {str(driver): ("a device", lambda: False)})
    assert main(["doctor", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["warnings"]
    assert first.startswith("pytorch-triton-rocm and triton all install the package triton")
    assert second == f"{driver} indicates a device, which this PyTorch cannot use"
    assert main(["doctor"]) == 0
    assert sum(line.startswith("warning: ") for line in capsys.readouterr().out.splitlines()) == 2


# The program.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: {demo,bench,doctor,npu-run,deep-ep-run,compare,record}"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--world-size", "0"], "argument --world-size: must be at least 1, got 0"),
        (["demo", "--tokens", "many"], "argument --tokens: invalid positive value: 'many'"),
        (["demo", "--transport", "pigeons"], "invalid choice: 'pigeons'"),
        (["doctor", "--model", "gpt-2"], "invalid choice: 'gpt-2'"),
        (["doctor", "--model", "mixtral", "--top-k", "9"], "cannot choose 9 of 8 experts"),
        (["doctor", "--experts", "12"], "12 experts cannot be divided over 8 ranks"),
        (["npu-run"], "required: SCRIPT, ARGS"),
        (["npu-run", "--devices", "0", "script.py"], "must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert message in captured.err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--version"], f"moe_triton {moe_triton.__version__}"),
        (["--help"], "run an MoE layer over 8 processes and check it"),
        (["demo", "--help"], "The last line begins with OK"),
        (["doctor", "--help"], "deepseek-v3, qwen3-235b, kimi-k2"),
        (["npu-run", "--help"], "The exit status is the script's, and 1 if that is 0 but"),
    ],
)
def test_information(capsys, arguments, expected):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert expected in " ".join(capsys.readouterr().out.split())


def test_interrupt(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_module_exits_quietly_on_a_broken_pipe(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "moe_triton", "doctor"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, "")


# Bars and numbers.


def terminal(monkeypatch, encoding: str, is_terminal: bool = False) -> Terminal:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", stream)
    return Terminal()


def test_bars_in_unicode(monkeypatch):
    show = terminal(monkeypatch, "utf-8")
    assert [show.bar(value, 16, 2) for value in (0, 0.01, 1, 9, 16)] == ["", "▏", "▏", "█▏", "██"]
    assert show.columns([0, 0.01, 4, 8], 8) == " ▁▅█"


def test_bars_in_ascii(monkeypatch):
    show = terminal(monkeypatch, "ascii")
    assert [show.bar(value, 16, 2) for value in (0, 0.01, 9, 16)] == ["", "#", "#", "##"]
    assert show.columns([0, 0.01, 4, 8], 8) == " .+@"


def test_styles_only_for_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal(monkeypatch, "utf-8", is_terminal=True).styled("x", "bold") == "\033[1mx\033[0m"
    assert terminal(monkeypatch, "utf-8").styled("x", "bold") == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal(monkeypatch, "utf-8", is_terminal=True).styled("x", "bold") == "x"


def test_numbers_for_people():
    assert [size(n) for n in (0, 999, 1000, 2048, 10 * 2**20, 300 * 2**30, 2**60)] == [
        *("0 B", "999 B", "0.98 KiB", "2.00 KiB", "10.0 MiB", "300 GiB", "1048576 TiB")
    ]
    assert [milliseconds(s) for s in (0.0012, 0.05, 2)] == ["1.20 ms", "50.0 ms", "2000 ms"]
