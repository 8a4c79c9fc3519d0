"""The Trainer trains a reduced model as it is, and models with accelerate's device hooks stay usable."""

import pytest
import torch
import transformers as hf
from models import CASES
from qwen_models import CASES as QWEN
from test_contract import labelled

import duet

ALL = CASES | QWEN
# transformers reads image_newline past the hooks of an offloaded model
OFFLOADED = [name for name in ALL if name not in ("llava_next", "llava_onevision", "llava_next_video")]


def collate(records):
    (record,) = records
    return {name: torch.as_tensor(value) for name, value in record.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llava_next", "video_llava", "llava_onevision", *QWEN])
def test_trainer(family, tmp_path):
    case = ALL[family]
    model = case.build()
    names = [name for name, (_, pictures, _) in case.samples.items() if pictures]
    records = [labelled(case.inputs(model, [case.samples[name]])) | {"not_an_input": 1} for name in names]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if case.projectors[0] in name}
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=len(records), learning_rate=1e-2,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with duet.attach(model, case.config):
        trainer = hf.Trainer(model=model, args=arguments, train_dataset=records, data_collator=collate)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(records) and all(0 < loss < 100 for loss in losses)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert duet.attach(type(model).from_pretrained(tmp_path / "saved")).config == case.config.for_depth(4)


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_models_with_device_map_hooks(family):
    from accelerate import dispatch_model

    case = ALL[family]
    model = dispatch_model(case.build(), {"": "cpu"}, force_hooks=True)
    inputs = case.batch(model)
    plain = model(**inputs).logits
    with duet.attach(model, case.config):
        reduced = model(**inputs).logits
        assert reduced.shape[1] < plain.shape[1]
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    with duet.attach(case.build(), case.config) as handle:
        assert torch.equal(handle.model(**inputs).logits, reduced)
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", OFFLOADED)
def test_offloaded_models(family):
    from accelerate import cpu_offload

    case = ALL[family]
    model = case.build()
    inputs = case.batch(model)
    with duet.attach(model, case.config):
        reduced = model(**inputs).logits
    with duet.attach(cpu_offload(model, torch.device("cpu")), case.config):
        assert torch.equal(model(**inputs).logits, reduced)
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


@torch.no_grad()
@pytest.mark.parametrize("family", CASES)
def test_positional_arguments_follow_the_host(family):
    case = ALL[family]
    model = case.build()
    inputs = case.batch(model)
    with duet.attach(model, case.config):
        wanted = model(**inputs).logits
        ids, pixels = (
            inputs.pop("input_ids"),
            inputs.pop(next(name for name in inputs if name.startswith("pixel_values"))),
        )
        assert torch.equal(model(ids, pixels, **inputs).logits, wanted)
        with pytest.raises(ValueError, match="mm_encoder_outputs holds unreduced features"):
            model(ids, mm_encoder_outputs={"image": object()})
