"""qpd: steers each RDMA queue pair of an EVPN-VXLAN fabric over one path, beside FRR."""

__version__ = "0.1.0"
