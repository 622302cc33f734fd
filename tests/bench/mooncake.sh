#!/bin/bash
# Makes a Python that has the wheel of Mooncake Store: mooncake.sh FOLDER [PYTHON]. What cannot be is said, and is no failure:
# the bench then goes without.
set -u
folder=$1 python=${2:-/usr/bin/python3}
package=mooncake-transfer-engine-non-cuda==0.3.13.post1 # TCP needs no CUDA
log=$folder/install.log

works() { "$folder/bin/python" -c 'import mooncake.store' >>"$log" 2>&1; }
without() { echo "Mooncake Store is left out of the bench: $1; see $log" >&2; rm -f "$folder/bin/python"; exit 0; }

[ ! -x "$folder/bin/python" ] || ! works || exit 0
mkdir -p "$folder"
echo "Mooncake Store for comparison: installing $package into $folder"
"$python" -m venv "$folder" >"$log" 2>&1 || without "no virtual environment (package python3-venv)"
timeout 120 "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 15 "$package" \
    >>"$log" 2>&1 || without "its wheel could not be installed"
works || without "its wheel does not run here"
