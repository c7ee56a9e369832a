#!/usr/bin/env bash
# GPU checks in less than ten minutes: tests of kernels and layers on the device, benches, graphs and
# a memory checker. Installs nothing, and reports missing tools.
#
#     bench/gpu.sh [--peers-from FOLDER]    # for FOLDER see moe_triton/bench/kernel_peers.py
#     bench/gpu.sh --dry-run                # the same parts on a CPU, small and without timing
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

most_seconds=570
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
export PYTHONPATH="$site:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
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
        note "FAILED  $name: no time is left"
        failed=1
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

if ! has torch || ! has triton || ! has pytest; then
    note "FAILED  $python has no torch, no triton or no pytest"
    exit 1
fi
note "$(environment)"
if [[ ! $dry_run ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    note "FAILED  PyTorch sees no GPU; --dry-run needs none"
    exit 1
fi

# -m must not add the current directory with its links to sys.path.
safely=(env PYTHONSAFEPATH=1)
pytest=("$python" -m pytest -q -rs -p no:cacheprovider -o faulthandler_timeout=120)
if ! "$python" -c 'import sys, pytest; sys.exit(pytest.version_tuple < (9,))'; then
    # The settings in pyproject.toml need pytest 9; these options are the relevant ones.
    note "an old pytest: without the settings of pyproject.toml"
    pytest+=(-c /dev/null --rootdir "$PWD" --import-mode=importlib -m "not full")
fi
workers=()
if has xdist && [[ ! $dry_run ]]; then
    # Most of their time is compilation.
    workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
fi

# Cross-compilation is tested without a GPU.
tests=(tests/kernels tests/test_device.py --ignore tests/kernels/test_compiled.py)
if [[ $dry_run ]]; then
    part tests 120 "${safely[@]}" "${pytest[@]}" tests/kernels/test_routing_plan.py tests/kernels/test_recv_permutation.py
    part kernels 120 "$python" -m moe_triton bench kernels --dry-run --tokens 5 \
        --json "$out/kernels.jsonl" "${bench_options[@]}"
    part graphs 60 "${safely[@]}" "${pytest[@]}" tests/kernels/test_graphs.py
    note "left out  memory checker: it needs a GPU"
else
    part tests 230 "${safely[@]}" "${pytest[@]}" "${workers[@]}" "${tests[@]}" -k "not graph"
    # The time left by the tests, less the parts that follow.
    seconds=$((most_seconds - SECONDS - 190))
    ((seconds < 60)) && seconds=60
    part kernels $((seconds + 40)) "$python" -m moe_triton bench kernels --seconds "$seconds" \
        --json "$out/kernels.jsonl" "${bench_options[@]}"
    if has matplotlib; then
        part plot 30 "$python" -m moe_triton.bench.kernel_plot "$out/kernels.jsonl" "$out/kernels.png"
    fi
    part graphs 60 "${safely[@]}" "${pytest[@]}" "${tests[@]}" -k graph
    if command -v compute-sanitizer >/dev/null; then
        # Separate allocations, so that an access past the end of a tensor is an error.
        part sanitizer 90 "${safely[@]}" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool memcheck --error-exitcode 9 \
            "${pytest[@]}" "${tests[@]}" -k "example and not any_size"
    else
        note "left out  memory checker: no compute-sanitizer"
    fi
fi

echo
cat "$summary"
exit "$failed"
