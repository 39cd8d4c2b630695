#!/usr/bin/env bash
# All that one GPU can show of this code, in order, each part bounded in time.  What a part prints and writes is in OUT
# as soon as it is there, so that a run that is cut off leaves the parts before.
#
#   benchmarks/gpu_all.sh OUT                     all parts, about ten minutes
#   benchmarks/gpu_all.sh OUT warm tower moe      some of them
#
#   warm      a first run of the rows of tower and moe side by side, which compiles them; its figures mean nothing
#   tower     the vision tower and its peers, benchmarks/gpu.py
#   moe       the MoE layers and their peers
#   kernels   cross-entropy, long row, recompute
#   step      real training steps, benchmarks/gpu_step.py
#   profile   where the time of tower and layers goes, benchmarks/profile_workload.py
#   tests     tests/gpu, its files side by side
#
# SCALE=2 doubles every bound.  Exit code 1 where a part failed or was cut off; the table at the end says which.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?OUT, the folder of logs and results, is missing}")
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(warm tower moe step profile kernels tests)
mkdir -p "$out"
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
TOWER='tower 32k: (auto, compiled, recompute (none|selective)|varlen|Hugging)'
MOE='moe (32k|8k): (torch|Hugging Face Qwen3-MoE, grouped|Megatron-core, Trans)'
failed=0

# bounded SECONDS NAME COMMAND...: its output in OUT/NAME.log, one line of how it ended.
bounded() {
    local seconds=$(($1 * ${SCALE:-1})) name=$2 begin=$SECONDS
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
    local rc=$?
    printf '%-22s exit %3d after %3d s of %d\n' "$name" $rc $((SECONDS - begin)) "$seconds" | tee -a "$out/parts.txt"
    return $rc
}

# Waits for all jobs of this shell; fails where one failed.
together() {
    local id rc=0
    for id in $(jobs -p); do wait "$id" || rc=1; done
    return $rc
}

warm() {
    bounded 150 warm-tower "$PYTHON" benchmarks/gpu.py --case tower --rows "$TOWER" --rounds 1 --out "$out/warm" &
    bounded 150 warm-moe "$PYTHON" benchmarks/gpu.py --case moe --rows "$MOE" --rounds 1 --out "$out/warm" &
    together
}

tests() {
    local file
    for file in tests/gpu/test_*.py; do
        bounded 240 "$(basename "$file" .py)" "$PYTHON" -m pytest --confcutdir=tests/gpu -p no:cacheprovider \
            -o log_level=WARNING --tb=short -v "$file" &
    done
    together
}

tower() { bounded 120 tower "$PYTHON" benchmarks/gpu.py --case tower --rows "$TOWER" --out "$out/gpu" --results "$out/gpu.json"; }
moe() { bounded 120 moe "$PYTHON" benchmarks/gpu.py --case moe --rows "$MOE" --out "$out/gpu" --results "$out/gpu.json"; }
kernels() {
    bounded 120 kernels "$PYTHON" benchmarks/gpu.py --case cross-entropy --case long-row --case recompute \
        --out "$out/gpu" --results "$out/gpu.json"
}
step() { bounded 120 step "$PYTHON" benchmarks/gpu_step.py --out "$out/gpu_step.json"; }
profile() {
    bounded 60 profile-tower "$PYTHON" benchmarks/profile_workload.py tower --out "$out/profile/tower"
    local rc=$?
    bounded 60 profile-moe "$PYTHON" benchmarks/profile_workload.py moe --out "$out/profile/moe" && return $rc
}

for part in "${parts[@]}"; do
    case $part in
        warm | tests | tower | moe | kernels | step | profile) "$part" || failed=1 ;;
        *) echo "error: there is no part $part" >&2; exit 2 ;;
    esac
done
echo
cat "$out/parts.txt"
exit $failed
