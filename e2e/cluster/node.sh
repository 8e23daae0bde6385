# Makes this a node's own system: run as root in the node's namespaces, after its init has mounted /proc, /sys and /run.
# Environment: FOLDER (the node's), PROGRAMS (a folder), CGROUPS (a script that mounts them), VOLUMES (their number on each datastore).
set -eu
mkdir /run/node /run/programs
mount --bind "$FOLDER" /run/node
mount --bind "$PROGRAMS" /run/programs
# Pods may hand mounts to others (mountPropagation: Bidirectional).
mount --make-rshared /
# What lives below these is the node's. /run/node keeps the folder in sight if these hide it.
for name in lib log; do mount --bind "/run/node/$name" "/var/$name"; done
# Datastores, if there are any: mount and loop device go with the node, what is on it stays.
for image in /run/node/datastores/*.image; do
    [ -e "$image" ] || continue
    class="$(basename "$image")"
    class="${class%%-*}"
    mount -t "$class" -o loop "$image" "/var/lib/volumes/$class"
    for number in $(seq "$VOLUMES"); do mkdir -p "/var/lib/volumes/$class/volume-$number"; done
done
eval "$CGROUPS"
# kubelet sets these for the whole machine: it gets copies to write to.
for file in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    [ -e "/proc/sys/$file" ] || continue
    copy="/run/$(echo "$file" | tr / .)"
    cat "/proc/sys/$file" > "$copy"
    mount --bind "$copy" "/proc/sys/$file"
done
echo 1 > /proc/sys/net/ipv4/ip_forward
