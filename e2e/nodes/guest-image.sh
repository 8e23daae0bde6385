#!/bin/sh
# Finishes the root file system of the Debian guest; $1 is its root folder.
set -e
cd "$1"
echo guest > etc/hostname
echo '/dev/vda / ext4 defaults,errors=remount-ro 0 1' > etc/fstab
cat > etc/network/interfaces <<'NETWORK'
auto lo
iface lo inet loopback
auto eth0
iface eth0 inet static
  address 10.79.0.100/24
NETWORK
# Redis answers an increment only after it is on the disk.
sed -i -E 's/^bind .*/bind 0.0.0.0/; s/^protected-mode .*/protected-mode no/; s/^save .*//
  s/^appendonly .*/appendonly yes/; s/^appendfsync .*/appendfsync always/; s/^# *save .*//' etc/redis/redis.conf
echo 'save ""' >> etc/redis/redis.conf
# Root logs in from the test machine without a password: the network is the lab's own.
sed -i 's/^root:[^:]*:/root::/' etc/shadow
echo 'DROPBEAR_EXTRA_ARGS="-B"' >> etc/default/dropbear
# What a virtual machine without desktop, removable devices and other file systems does not need takes most of the time of an emulated boot.
for service in udev brightness hwclock.sh kmod mountnfs.sh mountnfs-bootclean.sh bootlogs rmnologin urandom; do
  rm -f etc/rc?.d/S??"$service"
done
# The login prompts of a text screen: there is none.
sed -i -E 's/^([2-6]:.*)/#\1/; s/^#?T0:.*//' etc/inittab
echo 'T0:23:respawn:/sbin/getty -L ttyS0 115200 vt100' >> etc/inittab
sed -i 's/^MODULES=.*/MODULES=list/' etc/initramfs-tools/initramfs.conf
printf 'virtio_pci\nvirtio_blk\nvirtio_net\nvirtio_rng\n' >> etc/initramfs-tools/modules
chroot . update-initramfs -u -k all
cat > etc/init.d/guest-ready <<'READY'
#!/bin/sh
### BEGIN INIT INFO
# Provides: guest-ready
# Required-Start: $all
# Required-Stop:
# Default-Start: 2 3 4 5
# Default-Stop:
# Short-Description: Says on the console that all services are up
### END INIT INFO
[ "$1" = start ] && echo "guest ready, up for $(cut -d' ' -f1 /proc/uptime) s" > /dev/console
exit 0
READY
chmod 755 etc/init.d/guest-ready
chroot . update-rc.d guest-ready defaults
# Files of known content for the HTTP server: the file name is the seed and the length says how many numbers follow, one a line.
for count in 1000 20000; do
  seq 1 "$count" > "var/www/html/count-$count"
done
