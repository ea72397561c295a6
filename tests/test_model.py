"""The decoder against Hugging Face's Llama, Qwen3 and GPT-2, and its own properties."""

import pytest
import torch

from nanorlhf import ops
from nanorlhf.config import ModelConfig
from nanorlhf.engine.generate import ragged
from nanorlhf.model import Model, compute_dtype

transformers = pytest.importorskip("transformers")

SHAPE = dict(vocab_size=97, hidden_size=32, layers=2, heads=4, kv_heads=2, head_size=16, intermediate_size=48, context=64)
SEQUENCES = [[3, 5, 7, 11, 13], [2], [90, 1, 1, 4, 8, 8, 20]]


def hf_settings(config: ModelConfig) -> dict:
    return dict(vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers, num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads, head_dim=config.head_size, max_position_embeddings=config.context,
                rope_theta=config.rope_base, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied)


def logits(model: Model, sequence) -> torch.Tensor:
    tokens, cu_seqlens = ragged([sequence])
    return model(tokens, cu_seqlens) @ model.head_weight.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_weights_load_into_hugging_face_tensor_for_tensor_and_give_its_logits(qk_norm, tied):
    config = ModelConfig(**SHAPE, qk_norm=qk_norm, tied=tied)
    model = Model(config, seed=1)
    for name, p in model.named_parameters():
        if p.ndim == 1:  # norms start at one; a wrong name would not show
            p.add_(torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name))))
    kind = "Qwen3" if qk_norm else "Llama"
    theirs = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**hf_settings(config)))
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    theirs.tie_weights()
    for sequence in SEQUENCES:
        expected = theirs(torch.tensor([sequence])).logits[0]
        torch.testing.assert_close(logits(model, sequence), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_gpt2_variant_gives_gpt2s_logits():
    config = ModelConfig(**{**SHAPE, "kv_heads": 4, "head_size": 8}, qk_norm=False, variant="gpt2")
    model = Model(config, seed=2)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, layer_norm_epsilon=config.norm_eps))
    theirs.eval()
    for name, p in theirs.named_parameters():  # biases start at zero; a wrong place would not show
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    source = theirs.state_dict()
    state = {"model.embed_tokens.weight": source["transformer.wte.weight"],
             "model.embed_positions.weight": source["transformer.wpe.weight"]}
    for kind in ("weight", "bias"):
        state[f"model.norm.{kind}"] = source[f"transformer.ln_f.{kind}"]
        for i in range(2):
            h, l = f"transformer.h.{i}.", f"model.layers.{i}."
            turn = (lambda t: t.T) if kind == "weight" else (lambda t: t)  # their Conv1D holds (in, out)
            for part, t in zip("qkv", turn(source[h + f"attn.c_attn.{kind}"]).chunk(3)):
                state[l + f"self_attn.{part}_proj.{kind}"] = t
            state[l + f"self_attn.o_proj.{kind}"] = turn(source[h + f"attn.c_proj.{kind}"])
            state[l + f"mlp.up_proj.{kind}"] = turn(source[h + f"mlp.c_fc.{kind}"])
            state[l + f"mlp.down_proj.{kind}"] = turn(source[h + f"mlp.c_proj.{kind}"])
            state[l + f"input_layernorm.{kind}"] = source[h + f"ln_1.{kind}"]
            state[l + f"post_attention_layernorm.{kind}"] = source[h + f"ln_2.{kind}"]
    model.load_state_dict(state)
    for sequence in SEQUENCES:
        expected = theirs(torch.tensor([sequence])).logits[0]
        torch.testing.assert_close(logits(model, sequence), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_sequence_has_the_same_hidden_states_whoever_shares_its_batch():
    model = Model(ModelConfig(**SHAPE))
    together = model(*ragged(SEQUENCES))
    alone = torch.cat([model(*ragged([s])) for s in SEQUENCES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_future_tokens_cannot_change_past_hidden_states():
    model = Model(ModelConfig(**SHAPE))
    one, other = model(*ragged([[1, 2, 3, 4, 5]])), model(*ragged([[1, 2, 3, 9, 9]]))
    torch.testing.assert_close(one[:3], other[:3], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(one[3:], other[3:], atol=1e-3)


@torch.no_grad()
def test_logprobs_are_those_of_the_softmax_of_the_logits():
    model = Model(ModelConfig(**SHAPE))
    tokens, cu_seqlens = ragged([SEQUENCES[0]])
    full = torch.log_softmax(model(tokens, cu_seqlens).double() @ model.head_weight.T.double() / 0.7, -1)
    logprobs, entropy = model.logprobs(tokens, cu_seqlens, temperature=0.7)
    expected = full[:-1].gather(-1, tokens[1:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(full.exp() * full).sum(-1)[:-1], atol=1e-5, rtol=1e-5)


def test_a_scalar_head_reads_the_position_that_is_asked_for():
    model = Model(ModelConfig(**SHAPE), scalar_head=True)
    tokens, cu_seqlens = ragged(SEQUENCES)
    where = cu_seqlens[1:].long() - 1
    scores = model.scores(tokens, cu_seqlens, where)
    expected = model(tokens, cu_seqlens)[where] @ model.score.weight[0]
    torch.testing.assert_close(scores, expected)
    assert scores.shape == (3,) and scores.dtype == torch.float32


def test_the_number_of_parameters_is_what_the_shape_says():
    """V·C + L·(2·C·H·D + 2·C·Hkv·D + 3·C·M + 2·C + 2·D) + C, tied, with QK-norm."""
    config = ModelConfig(**SHAPE)
    per_layer = 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 16
    assert sum(p.numel() for p in Model(config).parameters()) == 97 * 32 + 2 * per_layer + 32


def test_bfloat16_compute_keeps_float32_master_weights_and_gradients():
    model = Model(ModelConfig(**SHAPE), dtype=torch.bfloat16)
    tokens, cu_seqlens = ragged(SEQUENCES)
    logprobs, _ = model.logprobs(tokens, cu_seqlens)
    (-logprobs.mean()).backward()
    assert logprobs.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    exact, _ = Model(ModelConfig(**SHAPE)).logprobs(tokens, cu_seqlens)
    assert 0 < float((logprobs - exact).abs().max()) < 0.05


def test_a_sequence_longer_than_the_context_is_refused_in_one_sentence():
    model = Model(ModelConfig(**SHAPE))
    with pytest.raises(ValueError, match="a sequence of 65 tokens is longer than the model's context of 64"):
        model(*ragged([[1] * 65]))


def test_dtype_auto_follows_the_hardware_and_a_wrong_name_is_refused():
    has = ops.backend.cpu_features()
    expected = torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    assert compute_dtype("auto", torch.device("cpu")) is expected
    with pytest.raises(ValueError, match="unknown dtype 'fp8'"):
        compute_dtype("fp8", torch.device("cpu"))
