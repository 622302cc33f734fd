#!/bin/bash
# What `make tidy` checks: formatting, sizes, which room includes which, headers that compile alone, clang-tidy, shell scripts.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build}
bad=0
read -ra packages <<<"$(pkg-config --cflags grpc libprotobuf-c libuv inih libsystemd libcrypto jansson criterion)"
flags=(-std=c11 -D_GNU_SOURCE -I. -Ikernels -Iclient "-I$BUILD/proto" '-DBKV_VERSION="tidy"' "${packages[@]}")
complain() { echo "tidy: $*" >&2; bad=1; }
sources() { git ls-files --cached --others --exclude-standard "$@"; }

# -- format. Releases of clang-format disagree in details; the one that decides is 14, Debian 12's.
if clang-format --version | grep -q 'version 14\.'; then
    # shellcheck disable=SC2046
    clang-format --dry-run --Werror $(sources '*.c' '*.h') 2>&1 | grep -E 'error:' | head -n 20
    [ "${PIPESTATUS[0]}" = 0 ] || complain "not formatted: run make format"
else
    echo "tidy: SKIPPED the format check: it needs clang-format 14, this is $(clang-format --version)"
fi

# -- no file too long to read
while read -r lines file; do
    [ "$file" = total ] || [ "$lines" -le 600 ] || complain "$file has $lines lines: split it"
done < <(sources '*.c' '*.h' '*.cu' '*.py' | xargs wc -l)

# -- dependencies point one way: rpc -> transport -> pipeline -> store -> kernels, and rpc -> cluster -> store; verbs below both, observe beside them; the daemon never sees the client
allow() { # room, rooms it may include
    local room=$1 may=$2 line
    while IFS= read -r line; do complain "include direction: $line"; done < <(
        sources "$room/*.c" "$room/*.h" | xargs -r grep -nHE '^#include "(kernels|daemon|client|tests)/' | grep -vE "#include \"($may)")
}
allow kernels 'kernels/'
allow proto 'kernels/status.h|kernels/summary.h'
allow daemon/observe 'kernels/status.h|daemon/observe/'
allow daemon/store 'kernels/|daemon/store/|daemon/observe/'
allow daemon/pipeline 'kernels/|daemon/store/|daemon/observe/|daemon/pipeline/'
allow daemon/verbs 'kernels/status.h|daemon/observe/|daemon/verbs/'
allow daemon/transport 'kernels/|daemon/store/|daemon/observe/|daemon/pipeline/|daemon/verbs/|daemon/transport/'
allow daemon/cluster 'kernels/|daemon/store/|daemon/observe/|daemon/verbs/|daemon/cluster/'
allow daemon/rpc 'kernels/|daemon/store/|daemon/observe/|daemon/pipeline/|daemon/transport/|daemon/cluster/|daemon/rpc/'
allow client 'kernels/|client/'

# -- every header compiles alone
for header in $(sources '*.h'); do
    gcc "${flags[@]}" -Wall -Wextra -Wconversion -Werror -fsyntax-only -x c "$header" || complain "$header does not compile alone"
done

# -- clang-tidy, as many at once as there are cores
check() { xargs -r -P "$(nproc)" -I{} clang-tidy --quiet {} -- "${flags[@]}" "$@" 2>/dev/null; }
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni)
sources 'kernels/*.c' 'proto/*.c' 'daemon/*.c' 'client/*.c' | grep -vE '_(avx2|avx512|amx)\.c$' | check || complain "clang-tidy has findings"
sources 'kernels/*_avx2.c' | check "${avx2[@]}" || complain "clang-tidy has findings"
sources 'kernels/*_avx512.c' | check "${avx512[@]}" || complain "clang-tidy has findings"
sources 'kernels/*_amx.c' | check "${avx512[@]}" -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8 || complain "clang-tidy has findings"

# -- scripts and the unit file
# shellcheck disable=SC2046
shellcheck $(sources '*.sh' '.ci/run') || complain "shellcheck has findings"
for script in $(sources '*.py'); do
    ${PYTHON:-/usr/bin/python3} -m py_compile "$script" || complain "$script does not compile"
done

# -- the top level holds what it should
extra=$(sources | cut -d/ -f1 | sort -u | grep -v '^\.' | grep -vxE 'daemon|client|proto|kernels|deploy|tests|Makefile|README.md|LICENSE|CONTRIBUTING.md')
[ -z "$extra" ] || complain "top level holds more than it should: $extra"

[ "$bad" = 0 ] && echo "tidy: clean"
exit "$bad"
