#!/usr/bin/env bash
# Start a prefill instance, a decode instance and the router; return when they answer.
#
#   bash pd_example/disaggregated_prefill.sh
#   MODEL=Qwen/Qwen2.5-7B-Instruct PREFILL=1x4 DECODE=2x2 bash pd_example/disaggregated_prefill.sh
#
# On first run it sets up everything that is needed. Options and environment
# variables are those of "vllm-pd up": add --help to see them.
set -euo pipefail

unset CDPATH
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=pd_example/setup_env.sh
source "$here/setup_env.sh"

setup_env
"${VLLM_PD[@]}" up "$@"
if (($# == 0)); then echo "       (the same: bash $(printf %q "$here/kill_server.sh"))"; fi
