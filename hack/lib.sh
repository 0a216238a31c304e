# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Functions for the scripts beside this file: messages, a lock, and installing Debian packages into a prefix.

# Downloads and tools are outside the checkout, so that several checkouts share them.
PREFIX=${REKINDLE_PREFIX:-${XDG_CACHE_HOME:-$HOME/.cache}/rekindle}

say() { printf '%s\n' "${0##*/}: $*" >&2; }
trap 'say "failed at ${BASH_SOURCE[0]##*/}:$LINENO: $BASH_COMMAND"' ERR
die() { say "error: $*"; exit 1; }

# Run a command; print its output only if it fails.
quietly() {
  local log
  log=$(mktemp)
  if ! "$@" </dev/null >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    rm -f "$log"
    die "this command failed: $*"
  fi
  rm -f "$log"
}

# Let only one installer run: two that start together must not build the same directory.
take_lock() {
  mkdir -p "$PREFIX"
  exec 9>"$PREFIX/.lock"
  flock 9
}

# use_debian SUITE COMPONENT STATE
# Let apt use one component of a Debian suite, and of sid for experimental, which builds on it. The system's
# package database is neither read nor changed: apt gets a state of its own in which nothing is installed, in
# the directory STATE, until APT_CONFIG is unset.
use_debian() {
  local suite=$1 component=$2 state=$3 mirror keyring
  mkdir -p "$state/lists/partial" "$state/empty" "$PREFIX/downloads/partial"

  # Use the mirror that this machine already uses for Debian. apt-get expands the names in its format.
  # shellcheck disable=SC2016
  mirror=${REKINDLE_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
    awk '$1 == "Debian" && $2 == "Debian" && $3 == "main" { print $4; exit }')}
  [ -n "$mirror" ] || die "no Debian mirror in apt's sources: set REKINDLE_DEBIAN_MIRROR to the URL of one"
  keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  [ -e "$keyring" ] || die "missing $keyring: install the package debian-archive-keyring"
  echo "deb [signed-by=$keyring] $mirror $suite $component" >"$state/sources.list"
  [ "$suite" != experimental ] || echo "deb [signed-by=$keyring] $mirror sid $component" >>"$state/sources.list"
  cat >"$state/apt.conf" <<APT
Dir::State "$state";
Dir::State::lists "$state/lists";
Dir::State::status "/dev/null";
Dir::Cache "$state";
Dir::Cache::archives "$PREFIX/downloads";
Dir::Etc::sourcelist "$state/sources.list";
Dir::Etc::sourceparts "$state/empty";
Dir::Etc::preferencesparts "$state/empty";
APT::Install-Recommends "false";
APT::Default-Release "$suite";
APT
  export APT_CONFIG=$state/apt.conf
  quietly apt-get update
}

# unpack_debian SUITE DESTINATION PACKAGE...
# Unpack packages with all their dependencies, libc included, below DESTINATION. apt's resolver names every
# dependency, since nothing is installed.
unpack_debian() {
  local suite=$1 destination=$2 state
  shift 2
  state=$(mktemp -d "$PREFIX/apt.XXXXXX")
  use_debian "$suite" main "$state"
  quietly apt-get install --yes --download-only "$@"
  # "Inst NAME (VERSION SUITE [ARCHITECTURE])"; apt writes the colon of an epoch as %3a in file names.
  local archives
  archives=$(apt-get install --simulate "$@" |
    sed -nE 's/^Inst ([^ ]+) \(([^ ]+) .*\[([a-z0-9]+)\]\).*/\1_\2_\3.deb/p' | sed 's/:/%3a/')
  unset APT_CONFIG
  [ -n "$archives" ] || die "no packages found for: $*"
  mkdir -p "$destination"
  local archive
  for archive in $archives; do
    quietly dpkg-deb --extract "$PREFIX/downloads/$archive" "$destination"
  done
  rm -rf "$state"
}

# wrap_program ROOT PROGRAM WRAPPER
# Write a script that starts a program unpacked below ROOT with the libraries and the dynamic loader from there.
wrap_program() {
  local root=$1 program=$2 wrapper=$3 loader triplet
  loader=$(find "$root" -name 'ld-linux*.so.*' -path '*-linux-gnu*' | head -n 1)
  triplet=$(basename "$(dirname "$loader")")
  mkdir -p "$(dirname "$wrapper")"
  cat >"$wrapper.new" <<SCRIPT
#!/bin/sh
exec "$loader" --library-path "$root/lib/$triplet:$root/usr/lib/$triplet" "$root/$program" "\$@"
SCRIPT
  chmod 755 "$wrapper.new"
  mv "$wrapper.new" "$wrapper"
}
