#!/usr/bin/env bash
# Stop exactly what disaggregated_prefill.sh started. Running it twice is harmless.
#
#   bash pd_example/kill_server.sh
set -euo pipefail

unset CDPATH
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=pd_example/setup_env.sh
source "$here/setup_env.sh"

if ! find_env; then
  echo "nothing is running: the environment was never set up"
  exit 0
fi
exec "${VLLM_PD[@]}" down "$@"
