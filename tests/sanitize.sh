#!/usr/bin/env bash
# Runs the compiled back end under the compiler's sanitizers, in a copy of the tree outside it.
#
#   tests/sanitize.sh address [pytest arguments]   addresses and undefined behaviour: the contract, the engine
#   tests/sanitize.sh thread [pytest arguments]    data races: the engine and every thread count
#
# Arguments for pytest stand in place of the tests named below, e.g. `tests/contract -k relu`. PYTHON is an interpreter
# that has the extras test and dev (.venv/bin/python if not given); the compiler is gcc, whose run-time libraries load
# before an interpreter that knows nothing of them. WORK is a folder for the copy that stays, with what was built (one
# for each of the two). Ends with 1 where a test fails or a sanitizer reports anything.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [ -n "${WORK:-}" ]; then
  mkdir -p "$WORK"
  work=$(cd "$WORK" && pwd)
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

library() { gcc -print-file-name="lib$1.so"; }
case "${1:-}" in
  address)
    # -fno-wrapv: Python's own flags let integers wrap, and an overflow goes unseen
    flags="-fsanitize=address,undefined -fno-wrapv"
    preload="$(library asan) $(library ubsan) $(library stdc++)"
    tests=(tests/contract tests/kernels/test_abi.py tests/api/test_{engine,single_step,predict,shares,runtime_block}.py)
    ;;
  thread)
    flags="-fsanitize=thread"
    preload="$(library tsan)"
    tests=(tests/contract/test_threads.py tests/api/test_{engine,threads}.py)
    ;;
  *)
    sed -n '4,5s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
shift
[ $# -eq 0 ] || tests=("$@")

cd "$root"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --preserve=timestamps -t "$work"
cd "$work"
rm -f fastdl/kernels
export FASTDL_FLAGS="$flags -O1 -g1 -fno-omit-frame-pointer" NUMBA_CACHE_DIR="$work/numba" PYTHONDONTWRITEBYTECODE=1
unset FASTDL_PURE FASTDL_FAMILIES FASTDL_SIMD
CC=gcc CXX=g++ "$python" setup.py -q build_ext --inplace
ln -s ../kernels fastdl/kernels # found here first, whatever is installed in place
"$python" -c "import fastdl.kernels as k; assert k.__file__.startswith('$work/'), k.__file__"

# The interpreter leaks on purpose, and forks with threads; what is not built here is not looked into.
printf 'called_from_lib:libscipy_openblas\nrace:libscipy_openblas\nrace:_multiarray_umath\n' >suppressions
rm -rf reports
mkdir reports
common="log_path=$work/reports/r:halt_on_error=0"
export ASAN_OPTIONS="$common:detect_leaks=0:allocator_may_return_null=1"
export UBSAN_OPTIONS="$common:print_stacktrace=1"
export TSAN_OPTIONS="$common:die_after_fork=0:suppressions=$work/suppressions:report_signal_unsafe=0"
# A fixed layout of addresses: ThreadSanitizer has none to spare. A test with an LD_PRELOAD of its own would lose ours,
# instrumented code needs more stack than 128 KB, and the fence is there to be run into.
status=0
setarch "$(uname -m)" -R env LD_PRELOAD="$preload" "$python" -m pytest -q -p no:cacheprovider -k "not numba and not cuda" \
  --deselect tests/api/test_engine.py::test_no_allocation \
  --deselect tests/contract/test_planted_faults.py::test_fence \
  --deselect tests/api/test_threads.py::test_a_stack_of_128_kilobytes_is_enough "${tests[@]}" || status=$?
if compgen -G "reports/*" >/dev/null; then
  cat reports/*
  status=1
fi
exit $status
