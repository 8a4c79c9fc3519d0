"""Bad records are found before the first step; the dry run shows what training would see."""

from __future__ import annotations

import json

import pytest
import train_world

from llava.train.records import BadSampleError


@pytest.fixture
def bad_data(tmp_path):
    """Records of which one has a corrupt picture and one an empty answer, out of 300."""
    path, images = train_world.write_data(tmp_path / "data", count=300, text_only=280)
    records = json.loads(path.read_text())
    (images / "p290.png").write_bytes(b"not a picture")
    records[5]["conversations"][1]["value"] = "  "
    path.write_text(json.dumps(records))
    return path, images


def test_bad_records_stop_the_run_before_the_first_step(train, tmp_path, bad_data):
    with pytest.raises(BadSampleError) as caught:
        train(data_path=bad_data[0], image_folder=bad_data[1])
    message = str(caught.value)
    assert "300 records" in message and "2 bad" in message
    assert "r290" in message and "r5" in message and "record 5" in message and "--on_bad_sample skip" in message
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_skip_leaves_them_out_and_counts_them(train, tmp_path, bad_data, caplog):
    train(data_path=bad_data[0], image_folder=bad_data[1], on_bad_sample="skip", max_steps=1, save_strategy="no")
    assert "2 bad records were left out or replaced" in caplog.text
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(record["id"] for record in listed) == ["r290", "r5"]


def test_too_many_records_without_labels_are_fatal(train, tmp_path):
    path, images = train_world.write_data(tmp_path / "data", count=20)
    records = json.loads(path.read_text())
    records[3]["conversations"][1]["value"] = ""
    path.write_text(json.dumps(records))
    with pytest.raises(BadSampleError, match=r"1 of 20 records have nothing to learn from.*max_zero_label_share"):
        train(data_path=path, image_folder=images, on_bad_sample="skip")
    train(data_path=path, image_folder=images, on_bad_sample="skip", max_zero_label_share=0.1, max_steps=1)


def test_records_that_do_not_fit_the_template_are_found_first(train, world):
    with pytest.raises(BadSampleError, match="plain template"):
        train(version="plain", data_path=world.data[0], image_folder=world.data[1])


@pytest.mark.parametrize("mode", [{}, {"captions": True}, {"lora_enable": True, "lora_r": 2}])
def test_dry_run_checks_everything_and_leaves_nothing(train, tmp_path, capsys, mode):
    train(dry_run=True, dry_run_records=6, max_steps=-1, num_train_epochs=2, **mode)
    said = capsys.readouterr().out
    assert "supervised" in said and "thing number" in said and "<image>" in said
    assert "tensors read back and compared" in said
    assert "memory per rank in MB" in said and "everything works" in said
    assert "would take 16 steps" in said or "would take 8 steps" in said
    assert not (tmp_path / "out" / "dry_run").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_dry_run_notices_a_save_that_lost_a_weight(train, tmp_path):
    from safetensors.torch import load_file, save_file

    from llava.train import train as module
    from llava.train.checkpoints import CheckpointError
    from llava.train.llava_trainer import LLaVATrainer

    class Forgetful(LLaVATrainer):
        """Writes wrong values into what it saves."""

        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            path = f"{output_dir}/model.safetensors"
            state = load_file(path)
            state["lm_head.weight"] += 1
            save_file(state, path, metadata={"format": "pt"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LLaVATrainer", Forgetful)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight was read back with other values"):
            train(dry_run=True)


def test_duet_flags_without_a_tower_are_refused(train):
    with pytest.raises(ValueError, match="no visual tokens to reduce"):
        train(vision_tower=None, image_folder=None)


def test_mpt_is_refused_by_content(tmp_path):
    from llava.train.build import model_class

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpt"}))
    with pytest.raises(ValueError, match="MPT"):
        model_class(str(tmp_path), None, True)
