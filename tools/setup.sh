#!/usr/bin/env bash
# Installs the Debian packages that the Makefile's targets need, and reports the progress.
#
#     tools/setup.sh packages WHY NAME...    install the missing packages; start and enable no service
#     tools/setup.sh run WHAT COMMAND...     run a command quietly
#
# While something runs, its last line is shown every 4 seconds. If it fails, all of its output is shown. If this script is
# interrupted, so is what runs: apt finishes the package at hand first.
set -euo pipefail
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # dpkg needs these, and 'su' leaves them out

EVERY=4 # seconds between two lines
UNITS=/etc/systemd/system
POLICY=/usr/sbin/policy-rc.d
PATIENCE=60 # seconds that an interrupted command may take to end
log=$(mktemp)
ours='' # the policy file, while it is ours
running='' # the command, while it runs; it leads a process group
installing='' # 'yes' once packages may have changed the services
before='' # the units that were enabled before
trap 'exit 130' INT TERM HUP PIPE
trap clean_up EXIT

# clean_up: end what runs, and give the machine its services' states back, however this script ends
clean_up() {
    set +e # each step is taken
    trap '' INT TERM HUP PIPE
    if [ -n "$running" ]; then
        echo "Interrupted; what runs is asked to end" 2>/dev/null
        kill -INT -- "-$running" 2>/dev/null
        for ((i = 0; i < 10 * PATIENCE; i++)); do
            kill -0 "$running" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$running" 2>/dev/null
    fi
    [ -z "$installing" ] || restore_services
    rm -f "$log"
}

# run WHAT COMMAND...: run a command; print a line at its start, every few seconds, and at its end
run() {
    local what=$1 began=$SECONDS shown=$SECONDS status=0 line
    shift
    echo "$what"
    env --default-signal=INT setsid "$@" >"$log" 2>&1 </dev/null & # bash has what is in the background ignore SIGINT
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
    local why=$1 names
    shift
    mapfile -t names < <(missing "$@")
    ((${#names[@]})) || return 0
    if ((EUID)); then
        echo "These Debian packages are missing, $why: ${names[*]}; run this as root, or install them"
        return 1
    fi
    before=$(enabled_units)
    installing=yes
    if [ ! -e "$POLICY" ]; then # the file by which Debian's packages ask whether they may start a service
        ours=$POLICY
        printf '#!/bin/sh\n# %s\nexit 101\n' "for vpp-ipsec's tools/setup.sh, which removes this file at its end" >"$POLICY"
        chmod +x "$POLICY"
    fi
    run "Reading Debian's package lists" apt-get -qq update
    run "Installing ${#names[@]} Debian packages, $why: ${names[*]}" \
        apt-get -y --no-install-recommends install "${names[@]}"
}

# restore_services: let packages start services again, and disable those that were enabled meanwhile
restore_services() {
    local unit
    rm -f $ours
    for unit in $(comm -13 <(echo "$before") <(enabled_units)); do
        systemctl disable "$unit" >/dev/null 2>&1 || find "$UNITS" -type l -path "*.wants/$unit" -delete
        echo "  left the service $unit disabled, as nothing here needs it"
    done
}

action=$1
shift
"$action" "$@"
