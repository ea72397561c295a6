"""Folders that transformers reads, state that survives a kill, and one sentence for what cannot be read."""

import json

import pytest
import torch

from nanorlhf.checkpoint import StageState, load_model, load_state, save_model, save_state, write_atomic
from nanorlhf.config import ModelConfig, OptimConfig
from nanorlhf.engine.generate import ragged
from nanorlhf.model import Model
from nanorlhf.optim import Optimizer

SMALL = ModelConfig(vocab_size=50, hidden_size=16, layers=1, heads=2, kv_heads=1, head_size=8, intermediate_size=24,
                    context=32)


@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_transformers_loads_a_saved_folder_and_gives_the_same_logits(tmp_path, qk_norm):
    transformers = pytest.importorskip("transformers")
    model = Model(ModelConfig(**{**SMALL.__dict__, "qk_norm": qk_norm}), seed=4)
    save_model(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, cu_seqlens = ragged([[4, 9, 33, 2]])
    expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(model(tokens, cu_seqlens) @ model.head_weight.T, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_transformers_reads_a_reward_models_score(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = Model(SMALL, scalar_head=True, seed=4)
    save_model(tmp_path, model)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    tokens, cu_seqlens = ragged([[4, 9, 33, 2]])
    ours = model.scores(tokens, cu_seqlens, torch.tensor([3]))
    torch.testing.assert_close(ours, theirs(tokens[None]).logits[0].float(), atol=2e-5, rtol=1e-4)


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = Model(SMALL, seed=3)
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.config == SMALL
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert hasattr(load_model(tmp_path, scalar_head=True), "score")


def test_missing_and_foreign_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        load_model(tmp_path)
    save_model(tmp_path, Model(SMALL))
    config = json.loads((tmp_path / "config.json").read_text())
    config["nanorlhf"]["format"] = 999
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another version"):
        load_model(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, b"old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_stage_state_holds_models_optimisers_and_numbers(tmp_path):
    model = Model(SMALL)
    optimizer = Optimizer(model, OptimConfig(), 4)
    state = StageState(tmp_path / "state.safetensors")
    assert state.restore(model=model, optimizer=optimizer) == {"step": 0}
    tokens, cu_seqlens = ragged([[1, 2, 3, 4]])
    (-model.logprobs(tokens, cu_seqlens)[0].mean()).backward()
    optimizer.step(0)
    state.save(1, beta=0.25)
    other = Model(SMALL, seed=8)
    other_optimizer = Optimizer(other, OptimConfig(), 4)
    held = StageState(tmp_path / "state.safetensors").restore(model=other, optimizer=other_optimizer)
    assert held["step"] == 1 and held["beta"] == 0.25
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)
    for key, value in optimizer.state_tensors().items():
        assert torch.equal(value, other_optimizer.state_tensors()[key])


def test_a_damaged_state_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(2)}, {"step": 1})
    assert load_state(path)[1]["step"] == 1
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="cannot be read as a stage's state"):
        load_state(path)
