# A guest image: what a VM boots and begins with. Nothing of it is run. docs/kubernetes.md, "Guest images", explains it.
#   docker build --file docs/examples/guest.Dockerfile --tag REGISTRY/guests/web:1 FOLDER
# FOLDER has the guest's kernel, its initial RAM disk, and a file for each disk that begins with contents. All may read them in the image.
FROM scratch
COPY --chmod=0644 vmlinuz initrd /boot/
COPY --chmod=0644 root.raw /disk/
