#!/bin/sh
# Finishes the root file system of an emulated node; $1 is its root folder.
set -e
# Everything of the lab's own comes on a second disk, so that this image stays the same while the project changes.
cat > "$1/usr/sbin/lab-init" <<'INIT'
#!/bin/sh
/bin/mount -o ro -t ext4 /dev/vdb /lab && exec /lab/init.sh
INIT
chmod 755 "$1/usr/sbin/lab-init"
mkdir -p "$1/lab" "$1/data" "$1/share"
# A small initrd boots sooner: only what leads to the root disk.
sed -i 's/^MODULES=.*/MODULES=list/' "$1/etc/initramfs-tools/initramfs.conf"
printf 'virtio_pci\nvirtio_blk\n' >> "$1/etc/initramfs-tools/modules"
chroot "$1" update-initramfs -u -k all
