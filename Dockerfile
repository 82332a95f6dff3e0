# Images of qpd and of the lab's routers, for a Debian or Ubuntu base whose python3-bpfcc is bcc 0.26 or later:
#
#   docker build --target qpd -t qpd .          the daemon, beside the FRR of a leaf
#   docker build --target leaf -t qpd-leaf .    FRR and tools: leaves, spines and hosts of deploy/containerlab
#
# docs/containers.md says how they are run, and what each capability is for. BuildKit is needed (Docker 23 uses it
# by itself, earlier ones with DOCKER_BUILDKIT=1). Where packages come from a mirror of your own: --secret id=pip,src=FILE is
# pip's configuration, --secret id=ca,src=FILE the certificates that it is to trust. Neither stays in an image.
ARG BASE=debian:bookworm-slim

# Package lists, read once for all stages.
FROM ${BASE} AS lists
RUN apt-get -q update

# Kernel headers without the compiler that their package asks for: bcc brings its own. Only uapi headers are compiled,
# but those include a good part of the others.
FROM lists AS headers
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /headers
# apt's own user may not write here.
RUN wanted=$(apt-cache depends --important linux-headers-amd64 linux-headers-arm64 linux-headers-generic 2>/dev/null \
        | awk '$1 == "Depends:" && $2 ~ /^linux-headers-[0-9]/ { print $2 }' \
        | while read -r name; do if apt-cache show "$name" >/dev/null 2>&1; then echo "$name"; break; fi; done) \
    && others=$(apt-cache depends --important "$wanted" \
        | awk '$1 == "Depends:" && $2 ~ /headers-[0-9]/ { print $2 }') \
    && apt-get -q -o APT::Sandbox::User=root download $wanted $others \
    && for package in ./*.deb; do dpkg-deb -x "$package" root; done \
    && cd root/usr/src \
    && find . -path '*/arch/*' -prune ! -path '*/arch/x86' ! -path '*/arch/arm64' -exec rm -r {} + \
    && find . -type f ! -path '*/include/*' -delete \
    && find . -depth -type d -empty -delete

# What runs: Python and bcc, which has LLVM's library within, and no compiler to call.
FROM ${BASE} AS runtime
RUN --mount=type=bind,from=lists,source=/var/lib/apt/lists,target=/var/lib/apt/lists,rw \
    export DEBIAN_FRONTEND=noninteractive \
    && apt-get -q -y install --no-install-recommends python3 python3-bpfcc iproute2 \
    && apt-get clean

# The package and what it needs from PyPI, in a directory that moves as one.
FROM runtime AS build
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
RUN --mount=type=bind,from=lists,source=/var/lib/apt/lists,target=/var/lib/apt/lists,rw \
    apt-get -q -y install --no-install-recommends python3-venv \
    && /usr/bin/python3 -m venv --system-site-packages /opt/qpd
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ebpf ebpf
COPY qpd qpd
COPY deploy/containerlab/common deploy/containerlab/common
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/secrets/ca \
    /opt/qpd/bin/python -m pip install . \
    && /opt/qpd/bin/python -m pip uninstall -q -y pip setuptools

FROM runtime AS qpd
COPY --from=headers /headers/root/usr/src /usr/src
COPY --from=build /opt/qpd /opt/qpd
ENV PATH=/opt/qpd/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Root without its power: pins in bpffs and FRR's sockets belong to users of other containers, and to the container's
# user the engine gives no capability but through files that have it. What root may do here is what --cap-add says.
# What `qpctl status` asks, for a tenth of its processor time: a lab has many sidecars.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["python3", "-c", "\
import http.client, socket; \
api = http.client.HTTPConnection('qpd'); \
api.sock = socket.socket(socket.AF_UNIX); \
api.sock.connect('/run/qpd/qpd.sock'); \
api.request('GET', '/v1/status'); \
assert api.getresponse().status == 200"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["qpd"]
CMD ["run"]

FROM ${BASE} AS leaf
RUN --mount=type=bind,from=lists,source=/var/lib/apt/lists,target=/var/lib/apt/lists,rw \
    export DEBIAN_FRONTEND=noninteractive \
    && apt-get -q -y install --no-install-recommends frr iproute2 iputils-ping ethtool procps tcpdump \
    && apt-get clean
# deploy/containerlab/common/start-frr.sh starts FRR in this image and in FRR's own.
CMD ["bash"]
