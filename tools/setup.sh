#!/usr/bin/env bash
# Installs the Debian packages that the Makefile's targets need, and reports the progress.
#
#     tools/setup.sh packages WHY NAME...    install the missing packages; start and enable no service
#     tools/setup.sh run WHAT COMMAND...     run a command quietly
#
# It prints the last output line of a running command every 4 seconds. If the command fails, it prints the whole output.
set -euo pipefail
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

EVERY=4 # seconds between two lines
UNITS=/etc/systemd/system
POLICY=/usr/sbin/policy-rc.d
log=$(mktemp)
ours='' # the policy file, if this script made it
running='' # process id of the command, while it runs
trap '[ -z "$running" ] || { kill "$running"; wait "$running"; } 2>/dev/null; rm -f "$log" $ours' EXIT
trap 'exit 130' INT TERM HUP

# run WHAT COMMAND...: run a command; print a line at its start, every few seconds, and at its end
run() {
    local what=$1 began=$SECONDS shown=$SECONDS status=0 line
    shift
    echo "$what"
    "$@" >"$log" 2>&1 </dev/null &
    running=$!
    while kill -0 "$running" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - shown >= EVERY)); then
            shown=$SECONDS
            line=$({ grep -v "^WARNING" "$log" || true; } | tail -n 1 | tr -d '\r' | cut -c -100)
            echo "  $((SECONDS - began)) s: ${line:-at work}"
        fi
    done
    wait "$running" || status=$?
    running=''
    if ((status)); then
        cat "$log"
        echo "failed with status $status after $((SECONDS - began)) s: $*"
        return "$status"
    fi
    echo "  done in $((SECONDS - began)) s"
}

missing() {
    local name
    for name in "$@"; do
        dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q ' installed$' || echo "$name"
    done
}

enabled_units() {
    find "$UNITS" -type l -path '*.wants/*' -printf '%f\n' 2>/dev/null | sort -u
}

# packages WHY NAME...: install missing packages, without a change to the machine's services
packages() {
    local why=$1 names before
    shift
    mapfile -t names < <(missing "$@")
    ((${#names[@]})) || return 0
    before=$(enabled_units)
    if [ ! -e "$POLICY" ]; then # Debian's packages run this file to ask whether they may start a service
        ours=$POLICY
        printf '#!/bin/sh\nexit 101\n' >"$POLICY"
        chmod +x "$POLICY"
    fi
    run "Reading Debian's package lists" apt-get -qq update
    run "Installing ${#names[@]} Debian packages, $why: ${names[*]}" \
        apt-get -y --no-install-recommends install "${names[@]}"
    rm -f $ours
    ours=''
    local unit
    for unit in $(comm -13 <(echo "$before") <(enabled_units)); do
        systemctl disable "$unit" >/dev/null 2>&1 || find "$UNITS" -type l -path "*.wants/$unit" -delete
        echo "  left the service $unit disabled, as nothing here needs it"
    done
}

action=$1
shift
"$action" "$@"
