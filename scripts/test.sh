#!/usr/bin/env bash
# Run the tests on a machine with only python3: makes .venv, installs the project, runs pytest. A second run is quick.
# Arguments go to pytest: ./scripts/test.sh tests/test_losses.py -k gram. PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
stamp=.venv/.installed-test
if [ ! -f "$stamp" ] || [ -n "$(find pyproject.toml fastnst/*.[ch] -newer "$stamp")" ]; then
  .venv/bin/python -m pip install --disable-pip-version-check -q -e '.[test]'
  touch "$stamp"
fi
exec .venv/bin/python -m pytest "$@"
