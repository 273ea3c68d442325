#!/bin/sh
# Builds the Debian package: tools/deb.sh DIRECTORY writes the .deb there. It builds in a copy of the tree, so
# that no files are left in or next to the tree.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
tar -C "$root" --exclude-vcs --exclude=./build --exclude=./dist --exclude=./.venv --exclude=./.tox --exclude=__pycache__ \
    --exclude='*.egg-info' --exclude='.*_cache' --exclude=./.hypothesis -cf - . | tar -C "$work/source" -xf -
cd "$work/source"
dpkg-buildpackage --build=binary --unsigned-source --unsigned-changes >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
mv "$work"/*.deb "$out"
