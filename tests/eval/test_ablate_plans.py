"""What the paper's ablations run: the paper's settings are among them, and nothing else varies."""

from dataclasses import replace

import pytest

from duet import DuetConfig
from llava.eval.ablations import ABLATIONS, STAGES, duet_at
from llava.eval.plans import Geometry

LLAVA, TINY = Geometry(576, 32), Geometry(576, 12)


def plans_of(name, geometry=LLAVA):
    ablation = ABLATIONS[name]
    return ablation.plan(geometry, ablation.budgets)


@pytest.mark.parametrize("geometry", [LLAVA, TINY], ids=["7b", "tiny"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_configuration_fits_and_is_there_once(name, geometry):
    plans, _ = plans_of(name, geometry)
    assert len({plan.line for plan in plans}) == len({plan.name for plan in plans}) == len(plans) > 0
    for plan in plans:
        plan.config.validate(geometry.patches, geometry.layers)
        reached = plan.config.average_tokens(geometry.patches, geometry.layers)
        assert not plan.budget or abs(reached - plan.budget) <= 0.5


def test_table_7_is_clustering_on_and_off_with_and_without_stage_2():
    plans, refused = plans_of("table7")
    at = {(plan.label, plan.budget): plan.config for plan in plans}
    assert len(at) == 12 and not refused
    assert at["(C)", 192].for_depth(32) == DuetConfig.preset("llava-1.5-7b", tokens=192).for_depth(32)
    assert (at["VZ", 64].stage1, at["VZ", 64].dominant, at["VZ", 64].contextual) == ("visionzip", 54, 10)
    assert (at["VZ (C)", 64].stage1, dict(at["VZ (C)", 64].schedule)) == ("local_cluster", {})
    assert (at["DV (V)", 64].stage1, dict(at["DV (V)", 64].schedule)) == ("visionzip", {16: 0.5, 24: 0.0})


def test_tables_8_and_11_vary_the_ranking_text_alone():
    plans, _ = plans_of("table8")
    assert {plan.config.queries for plan in plans} == {"last", "all", "salient"}
    for budget in (192, 128, 64):
        assert len({replace(plan.config, queries="last") for plan in plans if plan.budget == budget}) == 1
    plans, _ = plans_of("table11")
    assert {plan.label: plan.config.queries for plan in plans} == {
        "PDrop": "last", "PDrop (S)": "salient", "PDrop (all)": "all",
    }  # fmt: skip
    assert {plan.budget for plan in plans} == {270}
    assert all(dict(plan.config.schedule) == {8: 0.5, 16: 0.25, 24: 0.125} for plan in plans)


def test_figure_3_varies_the_cluster_width_alone():
    plans, _ = plans_of("fig3")
    for budget in (192, 128, 64):
        own = [plan for plan in plans if plan.budget == budget]
        assert {replace(plan.config, cluster_width=4) for plan in own} == {duet_at(LLAVA, budget)}
        assert {plan.point["cluster width"] for plan in own} >= {2, 4, 6, 8}


def test_figure_5_sweeps_ratios_and_empties_each_stage():
    plans, _ = plans_of("fig5")
    schedules = [tuple(plan.config.schedule[layer] for layer in STAGES) for plan in plans]
    assert (0.5, 0.25, 0.125) in schedules and (0.5, 0.25, 0.0) in schedules and (1.0, 1.0, 0.0) in schedules
    for plan, kept in zip(plans, schedules, strict=True):
        assert (plan.point["no token left after"] != "never") == (0.0 in kept)
        assert plan.config.queries == "all" and plan.config.stage1 == "none"
    assert len(set(schedules)) == len(schedules) == 12


def test_figures_7_and_8_keep_the_sum():
    plans, refused = plans_of("fig78")
    for budget, entering, published in ((192, 307, 300), (128, 205, 170)):
        own = [plan.config for plan in plans if plan.budget == budget]
        assert {config.entering for config in own} == {entering}
        assert published in {config.dominant for config in own}
        assert {config.cluster_width for config in own} == {2, 4, 6, 8}
        assert all(c.cluster_width * c.contextual <= 576 - c.dominant for c in own)
    assert len(plans) == 44 and len(refused) == 8
    assert "k1 = 184, k2 = 123 at width 4: only 392 patches are left" in refused


def test_variations_cross_what_stage_1_declares():
    plans, _ = plans_of("variations")
    assert all(plan.config.stage1 == "local_cluster" and plan.config.options == dict(plan.point) for plan in plans)
