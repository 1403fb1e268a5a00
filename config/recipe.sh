#!/bin/bash
# What config/ablations.sh found at N = 24k, tried at N = 201k beside the copies and MoEs of config/study.py:
# D1 = 4M, D2 = 8M, two seeds. loss_free is copying with loss-free balancing. best has half the learning
# rate and a router towards clusters too. loss_free_moe is from scratch, with loss-free balancing.
#
#     bash config/recipe.sh      # after config/study.py, about 30 core-minutes; called again, it goes on
#
# The rows go to out/recipe/rows.jsonl.
set -e
jobs=$(nproc)  # before the next line, which it heeds
export OMP_NUM_THREADS=1
PY=${PY:-python}
OUT=out/recipe
D2=8388608
MODEL="--hidden_size=64 --intermediate_size=176 --num_hidden_layers=4 --num_attention_heads=2"
TRAIN="--dataset=data/pysource --warmup_steps=12 --eval_tokens=524288 --device=cpu --learning_rate=3e-3 \
    --router_aux_loss_coef=0 --router_bias_update_rate=0.01"

run() {  # seed, name, settings
    [ -e $OUT/$2-s$1-$D2/row.json ] || $PY train.py $TRAIN --rows=$OUT/rows.jsonl --seed=$1 \
        --max_tokens=$D2 --trunk=$2-s$1 --out_dir=$OUT/$2-s$1-$D2 --resume "${@:3}"
}

for seed in 0 1; do
    dense=out/study/dense-N201280-s$seed/checkpoint-2048
    [ -e $OUT/copy-s$seed ] || $PY upcycle.py $dense $OUT/copy-s$seed --seed=$seed
    [ -e $OUT/clusters-s$seed ] || \
        $PY upcycle.py $dense $OUT/clusters-s$seed --seed=$seed --router_init=clusters --router_std=0.12
done
export -f run
export PY OUT TRAIN D2
for seed in 0 1; do
    echo "$seed loss_free --init_from=$OUT/copy-s$seed"
    echo "$seed best --init_from=$OUT/clusters-s$seed --learning_rate=1.5e-3"
    echo "$seed loss_free_moe $MODEL --num_local_experts=8"
done | xargs -P "$jobs" -L 1 bash -c 'run "$@"' run
