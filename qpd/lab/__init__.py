"""The emulated fabric: containerlab topologies in network namespaces with real FRR, their traffic and judges."""
