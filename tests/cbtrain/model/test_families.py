"""Every family of causal decoders: the same losses with early exit, without, and as plain forwards give them."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from causal_models import GEMMA, MODELS, SHAPE, model_of, token_batch, with_large_weights
from peft import PeftModel
from plain_step import plain_step
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from cbtrain.config import CircuitBreakerConfig, InputError, get_config
from cbtrain.data.batches import PairedBatch, ScoredCounts
from cbtrain.evaluation.held_out import HeldOut, evaluate
from cbtrain.losses.schedule import Coefficients
from cbtrain.model.checks import check_fit
from cbtrain.model.loading import forget_base, load_base
from cbtrain.model.lora import add_adapter, beyond_lora, decoder_blocks, lora_targets
from cbtrain.model.partial_forward import Decoder
from cbtrain.training.engine import save_adapter
from cbtrain.training.step import CircuitBreakerStep
from cbtrain.utils.environment import say_once

CONFIG = get_config("tiny", lora_init_std=0.1, target_layers=(1, 3), retain_norms=(2.0, 4.0), kl_temperature=2.0)
HOW: tuple[Literal["early_exit", "output_hidden_states"], ...] = ("early_exit", "output_hidden_states")
WEIGHTS = Coefficients(1.0, 1.0, 1.0)
BATCH = token_batch()
PAIR = PairedBatch((BATCH,), (BATCH,))
COUNTS = ScoredCounts(len(BATCH.scored_tokens), len(BATCH.scored_tokens), len(BATCH.scored_predictions), 0)


def gradients_of(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("name", MODELS)
def test_losses_with_early_exit_are_those_without_and_those_of_plain_forwards(name):
    """Whatever a family does to its logits: the losses, their gradients and the held-out KL."""
    model = add_adapter(model_of(name), CONFIG)
    loss, plain = plain_step(model, PAIR, CONFIG, WEIGHTS)
    expected = gradients_of(model, loss)
    early, whole = (CircuitBreakerStep(model, replace(CONFIG, hidden_states=how)) for how in HOW)
    assert early.decoder.early_exit
    assert not whole.decoder.early_exit
    outputs = [step(PAIR, COUNTS, WEIGHTS) for step in (early, whole)]
    assert torch.equal(outputs[0].parts, outputs[1].parts), [output.parts for output in outputs]
    for output in outputs:
        assert output.parts.tolist() == pytest.approx(plain.tolist(), rel=1e-4)
        for found, gradient in zip(gradients_of(model, output.loss), expected, strict=True):
            assert torch.allclose(found, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
    cold = plain_step(model, PAIR, replace(CONFIG, kl_temperature=1.0), WEIGHTS)[1][3]
    metrics = evaluate(early.decoder, HeldOut([BATCH], [BATCH]), CONFIG)
    assert metrics["eval_benign_kl"] == pytest.approx(cold.item(), rel=1e-4)


@pytest.fixture
def saved(tmp_path):
    """Saves a model; gives the configuration that names it."""

    def save(model: PreTrainedModel) -> CircuitBreakerConfig:
        model.save_pretrained(tmp_path / "model")
        return replace(CONFIG, model=str(tmp_path / "model"))

    return save


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_gives_the_trained_logits_in_plain_peft(name, saved, tmp_path):
    config = saved(model_of(name))
    assert check_fit(config) == 4
    model = add_adapter(load_base(config), replace(config, lora_layers=(0, 2)))
    expected = logits_of(model)
    save_adapter(model, tmp_path / "adapter", config)
    base = AutoModelForCausalLM.from_pretrained(config.model).eval()
    plain = logits_of(base)
    # Trainable as ours is: torch chooses kernels by that too.
    found = logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval())
    assert torch.equal(found, expected), (found - expected).abs().max()
    assert (found - plain).abs().max() > 1e-3


def test_experts_and_their_router_are_named_as_out_of_loras_reach(saved, capsys):
    say_once.cache_clear()
    config = saved(model_of("llama4"))
    capsys.readouterr()
    check_fit(config)
    check_fit(config)
    assert capsys.readouterr().err == (
        "LoRA can reach 45% of the decoder blocks' weights: not feed_forward.experts.down_proj, "
        "feed_forward.experts.gate_up_proj, feed_forward.router\n"
    )
    adapted = {
        n.split(".lora_")[0]
        for n, p in add_adapter(model_of("llama4"), CONFIG).named_parameters()
        if p.requires_grad and ".layers.1." in n
    }
    assert sorted(name.split(".layers.1.")[1] for name in adapted) == [
        "feed_forward.shared_expert.down_proj",
        "feed_forward.shared_expert.gate_proj",
        "feed_forward.shared_expert.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt-neox", "gpt2", "falcon"])
def test_in_a_dense_model_lora_reaches_every_weight_of_the_blocks(name):
    assert beyond_lora(model_of(name)) is None


def test_an_encoder_of_images_with_as_many_blocks_is_not_taken_for_the_decoder():
    base = model_of("gemma3 with images")
    assert decoder_blocks(base)[0] == "model.language_model.layers"
    model = add_adapter(base, replace(CONFIG, lora_layers=(1,)))
    adapted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert adapted
    assert all(".language_model.layers.1." in name for name in adapted), adapted


def test_blocks_without_a_linear_map_are_refused_by_what_their_weights_sit_in(saved):
    config = saved(model_of("llama"))

    class Doubled(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(states)

    base = load_base(config)
    for module in base.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Doubled
    with pytest.raises(InputError, match=r"the blocks' weights sit in Doubled, and LoRA goes on Linear and Conv1D$"):
        lora_targets(base, config)
    forget_base()


def test_what_peft_refuses_is_left_out_unless_it_is_named():
    mamba = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=4, vocab_size=100))
    assert lora_targets(mamba, CONFIG) == ["dt_proj", "in_proj", "x_proj"]
    assert "mixer.out_proj" in beyond_lora(mamba)
    with pytest.raises(InputError, match="MambaForCausalLM takes no such adapter") as caught:
        add_adapter(mamba, replace(CONFIG, lora_targets=("in_proj", "out_proj")))
    assert "\n" not in str(caught.value)
    assert add_adapter(mamba, CONFIG)


def test_a_model_of_several_streams_is_refused_before_its_weights_are_loaded(saved):
    shape = GEMMA | {"vocab_size_per_layer_input": 100, "laurel_rank": 4, "num_kv_shared_layers": 0}
    config = saved(Gemma3nForCausalLM(Gemma3nTextConfig(**shape, layer_types=["full_attention"] * 4)))
    with pytest.raises(InputError, match="Gemma3nForCausalLM passes several streams from block to block, not"):
        check_fit(config)


def test_what_fails_in_the_trial_forward_is_told_by_name():
    base = model_of("llama")
    base.model.layers[1].register_forward_hook(lambda *_: {}["lost"])
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be taken apart as a decoder \(KeyError: 'lost'\)$"):
        Decoder(add_adapter(base, CONFIG), "early_exit")


def test_an_adapter_that_no_gradient_reaches_is_refused():
    base = model_of("llama")
    base.model.norm.register_forward_hook(lambda _module, _args, output: output.detach())
    with pytest.raises(InputError, match="LlamaForCausalLM passes no gradient to an adapter"):
        Decoder(add_adapter(base, CONFIG), "early_exit")


def test_a_model_that_reads_ahead_is_refused():
    shape = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    encoder = with_large_weights(BertLMHeadModel(BertConfig(**shape)))
    with pytest.raises(InputError, match="BertLMHeadModel is no causal decoder: later tokens change what it predicts"):
        Decoder(add_adapter(encoder, CONFIG), "early_exit")
