#!/usr/bin/env bash
# All that needs a GPU, in one go of less than 8 minutes on an H100: agreement, speed, memory, a training at the default
# options with its curve, the tests. Ends with a table. `python3` must have PyTorch and Triton.
#
#   benchmarks/gpu_check.sh [FOLDER]             results go to FOLDER, by default runs/gpu_check
#   benchmarks/gpu_check.sh --dry-run [FOLDER]   the same at tiny sizes on a CPU: tests this script, its times mean nothing
set -uo pipefail
cd "$(dirname "$0")/.."

options=(--device cuda --backend triton)
training=(--curriculum_start 2 --seed 1 --epochs 250)
if [[ ${1:-} == --dry-run ]]; then
    shift
    export TRITON_INTERPRET=1
    # An epoch would take hours in the interpreter.
    options=(--device cpu --backend cpp)
    training=(--seed 1 --epochs 2 --sequence_length 2 --num_classes 2 --num_time_steps 10 --embedding_size 4 --memory_size 4)
fi
folder=${1:-runs/gpu_check}
rm -rf "$folder/training"
mkdir -p "$folder"

row() { echo "| $1 | $2 | $3 |" | tee -a "$folder/table.md"; }
limited() { timeout --signal=TERM --kill-after=20 "$@"; }  # SECONDS COMMAND...

limited 170 python3 benchmarks/gpu_check.py --output "$folder" || row "**measurements**" "exit status $?" "0"

# From this seed the network learns where sequences grow in the first epochs. What time does not allow is left out: a training
# ends at a signal and keeps its last epoch.
start=$SECONDS
limited 120 python3 memorizing_associations_task.py "${options[@]}" "${training[@]}" --output_dir "$folder/training"
row "training: exit status, seconds" "$?, $((SECONDS - start))" "0 (143: stopped for time)"
row "training: epochs, best validation accuracy" "$(
    python3 - "$folder/training/metrics.jsonl" <<'PYTHON'
import json, sys
history = [json.loads(line) for line in open(sys.argv[1])]
print(f"{len(history)}, {max((epoch['validation_accuracy'] for epoch in history), default=0):.1f} %")
PYTHON
)" "> 95 %"
limited 20 python3 memorizing_associations_task.py "${options[@]}" --resume "$folder/training/model_best.pth.tar" --evaluate
row "test of the best network: exit status" "$?" "0"
limited 20 python3 plot_memorizing_associations_task.py --metrics "$folder/training/metrics.jsonl" \
    --output "$folder/training.png"
row "training curve: exit status" "$?" "0"

if [[ -z ${TRITON_INTERPRET:-} ]]; then
    limited 150 python3 -m pytest -q -p no:cacheprovider tests/test_triton.py > "$folder/tests.txt" 2>&1
    row "tests on the GPU: exit status" "$?: $(tail -n 1 "$folder/tests.txt")" "0"
fi

echo
cat "$folder/table.md"
! grep -q '\*\*' "$folder/table.md" # a part that failed
