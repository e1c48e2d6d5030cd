#!/usr/bin/env bash
# Installs megatron_ettin for GPUs into the Python that $PYTHON names (default: python3). That Python must have a torch
# for CUDA, which the script does not change. Transformer Engine's extension is compiled against this torch, which needs
# CUDA's compiler. The Dockerfile's gpu image uses this script.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
say() { echo "setup_gpu: $*" >&2; }

torch=$("$python" -c 'import torch; print(torch.__version__ if torch.version.cuda else "")') ||
    { say "$python has no torch; install a build for CUDA first"; exit 2; }
[[ -n $torch ]] || { say "the torch of $python is built for CPUs; install one for CUDA, or use tools/setup_venv.sh"; exit 2; }
command -v nvcc >/dev/null || { say "no nvcc on PATH; Transformer Engine's extension is compiled here"; exit 2; }

pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
{ cat "$root/constraints-gpu.txt"; echo "torch==$torch"; } >"$pins"
install() { "$python" -m pip install --disable-pip-version-check --no-input --constraint "$pins" "$@"; }

say "compiling Transformer Engine for torch $torch"
install --no-build-isolation "transformer-engine[pytorch,core_cu13]"
say "installing megatron_ettin"
install --editable "$root[gpu,data,deepspeed,wandb]" --no-build-isolation
"$python" -c 'import megatron.core, transformer_engine' # must both be there before a job finds out
"$python" -c "import flash_attn" 2>/dev/null || say "without flash_attn: slower in places, nothing is missing (docs/containers.md)"
