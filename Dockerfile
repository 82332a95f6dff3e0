# qpd as a sidecar of a leaf:
#
#   docker build --target qpd -t qpd .
#   docker run --network container:LEAF --cap-drop ALL --cap-add BPF --cap-add NET_ADMIN --cap-add PERFMON \
#     --cap-add SYS_RESOURCE --cap-add DAC_OVERRIDE -v /sys/fs/bpf:/sys/fs/bpf -v FRR_SOCKETS:/var/run/frr qpd
#
# The base must be a Debian or Ubuntu whose python3-bpfcc is bcc 0.18 or later.
ARG BASE=debian:bookworm-slim

# Kernel headers without the compiler that their package asks for: bcc brings its own.
FROM ${BASE} AS headers
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /headers
RUN apt-get -q update \
    && wanted=$(apt-cache depends --important linux-headers-amd64 linux-headers-generic 2>/dev/null \
        | awk '$1 == "Depends:" && $2 ~ /^linux-headers-[0-9]/ { print $2; exit }') \
    && others=$(apt-cache depends --important "$wanted" \
        | awk '$1 == "Depends:" && $2 ~ /headers-[0-9]/ { print $2 }') \
    && apt-get -q download $wanted $others \
    && for package in ./*.deb; do dpkg-deb -x "$package" root; done \
    && cd root/usr/src \
    && find . -type f ! -path '*/include/*' -delete \
    && find . -depth -type d -empty -delete

# The package and what it needs from PyPI, in a directory that moves as one.
FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get -q update && apt-get -q -y install --no-install-recommends python3 python3-venv
RUN /usr/bin/python3 -m venv --system-site-packages /opt/qpd
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ebpf ebpf
COPY qpd qpd
RUN /opt/qpd/bin/python -m pip install .

FROM ${BASE} AS qpd
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get -q update \
    && apt-get -q -y install --no-install-recommends python3 python3-bpfcc iproute2 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=headers /headers/root/usr/src /usr/src
COPY --from=build /opt/qpd /opt/qpd
ENV PATH=/opt/qpd/bin:$PATH PYTHONUNBUFFERED=1
# Not a non-root user: FRR's sockets and bpffs belong to users of the host; the capabilities above are what counts.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["qpctl", "status"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["qpd"]
CMD ["run"]
