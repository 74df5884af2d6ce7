#!/usr/bin/env bash
# Runs the contract tests on the newest release of everything, caps lifted, torch apart: what breaks there is next.
#   tests/newest.sh [PYTHON]     PYTHON: the interpreter to build the environment with, 3.11 or later (default python3)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT

"${1:-python3}" -m venv "$environment"
source "$environment/bin/activate"

torch=$(grep -o '^torch==[^ ]*' constraints.txt)
python -m pip install --quiet --upgrade pip packaging "$torch"
python - > "$environment/newest.txt" << 'END'
import tomllib

from packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for text in [*project["dependencies"], *extras["sentencepiece"], *extras["dev"]]:
    wanted = Requirement(text)
    if wanted.name not in ("torch", "pgp-lightning"):
        print(wanted.name + (f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""))
END
python -m pip install --quiet --upgrade "$torch" -r "$environment/newest.txt"
python -m pip install --quiet --no-deps -e .

python -m pip list --format freeze | tr _ - | grep -iE "^($(sed 's/\[.*//' "$environment/newest.txt" | paste -sd '|')|torch)=="
python -m pytest -m contract -n 2 --dist loadfile -p no:cacheprovider
