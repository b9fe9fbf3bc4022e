#!/usr/bin/env bash
# Checks every kernel and a whole model on a Hopper or Blackwell GPU, plainly and a part of them under compute-sanitizer.
#   bash tests/gpu/run.sh [--library FILE] [--out FOLDER]
#   --library FILE   what build_library.py wrote elsewhere (FILE with its JSON): no compiler is needed here then, and no
#                    model is built
#   --out FOLDER     logs, and what is built (default: a temporary folder)
# Exit status: 0 all right or skipped (no such GPU here, said in a line), 1 something failed, 2 a bad argument.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

library="" out=""
while (($#)); do
  case $1 in
    --library | --out) [[ $# -ge 2 ]] || { echo "tests/gpu/run.sh: $1 wants a name" >&2; exit 2; } ;;&
    --library) library=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    *) echo "tests/gpu/run.sh: unknown argument $1 (--library FILE, --out FOLDER)" >&2; exit 2 ;;
  esac
done
[[ -z $library || -f $library ]] || { echo "tests/gpu/run.sh: no file $library" >&2; exit 2; }

capability=""
if [[ -n ${CUDA_VISIBLE_DEVICES-all} ]]; then
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
fi
case $capability in
  9.*) target=h200 ;;
  10.*) target=b200 ;;
  "") echo "tests/gpu/run.sh: no NVIDIA GPU here: skipped"; exit 0 ;;
  *) echo "tests/gpu/run.sh: compute capability $capability, kernels are for 9 and 10: skipped"; exit 0 ;;
esac

out=${out:-$(mktemp -d)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
failed=0

step() { # NAME COMMAND...: a line with its outcome; all it prints is in OUT/NAME.log
  local name=$1 began=$SECONDS status
  shift
  "$@" >"$out/$name.log" 2>&1
  status=$?
  printf '%-22s %-8s %4d s  %s\n' "$name" "$( ((status)) && echo FAILED || echo ok)" $((SECONDS - began)) \
    "$(grep -E 'right|equal|ERROR SUMMARY|RACECHECK SUMMARY|built|written' "$out/$name.log" | tail -n 1)"
  if ((status)); then failed=1 && tail -n 5 "$out/$name.log" | sed 's/^/    /'; fi
  return $status
}

sanitized() { # TOOL COMMAND...: our own kernels only, torch's have mangled names
  compute-sanitizer --tool "$1" --error-exitcode 9 --launch-timeout 0 --report-api-errors no \
    --kernel-name-exclude kernel_substring=_ZN,kernel_substring=at:: "${@:2}"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1
printf '%-22s %-8s %6s  %s\n' step outcome time "what it says"
if [[ -z $library ]]; then
  library=$out/cases.so
  step build "$python" tests/gpu/build_library.py "$library" "$target" || exit 1
  example=(--model examples/tiny-qwen3.5-sparse75 --prune none --dtype float32)
  for place in cpu "$target"; do
    step "build-model-$place" "$python" -m tvm_sparse.build "${example[@]}" --target "$place" --out "$out/model-$place"
  done
  rm -f "$out/float32.npz"
  step model-cpu "$python" tests/gpu/run_model.py "$out/model-cpu" cpu "$out/float32.npz"
  step model "$python" tests/gpu/run_model.py "$out/model-$target" cuda "$out/float32.npz"
fi
step matmuls "$python" tests/gpu/run_matmuls.py --library "$library"
step operations "$python" tests/gpu/run_operations.py --library "$library"
step prefill "$python" tests/gpu/run_prefill_operations.py --library "$library"
step products "$python" tests/gpu/run_products.py --library "$library"
step products-own env TVM_SPARSE_CUBLASLT=0 "$python" tests/gpu/run_products.py --library "$library"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool-matmuls" sanitized "$tool" "$python" tests/gpu/run_matmuls.py --library "$library" --largest 5000
    step "$tool-operations" sanitized "$tool" "$python" tests/gpu/run_operations.py --library "$library" tiny
  done
else
  echo "compute-sanitizer is not on PATH: memcheck and racecheck skipped"
fi
echo "logs: $out"
exit $failed
