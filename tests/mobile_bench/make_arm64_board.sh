#!/usr/bin/env bash
# An ARM64 Debian with sshd, Python and ai-edge-litert in FOLDER, to be run under qemu-user as the 'board' of
# test_board.py. Needs root, debootstrap, qemu-user-static, binfmt-support and pip. Nothing in it is installed the
# usual way: the packages are only unpacked, which takes seconds instead of minutes of emulation.
#
#     tests/mobile_bench/make_arm64_board.sh [FOLDER] [DEBIAN MIRROR]
set -euo pipefail
folder=${1:-$HOME/.cache/tfopt-dev/arm64} mirror=${2:-} # debootstrap's own by default
work=$folder.making
rm -rf "$work" && mkdir -p "$work"
debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,openssh-server bookworm "$work" ${mirror:+"$mirror"}
for package in "$work"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$work"; done
rm -rf "$work"/var/cache/apt/archives/*.deb "$work/debootstrap"
printf 'root:x:0:0:root:/root:/bin/sh\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n' >"$work/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$work/etc/group"
# Without these XNNPACK finds no processor and leaves; with a whole /sys the runtime crashes under qemu-user.
mkdir -p "$work/sys/devices/system/cpu" "$work/run/sshd" "$work/root" "$work/proc"
echo 0-1 | tee "$work/sys/devices/system/cpu/possible" >"$work/sys/devices/system/cpu/present"
for device in null urandom random zero; do
  [ -e "$work/dev/$device" ] || cp -a "/dev/$device" "$work/dev/"
done
python3 -m pip install --quiet --disable-pip-version-check --target "$work/usr/lib/python3/dist-packages" \
  --python-version 3.11 --implementation cp --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
  --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 --only-binary=:all: \
  'ai-edge-litert>=2.3,<3' 'numpy<3'
mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
update-binfmts --enable qemu-aarch64
rm -rf "$folder" && mv "$work" "$folder"
chroot "$folder" /usr/bin/python3 -c 'import numpy, platform; from ai_edge_litert.interpreter import Interpreter
print("ready:", platform.machine(), "Python", platform.python_version())'
