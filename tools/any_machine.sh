#!/usr/bin/env bash
# The numeric tests under every code path that this CPU has: vector widths of ATen, MKL and oneDNN, threads, seeds, load.
# One line a setting; exits with 1 if one failed.   usage: tools/any_machine.sh [SETTING...]   e.g. MKL_CBWR=AVX2 seed=3
# It runs what is marked numeric, without slow and thorough. PYTHON (default .venv/bin/python) runs pytest; TESTS
# (default: all that have the mark) chooses files; LOGS (default a new folder) keeps the output; ARGS go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
LOGS=${LOGS:-$(mktemp -d)}
mkdir -p "$LOGS"

ALL="ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx512
MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX512
MKL_CBWR=COMPATIBLE MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX512_CORE
threads=1 threads=2 threads=4 seed=1 seed=2 seed=3 seed=4 seed=5 busy"

# flags of /proc/cpuinfo (or sysctl) that a setting needs; other processors than x86 have none of them
FLAGS=" $( (grep -m1 -E '^flags' /proc/cpuinfo || sysctl -n machdep.cpu.features machdep.cpu.leaf7_features) 2>/dev/null |
    tr '[:upper:].' '[:lower:]_' | tr '\n' ' ') "
needs() {
    case $1 in
    ATEN*=default | threads=* | seed=* | busy) ;;
    MKL*=SSE4_2 | MKL*=COMPATIBLE) echo sse4_2 ;;
    *avx512 | *AVX512*) echo avx512f ;;
    *avx2 | *AVX2) echo avx2 ;;
    *) echo "$1: unknown setting" >&2 && exit 2 ;;
    esac
}

MARKS="numeric and not (slow or thorough)"
# a decorator, or in the file's list of marks
mapfile -t FILES < <(tr ' ' '\n' <<<"${TESTS:-$(grep -rlE --include='test_*.py' 'pytest\.mark\.numeric' tests)}")

status=0
for setting in ${*:-$ALL}; do
    flag=$(needs "$setting") || exit 2
    if [ -n "$flag" ] && [[ $FLAGS != *" $flag "* ]]; then
        echo "not run  $setting: this CPU has no $flag"
        continue
    fi
    environment=(OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1) busy=()
    case $setting in
    threads=*) environment+=(OMP_NUM_THREADS="${setting#*=}") ;;
    seed=*) environment+=(FUSED_LORA_TEST_SEED="${setting#*=}") ;;
    busy)
        for _ in $(seq "$(getconf _NPROCESSORS_ONLN)"); do
            (while :; do :; done) &
            busy+=($!)
        done
        ;;
    *) environment+=("$setting") ;;
    esac
    start=$SECONDS log="$LOGS/${setting//[^A-Za-z0-9_]/-}.log"
    # shellcheck disable=SC2086 # ARGS are several words
    env "${environment[@]}" "$PYTHON" -m pytest -q -m "$MARKS" "${FILES[@]}" ${ARGS:-} >"$log" 2>&1
    code=$?
    [ ${#busy[@]} -eq 0 ] || { kill "${busy[@]}" && wait "${busy[@]}"; } 2>/dev/null
    summary=$(grep -E '(passed|failed|error).* in ' "$log" | tail -1 | tr -d =)
    if [ $code -eq 0 ]; then
        echo "passed   $setting: $summary ($((SECONDS - start)) s)"
    else
        status=1
        echo "FAILED   $setting: ${summary:-pytest ended with $code} (see $log)"
        grep -E '^(FAILED|ERROR)' "$log" | cut -c1-200 | sed 's/^/         /'
    fi
done
exit $status
