#!/usr/bin/env bash
# Projector on captions for devices without bf16; attention is torch's SDPA.
# LLaVA's first generation, not LLaVA-1.5 (that is scripts/v1_5). Edit the paths; run from the repository's root.
set -euo pipefail

MODEL_VERSION=${MODEL_VERSION:-vicuna-v1-3-7b} # or llama-2-7b-chat
PROMPT_VERSION=plain                           # captions, whatever the model

deepspeed llava/train/train_xformers.py \
    --deepspeed ./scripts/zero2.json \
    --model_name_or_path ./checkpoints/$MODEL_VERSION --version $PROMPT_VERSION \
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \
    --image_folder ./playground/data/LLaVA-Pretrain/images \
    --vision_tower openai/clip-vit-large-patch14 --mm_vision_select_layer -2 --tune_mm_mlp_adapter True \
    --mm_use_im_start_end False --mm_use_im_patch_token False \
    --output_dir ./checkpoints/llava-$MODEL_VERSION-pretrain \
    --num_train_epochs 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 4 --learning_rate 2e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --bf16 False --tf32 False --gradient_checkpointing True --model_max_length 2048 \
    --evaluation_strategy no --save_strategy steps --save_steps 24000 --save_total_limit 1 \
    --dataloader_num_workers 4 --lazy_preprocess True --logging_steps 1 --report_to wandb
