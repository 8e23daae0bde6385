# Makes an emulated machine a node: run as root once it has booted. The variable VOLUMES names the folders of its local volumes.
modprobe -a overlay br_netfilter nf_tables
mkdir -p /run/node /data/lib /data/log
ln -s /usr/local/bin /run/programs
# Pods may hand mounts to others (mountPropagation: Bidirectional).
mount --make-rshared /
# What lives below these outlives the machine.
for name in lib log; do mount --bind "/data/$name" "/var/$name"; done
mkdir -p /var/lib/kubelet $VOLUMES
echo 1 > /proc/sys/net/ipv4/ip_forward
