#!/bin/sh
# Makes a port's link a wide-area one: what the port sends is delayed, lost and limited.
# usage: wan.sh PORT [limit PACKETS] [delay TIME [JITTER]] [loss PERCENT] [rate RATE]     (netem's words, tc-netem(8))
#        wan.sh PORT                                                                      (a plain wire again)
# Give a rate with a jitter: netem then keeps the packets in their order, as a wide-area link does.
# A kernel without netem still limits the rate, and says what it leaves out.
set -eu
port=$1
shift
if [ $# -eq 0 ]; then
    tc qdisc delete dev "$port" root 2>/dev/null || true
    exit 0
fi
if tc qdisc replace dev "$port" root netem "$@" 2>/dev/null; then
    exit 0
fi
rate=
last=
for word in "$@"; do
    if [ "$last" = rate ]; then rate=$word; fi
    last=$word
done
if [ -n "$rate" ]; then
    tc qdisc replace dev "$port" root tbf rate "$rate" burst 64kb latency 50ms
    echo "wan.sh: this kernel has no netem: wide-area links have their rate, and no delay or jitter"
else
    tc qdisc delete dev "$port" root 2>/dev/null || true
    echo "wan.sh: this kernel has no netem: wide-area links have no delay or jitter"
fi
