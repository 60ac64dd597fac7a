#!/usr/bin/env bash
# From nothing to a stylized photo, on a machine with only python3 and a package index: makes .venv, installs, trains a small
# style and writes quickstart/contact_sheet.jpg. STYLE=my.jpg takes your own painting. Run again, it is quick.
set -euo pipefail
if [ -n "${STYLE:-}" ]; then
  STYLE=$(realpath "$STYLE")
fi
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
stamp=.venv/.installed-quickstart
if [ ! -f "$stamp" ] || [ -n "$(find pyproject.toml fastnst/*.[ch] -newer "$stamp")" ]; then
  echo "Installing into .venv (about two minutes, mostly PyTorch) ..."
  .venv/bin/python -m pip install --disable-pip-version-check -q -e '.[quickstart]'
  touch "$stamp"
fi
exec .venv/bin/python scripts/quickstart.py ${STYLE:+--style "$STYLE"} "$@"
