#!/bin/busybox sh
# shellcheck shell=dash
# guest-init.sh - the guest's first process (run-in-vm.sh puts it into the initramfs): makes the host's root file system, read
# only, the guest's, with memory on top for what is written; sets up the network and its Soft-RoCE devices; runs the command in
# /job/command; leaves its exit status in /job/status; powers off.
#
#   lo    127.0.0.1
#   veth0 10.77.0.1 with rxe0, veth1 10.77.0.2 with rxe1: two ends of one cable
#   lan   10.77.9.1 or .2 with rxe0, in place of rxe0 on veth0, when two guests are joined
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

off() {
    sync
    echo o >/proc/sysrq-trigger
    while :; do sleep 60; done
}
fail() {
    echo "guest-init: $*" >/dev/console
    off
}

while read -r module; do
    insmod "/modules/$module" || fail "cannot load $module"
done </modules/order

# -- file systems: the host's below, memory above
shared=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o "$shared,ro,cache=loose" host /lower || fail "no root file system from the host"
mount -t tmpfs -o size=75% memory /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work,xino=off overlay /root || fail "no overlay"
mount -t proc proc /root/proc
mount -t sysfs sysfs /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts -o ptmxmode=666 devpts /root/dev/pts
mount -t tmpfs -o mode=1777 memory /root/dev/shm
mount -t tmpfs -o mode=755 memory /root/run
for link in fd:/proc/self/fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -sf "${link#*:}" "/root/dev/${link%%:*}"; done
mkdir /root/run/job
mount -t 9p -o "$shared,rw,cache=none" job /root/run/job || fail "no job from the host"
# shellcheck source=/dev/null
. /root/run/job/settings # NODE, SHARE
if [ -n "$SHARE" ]; then
    mkdir -p "/root$SHARE"
    mount -t 9p -o "$shared,rw,cache=none" share "/root$SHARE" || fail "cannot share $SHARE"
fi

# -- network, with the host's own tools
cat >/root/run/network <<'NETWORK'
PATH=/usr/sbin:/usr/bin:/sbin:/bin
device() { # rdma device, network device; `rdma link add` exits 0 even when it fails
    rdma link add "$1" type rxe netdev "$2"
    [ -d "/sys/class/infiniband/$1" ] || { echo "no $1 on $2"; exit 1; }
}
ip link set lo up
if [ -n "$NODE" ]; then
    for card in /sys/class/net/*; do
        case $(readlink -f "$card/device/driver") in */virtio_net) ip link set "${card##*/}" name lan mtu 4200 up ;; esac
    done
    ip addr add "10.77.9.$NODE/24" dev lan
    device rxe0 lan
else
    ip link add veth0 mtu 4200 type veth peer name veth1 mtu 4200
    ip addr add 10.77.0.1/24 dev veth0
    ip addr add 10.77.0.2/24 dev veth1
    for end in veth0 veth1; do
        echo 1 >/proc/sys/net/ipv4/conf/$end/accept_local # what comes over the cable is from an address of our own
        ip link set $end up
    done
    device rxe0 veth0
    device rxe1 veth1
fi
NETWORK
hostname "guest$NODE"
NODE=$NODE chroot /root /bin/sh /run/network >/dev/console 2>&1 || fail "no network"

# -- the command
ulimit -l unlimited
ulimit -c 0
chroot /root /bin/bash /run/job/command </dev/null >/root/run/job/output 2>&1
echo $? >/root/run/job/status
off
