"""A model run block by block gives what its own forward gives, and runs nothing that is not read."""

from dataclasses import replace

import pytest
import torch
from causal_models import MODELS, model_of, token_batch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from cbtrain.config import InputError, get_config
from cbtrain.data.batches import TeacherStates, TokenBatch
from cbtrain.model import partial_forward as decoder_module
from cbtrain.model.activation_checkpointing import recomputed_blocks
from cbtrain.model.lora import add_adapter
from cbtrain.model.partial_forward import Decoder
from cbtrain.utils.environment import say_once

CONFIG = get_config("tiny", lora_init_std=0.1, lora_layers=None)
UPPER = replace(CONFIG, lora_layers=(2,), target_layers=(3,))


@pytest.fixture
def batch() -> TokenBatch:
    return token_batch()


def equal(first: TeacherStates, second: TeacherStates) -> bool:
    return torch.equal(first.hidden, second.hidden) and torch.equal(first.head_input, second.head_input)


def calls_of(decoder: Decoder) -> list[int]:
    """The blocks that run from now on, in their order."""
    calls: list[int] = []
    for index, block in enumerate(decoder._blocks):
        original = block.forward

        def forward(*args, original=original, index=index, **kwargs):
            calls.append(index)
            return original(*args, **kwargs)

        block.forward = forward
    return calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lora_layers", [None, (2,)])
def test_both_views_are_those_of_whole_forwards_bit_for_bit(name, lora_layers, batch):
    model = add_adapter(model_of(name), replace(CONFIG, lora_layers=lora_layers))
    by_blocks, whole = Decoder(model, "early_exit"), Decoder(model, "output_hidden_states")
    assert by_blocks.early_exit
    assert not whole.early_exit
    layers = [0, 1, 2, 3, 4]
    student, teacher = by_blocks.states(batch, layers, final=True)
    expected_student, expected_teacher = whole.states(batch, layers, final=True)
    assert equal(student, expected_student)
    assert equal(teacher, expected_teacher)
    assert equal(by_blocks.teacher(batch, layers, True), teacher)
    assert not torch.equal(student.hidden, teacher.hidden)
    assert student.head_input.requires_grad
    assert not teacher.head_input.requires_grad
    lower, _ = by_blocks.states(batch, [1, 3], final=False)
    assert torch.equal(lower.hidden, student.hidden[:, [1, 3]])


@pytest.mark.parametrize("name", MODELS)
def test_the_head_on_the_final_states_gives_the_models_own_logits(name, batch):
    """Soft caps, biases and multiplied logits included."""
    model = add_adapter(model_of(name), CONFIG)
    decoder = Decoder(model, "early_exit")
    student, _ = decoder.states(batch, [1], final=True)
    head = decoder.head.arguments()
    logits = decoder.head.scale * torch.nn.functional.linear(student.head_input, head["lm_head_weight"], head["bias"])
    if head["softcap"]:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.allclose(logits, own.flatten(0, 1)[batch.scored_predictions], atol=1e-5)


def test_a_pass_ends_at_the_highest_layer_and_shares_the_blocks_below_the_adapter(batch):
    decoder = Decoder(add_adapter(model_of("llama"), replace(UPPER, lora_layers=(1,))), "early_exit")
    calls = calls_of(decoder)
    decoder.states(batch, [2], final=False)
    assert calls == [0, 1, 1], "block 0 once, block 1 for each view, nothing above layer 2"
    calls.clear()
    decoder.states(batch, [2], final=True)
    assert calls == [0, 1, 2, 3, 1, 2, 3]


def test_states_that_a_batch_brings_spare_the_teachers_pass(batch):
    decoder = Decoder(add_adapter(model_of("llama"), UPPER), "early_exit")
    student, teacher = decoder.states(batch, [3], final=True)
    calls = calls_of(decoder)
    again, given = decoder.states(replace(batch, teacher=teacher), [3], final=True)
    assert calls == [0, 1, 2, 3]
    assert given is teacher
    assert equal(again, student)


def test_backward_does_not_enter_the_blocks_below_the_adapter(batch):
    model = add_adapter(model_of("llama"), UPPER)
    decoder = Decoder(model, "early_exit")
    entered = []
    for index, block in enumerate(decoder._blocks):
        block.register_full_backward_hook(lambda *_, index=index: entered.append(index))
    student, _ = decoder.states(batch, [3], final=True)
    student.head_input.sum().backward()
    assert set(entered) == {2, 3}


def test_blocks_run_again_keep_gradients_and_still_end_at_the_adapter(batch):
    def gradients(again: bool) -> tuple[list[torch.Tensor], list[int]]:
        model = add_adapter(model_of("llama"), UPPER)
        decoder = Decoder(model, "early_exit")
        calls = calls_of(decoder)
        with recomputed_blocks(model, replace(UPPER, gradient_checkpointing=again)):
            student, _ = decoder.states(batch, [3], final=True)
            (student.head_input.square().sum() + student.hidden.square().sum()).backward()
        return [p.grad for p in model.parameters() if p.requires_grad], calls

    (plain, once), (recomputed, calls) = gradients(False), gradients(True)
    assert plain
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4), (a - b).abs().max()  # of gradients of some 10
    assert [calls.count(block) - once.count(block) for block in range(4)] == [0, 0, 1, 1], "what backward enters"


def test_without_a_gradient_from_the_final_state_the_rest_is_the_same(batch):
    def gradients(final_gradient: bool) -> tuple[TeacherStates, list[torch.Tensor | None]]:
        model = add_adapter(model_of("llama"), CONFIG)
        student, _ = Decoder(model, "early_exit").states(batch, [2], final=True, final_gradient=final_gradient)
        student.hidden.square().sum().backward()
        return student, [p.grad for p in model.parameters() if p.requires_grad]

    (with_graph, first), (without, second) = gradients(True), gradients(False)
    assert equal(with_graph, without)
    assert with_graph.head_input.requires_grad
    assert not without.head_input.requires_grad
    assert any(gradient is not None for gradient in first)
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


class Scaled(LlamaModel):
    """A decoder that does something behind its final norm."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        if output.hidden_states:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
        return output


class ScaledForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = Scaled(config)


SHAPE = LlamaConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def test_a_model_that_does_not_run_block_by_block_runs_whole_and_says_so_once(batch, capsys):
    say_once.cache_clear()
    torch.manual_seed(0)
    model = add_adapter(ScaledForCausalLM(SHAPE).eval(), CONFIG)
    for _ in range(2):
        decoder = Decoder(model, "early_exit")
        assert not decoder.early_exit
    said = capsys.readouterr().err
    assert said.count("ScaledForCausalLM does not run block by block") == 1, said
    student, teacher = decoder.states(batch, [1, 4], final=True)
    own = model.get_base_model()(batch.input_ids, batch.attention_mask, output_hidden_states=True).hidden_states
    for column, layer in enumerate((1, 4)):
        assert torch.equal(student.hidden[:, column], own[layer].flatten(0, 1)[batch.scored_tokens])
    assert not torch.equal(student.hidden, teacher.hidden)


class Squared(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.square()
        return output


def test_logits_that_are_no_head_of_the_last_hidden_state_are_refused():
    with pytest.raises(InputError, match="Squared makes its logits by more than a head, a scale and a cap"):
        Decoder(add_adapter(Squared(SHAPE).eval(), CONFIG), "early_exit")


def test_an_adapted_head_is_the_students_alone(batch):
    torch.manual_seed(0)
    base = LlamaForCausalLM(SHAPE).eval()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)).eval()
    decoder = Decoder(model, "early_exit")
    student, _ = decoder.states(batch, [1], final=True)
    head = decoder.head.arguments()
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    found = student.head_input @ head["lm_head_weight"].T
    assert torch.allclose(found, own[batch.scored_predictions], atol=1e-5)
    assert head["lm_head_weight"].requires_grad
    assert torch.equal(head["teacher_lm_head_weight"], base.lm_head.base_layer.weight)


def test_a_pass_keeps_only_the_hidden_states_that_were_asked_for(batch):
    decoder = Decoder(add_adapter(model_of("llama"), CONFIG), "early_exit")
    entry = decoder._enter(decoder_module._inputs(batch))
    assert sorted(decoder._run(entry, {0: entry.hidden}, 4, [1])) == [1, 4]


def test_a_model_whose_blocks_cannot_be_found_runs_whole_and_says_so(batch, capsys):
    say_once.cache_clear()
    base = model_of("llama")
    base.model.layers.append(nn.Identity())  # one more than the configuration has, which the model does not run
    model = add_adapter(base, CONFIG)
    decoder = Decoder(model, "early_exit")
    assert not decoder.early_exit
    assert "does not run block by block" in capsys.readouterr().err
    expected, _ = Decoder(add_adapter(model_of("llama"), CONFIG), "early_exit").states(batch, [1, 4], final=True)
    student, _ = decoder.states(batch, [1, 4], final=True)
    assert equal(student, expected)
    with pytest.raises(InputError, match="--lora-layers: found no list of decoder blocks"):
        add_adapter(model.unload(), replace(CONFIG, lora_layers=(1,)))
