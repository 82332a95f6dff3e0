#!/bin/sh
# Health of a router: its daemons answer, and so have read their configuration.
set -eu
for daemon in zebra bgpd bfdd; do vtysh -d "$daemon" -c 'show version' >/dev/null; done
