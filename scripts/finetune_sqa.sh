#!/usr/bin/env bash
# ScienceQA with explanations, twelve epochs.
# LLaVA's first generation, not LLaVA-1.5 (that is scripts/v1_5). Edit the paths; run from the repository's root.
set -euo pipefail

PROMPT_VERSION=${PROMPT_VERSION:-v1}

deepspeed llava/train/train_mem.py \
    --deepspeed ./scripts/zero2.json \
    --model_name_or_path lmsys/vicuna-13b-v1.3 --version $PROMPT_VERSION \
    --data_path ./playground/data/ScienceQA/data/scienceqa/llava_train_QCM-LEA.json \
    --image_folder ./playground/data/ScienceQA/data/scienceqa/images/train \
    --vision_tower openai/clip-vit-large-patch14 --mm_vision_select_layer -2 \
    --pretrain_mm_mlp_adapter ./checkpoints/huggingface/liuhaotian/llava-pretrain-vicuna-13b-v1.3/mm_projector.bin \
    --mm_use_im_start_end False --mm_use_im_patch_token False \
    --output_dir ./checkpoints/llava-vicuna-13b-v1.3-pretrain_lcs558k_plain-ScienceQA_QCM_LEA-12e \
    --num_train_epochs 12 --per_device_train_batch_size 16 --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --bf16 True --tf32 True --gradient_checkpointing True --model_max_length 2048 \
    --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 \
    --dataloader_num_workers 4 --lazy_preprocess True --logging_steps 1 --report_to wandb
