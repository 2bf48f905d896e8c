# Sourced by the other scripts: a Python environment with fedfm in it.
#
#   source scripts/environment.sh EXTRAS     (such as "test"; may be empty)
#
# Uses the virtual environment that is active, else makes .venv with $PYTHON
# (default python3). Installs only when setup.py or the extras have changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv || exit 1
  fi
  source .venv/bin/activate
fi
python - <<'EOF' || exit 1
import sys
if sys.version_info < (3, 11):
  sys.exit(f"fedfm needs Python 3.11 or newer, this is {sys.version.split()[0]};"
           " set PYTHON=/path/to/python3.11")
EOF
stamp="$VIRTUAL_ENV/.fedfm-installed-${1:-core}"
want="$(cksum setup.py) $PWD"
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  echo "installing fedfm${1:+[$1]} into $VIRTUAL_ENV ..."
  python -m pip install --quiet -e ".${1:+[$1]}" || exit 1
  echo "$want" > "$stamp"
fi
