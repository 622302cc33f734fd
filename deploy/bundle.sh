#!/bin/bash
# Packs programs and every shared library they need, but for glibc's own and the GPU driver's, into one relocatable folder:
#
#   deploy/bundle.sh BUILD VERSION OUTPUT.tar.gz [PROGRAM...]      PROGRAMs go to tests/ beside bin/, lib/ and share/
#
# It unpacks anywhere and runs on any distribution whose glibc is as new as the one here (the last line says which). Libraries
# are found by an rpath relative to whoever needs them, which neither LD_LIBRARY_PATH nor the host's own copies override.
set -eu -o pipefail
cd "$(dirname "$0")/.."
build=$1 version=$2 output=$3
shift 3
command -v patchelf >/dev/null || { echo "bundle: patchelf is missing (package patchelf)" >&2; exit 1; }

name=balancekv-$version-$(uname -m)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
top=$work/$name
mkdir -p "$top"/{bin,lib,tests,share/licenses}

# What every host brings: glibc, whose parts belong to its loader, and what comes with the GPU's kernel module.
glibc='ld-linux.*|lib(c|m|mvec|pthread|dl|rt|resolv|util|anl|nsl|BrokenLocale|nss_.*|thread_db)'
host="^(linux-vdso|$glibc|lib(cuda|nvidia-.*|nvcuvid|nvoptix))\\.so"

# ---- programs
cp -L "$build/bin/balancekvd" "$build/bin/bkv" "$top/bin"
for program in "$@"; do
    cp -L "$program" "$top/tests"
done
cp -P "$build"/lib/libbalancekv.so* "$top/lib"

# ---- RDMA providers: libibverbs loads them by name when there is such a device, so that no program names them
verbs=$(ldd "$build/bin/balancekvd" | sed -n 's/.*libibverbs\.so[^ ]* => \(\/[^ ]*\).*/\1/p')
if [ -n "$verbs" ]; then
    for provider in "$(dirname "$verbs")"/libibverbs/*-rdmav*.so; do
        [ ! -e "$provider" ] || cp -L "$provider" "$top/lib"
    done
fi

# ---- the closure: what any of these needs, taken from where this machine's loader finds it
find "$top" -type f -exec ldd {} + >"$work/ldd" || { echo "bundle: ldd refuses a program" >&2; exit 1; }
while read -r soname _ path _; do
    if [[ $soname =~ $host || -e $top/lib/$soname ]]; then
        continue
    fi
    [[ $path = /* ]] || { echo "bundle: the loader does not find $soname" >&2; exit 1; }
    cp -L "$path" "$top/lib/$soname"
    readlink -f "$path" >>"$work/taken"
done < <(grep ' => ' "$work/ldd" | sort -u)

# ---- small, and at home wherever it lies. Symbols of our own programs stay: they make a backtrace readable
chmod -R u+w "$top"
find "$top" -type f \( -path '*/lib/*' ! -name 'libbalancekv*' -exec strip --strip-unneeded {} + \
    -o -exec strip --strip-debug {} + \)
find "$top/lib" -type f -exec patchelf --force-rpath --set-rpath "\$ORIGIN" {} +
find "$top/bin" "$top/tests" -type f -exec patchelf --force-rpath --set-rpath "\$ORIGIN/../lib" {} +

# ---- what one should have at hand, and what the libraries' authors ask for
cp README.md LICENSE deploy/balancekvd.{conf.example,service} client/balancekv.h proto/balancekv.proto "$top/share"
if command -v dpkg-query >/dev/null; then # which may know /usr/lib/x as /lib/x
    { cat "$work/taken"; sed 's|^/usr||' "$work/taken"; } | { xargs -r dpkg-query -S 2>/dev/null || true; } |
        cut -d: -f1 | sort -u | while read -r package; do
            text=/usr/share/doc/$package/copyright
            [ ! -e "$text" ] || cp -L "$text" "$top/share/licenses/$package"
        done
fi

# The same inputs make the same bytes.
mkdir -p "$(dirname "$output")"
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@${SOURCE_DATE_EPOCH:-0}" -cf - "$name" |
    gzip -n9 >"$output"
least=$(find "$top"/{bin,lib,tests} -type f -exec objdump -T {} + | grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -n 1)
echo "$output: $(du -h "$output" | cut -f1), $(find "$top/lib" -type f | wc -l) libraries; runs with ${least/_/ } or newer"
