#!/bin/bash
# An upcycled model and a MoE from scratch of the same loss: the next 1M tokens of both, step by step, at
# N = 24k, D1 = 4M, three seeds. Both start with a warm-up and without moments.
#
#     bash config/step_by_step.sh     # after config/ablations.sh, about 10 minutes of a core
#
# Losses and effective experts are in the log.jsonl of the runs in out/step_by_step.
set -e
export OMP_NUM_THREADS=1
PY=${PY:-python}
OUT=out/step_by_step
MODEL="--hidden_size=32 --intermediate_size=80 --num_hidden_layers=2 --num_attention_heads=1"
TRAIN="--dataset=data/pysource --eval_tokens=131072 --eval_every_steps=16 --device=cpu --learning_rate=8e-3
       --warmup_steps=12 --decay_steps=0 --rows=none --resume"

losses() {  # log: its steps with a validation loss, as "step loss"
    sed -nE 's/.*"step": ([0-9]+),.*"val_loss": ([0-9.]+).*/\1 \2/p' "$1"
}

run() {  # seed
    local start=out/ablations/copy-s$1 same="$TRAIN --seed=$1" kept loss equal
    kept=$(seq -s, 32768 32768 2097152)
    $PY train.py $same $MODEL --num_local_experts=8 --max_tokens=2097152 --save_at_tokens="[$kept]" \
        --out_dir=$OUT/scratch-s$1
    # The loss of the upcycled model is that of a step which changes nothing.
    $PY train.py $same --learning_rate=0 --eval_every_steps=1 --max_tokens=2048 --init_from=$start \
        --out_dir=$OUT/start-s$1
    loss=$(losses $OUT/start-s$1/log.jsonl | cut -d' ' -f2)
    equal=$(losses $OUT/scratch-s$1/log.jsonl | awk -v loss="$loss" '$2 <= loss {print $1; exit}')
    $PY train.py $same --max_tokens=1048576 --init_from=$start --out_dir=$OUT/upcycled-s$1
    equal=$OUT/scratch-s$1/checkpoint-$equal
    $PY train.py $same --max_tokens=1048576 --init_from=$equal --out_dir=$OUT/equal-s$1
}

for seed in 0 1 2; do run $seed; done
