#!/usr/bin/env bash
# Installs what the Makefile's targets need, and says what, why and how far.
#
#     tools/setup.sh packages WHY NAME...    the Debian packages among NAME that are missing; no service is started or enabled
#     tools/setup.sh run WHAT COMMAND...     run a command quietly
#
# While something runs, its last line is shown every 4 seconds. If it fails, all of its output is shown.
set -euo pipefail
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

EVERY=4 # seconds between two lines
UNITS=/etc/systemd/system
POLICY=/usr/sbin/policy-rc.d
log=$(mktemp)
ours='' # the policy file, while it is ours
running='' # the command, while it runs
trap '[ -z "$running" ] || { kill "$running"; wait "$running"; } 2>/dev/null; rm -f "$log" $ours' EXIT
trap 'exit 130' INT TERM HUP

# run WHAT COMMAND...: run a command, with a line at its start, one every few seconds, and one at its end
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

# packages WHY NAME...: install what is missing, as on a machine whose services must stay as they are
packages() {
    local why=$1 names before
    shift
    mapfile -t names < <(missing "$@")
    ((${#names[@]})) || return 0
    before=$(enabled_units)
    if [ ! -e "$POLICY" ]; then # the file by which Debian's packages ask whether they may start a service
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
