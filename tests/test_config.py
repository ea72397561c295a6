"""config.py: settings that hold together, and one sentence for those that do not."""

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest

from nanorlhf.config import PRESETS, ModelConfig, OptimConfig, PPOConfig, PretrainConfig, RewardConfig, RunConfig, gpt2_small, preset
from nanorlhf.model import Model


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_carries_its_own_name_and_takes_changes(name):
    assert preset(name).preset == name
    changed = preset(name, seed=11, out="elsewhere")
    assert (changed.seed, changed.out) == (11, "elsewhere") and changed.model == preset(name).model


def test_an_unknown_preset_is_refused_with_the_names_that_there_are():
    with pytest.raises(ValueError, match="unknown preset 'huge'; there are laptop, tiny"):
        preset("huge")


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        RunConfig().seed = 1


@pytest.mark.parametrize("change, sentence", [
    (dict(layers=0), "ModelConfig: layers must be positive, got 0"),
    (dict(vocab_size=-5), "ModelConfig: vocab_size must be positive, got -5"),
    (dict(heads=6, kv_heads=4), r"ModelConfig: heads \(6\) must be a multiple of kv_heads \(4\)"),
    (dict(head_size=7), "ModelConfig: rotary positions need an even head_size, got 7"),
    (dict(variant="mamba"), "ModelConfig: unknown variant 'mamba'"),
])  # fmt: skip
def test_a_shape_that_cannot_be_is_refused_in_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(**change)


def test_gpt2_may_have_an_odd_head_size():
    assert ModelConfig(head_size=7, variant="gpt2").head_size == 7


@pytest.mark.parametrize("change, sentence", [
    (dict(pretrain=PretrainConfig(row_tokens=100)),
     r"pretrain.row_tokens \(100\) is longer than the model's context \(64\)"),
    (dict(ppo=PPOConfig(max_new_tokens=64)), r"ppo.max_new_tokens \(64\) leaves no room for a prompt in the model's "
                                             r"context \(64\)"),
    (dict(reward=RewardConfig(k=1)), "reward.k must be at least 2 to rank anything, got 1"),
])  # fmt: skip
def test_settings_that_contradict_one_another_are_refused_in_one_sentence(change, sentence):
    sound = dict(model=ModelConfig(context=64), pretrain=PretrainConfig(row_tokens=64), ppo=PPOConfig(max_new_tokens=63))
    assert RunConfig(**sound)
    with pytest.raises(ValueError, match=sentence):
        RunConfig(**{**sound, **change})


def test_the_dictionary_holds_every_field_in_jsons_own_types():
    def check(config, held):
        assert set(held) == {f.name for f in fields(config)}
        for f in fields(config):
            value = getattr(config, f.name)
            if is_dataclass(value):
                check(value, held[f.name])
            else:
                assert held[f.name] == (list(value) if isinstance(value, tuple) else value)

    config = replace(preset("tiny"), seed=5)
    check(config, config.to_dict())


def test_gpt2_small_has_the_published_number_of_parameters():
    """124,439,808: 50,257·768 + 1,024·768 + 12·(4·768² + 8·768² + biases 9·768 + 4·768 of norms) + 2·768."""
    c = gpt2_small()
    C, per_layer = c.hidden_size, 12 * c.hidden_size**2 + 9 * c.hidden_size + 4 * c.hidden_size
    expected = c.vocab_size * C + c.context * C + c.layers * per_layer + 2 * C
    assert expected == 124_439_808
    small = replace(c, vocab_size=10, layers=1, context=8)  # the same blocks without the weight
    assert sum(p.numel() for p in Model(small).parameters()) == 10 * C + 8 * C + per_layer + 2 * C


@pytest.mark.parametrize("stage, change, sentence", [
    ("rloo", dict(temperature=0.0), "rloo.temperature must be above 0, got 0.0"),
    ("grpo", dict(temperature=float("nan")), "grpo.temperature must be finite, got nan"),
    ("ppo", dict(top_p=1.5), "ppo.top_p must be at most 1, got 1.5"),
    ("ppo", dict(importance_cap=-1.0), "ppo.importance_cap must be 0 or more, got -1.0"),
    ("ppo", dict(micro_episodes=-1), "ppo.micro_episodes must be 0 or more, got -1"),
    ("ppo", dict(missing_end="drop"), "ppo.missing_end must be one of replace, subtract, keep, got 'drop'"),
    ("ppo", dict(optim=OptimConfig(lr=-1.0)), "ppo.optim.lr must be 0 or more, got -1.0"),
    ("ppo", dict(steps=0), "ppo.steps must be above 0, got 0"),
    ("reinforce", dict(kl_horizon=2), r"reinforce.kl_horizon \(2\) is too short for 16 responses in a step: beta could fall to 0"),
    ("dpo", dict(beta=0.0), "dpo.beta must be above 0, got 0.0"),
    ("dpo", dict(loss="ipo", label_smoothing=0.1), "dpo.label_smoothing is of the sigmoid loss; IPO has none"),
    ("reward", dict(unfavourable=2.0), "reward.unfavourable must be at most 1, got 2.0"),
])  # fmt: skip
def test_a_setting_out_of_range_is_refused_before_the_run_begins(stage, change, sentence):
    config = preset("tiny")
    with pytest.raises(ValueError, match=sentence):
        replace(config, **{stage: replace(getattr(config, stage), **change)})
