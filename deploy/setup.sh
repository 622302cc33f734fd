#!/bin/sh
# Installs what deploy/packages.txt names and this machine lacks. Does nothing, and needs no rights, when nothing is missing.
set -eu
list=$(dirname "$0")/packages.txt

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
known() { apt-cache show "$1" >/dev/null 2>&1; }

if ! command -v apt-get >/dev/null 2>&1; then
    echo "setup: no apt-get here; install what $list names by this system's own means" >&2
    exit 0
fi

missing=
# shellcheck disable=SC2013 # one word a line
for line in $(grep -v '^#' "$list"); do
    for name in $(echo "$line" | tr '|' ' '); do
        if installed "$name"; then continue 2; fi
    done
    missing="$missing $line"
done
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || { echo "setup: run as root or install sudo; missing:$missing" >&2; exit 1; }
    sudo=sudo
fi
echo "setup: installing$missing"
$sudo apt-get update -q
chosen=
for line in $missing; do
    found=
    for name in $(echo "$line" | tr '|' ' '); do
        if known "$name"; then found=$name; break; fi
    done
    [ -n "$found" ] || { echo "setup: this release has no package $line" >&2; exit 1; }
    chosen="$chosen $found"
done
# shellcheck disable=SC2086 # a list of words on purpose
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $chosen
