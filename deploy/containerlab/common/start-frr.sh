#!/bin/sh
# FRR as a container's first process, in any image that has it: this repository's, FRR's own (8.4 to 10.x), a distribution's.
set -e
# The management network's gateway is no next hop of the fabric: qpd would take eth0 for an uplink.
ip route flush exact default
ip -6 route flush exact default
# Shared with qpd as a volume; one that is new belongs to root.
mkdir -p /var/run/frr
chown frr:frr /var/run/frr
rm -f /var/run/frr/configured
# What FRR's library of shell functions wants to be given.
log_success_msg() { echo "$@"; }
log_warning_msg() { echo "$@" >&2; }
log_failure_msg() { echo "$@" >&2; }
# shellcheck source=/dev/null
. /usr/lib/frr/frrcommon.sh
# Not by watchfrr, which gives all daemons together 20 s and on a slow machine stops before they have their configuration.
# Its last word is vtysh's about the configuration.
set +e
all_start && touch /var/run/frr/configured
# Not exec: whatever loses its parent becomes this shell's child, and `wait` sees to its end.
# shellcheck disable=SC2046 # one word a daemon
/usr/lib/frr/watchfrr --restart-timeout 120 $(daemon_list) &
wait $!
