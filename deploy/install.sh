#!/bin/sh
# Installs Surety from this source into a new virtual environment, each package by version and hash:
#
#     deploy/install.sh /opt/surety-0.1.0
#
# What builds the packages stays in a temporary folder, so the environment has no build tools and no pip. PYTHON names
# another interpreter than python3.
set -eu
target=$1
source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ ! -e "$target" ] || { echo "$target exists: install each version into a folder of its own" >&2; exit 1; }

"${PYTHON:-python3}" -m venv "$work/build"
pip="$work/build/bin/pip --quiet --disable-pip-version-check"
$pip install --require-hashes --only-binary=:all: --requirement "$source/deploy/build-constraints.txt"
# openapi-ui-bundles is published as source alone.
$pip wheel --require-hashes --only-binary=:all: --no-binary=openapi-ui-bundles --no-build-isolation \
    --wheel-dir "$work/wheels" --requirement "$source/deploy/constraints.txt"
$pip wheel --no-deps --no-build-isolation --wheel-dir "$work/wheels" "$source"
"${PYTHON:-python3}" -m venv --without-pip "$target"
$pip --python "$target/bin/python" install --no-index --find-links "$work/wheels" surety
