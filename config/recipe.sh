#!/bin/bash
# What config/ablations.sh found at N = 24k, tried at N = 201k beside the copies and MoEs of config/study.py:
# D1 = 4M, D2 = 2M and 8M, two seeds. loss_free is copying with loss-free balancing. best has half the learning
# rate and a router towards clusters too. loss_free_moe is from scratch, with loss-free balancing.
#
#     bash config/recipe.sh      # after config/study.py, about 40 core-minutes; called again, it goes on
#
# The rows go to out/recipe/rows.jsonl.
set -e
jobs=$(nproc)  # before the next line, which it heeds
export OMP_NUM_THREADS=1
PY=${PY:-python}
OUT=out/recipe
MODEL="--hidden_size=64 --intermediate_size=176 --num_hidden_layers=4 --num_attention_heads=2"
TRAIN="--dataset=data/pysource --warmup_steps=12 --eval_tokens=524288 --device=cpu --learning_rate=3e-3 \
    --router_aux_loss_coef=0 --router_bias_update_rate=0.01"

run() {  # seed, D2, name, settings
    [ -e $OUT/$3-s$1-$2/row.json ] || $PY train.py $TRAIN --rows=$OUT/rows.jsonl --seed=$1 \
        --max_tokens=$2 --trunk=$3-s$1 --out_dir=$OUT/$3-s$1-$2 --resume "${@:4}"
}

for seed in 0 1; do
    dense=out/study/dense-N201280-s$seed/checkpoint-2048
    [ -e $OUT/copy-s$seed ] || $PY upcycle.py $dense $OUT/copy-s$seed --seed=$seed
    [ -e $OUT/clusters-s$seed ] || \
        $PY upcycle.py $dense $OUT/clusters-s$seed --seed=$seed --router_init=clusters --router_std=0.12
done
export -f run
export PY OUT TRAIN
for seed in 0 1; do
    for D2 in 8388608 2097152; do
        echo "$seed $D2 loss_free --init_from=$OUT/copy-s$seed"
        echo "$seed $D2 best --init_from=$OUT/clusters-s$seed --learning_rate=1.5e-3"
        echo "$seed $D2 loss_free_moe $MODEL --num_local_experts=8"
    done
done | xargs -P "$jobs" -L 1 bash -c 'run "$@"' run
