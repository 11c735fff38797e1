#!/usr/bin/env bash
# What a single CUDA GPU tells about moving KV cache, without vLLM. Skips with one line
# where there is no such GPU. Arguments go to benchmarks/gpu/staging.py.
#
# Environment variables:
#   PYTHON  Python with torch for CUDA and what vllm-pd imports   [python3]
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python3}" benchmarks/gpu/staging.py "$@"
