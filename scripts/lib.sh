# Sourced by scripts/test and scripts/demo, which have changed to the top of the checkout.
# shellcheck shell=bash

note() { printf '==> %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }

# missing_packages NAME...: those Debian packages that are not installed, one a line.
missing_packages() {
  local name
  for name in "$@"; do
    # The status is asked for by its last word: a package that was removed still has an entry.
    case "$(dpkg-query -W -f '${Status}' "$name" 2>/dev/null)" in
      *' installed') ;;
      *) printf '%s\n' "$name" ;;
    esac
  done
}

# install_packages NAME...: install Debian packages without starting any of their services. Root only.
install_packages() (
  policy=/usr/sbin/policy-rc.d
  saved=$policy.before-cfe-hpc
  restore() {
    rm -f "$policy"
    if [ -e "$saved" ]; then mv "$saved" "$policy"; fi
  }
  # What an earlier call that was killed has put aside is the machine's own, and stays so.
  if [ -e "$policy" ] && [ ! -e "$saved" ]; then mv "$policy" "$saved"; fi
  trap restore EXIT
  trap 'exit 130' INT TERM
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q </dev/null >&2 || exit 1
  apt-get install -q -y -o DPkg::Lock::Timeout=300 --no-install-recommends "$@" </dev/null >&2
)

# ensure_packages WHY NAME...: install what is missing; without root, or off Debian, say what will be missed.
ensure_packages() {
  local why=$1
  shift
  if ! command -v dpkg-query >/dev/null; then
    note "not a Debian system: $why, unless the programs of these packages are here: $*"
    return
  fi
  local missing
  missing=$(missing_packages "$@" | tr '\n' ' ')
  missing=${missing% }
  if [ -z "$missing" ]; then
    return
  fi
  if ! is_root; then
    note "not root, so these Debian packages stay missing: $missing"
    note "$why; to install them: sudo apt-get install --no-install-recommends $missing"
    return
  fi
  note "installing Debian packages: $missing"
  # shellcheck disable=SC2086  # one word a package
  install_packages $missing || die "apt-get could not install: $missing"
}

# find_python: the interpreter that .venv is made with: $PYTHON, else python3.
find_python() {
  local python=${PYTHON:-python3}
  command -v "$python" >/dev/null || die "$python: not found; install Python 3.10 or later, or name one: PYTHON=..."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    die "$python: not Python 3.10 or later; name one that is: PYTHON=..."
  printf '%s\n' "$python"
}

# ensure_venv EXTRA...: make .venv if it is missing and install the checkout with these extras. A second call with the
# same pyproject.toml does nothing.
ensure_venv() {
  local python key extra stamps=.venv/.cfe-hpc todo=()
  if ! .venv/bin/python -c '' 2>/dev/null; then
    python=$(find_python) || exit 1
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      is_root && command -v apt-get >/dev/null || die "$python has no venv module; on Debian: apt-get install python3-venv"
      note "installing Debian packages: python3-venv"
      install_packages python3-venv || die "apt-get could not install python3-venv"
    fi
    note "making .venv with $("$python" -V 2>&1)"
    "$python" -m venv --clear .venv || die "$python -m venv failed"
  fi
  key="$(.venv/bin/python -V) $(sha256sum <pyproject.toml) $PWD"
  for extra in "$@"; do
    if [ "$(cat "$stamps/$extra" 2>/dev/null)" != "$key" ]; then todo+=("$extra"); fi
  done
  if [ ${#todo[@]} -eq 0 ]; then
    return
  fi
  local pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)
  # Before all else, and by this very version: any other way of asking brings gigabytes of CUDA along. A torch that
  # somebody put here on purpose, say for their GPUs, stays.
  if ! .venv/bin/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    note "installing torch"
    "${pip[@]}" install torch==2.13.0 </dev/null || die "pip could not install torch==2.13.0"
  fi
  local wanted
  wanted=$(IFS=,; printf '%s' "$*")
  note "installing cfe_hpc with its extras $wanted"
  "${pip[@]}" install -e ".[$wanted]" </dev/null || die "pip could not install .[$wanted]"
  mkdir -p "$stamps"
  for extra in "$@"; do
    printf '%s\n' "$key" >"$stamps/$extra"
  done
}
