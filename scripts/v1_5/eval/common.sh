#!/usr/bin/env bash
# Sourced by the scripts next to it with their arguments, after they have set MODEL_PATH. --model-path in the arguments
# wins. Goes to the repository's root and sets python, CKPT (the model's name) and EVAL_ROOT (where the benchmarks lie).
word=
for next in "$@"; do
    [ "$word" != --model-path ] || MODEL_PATH=$next
    case $next in --model-path=*) MODEL_PATH=${next#*=} ;; esac
    word=$next
done
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=${DUET_PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
CKPT=${CKPT:-$(basename "$MODEL_PATH")}
EVAL_ROOT=${EVAL_ROOT:-./playground/data/eval}

# Answer a question file in as many parts as CUDA_VISIBLE_DEVICES names devices, and join them.
# answer_in_parts FOLDER FLAGS... -> FOLDER/merge.jsonl
answer_in_parts() {
    local folder=$1 devices index pids=() parts=()
    shift
    IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-0}"
    for index in "${!devices[@]}"; do
        parts+=("$folder/${#devices[@]}_$index.jsonl")
        CUDA_VISIBLE_DEVICES=${devices[$index]} "$python" -m llava.eval.model_vqa_loader \
            --model-path "$MODEL_PATH" --answers-file "${parts[index]}" \
            --num-chunks ${#devices[@]} --chunk-idx "$index" --temperature 0 --conv-mode vicuna_v1 "$@" &
        pids+=($!)
    done
    for index in "${!pids[@]}"; do
        wait "${pids[index]}" || {
            echo "error: part $index of ${#pids[@]} failed; run the same command again" >&2
            exit 1
        }
    done
    cat "${parts[@]}" >"$folder/merge.jsonl"
}
