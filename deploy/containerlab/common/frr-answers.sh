#!/bin/sh
# Health of a router: its daemons have their configuration (start-frr.sh) and answer.
set -eu
[ -e /var/run/frr/configured ]
for daemon in zebra bgpd bfdd; do vtysh -d "$daemon" -c 'show version' >/dev/null; done
