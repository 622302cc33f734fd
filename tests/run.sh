#!/bin/bash
# Runs the named suites one after the other and closes with one line, "N passed, N failed[, N skipped]".
#
#   unit          $BUILD/tests/unit-* (criterion), one a room
#   integration   tests/integration/test_*.py against the real daemon
#   e2e           tests/e2e/test_*.py with the real model
#   rdma          tests/rdma/test_*.py, each in a guest of its own, two at a time
#   cluster       tests/cluster/test_*.py, a pool of daemons in network namespaces
#
# SANITIZER=asan|tsan sets that sanitizer's options. Python suites print the same closing line themselves.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build}
PYTHON=${PYTHON:-/usr/bin/python3}
export BUILD PYTHONUNBUFFERED=1 OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-2}"

case ${SANITIZER:-} in
asan) export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0:exitcode=99:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
      export LSAN_OPTIONS=suppressions=$PWD/tests/lsan.supp:print_suppressions=0 ;;
tsan) export TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=99 suppressions=$PWD/tests/tsan.supp" ;;
esac

passed=0 failed=0 skipped=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Adds a suite's closing line to the totals; a suite that failed without counting it counts as one failure.
tally() {
    local status=$1 line=$2 p f s
    p=$(sed -n 's/.*\b\([0-9][0-9]*\) passed.*/\1/p' <<<"$line"); f=$(sed -n 's/.*\b\([0-9][0-9]*\) failed.*/\1/p' <<<"$line")
    s=$(sed -n 's/.*\b\([0-9][0-9]*\) skipped.*/\1/p' <<<"$line")
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0})) skipped=$((skipped + ${s:-0}))
    if [ "$status" != 0 ] && [ "${f:-0}" = 0 ]; then failed=$((failed + 1)); fi
}

for suite in "$@"; do
    echo "== $suite"
    case $suite in
    unit)
        for binary in "$BUILD"/tests/unit-*; do
            echo "-- $binary"
            # Without --verbose criterion is silent about what is skipped. Most of these tests wait more than they work.
            "$binary" --jobs 4 --timeout 300 --verbose 2>&1 | sed -u -e 's/\x1b\[[0-9;]*m//g' -e '/^\[\(RUN \|PASS\)\]/d' | tee "$log"
            status=$?
            # criterion closes with "[====] Synthesis: Tested: 12 | Passing: 12 | Failing: 0 | Crashing: 0"
            line=$(grep -a 'Synthesis' "$log" | tail -n 1 |
                sed -E 's/.*Passing: *([0-9]+).*Failing: *([0-9]+).*Crashing: *([0-9]+).*/\1 \2 \3/')
            read -r p f c <<<"${line:-0 0 1}"
            tally "$status" "$p passed, $((f + c)) failed, $(grep -ac '^\[SKIP\]' "$log") skipped"
        done
        ;;
    integration | e2e | cluster)
        for test in tests/"$suite"/test_*.py; do
            echo "-- $test"
            "$PYTHON" "$test" 2>&1 | tee "$log"
            status=$?
            tally "$status" "$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)"
        done
        ;;
    rdma) # guests wait more than they work; what they say comes in order, at the end
        said=$(mktemp -d)
        for test in tests/rdma/test_*.py; do
            while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
            { "$PYTHON" "$test" >"$said/${test##*/}" 2>&1; echo $? >"$said/${test##*/}.status"; } &
        done
        wait
        for test in tests/rdma/test_*.py; do
            echo "-- $test"
            cat "$said/${test##*/}"
            tally "$(cat "$said/${test##*/}.status")" "$(grep -aE '^[0-9]+ passed, [0-9]+ failed' "$said/${test##*/}" | tail -n 1)"
        done
        rm -rf "$said"
        ;;
    *) echo "run.sh: no suite $suite" >&2; exit 2 ;;
    esac
done
echo
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ $((passed + skipped)) -gt 0 ]
