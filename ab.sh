#!/bin/bash
# Run from the root of the tree to be measured: bash /work/wt/coords/ab.sh  (PY names the python, SCANS the scans)
here=$(cd "$(dirname "$0")" && pwd)
so=$(ls build/gpu/_native*.so 2>/dev/null | head -1)
[ -n "$so" ] && cp -u "$so" jaxsparse/ 2>/dev/null
script=./ab.py; [ -f $script ] || script=$here/ab.py
PYTHONPATH=$PWD:$PWD/benchmarks:$PYTHONPATH ${PY:-python3} $script
