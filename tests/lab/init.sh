#!/bin/sh
# pid 1 of the guest: lays a throw-away overlay over the host's read-only root, runs $LAB_JOB/run there and leaves its status
# in $LAB_JOB/status. What it prints itself goes to the console. $LAB_SHARE is how that directory comes from the host,
# $LAB_OUTPUT the terminal for what the job prints, $LAB_MODULES where the kernel's modules are.
set -e
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
trap 'sync; echo o >/proc/sysrq-trigger; sleep 60' EXIT # pid 1 must not end before the power is off

mount -t proc proc /proc
modules=${LAB_MODULES:-/usr/lib/uml/modules/$(uname -r)}
[ ! -e "$modules" ] || insmod "$modules/kernel/fs/overlayfs/overlay.ko"
mount -t tmpfs -o size=75% tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root
mkdir -p mnt/host
pivot_root . mnt/host

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o mode=755 tmpfs /run
exec </dev/null >/dev/console 2>&1
mkdir -p /dev/pts /dev/shm /lib/modules "$LAB_JOB"
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
case $LAB_SHARE in # the one place that the guest shares with the host
hostfs) mount -t hostfs -o "$LAB_JOB" none "$LAB_JOB" ;;
9p) mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 job "$LAB_JOB" ;;
esac
ln -sfn "$modules" "/lib/modules/$(uname -r)"
modprobe ipv6 # no one asks for it by itself
ip link set lo up
stty -F "$LAB_OUTPUT" raw -echo

status=0
setsid sh "$LAB_JOB/run" >"$LAB_OUTPUT" 2>&1 || status=$?
echo $status >"$LAB_JOB/status"
