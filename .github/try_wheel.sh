#!/bin/sh
# Install a wheel in an empty folder outside the repository, and use it there: sh .github/try_wheel.sh dist/*.whl
set -eu
wheel=$(realpath "$1")
pins=$(realpath constraints.txt)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

"${PYTHON:-python3}" -m venv venv 2> /dev/null || { rm -rf venv; "${PYTHON:-python3}" -m virtualenv --quiet venv; }
venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$pins" "$wheel"

# Nothing of the user's settings, data or downloaded models.
export HOME="$place" EARMARK_DATA_DIR="$place/data" HF_HUB_OFFLINE=1
venv/bin/earmark --version
venv/bin/earmark demo --report demo.html
test -s demo.html
venv/bin/python - << 'PYTHON'
from pathlib import Path

import earmark

dog = Path(earmark.__file__).with_name("examples") / "dog.ogg"
best = earmark.classify(str(dog))[0]
assert best.label == "dog", best
print(f"import earmark: {dog.name} is {best.label}, {best.score:.2f}")
PYTHON
