#!/bin/bash
# Runs every GPU test and every GPU bench of an unpacked bundle (make bundle), on a machine where nothing can be installed:
#
#   tests/gpu/run-bundle.sh BUNDLE.tar.gz|FOLDER [OUT [test|bench]]
#
# Results go to OUT (default: a folder gpu-results here): a log and, of benches, a JSON file each. The last lines say how each
# ended; the exit status is that of the worst. The comparisons with PyTorch, and the trace, are looked for from the current
# folder, so run it in the repository.
set -u -o pipefail
bundle=${1:?a bundle or its folder} out=${2:-gpu-results} what=${3:-all}
mkdir -p "$out"

if [ -f "$bundle" ]; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    tar -xzf "$bundle" -C "$unpacked" || exit 1
    bundle=$(echo "$unpacked"/*/)
fi
[ -x "$bundle/bin/balancekvd" ] || { echo "run-bundle: there is no bin/balancekvd in $bundle" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null ||
    echo "run-bundle: no nvidia-smi; what needs a GPU is skipped"

worst=0
summary=$(mktemp)
run() { # name, program and its arguments
    local name=$1 status=0
    shift
    echo "== $name"
    timeout "${STEP_SECONDS:-240}" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40 || status=$?
    echo "$name: $([ "$status" = 0 ] && echo ok || echo "FAILED ($status)")" >>"$summary"
    [ "$status" = 0 ] || worst=1
}

shopt -s nullglob
if [ "$what" != bench ]; then
    # CUDA IPC first: it is what a bundle is for
    for test in "$bundle"/tests/gpu-test_ipc* "$bundle"/tests/gpu-test_[!i]*; do
        run "${test##*/}" "$test"
    done
fi
if [ "$what" != test ]; then
    for bench in "$bundle"/tests/bench_gpu_ipc "$bundle"/tests/bench_gpu_[!i]*; do
        run "${bench##*/}" "$bench" --out "$out/${bench##*/bench_}.json"
    done
fi
echo "== summary"
cat "$summary"
rm -f "$summary"
exit "$worst"
