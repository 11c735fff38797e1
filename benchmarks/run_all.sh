#!/usr/bin/env bash
# Every benchmark, one after the other, with results in one folder:
#
#   bash benchmarks/run_all.sh            hours
#   bash benchmarks/run_all.sh --quick    less than an hour on two cores
#
# Writes benchmarks/results/<date>-<machine>/: environment.txt, and of each benchmark its
# report as JSON, its output as text, and for compare.py Markdown, plots and all requests.
# A benchmark that fails does not stop the others; Ctrl-C or SIGTERM stops all of it.
#
# Environment variables:
#   PYTHON   Python with vLLM, vllm-pd and matplotlib   [that of pd_example/setup_env.sh]
#   RESULTS  folder of the results
#   SLO      objectives for goodput.py                  [ttft:1500 tpot:40]
set -uo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

quick=()
search=()
case ${1:-} in
  '') ;;
  --quick)
    quick=(--quick)
    search=(--duration 90 --seeds 1 --tolerance 0.2 --deployment pd --deployment replicas)
    ;;
  *)
    echo "error: unknown option $1; see the head of benchmarks/run_all.sh" >&2
    exit 2
    ;;
esac

python=${PYTHON:-}
if [[ -z $python ]]; then
  # shellcheck source=pd_example/setup_env.sh
  source pd_example/setup_env.sh
  find_env || pd_fail "there is no environment yet: bash pd_example/disaggregated_prefill.sh makes it"
  python=$PD_PYTHON
fi

results=${RESULTS:-benchmarks/results/$(date -u +%F)-$(uname -n)}
mkdir -p "$results" || exit
failed=()

# End the benchmark that runs as Ctrl-C does, which it handles, and wait until it has written
# what it has.
stop() {
  trap '' INT TERM
  if [[ -n $(jobs -p) ]]; then
    kill -INT %%
    wait %%
  fi
  echo "interrupted: what there is, is in $results" >&2
  exit 130
}
trap stop INT TERM
# A job of its own: a shell handles no signal while it waits for what is in the foreground, and
# what is in the background without this ignores Ctrl-C.
set -m

# Run one benchmark; its output goes to the terminal and to a file.
measure() {
  local name=$1
  shift
  echo "== $name: $*"
  "$python" "$@" 2>&1 </dev/null | tee -i "$results/$name.txt" &
  wait %%
  local status=$?  # of the benchmark, by pipefail
  ((status == 130)) && exit 130
  ((status)) && failed+=("$name")
}

{
  date -u +'date: %FT%TZ'
  echo "commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
  echo "command: bash benchmarks/run_all.sh $*"
  uname -srm
  lscpu 2>/dev/null | grep -E '^(Model name|CPU\(s\)|Thread|Core|L2|L3|NUMA)'
  grep -E '^(MemTotal|MemAvailable)' /proc/meminfo
  "$python" --version
  "$python" -m pip list --format freeze 2>/dev/null
} >"$results/environment.txt"

measure kv-transfer benchmarks/kv_transfer.py "${quick[@]}" --report "$results/kv-transfer.json"
measure router-overhead benchmarks/router_overhead.py "${quick[@]}" \
  --report "$results/router-overhead.json"
measure service-overhead benchmarks/service_overhead.py "${quick[@]}" \
  --json "$results/service-overhead.json"
measure compare benchmarks/compare.py "${quick[@]}" --output "$results/compare"
# The objectives are a list, so they go last.
read -ra slo <<<"${SLO:-ttft:1500 tpot:40}"
measure goodput benchmarks/goodput.py --json "$results/goodput.json" \
  --markdown "$results/goodput.md" "${search[@]}" --goodput "${slo[@]}"
measure gpu benchmarks/gpu/staging.py "${quick[@]}" --json "$results/gpu.json"

echo "the results are in $results"
if ((${#failed[@]})); then
  echo "error: failed: ${failed[*]}" >&2
  exit 1
fi
