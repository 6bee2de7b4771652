#!/bin/sh
# Unpack the kernel of guests (tools/guest.py) into a new directory: Debian's for clouds, the
# smallest that there is, with the modules of a virtio disk. Nothing is installed.
set -eu
target=$1

# Those that the kernel has built in have no files.
modules="virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
    crc16 crc32c_generic mbcache jbd2 ext4"

command -v apt-get >/dev/null 2>&1 || exit 1
[ "$(id -u)" != 0 ] || apt-get -qq update >/dev/null
package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
    sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)/\1/p' | head -n 1)
[ -n "$package" ] || exit 1

echo "unpacking $package for guests"
download=$(mktemp -d)
trap 'rm -rf "$download" "$target.new"' EXIT
(cd "$download" && apt-get -qq -o APT::Sandbox::User=root download "$package" >/dev/null)
dpkg-deb -x "$download/$package"_*.deb "$download/unpacked"

rm -rf "$target.new"
mkdir "$target.new"
cp "$download"/unpacked/boot/vmlinuz-* "$target.new/vmlinuz"
for module in $modules; do
    find "$download/unpacked" -name "$module.ko*" -exec cp {} "$target.new" \;
done
chmod -R a+rX "$target.new"
mv "$target.new" "$target"
