#!/usr/bin/env bash
# Sets up, then runs the tests on eight virtual CPU devices. Arguments go to
# pytest: `bash scripts/test.sh -m slow`, `bash scripts/test.sh tests/x_test.py`.
set -euo pipefail
source "$(dirname "$0")/environment.sh" "test"
export JAX_PLATFORMS=cpu
if [ "$#" -eq 0 ]; then
  set -- -m "not slow"
fi
exec python -m pytest -q -n 2 --dist loadfile "$@"
