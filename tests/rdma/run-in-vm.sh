#!/bin/bash
# run-in-vm.sh - runs a command where there is RDMA: in a throw-away qemu guest that boots the distribution's own kernel with
# Soft-RoCE (rxe) and sees this machine's whole file system, read only, with memory on top. No hardware, no root, no KVM needed.
#
#   run-in-vm.sh [-t SECONDS] [-m MEMORY] [-w FOLDER] [-j FOLDER -n {1|2}] [--] COMMAND [ARGUMENT...]
#
#   -t SECONDS  wall limit of the guest, boot included (default 120)
#   -m MEMORY   of the guest, in qemu's syntax (default 2G); what the command writes lives in it too
#   -w FOLDER   is shared with the guest for writing, at the same path; everything else it writes vanishes
#   -j FOLDER   joins two guests (-n 1 and -n 2) by a network: 10.77.9.1 and 10.77.9.2. FOLDER is for their sockets
#
# The command runs in the same folder with the same environment and BKV_GUEST=1. Its output comes back as ours, both streams as
# one, and its exit status is ours. Further statuses: 77 no guest can be had here (the reason is on stderr), 124 the guest ran
# into its limit, 125 it ended before the command did. Killed by a signal, the guest ends as if its power were cut.
# guest-init.sh says what devices there are; kernel.sh fetches the kernel, once.
set -u -o pipefail
here=$(dirname "$(realpath "$0")")
limit=120 memory=2G share='' join='' node=''
while [ $# -gt 0 ]; do
    case $1 in
    -t) limit=$2; shift 2 ;;
    -m) memory=$2; shift 2 ;;
    -w) share=$(realpath "$2"); shift 2 ;;
    -j) join=$(realpath "$2"); shift 2 ;;
    -n) node=$2; shift 2 ;;
    --) shift; break ;;
    -*) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0" >&2; exit 2 ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || { echo "run-in-vm: no command" >&2; exit 2; }

for tool in qemu-system-x86_64 busybox cpio setpriv; do
    command -v "$tool" >/dev/null || { echo "run-in-vm: no $tool here (make setup)" >&2; exit 77; }
done
kernel=$("$here/kernel.sh") || exit

state=$(mktemp -d "${TMPDIR:-/tmp}/bkv-guest.XXXXXX") || exit 125
guest=''
# shellcheck disable=SC2317 # reached by the trap
finish() { [ -z "$guest" ] || kill -KILL "$guest" 2>/dev/null; wait; rm -rf "$state"; }
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# -- what the guest is to do
mkdir "$state/job" "$state/root"
{
    export -p
    echo 'export BKV_GUEST=1'
    printf 'cd %q\nexec' "$PWD"
    printf ' %q' "$@"
    echo
} >"$state/job/command"
printf 'NODE=%q SHARE=%q\n' "$node" "$share" >"$state/job/settings"
: >"$state/job/output"

# -- its initramfs: busybox, the modules and guest-init.sh
(
    cd "$state/root" && mkdir bin dev lower proc root sys upper &&
        cp "$(command -v busybox)" bin/busybox && cp -r "$kernel/modules" modules &&
        cp "$here/guest-init.sh" init && chmod 755 init &&
        find . | cpio -o -H newc -R 0:0 --quiet >"$state/initrd"
) || { echo "run-in-vm: cannot make the initramfs" >&2; exit 125; }

# A /dev/kvm may be there without a CPU behind it on which a kernel gets anywhere. Emulated string instructions are slow.
if [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo; then
    machine=(-accel kvm -cpu host)
else
    machine=(-accel 'tcg,thread=multi,tb-size=512' -cpu 'max,la57=off,erms=off,fsrm=off')
fi
network=(-nic none)
if [ -n "$join" ]; then
    rm -f "$join/$node"
    network=(-netdev "dgram,id=lan,local.type=unix,local.path=$join/$node,remote.type=unix,remote.path=$join/$((3 - node))"
        -device "virtio-net-pci,netdev=lan,mac=52:54:00:77:09:0$node,host_mtu=4200,romfile=")
fi
folder() { printf 'local,path=%s,mount_tag=%s,security_model=none,multidevs=remap%s' "$1" "$2" "${3:-}"; }
folders=(-virtfs "$(folder / host ,readonly=on)" -virtfs "$(folder "$state/job" job)")
[ -z "$share" ] || folders+=(-virtfs "$(folder "$share" share)")

# Whoever kills this script kills the guest. On a busy machine an emulated timer is too late for the kernel's own check of it.
setpriv --pdeathsig KILL timeout --signal KILL "$limit" setpriv --pdeathsig KILL \
    qemu-system-x86_64 -M q35 "${machine[@]}" -smp "$(($(nproc) < 4 ? $(nproc) : 4))" -m "$memory" -nodefaults -no-user-config \
    -display none -monitor none -no-reboot -serial "file:$state/console" -kernel "$kernel/vmlinuz" -initrd "$state/initrd" \
    -append 'console=ttyS0 quiet no_timer_check panic=-1 oops=panic mitigations=off random.trust_cpu=on tsc=reliable' \
    "${folders[@]}" "${network[@]}" </dev/null 2>"$state/qemu" &
guest=$!
tail -q -n +1 -s 0.1 -f --pid "$guest" "$state/job/output" &
{ wait "$guest"; } 2>/dev/null # of a guest that was killed bash has something to say
status=$?
guest=''
wait # for tail

if [ -s "$state/job/status" ]; then exit "$(cat "$state/job/status")"; fi
tail -n 40 "$state/console" "$state/qemu" >&2
if [ "$status" = 137 ]; then echo "run-in-vm: the guest ran into its limit of $limit s" >&2; exit 124; fi
echo "run-in-vm: the guest ended before the command did" >&2
exit 125
