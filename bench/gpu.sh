#!/usr/bin/env bash
# GPU checks in at most 400 s, the most valuable part first, so that a machine lent for 15 minutes
# allows a mend and a second run. Installs nothing, and reports missing tools.
#
#     bench/gpu.sh [--peers-from FOLDER]    # for FOLDER see moe_triton/bench/kernel_peers.py
#     bench/gpu.sh --dry-run                # the same parts on a CPU, small and without figures
#
#     P0 rendezvous   windows between two processes on this device      60 s
#     P1 rounds       2 and 4 processes, every sum                      90 s
#     P2 faults       abort, killed rank                                60 s
#     P3 graphs       replays in 2 processes                            60 s
#     P4 streams      2 ranks at the same time                          60 s
#     P5 times        layers of 8 ranks, kernels beside a copy          90 s
#     P6 memory       compute-sanitizer over small cases                30 s
#     then, in the time that is left, the tests of kernels and layers on the device
#
# Logs and results go to $OUT (build/gpu). Every part has a time limit; the status is 1 if one fails.
# PYTHON is the interpreter, by default .venv's or python3.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

dry_run=
bench_options=()
while (($#)); do
    case $1 in
    --dry-run) dry_run=1 ;;
    --peers-from) bench_options+=(--peers-from "${2:?a folder}") && shift ;;
    *) echo "gpu.sh: no option $1; see its head" >&2 && exit 2 ;;
    esac
    shift
done

most_seconds=400
out=${OUT:-build/gpu}
mkdir -p "$out"
summary=$out/summary.txt
: >"$summary"
failed=0

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi

# The package alone: the links in the repository's root hide other distributions.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD/moe_triton" "$site/moe_triton"
export PYTHONPATH="$site:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Ranks that share a GPU may open each other's memory.
export TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1
if [[ $dry_run ]]; then
    export TRITON_INTERPRET=1
else
    unset TRITON_INTERPRET
fi

note() {
    echo "$*" | tee -a "$summary"
}

has() {
    "$python" -c "import $1" 2>/dev/null
}

# part NAME LIMIT COMMAND...: run it for at most LIMIT seconds, output in NAME.log.
part() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    ((limit > most_seconds - SECONDS)) && limit=$((most_seconds - SECONDS))
    if ((limit < 5)); then
        note "left out  $name: no time is left"
        return
    fi
    echo "== $name, at most $limit s: $*"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 25 "$out/$name.log"
    if ((status == 0)); then
        note "passed  $name in $((SECONDS - start)) s"
    elif ((status == 124 || status == 137)); then
        note "FAILED  $name: stopped after $limit s"
        failed=1
    else
        note "FAILED  $name: status $status after $((SECONDS - start)) s, see $name.log"
        failed=1
    fi
}

environment() {
    date -u +%Y-%m-%dT%H:%MZ
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit \
        --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    "$python" - <<'END'
import importlib.util, os, platform, torch, triton
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{device}; Python {platform.python_version()}, torch {torch.__version__}, "
      f"triton {triton.__version__}, {os.cpu_count()} cores")
without = {
    "hypothesis": "property tests are skipped",
    "xdist": "tests run in one process",
    "matplotlib": "no plot",
    "pynvml": "clocks come from nvidia-smi",
}
for name, what in without.items():
    if importlib.util.find_spec(name) is None:
        print(f"no {name}: {what}")
END
}

if ! has torch || ! has triton; then
    note "FAILED  $python has no torch or no triton"
    exit 1
fi
note "$(environment)"
if [[ ! $dry_run ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    note "FAILED  PyTorch sees no GPU; --dry-run needs none"
    exit 1
fi

# -m must not add the current directory with its links to sys.path.
safely=(env PYTHONSAFEPATH=1)
bench=("${safely[@]}" "$python" -m moe_triton bench)
plot() {
    has matplotlib && echo --plot "$out/$1.png"
}

if [[ $dry_run ]]; then
    device=(--device cpu --rounds 3)
    part rendezvous 60 "${bench[@]}" device rendezvous "${device[@]}"
    part rounds 60 "${bench[@]}" device rounds "${device[@]}"
    part faults 60 "${bench[@]}" device faults "${device[@]}"
    part graphs 60 "${bench[@]}" device graphs "${device[@]}" --backend interpret
    part streams 60 "${bench[@]}" device streams "${device[@]}" --backend interpret
    part layers 60 "${bench[@]}" layer --quick --samples 2 --tokens 2 --hidden 64 --experts 8 \
        --top-k 2 --json "$out/layers.jsonl"
    part kernels 120 "${bench[@]}" kernels --dry-run --tokens 5 --json "$out/kernels.jsonl" \
        "${bench_options[@]}"
    note "left out  memory checker and tests: they need a GPU"
else
    device=(--device cuda:0 --transport symmetric)
    part rendezvous 60 "${bench[@]}" device rendezvous "${device[@]}"
    part rounds 90 "${bench[@]}" device rounds "${device[@]}" --rounds 200
    part faults 60 "${bench[@]}" device faults "${device[@]}"
    part graphs 60 "${bench[@]}" device graphs "${device[@]}" --rounds 100
    part streams 60 "${bench[@]}" device streams "${device[@]}" --rounds 2000
    # shellcheck disable=SC2046 # two words or none
    part layers 45 "${bench[@]}" layer --device cuda --ranks 8 --tokens 128 4096 --quant int8 \
        --json "$out/layers.jsonl" $(plot layers)
    # shellcheck disable=SC2046
    part kernels 60 "${bench[@]}" kernels --seconds 45 --json "$out/kernels.jsonl" \
        $(plot kernels) "${bench_options[@]}"
    if ! has pytest; then
        note "left out  memory checker and tests: no pytest"
    else
        pytest=("${safely[@]}" "$python" -m pytest -q -rs -p no:cacheprovider
            -o faulthandler_timeout=120)
        if ! "$python" -c 'import sys, pytest; sys.exit(pytest.version_tuple < (9,))'; then
            # The settings in pyproject.toml need pytest 9; these options are the relevant ones.
            note "an old pytest: without the settings of pyproject.toml"
            pytest+=(-c /dev/null --rootdir "$PWD" --import-mode=importlib -m "not full")
        fi
        # Cross-compilation is tested without a GPU.
        tests=(tests/kernels tests/test_device.py --ignore tests/kernels/test_compiled.py)
        if command -v compute-sanitizer >/dev/null; then
            # Separate allocations, so that an access past the end of a tensor is an error.
            part memory 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool memcheck --error-exitcode 9 \
                "${pytest[@]}" "${tests[@]}" -k "example and not any_size"
        else
            note "left out  memory checker: no compute-sanitizer"
        fi
        workers=()
        if has xdist; then
            # Most of their time is compilation.
            workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
        fi
        part tests 230 "${pytest[@]}" "${workers[@]}" "${tests[@]}"
    fi
fi

echo
cat "$summary"
exit "$failed"
