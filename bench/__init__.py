"""What `make bench` runs: the classifier's cost a packet, the fabric's throughput, the daemon's footprint.

Figures of one machine say little elsewhere, so each is set beside a floor or a peer of the same run. docs/benchmarks.md
tells how and what each row means.
"""
