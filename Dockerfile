# syntax=docker/dockerfile:1
# Two images of megatron_ettin, installed by the set-up scripts that a bare machine uses (docs/containers.md):
#   docker build --target gpu -t megatron_ettin .          # NVIDIA's PyTorch, Transformer Engine, apex, flash-attn, DeepSpeed
#   docker build --target cpu -t megatron_ettin:cpu .      # `docker run megatron_ettin:cpu` runs the tests

FROM python:3.11.14-slim-bookworm AS cpu
LABEL org.opencontainers.image.title="megatron_ettin (CPU)" \
      org.opencontainers.image.description="Pre-training of paired encoders and decoders; tests and tools without a GPU" \
      org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# git: the tests ask it for tracked files. SLURM: its tests run a cluster in here (as the user, then without mounts).
# g++: torch's compiler. Versions of Debian's packages are the image's own, whose tag is fixed.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ git munge procps slurm-client slurm-wlm-basic-plugins slurmctld slurmd \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 ettin
# torch's builds without CUDA lie on an index of their own; the version is that of constraints-cpu.txt
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
    PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron_ettin
COPY --chown=ettin . .
RUN chown ettin /opt/megatron_ettin
USER 1000
RUN bash tools/setup_venv.sh
ENV PATH=/opt/megatron_ettin/.venv/bin:$PATH
HEALTHCHECK --interval=5m --timeout=60s CMD ["ettin", "doctor", "--quick"]
CMD ["bash", "tests/run.sh"]

FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu
LABEL org.opencontainers.image.title="megatron_ettin" \
      org.opencontainers.image.description="3D-parallel pre-training of paired encoders and decoders" \
      org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# the image pins what it came with, Transformer Engine too; ours are pinned by constraints-gpu.txt
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1
RUN useradd --create-home --uid 1001 ettin
WORKDIR /opt/megatron_ettin
COPY . .
RUN bash tools/setup_gpu.sh
USER 1001
WORKDIR /home/ettin
HEALTHCHECK --interval=5m --timeout=60s CMD ["ettin", "doctor", "--quick"]
CMD ["ettin", "--help"]
