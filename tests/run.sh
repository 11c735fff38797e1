#!/usr/bin/env bash
# Everything that is checked: linters, types, unit tests, end-to-end tests on real vLLM.
#
#   bash tests/run.sh               all of it (a few minutes of set-up on first use)
#   bash tests/run.sh --fast        without the engine tests
#   bash tests/run.sh -- -k tcp     further arguments go to pytest
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=()
if [[ ${1:-} == --fast ]]; then
  fast=(-m "not engine")
  shift
fi
if [[ ${1:-} == -- ]]; then shift; fi

# The tests run on the CPU build of vLLM, whatever the machine has.
export DEVICE=cpu
# shellcheck source=pd_example/setup_env.sh
source pd_example/setup_env.sh
setup_env --test
bin=$(dirname "$PD_PYTHON")

step() {
  echo "== $*"
  "$@"
}
step "$bin/ruff" check .
step "$bin/ruff" format --check .
step "$bin/codespell"
step "$bin/mypy" vllm_pd ascend-vllm-plugin/ascend_vllm_plugin tests pd_example benchmarks requirements tools
step "$bin/lint-imports"
step "$PD_PYTHON" -m pytest "${fast[@]}" "$@"
