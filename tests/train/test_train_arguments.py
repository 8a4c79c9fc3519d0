"""The argument lists of public LLaVA and DUET scripts parse, and wrong values are refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from json import dumps

import pytest
import torch
import train_world
from transformers import HfArgumentParser

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from llava.train.runtime import read_deepspeed_config

DEEPSPEED = str(train_world.ROOT / "scripts")

COMMON = """--bf16 True --output_dir OUT --num_train_epochs 1 --per_device_train_batch_size 16
--per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
--save_steps 50000 --save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4
--lazy_preprocess True --report_to wandb --vision_tower openai/clip-vit-large-patch14-336 --mm_vision_select_layer -2
--mm_use_im_start_end False --mm_use_im_patch_token False --data_path data.json --image_folder images"""

# What the published scripts pass beyond that; names and values are facts of those scripts.
SCRIPTS = {
    "llava pretrain": "--deepspeed ZERO2 --model_name_or_path lmsys/vicuna-7b-v1.5 --version plain "
    "--mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True --learning_rate 1e-3",
    "llava finetune": "--deepspeed ZERO3 --model_name_or_path lmsys/vicuna-7b-v1.5 --version v1 "
    "--pretrain_mm_mlp_adapter ./mm_projector.bin --mm_projector_type mlp2x_gelu --image_aspect_ratio pad "
    "--group_by_modality_length True --learning_rate 2e-5",
    "llava finetune lora": "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed ZERO3 "
    "--model_name_or_path lmsys/vicuna-7b-v1.5 --version v1 --pretrain_mm_mlp_adapter ./mm_projector.bin "
    "--mm_projector_type mlp2x_gelu --image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-4",
    "llava finetune task lora": "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 "
    "--deepspeed ZERO3 --model_name_or_path liuhaotian/llava-v1.5-13b --version v1 --mm_projector_type mlp2x_gelu "
    "--image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-4",
    "llava qlora": "--deepspeed ZERO2 --lora_enable True --bits 4 --model_name_or_path vicuna --version v1 "
    "--pretrain_mm_mlp_adapter ./mm_projector.bin --learning_rate 2e-5",
    "llava first version": "--model_name_or_path vicuna --version v0 --fsdp_transformer_layer_cls_to_wrap "
    "LlamaDecoderLayer --tune_mm_mlp_adapter True --learning_rate 2e-3",
    "llava next style": "--deepspeed ZERO2 --model_name_or_path vicuna --version v1 --mm_projector_type mlp2x_gelu "
    "--mm_vision_tower_lr 2e-6 --mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model "
    "--image_aspect_ratio anyres --image_grid_pinpoints [(336,672),(672,336)] --mm_patch_merge_type spatial_unpad "
    "--learning_rate 2e-5",
    "duet pretrain": "--deepspeed ZERO2 --model_name_or_path lmsys/vicuna-7b-v1.5 --version plain "
    "--mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True --learning_rate 1e-3 --layer_list [16,24] "
    "--image_token_ratio_list [0.5,0.0] --dominant_num 300 --context_num 7 --cluster_width 4",
    "duet finetune": "--deepspeed ZERO3 --model_name_or_path lmsys/vicuna-7b-v1.5 --version v1 "
    "--pretrain_mm_mlp_adapter ./mm_projector.bin --mm_projector_type mlp2x_gelu --image_aspect_ratio pad "
    "--group_by_modality_length True --learning_rate 2e-5 --layer_list [16,24] --image_token_ratio_list [0.5,0.0] "
    "--dominant 300 --contextual 7 --cluster_width 4 --use_salient_tokens True",
    "duet debugging aids": "--model_name_or_path vicuna --version v1 --monitor_grads True --monitor_grads_every 20 "
    "--raise_on_nan_grad True --tokenizer_model_max_length 3072 --learning_rate 2e-5 --duet_tokens 128",
}


def words(text: str) -> list[str]:
    return text.split()


def script(name: str, output: object) -> list[str]:
    text = f"{SCRIPTS[name]} {COMMON}".replace("OUT", str(output))
    return text.replace("ZERO2", f"{DEEPSPEED}/zero2.json").replace("ZERO3", f"{DEEPSPEED}/zero3.json").split()


@pytest.mark.parametrize("name", SCRIPTS)
def test_public_script_parses(name, tmp_path):
    args = parse_arguments(script(name, tmp_path))
    training = args.training
    assert training.eval_strategy == "no"
    assert training.warmup_steps == 0.03
    assert training.get_warmup_steps(1000) == 30
    assert training.model_max_length == 2048
    assert training.log_to_wandb and training.report_to == []
    assert training.optim == "adamw_torch"
    assert args.model.mm_vision_select_layer == -2
    assert not args.model.mm_use_im_patch_token
    if "ZERO3" in SCRIPTS[name]:
        assert training.hf_deepspeed_config.is_zero3()
    if name.startswith("duet") and "--layer_list" in SCRIPTS[name]:
        config = args.reduction.to_config(None)
        assert (config.dominant, config.contextual, config.cluster_width) == (300, 7, 4)
        assert config.schedule == {16: 0.5, 24: 0.0}
    elif not name.startswith("duet"):
        assert args.reduction.to_config(None) is None
    if "--lora_r 128" in SCRIPTS[name]:
        assert (training.lora_r, training.lora_alpha, training.mm_projector_lr) == (128, 256, 2e-5)


def test_defaults_are_those_of_llava(tmp_path):
    args = parse_arguments(["--output_dir", str(tmp_path)])
    model, data, training = args.model, args.data, args.training
    assert model.model_name_or_path == "facebook/opt-125m"
    assert (model.version, model.mm_vision_select_layer, model.mm_projector_type) == ("v0", -1, "linear")
    assert model.mm_use_im_patch_token and not model.mm_use_im_start_end
    assert (model.mm_patch_merge_type, model.mm_vision_select_feature) == ("flat", "patch")
    assert data.image_aspect_ratio == "square" and not data.is_multimodal
    assert training.model_max_length == 512 and training.optim == "adamw_torch"
    assert (training.lora_r, training.lora_alpha, training.lora_dropout, training.lora_bias) == (64, 16, 0.05, "none")
    assert (training.bits, training.quant_type, training.double_quant) == (16, "nf4", True)
    assert training.remove_unused_columns is False and training.mm_projector_lr is None


OLD = {
    "evaluation_strategy": "steps", "eval_steps": 5, "warmup_ratio": 0.1, "group_by_length": True,
    "save_safetensors": True, "per_gpu_train_batch_size": 3, "per_gpu_eval_batch_size": 2, "no_cuda": True,
    "overwrite_output_dir": True, "logging_dir": "logs", "local_rank": 0,
}  # fmt: skip


def by_parse_arguments(output, flags):
    return parse_arguments(["--output_dir", output, *flags]).training


def by_hf_argument_parser(output, flags):
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    return parser.parse_args_into_dataclasses(["--output_dir", output, *flags])[2]


def by_keywords(output, flags):
    del flags
    return TrainingArguments(output_dir=output, **OLD)


@pytest.mark.parametrize("door", [by_parse_arguments, by_hf_argument_parser, by_keywords])
def test_flags_of_older_transformers_are_understood_at_every_door_with_a_notice(door, tmp_path, caplog):
    training = door(str(tmp_path), [word for name, value in OLD.items() for word in (f"--{name}", str(value))])
    assert training.eval_strategy == "steps" and training.get_warmup_steps(100) == 10 and training.use_cpu
    assert training.train_sampling_strategy == "group_by_length"
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (3, 2)
    assert "--evaluation_strategy steps is now --eval_strategy steps" in caplog.text
    assert "--save_safetensors is ignored" in caplog.text and "--logging_dir is ignored" in caplog.text
    again = replace(training, seed=3)
    assert (again.eval_strategy, again.evaluation_strategy, again.warmup_ratio) == ("steps", None, None)


def test_old_flags_that_cannot_be_carried_over_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--warmup_ratio 1.5.*--warmup_steps"):
        TrainingArguments(output_dir=str(tmp_path), warmup_ratio=1.5)
    with pytest.raises(ValueError, match=r"--evaluation_strategy epoch and --eval_strategy steps contradict"):
        TrainingArguments(output_dir=str(tmp_path), evaluation_strategy="epoch", eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--bits 3 --lora_enable True", "--bits 3"),
        ("--bits 4", "--lora_enable True"),
        ("--lora_bias some", "--lora_bias some"),
        ("--on_bad_sample ignore", "--on_bad_sample ignore: expected error or skip"),
        ("--scan_images maybe", "--scan_images maybe"),
        ("--loss_normalization tokens", "--loss_normalization tokens"),
        ("--length_pool 0", "--length_pool 0: expected 1"),
        ("--length_pool 8", "--group_by_modality_length True"),
        ("--remove_unused_columns True", "images"),
        ("--video_tower x", "--video_tower"),
        ("--tune_mm_mlp_adapter True", "--vision_tower"),
    ],
)
def test_wrong_values_are_refused(extra, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--output_dir", str(tmp_path), *extra.split()])


def test_fp16_on_a_cpu_says_what_it_does(tmp_path, caplog):
    args = parse_arguments(["--output_dir", str(tmp_path), "--fp16", "True", "--use_cpu", "True"])
    assert not args.training.fp16 and args.training.compute_dtype == torch.float32
    assert "--fp16 True: there is no fp16 training on a CPU; this run computes in fp32" in caplog.text


def test_an_unknown_flag_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(ValueError, match=r"--learning_rat is not a training flag.*--learning_rate"):
        parse_arguments(["--output_dir", str(tmp_path), "--learning_rat", "1e-3"])


def test_cpu_deepspeed_sees_the_launchers_world(tmp_path, monkeypatch):
    """Without an accelerator, accelerate would report a world of one whatever the launcher says."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = parse_arguments(["--output_dir", str(tmp_path), "--deepspeed", f"{DEEPSPEED}/zero3.json"])
    assert args.training.world_size == 1
    assert str(args.training.distributed_state.distributed_type).endswith("DEEPSPEED")
    from llava.train.runtime import check_world_size

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"started 2 ranks .* sees 1"):
        check_world_size(args.training.world_size)


@pytest.mark.parametrize(
    ("json", "flag", "clips"),
    [
        (None, None, 1.0),  # transformers' own
        ("zero2.json", None, 0.0),  # LLaVA-1.5's, as its pinned DeepSpeed read them
        ("zero3.json", None, 0.0),
        ("zero3_offload.json", None, 1.0),  # LLaVA's says "auto"
        ("zero3.json", 0.5, 0.5),
        ("zero3_offload.json", 0.0, 0.0),
        ({"gradient_clipping": 0.3}, None, 0.3),
        ({"gradient_clipping": 0.3}, 0.3, 0.3),
    ],
)
def test_the_gradient_is_clipped_as_llava_or_the_user_said(tmp_path, json, flag, clips):
    """DeepSpeed clips at 1.0 where its configuration says nothing, and the one that LLaVA pinned did not clip."""
    argv = ["--output_dir", str(tmp_path)] + ([] if flag is None else ["--max_grad_norm", str(flag)])
    if isinstance(json, dict):
        given = read_deepspeed_config(f"{DEEPSPEED}/zero2.json") | json
        (tmp_path / "own.json").write_text(dumps(given))
        argv += ["--deepspeed", str(tmp_path / "own.json")]
    elif json:
        argv += ["--deepspeed", f"{DEEPSPEED}/{json}"]
    training = parse_arguments(argv).training
    assert training.max_grad_norm == clips
    if json:
        assert training.hf_deepspeed_config.config["gradient_clipping"] == clips
        assert training.deepspeed_plugin.deepspeed_config["gradient_clipping"] == clips


def test_a_deepspeed_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "torn.json").write_text('{"zero_optimization": {')
    with pytest.raises(ValueError, match=r"--deepspeed .*torn.json cannot be read as JSON"):
        parse_arguments(["--output_dir", str(tmp_path), "--deepspeed", str(tmp_path / "torn.json")])


def test_attention_falls_back_with_a_notice():
    from llava.train.runtime import resolve_attention

    assert resolve_attention(None) == ("sdpa", None)
    assert resolve_attention("eager") == ("eager", None)
    if not torch.cuda.is_available():
        kind, notice = resolve_attention("flash_attention_2")
        assert kind == "sdpa" and "flash" in notice
    with pytest.raises(ValueError, match="xformers"):
        resolve_attention("xformers")
