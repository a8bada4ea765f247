#!/usr/bin/env bash
# What some tests talk to and Python's packages do not bring, on Debian, as root: a browser, whose package also holds
# SwiftShader (a GPU in software), the Vulkan loader, an SSH server, and adb with Android's adbd. Whatever cannot be
# had is said, and the tests that need it skip with their reason.
#
#     tests/install_services.sh
set -uo pipefail
command -v apt-get >/dev/null 2>&1 || { echo 'install_services.sh: only for Debian and its like' >&2; exit 0; }
[ "$(id -u)" = 0 ] || { echo 'install_services.sh: needs root' >&2; exit 0; }
adbd=${TFOPT_ADBD:-$HOME/.cache/tfopt-dev/adbd/root}
log=$(mktemp)
missing() { echo "install_services.sh: no $1 (see $log)" >&2; }

declare -A program=(
  [chromium]=/usr/bin/chromium [libvulkan1]=/usr/lib/$(uname -m)-linux-gnu/libvulkan.so.1 [gcc]=/usr/bin/gcc
  [openssh-server]=/usr/sbin/sshd [openssh-client]=/usr/bin/ssh-keygen [adb]=/usr/bin/adb [iproute2]=/usr/bin/ip
)
wanted=()
for package in "${!program[@]}"; do [ -e "${program[$package]}" ] || wanted+=("$package"); done
if [ ${#wanted[@]} -gt 0 ]; then
  apt-get update -qq >>"$log" 2>&1
  for package in "${wanted[@]}"; do
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >>"$log" 2>&1 ||
      missing "$package"
  done
fi

# adbd is in the backports only, and is unpacked rather than installed: as a service it would open a root shell.
unpack_adbd() {
  local work release mirror options
  work=$(mktemp -d) && cd "$work" && apt-get update -qq || return 1
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' |
    awk -v release="$release" '$2 == release { print $1; exit }')
  [ -n "$mirror" ] || return 1
  mkdir -p lists/partial
  printf 'deb %s %s main\n' "$mirror" "$release" "$mirror" "$release-backports" >sources.list
  options=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$work/lists")
  apt-get "${options[@]}" update || return 1
  apt-get "${options[@]}" -t "$release-backports" download \
    adbd android-libbase android-libcutils android-liblog android-libboringssl || return 1
  apt-get "${options[@]}" download libprotobuf32 || return 1
  mkdir -p "$adbd.new" && for package in ./*.deb; do dpkg-deb -x "$package" "$adbd.new" || return 1; done
  rm -rf "$adbd" && mv "$adbd.new" "$adbd" && rm -rf "$work"
}
if [ ! -e "$adbd/usr/lib/android-sdk/platform-tools/adbd" ]; then
  (unpack_adbd) >>"$log" 2>&1 || missing adbd
fi
