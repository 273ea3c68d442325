#!/bin/sh
# First program in the namespaces of the guest on the machine's own kernel. It lays a throw-away overlay over the machine's
# files, runs $1/run there and leaves its status in $1/status. All mounts vanish with the namespaces.
set -e
job=$1
console=$job/console
exec 3>&1 >>"$console" 2>&1

mount --make-rprivate /
mkdir -p "$job/layers"
mount -t tmpfs -o size=75% tmpfs "$job/layers"
cd "$job/layers"
# lay WHERE ROOT: an overlay over one of the machine's file systems, as an overlay shows what is mounted below it empty
lay() {
    layer=$((layer + 1))
    mkdir "upper$layer" "work$layer"
    mount -t overlay -o "lowerdir=$1,upperdir=upper$layer,workdir=work$layer" overlay "$2"
}
# bind WHERE ROOT: the file system itself, read-only, where there can be no overlay over it
bind() {
    mount --bind "$1" "$2" && { mount -o remount,bind,ro "$2" || { umount -l "$2" && false; }; }
}
mkdir root
layer=0
lay / root
while read -r _ where kind _; do
    case $where in *\\*) where=$(printf "$(echo "$where" | sed 's/%/%%/g')") ;; esac # a blank is \040 there
    case $kind in proc | sysfs | devtmpfs | devpts | cgroup* | mqueue | nsfs | *pstore | securityfs | debugfs | tracefs | bpf) continue ;; esac
    case $where in / | /proc | /proc/* | /sys | /sys/* | /dev | /dev/* | /run | /run/* | "$job"*) continue ;; esac
    [ -d "root$where" ] || continue
    lay "$where" "root$where" || bind "$where" "root$where" || echo "$where is left out"
done </proc/self/mounts
mkdir -p "root/dev" "root$job"
mount -t tmpfs -o mode=755 tmpfs root/dev
for device in null zero full random urandom tty; do
    : >"root/dev/$device"
    mount --bind "/dev/$device" "root/dev/$device"
done
mkdir root/dev/net
mknod root/dev/net/tun c 10 200
mknod root/dev/vhost-net c 10 238 # numbers of include/linux/miscdevice.h; opening one loads its module
ln -s pts/ptmx root/dev/ptmx
ln -s /proc/self/fd root/dev/fd
mkdir -p root/dev/pts root/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts root/dev/pts
mount -t tmpfs tmpfs root/dev/shm
mount -t tmpfs -o mode=755 tmpfs root/run
mkdir -p "root$job"
mount --bind "$job" "root$job"
mkdir -p root/mnt/host
cd root
pivot_root . mnt/host
mount -t proc proc /proc
mount -t sysfs sysfs /sys
umount -l /mnt/host
# What /proc/sys has of the whole machine is read-only. What it has of the network is this namespace's.
mount --bind /proc/sys /proc/sys
mount --bind /proc/sys/net /proc/sys/net
mount -o remount,bind,ro /proc/sys
ip link set lo up

status=0
setsid sh "$job/run" >&3 2>&1 3>&- || status=$?
echo "$status" >"$job/status"
