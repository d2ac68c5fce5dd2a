#!/bin/sh
# Other model scanners, in a virtual environment of their own, for bench/bench_peers.py and bench/bench_scan.py:
#   tools/peers.sh FOLDER          then: python bench/bench_peers.py --peers FOLDER/bin
# Exactly the versions docs/checks/scan.md gives figures for. What cannot be had is said in a line, with status 0: the
# benches then say who was skipped.
set -u
folder=${1:?usage: tools/peers.sh FOLDER}
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder" || { echo "tools/peers.sh: no venv" >&2; exit 0; }
# typing_extensions is a dependency that fickling 0.1.12 does not declare; picklescan needs numpy for its files.
for peer in "picklescan==1.0.5 numpy" "modelscan==0.8.8" "fickling==0.1.12 typing_extensions"; do
    # shellcheck disable=SC2086
    "$folder/bin/python" -m pip install -q --disable-pip-version-check --timeout 30 --retries 1 ${PIP_FLAGS:-} $peer \
        >"$folder/pip.log" 2>&1 || echo "tools/peers.sh: without $peer: $(tail -n 1 "$folder/pip.log")" >&2
done
exit 0
