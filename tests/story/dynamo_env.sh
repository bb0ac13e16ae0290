#!/usr/bin/env bash
# Build the virtual environment that `pytest -m dynamo` starts NVIDIA Dynamo from.
# Usage: tests/story/dynamo_env.sh FOLDER. Does nothing where it is built already.
#
# Dynamo itself is installed without its dependencies: one of them is a stub that downloads
# from an index of the vendor's, and mock engines need none of the large ones.
set -euo pipefail
venv=$1
[ -e "$venv/complete" ] && exit 0
"${PYTHON:-python3}" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
install --no-deps 'ai-dynamo==1.6.1' 'ai-dynamo-runtime==1.6.1'
install 'aiohttp<4' 'kubernetes>=32.0.1,<33' 'msgspec>=0.19' 'prometheus-client>=0.23.1,<1' \
    'pyzmq>=26' 'redis>=6.2,<9' tqdm 'transformers>=4.56' typing-extensions 'zstandard>=0.23,<1' \
    'pydantic>=2.10.6,<=2.13.5' 'uvloop>=0.21' pyyaml numpy
touch "$venv/complete"
