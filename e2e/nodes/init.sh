#!/bin/sh
# Process 1 of an emulated node until the agent takes over. Kernel command line: ftvm.node=NAME, and for each network card in PCI order
# ftvm.ip=ADDRESS/PREFIX (or "none": left alone, up, without an address).
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc 2>/dev/null
mount -t sysfs sysfs /sys 2>/dev/null
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o remount,rw /
modprobe -a kvm-amd virtio_net tun bridge
ip link set lo up
index=0
for word in $(cat /proc/cmdline); do
  case $word in
    ftvm.node=*) hostname "${word#ftvm.node=}" ;;
    ftvm.ip=*)
      address=${word#ftvm.ip=}
      [ "$address" = none ] || ip address add "$address" dev "eth$index"
      ip link set "eth$index" up
      index=$((index + 1)) ;;
  esac
done
if [ -b /dev/vdc ]; then
  mkdir -p /data
  [ "$(blkid -o value -s TYPE /dev/vdc)" = ext4 ] || mke2fs -q -t ext4 -E lazy_itable_init=1 /dev/vdc
  mount -t ext4 /dev/vdc /data
fi
exec /lab/ftvm-node-agent
