#!/bin/bash
# Ablations of upcycling at N = 24k, beside the copies of config/study.py: D1 = 4M, D2 = 0.5M, 2M and 8M,
# three seeds. Each variant changes one thing, and its name is that of its rows' trunk.
#
#     bash config/ablations.sh      # after config/study.py, about 2 core-hours; called again, it goes on
#
# The rows go to out/ablations/rows.jsonl.
set -e
jobs=$(nproc)  # before the next line, which it heeds
export OMP_NUM_THREADS=1
PY=${PY:-python}
OUT=out/ablations
MODEL="--hidden_size=32 --intermediate_size=80 --num_hidden_layers=2 --num_attention_heads=1"
TRAIN="--dataset=data/pysource --warmup_steps=12 --eval_tokens=524288 --device=cpu --learning_rate=8e-3"

variants() {  # name, checkpoint to start from, settings
    echo "half      copy     --learning_rate=4e-3"
    echo "tenth     copy     --learning_rate=8e-4"
    echo "cosine    copy     --schedule=cosine"
    echo "repeated  copy     --repeat_data=true"
    echo "none      copy     --router_aux_loss_coef=0"
    echo "pooled    copy     --router_aux_loss_pooled=true"
    local loss_free="--router_aux_loss_coef=0 --router_bias_update_rate=0.01"
    echo "loss_free copy     $loss_free"
    echo "decayed   decayed"  # the dense model had its decay before it was upcycled
    echo "merged    merged"  # half of the experts are of the dense model of another seed
    local scratch="scratch --num_local_experts=8 $MODEL"  # do they help from scratch as well?
    echo "half_moe $scratch --learning_rate=4e-3"
    echo "cosine_moe $scratch --schedule=cosine"
    echo "loss_free_moe $scratch $loss_free"
    echo "best clusters --learning_rate=4e-3 $loss_free"  # the router's rows towards clusters too
    echo "best_moe $scratch --learning_rate=4e-3 $loss_free"
}

starts() {  # seed: the checkpoints from which its variants start
    local other=$((($1 + 1) % 3))
    local dense=out/study/dense-N23712-s$1/checkpoint-2048
    local second=out/study/dense-N23712-s$other/checkpoint-2048
    $PY train.py $MODEL $TRAIN --seed=$1 --max_tokens=4194304 --rows=none --resume --out_dir=$OUT/dense-s$1
    [ -e $OUT/copy-s$1 ] || $PY upcycle.py $dense $OUT/copy-s$1 --seed=$1
    [ -e $OUT/decayed-s$1 ] || $PY upcycle.py $OUT/dense-s$1/checkpoint-2048 $OUT/decayed-s$1 --seed=$1
    [ -e $OUT/clusters-s$1 ] || \
        $PY upcycle.py $dense $OUT/clusters-s$1 --seed=$1 --router_init=clusters --router_std=0.12
    [ -e $OUT/merged-s$1 ] || \
        $PY upcycle.py $dense $OUT/merged-s$1 $second --seed=$1 --method=merge --merge_shared=first
}

run() {  # seed, D2, name, checkpoint, settings
    local from=--init_from=$OUT/$4-s$1
    [ $4 = scratch ] && from=
    [ -e $OUT/$3-s$1-$2/row.json ] || $PY train.py $TRAIN $from --rows=$OUT/rows.jsonl \
        --seed=$1 --max_tokens=$2 --trunk=$3-s$1 --out_dir=$OUT/$3-s$1-$2 --resume "${@:5}"
}

for seed in 0 1 2; do starts $seed; done
export -f run
export PY OUT TRAIN
variants | while read -r variant; do
    for seed in 0 1 2; do
        for D2 in 8388608 2097152 524288; do echo "$seed $D2 $variant"; done
    done
done | xargs -P "$jobs" -L 1 bash -c 'run "$@"' run
