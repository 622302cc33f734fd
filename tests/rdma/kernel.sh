#!/bin/bash
# kernel.sh - fetches the distribution's own kernel for the guest and keeps of it what the guest needs: prints the folder that
# then holds vmlinuz, modules/*.ko and modules/order (how to load them). run-in-vm.sh boots it.
#
# Done once: 70 MB come by apt-get download (of Ubuntu 170 MB, where RDMA is in linux-modules-extra), 12 MB stay in $BKV_VM_CACHE
# (default ${XDG_CACHE_HOME:-~/.cache}/balancekv). Nothing is installed. Exit status 77: it is not to be had here, and stderr has
# the reason.
set -eu -o pipefail
cache=${BKV_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/balancekv}
wanted=(virtio_pci virtio_net 9pnet_virtio 9p overlay veth crc32_generic rdma_rxe rdma_ucm)
cannot() { echo "kernel.sh: $*" >&2; exit 77; }

version=1 # of what is kept: another one is another folder
for kept in "$cache/kernel-v$version-"*/modules/order; do
    if [ -s "$kept" ]; then dirname "$(dirname "$kept")"; exit 0; fi
done

PATH=$PATH:/usr/sbin:/sbin
for tool in apt-get dpkg-deb modprobe depmod; do
    command -v "$tool" >/dev/null || cannot "no $tool here"
done

# The packages of the newest kernel: what the meta package depends on.
depends() { apt-cache depends --no-recommends --no-suggests "$1" 2>/dev/null | sed -n 's/^ *Depends: //p'; }
packages_of() { # pattern of package names, meta package...
    local pattern=$1 meta; shift
    for meta in "$@"; do depends "$meta" | grep -E "$pattern" && return; done
}
find_packages() {
    mapfile -t packages < <(packages_of '^linux-image-[0-9].*-amd64$' linux-image-amd64)
    [ "${#packages[@]}" = 0 ] || return 0
    mapfile -t packages < <(packages_of '^linux-(image|modules-extra)-[0-9].*-generic$' linux-image-generic)
    [ "${#packages[@]}" != 0 ] || return 1
    mapfile -t -O "${#packages[@]}" packages < <(packages_of '^linux-modules-[0-9].*-generic$' "${packages[@]}")
}
mkdir -p "$cache"
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
fetch() {
    find_packages || return
    echo "kernel.sh: downloading ${packages[*]} by apt-get download, once, for $cache" >&2
    (cd "$work" && apt-get -q -o APT::Sandbox::User="$(id -un)" download "${packages[@]}" >&2)
}
# What apt knows may be too old, or nothing yet.
fetch || { [ "$(id -u)" = 0 ] && apt-get -q update >&2 && fetch; } ||
    cannot "neither linux-image-amd64 (Debian) nor linux-image-generic (Ubuntu) is to be had by apt; try apt-get update"
kernel=${packages[0]#linux-image-}

mkdir "$work/root" "$work/kept" "$work/kept/modules"
for package in "$work"/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/root" --exclude '*/kernel/drivers/gpu' --exclude '*/kernel/sound'
done
[ -d "$work/root/lib" ] || ln -s usr/lib "$work/root/lib"
depmod -b "$work/root" "$kernel"

# What each module needs comes before it; busybox loads plain .ko files.
for module in "${wanted[@]}"; do
    modprobe -d "$work/root" -S "$kernel" --show-depends "$module" || cannot "$kernel has no module $module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/files"
while read -r file; do
    name=$(basename "$file"); name=${name%%.ko*}.ko
    case $file in
    *.xz) xz -dc "$file" ;;
    *.zst) zstd -qdc "$file" ;;
    *) cat "$file" ;;
    esac >"$work/kept/modules/$name" || cannot "cannot unpack $file"
    echo "$name"
done <"$work/files" >"$work/kept/modules/order"
cp "$work/root/boot/vmlinuz-$kernel" "$work/kept/vmlinuz"
chmod -R u+w,a+rX "$work/kept"

kept=$cache/kernel-v$version-$kernel
mv -T "$work/kept" "$kept" 2>/dev/null || [ -s "$kept/modules/order" ] # another run may have been faster
echo "$kept"
