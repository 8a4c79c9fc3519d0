"""TRL's trainers on an attached model: every forward, of the policy and of the reference, is reduced, and losses pair.

TRL is no dependency; `make test-trl` installs the version that is tested and runs these tests.
"""

import importlib.util

import pytest
import torch
from models import CASES
from PIL import Image
from test_processors import processor

import duet
from duet import DuetConfig

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed; `make test-trl` installs it and runs these tests", allow_module_level=True)

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

CONFIG = DuetConfig(dominant=8, contextual=2, cluster_width=3, schedule={1: 0.5, 3: 0.0})
STEPS, LAYERS = 2, 4
VISUAL = [10, 5, 5, 0]  # visual tokens that the four layers see
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"]),
]


def pictures(count):
    return [Image.linear_gradient("L").rotate(90 * number).resize((24, 24)).convert("RGB") for number in range(count)]


def said(role, text):
    return {"role": role, "content": text}


def dataset(kind, count=8):
    asks = [[said("user", f"what is in the picture w{40 + number}")] for number in range(count)]
    answers = [
        [said("assistant", " ".join(f"w{50 + i + number}" for i in range(2 + number % 3)))] for number in range(count)
    ]
    rows = {"images": [[one] for one in pictures(count)], "prompt": asks}
    if kind == "sft":
        rows |= {"completion": answers}
    if kind == "dpo":
        rows |= {"chosen": answers, "rejected": answers[1:] + answers[:1]}
    return Dataset.from_dict(rows)


def settings(tmp_path, **more):
    return {
        "output_dir": str(tmp_path), "max_steps": STEPS, "per_device_train_batch_size": 2, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3, "bf16": False,
        "gradient_checkpointing": False,
    } | more  # fmt: skip


def adapter(lora):
    if not lora:
        return None
    from peft import LoraConfig

    return LoraConfig(target_modules=r".*language_model.*(q|v)_proj", r=4)


@pytest.fixture
def policy(tmp_path):
    """A tiny attached model that also lies in a folder, as the reference is loaded from its name."""
    model = CASES["llava"].build()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    model.generation_config.eos_token_id = None
    duet.attach(model, CONFIG)
    return model


def check(seen, least):
    """Every pass that was recorded is reduced, and there are at least so many."""
    assert len(seen.passes) >= least
    for segments in seen.passes:
        for row in range(len(segments[0].visual)):
            assert [s.visual[row] for s in segments for _ in range(s.start, s.stop)] == VISUAL


class Passes:
    """Counts the passes of a decoder, so that none can go unrecorded."""

    def __init__(self, *models):
        self.count = 0
        for model in models:
            layer = duet.handle(model).model.model.language_model.layers[0]
            layer.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.count += int(args[0].shape[1] > 1)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft(policy, tmp_path, lora):
    trainer = SFTTrainer(
        model=policy, args=SFTConfig(**settings(tmp_path, max_length=None)), train_dataset=dataset("sft"),
        processing_class=processor("llava"), peft_config=adapter(lora),
    )  # fmt: skip
    passes = Passes(trainer.model)
    with duet.trace() as seen:
        trainer.train()
    check(seen, STEPS)
    assert passes.count == len(seen.passes)
    assert len(losses(trainer)) == STEPS and all(0 < loss < 50 for loss in losses(trainer))


def test_sft_gives_the_loss_of_the_model_itself(policy, tmp_path, lora):
    trainer = SFTTrainer(
        model=policy, args=SFTConfig(**settings(tmp_path, max_length=None)), train_dataset=dataset("sft"),
        processing_class=processor("llava"), peft_config=adapter(lora),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        model = duet.handle(trainer.model).model
        wanted = type(model).forward(model, **batch).loss
    assert torch.isfinite(loss)
    if not lora:  # PEFT takes the labels away under TRL, so other rows rank
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_dpo(policy, tmp_path, lora):
    reference = None
    if not lora:
        reference = CASES["llava"].build()
        duet.attach(reference, CONFIG)
    trainer = DPOTrainer(
        model=policy, ref_model=reference, args=DPOConfig(**settings(tmp_path, max_length=None)),
        train_dataset=dataset("dpo"), processing_class=processor("llava"), peft_config=adapter(lora),
    )  # fmt: skip
    passes = Passes(trainer.model, *([] if lora else [trainer.ref_model]))
    with duet.trace() as seen:
        trainer.train()
    check(seen, 2 * STEPS)
    assert passes.count == len(seen.passes)
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference agree before the first step"


def test_grpo(policy, tmp_path, lora):
    def reward(completions, **_):
        return [float(len(str(one)) % 7) for one in completions]

    trainer = GRPOTrainer(
        model=policy, reward_funcs=reward,
        args=GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=4, beta=0.1, temperature=1.0)),
        train_dataset=dataset("grpo"), processing_class=processor("llava"), peft_config=adapter(lora),
    )  # fmt: skip
    models = [trainer.model]
    if trainer.ref_model is not None:
        duet.attach(trainer.ref_model, CONFIG)  # TRL has loaded it by its name, and put its own forward on
        models.append(trainer.ref_model)
    passes = Passes(*models)
    with duet.trace() as seen:
        trainer.train()
    check(seen, 3 * STEPS)
    assert passes.count == len(seen.passes), "generation, policy and reference"
    assert abs(trainer.state.log_history[0]["kl"]) < 1e-4, "policy and reference agree before the first step"
