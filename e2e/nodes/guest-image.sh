#!/bin/sh
# Finishes the root file system of the Debian guest; $1 is its root folder.
set -e
cd "$1"
echo guest > etc/hostname
echo '/dev/vda / ext4 defaults,errors=remount-ro 0 1' > etc/fstab
# Redis answers an increment only after it is on the disk.
sed -i -E 's/^bind .*/bind 0.0.0.0/; s/^protected-mode .*/protected-mode no/
  s/^appendonly .*/appendonly yes/; s/^appendfsync .*/appendfsync always/; s/^# *save .*//' etc/redis/redis.conf
echo 'save ""' >> etc/redis/redis.conf
# Root logs in from the test machine without a password: the network is the lab's own.
sed -i 's/^root:[^:]*:/root::/' etc/shadow
echo 'DROPBEAR_EXTRA_ARGS="-B"' >> etc/default/dropbear
# A start and stop of its own: an emulated boot through all scripts of a general-purpose system takes a minute, most of it in
# services that this guest has no use for. The three daemons are started by their packages' own scripts.
cat > etc/inittab <<'INITTAB'
id:2:initdefault:
si::sysinit:/etc/guest-start
l0:0:wait:/etc/guest-stop halt
l6:6:wait:/etc/guest-stop reboot
ca:12345:ctrlaltdel:/sbin/shutdown -r now
T0:2:respawn:/sbin/getty -L ttyS0 115200 vt100
INITTAB
cat > etc/guest-start <<'START'
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -o remount,rw /
hostname -F /etc/hostname
ip link set lo up
ip address add 10.79.0.100/24 dev eth0
ip link set eth0 up
for service in dropbear nginx redis-server; do "/etc/init.d/$service" start; done
echo "guest ready, up for $(cut -d' ' -f1 /proc/uptime) s" > /dev/console
START
cat > etc/guest-stop <<'STOP'
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
for service in redis-server nginx; do "/etc/init.d/$service" stop; done
killall5 -15
sleep 1
killall5 -9
sync
mount -o remount,ro /
echo "guest stopped: $1" > /dev/console
"$1" -d -f -i $([ "$1" = reboot ] || echo -p)
STOP
chmod 755 etc/guest-start etc/guest-stop
sed -i 's/^MODULES=.*/MODULES=list/' etc/initramfs-tools/initramfs.conf
printf 'virtio_pci\nvirtio_blk\nvirtio_net\nvirtio_rng\n' >> etc/initramfs-tools/modules
chroot . update-initramfs -u -k all
# What this guest never reads, and every resync would carry: drivers of other hardware, and the hardware's names.
for part in usr/lib/modules/*/kernel/*; do
  case $part in */drivers) ;; *) rm -r "$part" ;; esac
done
find usr/lib/modules/*/kernel/drivers -name '*.ko*' ! -path '*virtio*' -delete
rm -rf usr/lib/udev/hwdb.bin usr/lib/udev/hwdb.d
# Files of known content for the HTTP server: `seq 1 N`.
for count in 1000 20000 150000; do
  seq 1 "$count" > "var/www/html/count-$count"
done
