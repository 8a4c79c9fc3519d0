"""Weights that a step made NaN are never saved, even where the loss of every batch was finite."""

import pytest

from llava.sanity import NonFiniteWeights
from llava.train.checkpoints import checkpoints
from llava.train.llava_trainer import LLaVATrainer


@pytest.mark.parametrize("save", ["steps", "no"])
def test_the_run_stops_when_it_saves_and_keeps_what_is_sound(train, tmp_path, monkeypatch, save):
    step = LLaVATrainer.training_step

    def spoil(self, model, *rest, **more):
        loss = step(self, model, *rest, **more)
        if self.state.global_step == 1:  # the second and last one
            model.lm_head.weight.data[3, 3] = float("nan")
        return loss

    monkeypatch.setattr(LLaVATrainer, "training_step", spoil)
    with pytest.raises(NonFiniteWeights, match=r"step 2, nothing is saved: 1 weights are NaN.*lm_head\.weight"):
        train(max_steps=2, save_steps=1, save_strategy=save)
    out = tmp_path / "out"
    assert [path.name for path in checkpoints(out)] == (["checkpoint-1"] if save == "steps" else [])
    assert not list(out.glob("*.safetensors")) and not (out / "checkpoint-2").exists()
