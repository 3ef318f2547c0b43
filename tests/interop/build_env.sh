#!/bin/sh
# A virtual environment with the real packages, beside everything else:
#   tests/interop/build_env.sh DIR
#   SAE_PIPE_INTEROP_PYTHON=DIR/bin/python pytest tests/test_interop.py
set -eu
here=$(cd "$(dirname "$0")" && pwd)
env=${1:?the folder of the environment to make}
"${PYTHON:-python3}" -m venv "$env"
pip="$env/bin/python -m pip --disable-pip-version-check install --quiet"
$pip -r "$here/requirements.txt"
$pip --no-deps dictionary-learning==0.1.0 eai-sparsify==1.3.3 sae-bench==0.6.0
"$env/bin/python" "$here/check.py" versions
