#!/usr/bin/env bash
# A finished LLaVA-1.5 on data of your own; put its file at --data_path.
# LLaVA-1.5's script for 8 devices. Edit the paths; run from the repository's root.
set -euo pipefail

deepspeed llava/train/train_mem.py \
    --deepspeed ./scripts/zero3.json \
    --model_name_or_path liuhaotian/llava-v1.5-13b --version v1 \
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data \
    --vision_tower openai/clip-vit-large-patch14-336 --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu \
    --mm_use_im_start_end False --mm_use_im_patch_token False \
    --image_aspect_ratio pad --group_by_modality_length True \
    --output_dir ./checkpoints/llava-v1.5-13b-task \
    --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --bf16 True --tf32 True --gradient_checkpointing True --model_max_length 2048 \
    --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 \
    --dataloader_num_workers 4 --lazy_preprocess True --logging_steps 1 --report_to wandb
