#!/bin/busybox sh
# First program of the guest of QEMU's: loads what gets the kernel to the host's files, and goes on with $LAB_INIT there.
set -e
busybox mount -t devtmpfs dev /dev
for module in /modules/*; do busybox insmod "$module"; done
busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro root /root
busybox umount /dev
exec busybox switch_root /root "$LAB_INIT"
