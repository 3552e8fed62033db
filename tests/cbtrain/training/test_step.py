"""The weighted loss of one update: its parts, its normalisation, what it is invariant to."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from masks import prediction_mask, token_mask
from plain_step import four_forwards, plain_step

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data import batches
from cbtrain.data.batches import PairedBatch, ScoredCounts, TokenBatch, smaller_micro_batches, step_batches
from cbtrain.losses.fused_kl import fused_linear_kl
from cbtrain.losses.losses import kl_divergence_loss, reroute_loss, retain_loss
from cbtrain.losses.schedule import Coefficients, coefficients
from cbtrain.model.checks import prepare
from cbtrain.model.loading import load_base
from cbtrain.model.lora import add_adapter
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.teacher_cache.wanted_states import wanted_states
from cbtrain.training import loop
from cbtrain.training.step import CircuitBreakerStep, StepOutput

WEIGHTS = Coefficients(cs=3.0, cr=2.0, kl_weight=0.5)


@pytest.fixture
def world(small_config):
    config = replace(small_config, lora_init_std=0.1)
    data, pad = prepare(config)
    model = add_adapter(load_base(config), config)
    yield config, data, pad, CircuitBreakerStep(model, config)
    model.unload()


def counts_of(batch: PairedBatch) -> ScoredCounts:
    return ScoredCounts(
        harmful_tokens=sum(len(rows.scored_tokens) for rows in batch.harmful),
        benign_tokens=sum(len(rows.scored_tokens) for rows in batch.benign),
        benign_predictions=sum(len(rows.scored_predictions) for rows in batch.benign),
        tokens=sum(int(rows.attention_mask.sum()) for rows in (*batch.harmful, *batch.benign)),
    )


def widen(batch: TokenBatch, extra: int) -> TokenBatch:
    """The same rows with more padding, of a token that is no pad token."""
    length = batch.input_ids.shape[1]

    def moved(places):
        return places + places // length * extra

    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, extra), value=9),
        attention_mask=F.pad(batch.attention_mask, (0, extra)),
        scored_tokens=moved(batch.scored_tokens),
        scored_predictions=moved(batch.scored_predictions),
    )


def cache_of(step: CircuitBreakerStep, data, pad: int, directory) -> TeacherCache:
    """Filled by the step's own teacher, in batches of another shape than training's."""
    cache = TeacherCache(directory, "identity")
    wanted = wanted_states(data, step.config.target_layers, step.retained)
    cache.build(
        wanted,
        lambda batch, layers, final: step.decoder.teacher(batch, layers, final=final),
        batch_size=5,
        pad_token_id=pad,
    )
    return cache


def gradients_of(step: CircuitBreakerStep, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    step.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pass_tokens", [0, 128], ids=["by length", "together"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("hidden_states", ["early_exit", "output_hidden_states"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora_layers": (1,), "target_layers": (2,)},
        {"retain_layers": "all", "kl_temperature": 2.0},
        {"retain_layers": "through_target", "retain_norm": "relative", "retain_norms": (3.0, 1.5, 2.0)},
    ],
    ids=["all blocks", "block 1", "all layers retained", "relative, through the target"],
)
def test_every_way_to_compute_a_step_gives_the_plain_ones_losses_and_gradients(
    small_config, tmp_path, monkeypatch, pass_tokens, dtype, cached, hidden_states, fields
):
    """Early exit or whole forwards, live teacher or cached, rows in one batch or by length, against four whole
    forwards of all rows and materialised logits."""
    monkeypatch.setattr(batches, "PASS_TOKENS", pass_tokens)
    config = replace(small_config, lora_init_std=0.1, hidden_states=hidden_states, **fields)
    data, pad = prepare(config)
    model = add_adapter(deepcopy(load_base(config)).to(dtype), config)
    step = CircuitBreakerStep(model, config)
    (batch,), counts = step_batches(data, config, 0, pad)
    assert (len(batch.harmful) > 1) == (len(batch.benign) > 1) == (pass_tokens == 0)
    loss, expected_parts = plain_step(model, batch, config, WEIGHTS)
    expected = gradients_of(step, loss)
    if cached:
        cache = cache_of(step, data, pad, tmp_path)
        batch = batch.each(
            lambda rows: cache.attach(rows, config.target_layers, False),
            lambda rows: cache.attach(rows, step.retained, True),
        )
    output = step(batch, counts, WEIGHTS)
    found = gradients_of(step, output.loss)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert output.parts.tolist() == pytest.approx(expected_parts.tolist(), rel=tolerance)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        apart = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert apart <= tolerance, (name, apart.item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_halved_micro_batches_give_the_losses_and_gradients_of_the_whole_batch(small_config, dtype, tolerance):
    """Rows of different scored lengths: a mean of the micro-batches' means would be another number."""
    config = replace(small_config, lora_init_std=0.1, mask_policy="full_sequence")
    data, pad = prepare(config)
    model = add_adapter(deepcopy(load_base(config)).to(dtype), config)
    step, found, seen = CircuitBreakerStep(model, config), [], []
    smaller: CircuitBreakerConfig | None = config
    while smaller is not None:
        pairs, counts = step_batches(data, smaller, 0, pad)
        outputs = [step(pair, counts, WEIGHTS) for pair in pairs]
        loss = torch.stack([output.loss for output in outputs]).sum()
        found.append((torch.stack([output.parts for output in outputs]).sum(0), gradients_of(step, loss)))
        seen.append(len(pairs))
        smaller = smaller_micro_batches(smaller, 1)
    assert seen == [1, 2, 4, 8]
    (parts, gradients), *halved = found
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
    for other_parts, other in halved:
        assert other_parts.tolist() == pytest.approx(parts.tolist(), rel=tolerance)
        apart = torch.cat([other[name].flatten() for name in gradients]) - whole
        assert apart.norm() <= tolerance * whole.norm(), (apart.norm() / whole.norm()).item()


@pytest.mark.parametrize("lora_layers", [None, (1, 2)], ids=["all blocks", "upper blocks"])
def test_twenty_steps_are_bit_identical_to_those_of_four_whole_forwards(small_config, lora_layers):
    """Early exit and the shared prefix at equal shapes; the losses are the same functions of the hidden states."""
    config = replace(
        small_config, steps=20, lora_layers=lora_layers, target_layers=(2,), lora_init_std=0.05, warmup_steps=0
    )
    data, pad = prepare(config)

    def trained(whole: bool) -> tuple[list[list[float]], list[torch.Tensor]]:
        model = add_adapter(load_base(config), config)
        step = CircuitBreakerStep(model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        history = []
        for index in range(config.steps):
            (batch,), counts = step_batches(data, config, index, pad)
            weights = coefficients(config, index)
            output = (step_of_four_forwards if whole else CircuitBreakerStep.__call__)(step, batch, counts, weights)
            optimizer.zero_grad()
            output.loss.backward()
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            optimizer.step()
            history.append(output.parts.tolist())
        model.unload()
        return history, [p.detach().clone() for p in parameters]

    (ours, weights), (theirs, expected_weights) = trained(False), trained(True)
    assert ours == theirs
    assert ours[-1] != ours[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected_weights, strict=True))


def step_of_four_forwards(step, batch, counts, weights) -> StepOutput:
    """The same losses on the hidden states of `four_forwards`."""
    model, layers, head = step.model, step.config.target_layers, step.model.get_output_embeddings().weight
    (harmful,), (benign,) = batch.harmful, batch.benign
    harmful_teacher, benign_teacher, harmful_student, benign_student = four_forwards(model, harmful, benign)

    def at(output, mask, layers):
        return torch.stack([output.hidden_states[layer][mask] for layer in layers], dim=1)

    mask = token_mask(harmful)
    reroute = reroute_loss(at(harmful_student, mask, layers), at(harmful_teacher, mask, layers), counts.harmful_tokens)
    mask = token_mask(benign)
    retain = retain_loss(at(benign_student, mask, layers), at(benign_teacher, mask, layers), counts.benign_tokens)
    kl = fused_linear_kl(
        benign_student.hidden_states[-1],
        benign_teacher.hidden_states[-1],
        head,
        prediction_mask(benign),
        step.config.kl_temperature,
        denominator=counts.benign_predictions,
    )
    loss = weights.cs * reroute + weights.cr * retain + weights.kl_weight * kl
    return StepOutput(loss, torch.stack([loss, reroute, retain, kl]).detach())


def test_checkpointed_blocks_run_twice_and_keep_less(small_config):
    config = replace(small_config, lora_init_std=0.1, hidden_states="early_exit")
    data, pad = loop.prepare(config)
    (batch,), counts = step_batches(data, config, 0, pad)

    def measured(checkpointing: bool) -> tuple[int, int, list[torch.Tensor]]:
        calls, kept = [], {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with loop.adapted_model(replace(config, gradient_checkpointing=checkpointing)) as model:
            step = CircuitBreakerStep(model, config)
            handle = model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = step(batch, counts, coefficients(config, 1)).loss
            loss.backward()
            handle.remove()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return len(calls), sum(kept.values()), gradients

    (calls, kept, gradients), (calls_again, kept_again, gradients_again) = measured(False), measured(True)
    students = len(batch.harmful) + len(batch.benign)
    assert calls_again == calls + students
    assert kept_again < 0.7 * kept, (kept_again, kept)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert "forward" not in vars(load_base(config).model.layers[0]), "the base is as it was"


def test_parts_of_micro_batches_sum_to_the_whole(world):
    config, data, pad, step = world
    (whole,), counts = step_batches(data, config, 0, pad)
    micro, micro_counts = step_batches(data, replace(config, micro_batch_size=2), 0, pad)
    assert len(micro) == 4
    assert micro_counts == counts
    parts = sum(step(batch, counts, WEIGHTS).parts for batch in micro)
    assert parts.tolist() == pytest.approx(step(whole, counts, WEIGHTS).parts.tolist(), rel=1e-5)


def test_padding_changes_nothing(world):
    config, data, pad, step = world
    (batch,), counts = step_batches(data, config, 0, pad)
    wider = batch.each(lambda rows: widen(rows, 5), lambda rows: widen(rows, 3))
    expected = step(batch, counts, WEIGHTS).parts.tolist()
    assert step(wider, counts_of(wider), WEIGHTS).parts.tolist() == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_the_adapter_and_nothing_else(world):
    config, data, pad, step = world
    (batch,), counts = step_batches(data, config, 0, pad)
    step(batch, counts, WEIGHTS).loss.backward()
    reached = {name for name, p in step.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached
    assert all("lora_" in name for name in reached)


def test_kl_is_measured_at_weight_0(world):
    config, data, pad, step = world
    (batch,), counts = step_batches(data, config, 0, pad)
    output = step(batch, counts, Coefficients(cs=1.0, cr=1.0, kl_weight=0.0))
    assert output.parts[3] > 1e-4


def test_a_micro_batch_without_scored_tokens_adds_nothing_and_reaches_backward(world):
    config, data, pad, step = world
    (batch,), counts = step_batches(data, config, 0, pad)
    none = torch.zeros(0, dtype=torch.int64)
    blank = batch.each(lambda rows: replace(rows, scored_tokens=none, scored_predictions=none))
    output = step(blank, counts, WEIGHTS)
    output.loss.backward()
    assert output.parts.tolist() == [0.0] * 4


def test_the_kl_mask_is_the_token_mask_shifted_by_one(world):
    """Changing a scored token changes the prediction *at* it, which belongs to the next token."""
    config, data, pad, _ = world
    (batch,), _ = step_batches(data, config, 0, pad)
    (rows,) = batch.benign
    predictions = prediction_mask(rows)
    assert torch.equal(predictions[:, :-1], token_mask(rows)[:, 1:])
    assert not predictions[:, -1].any()
    logits = torch.randn(*rows.input_ids.shape, 11)
    first_scored = int(token_mask(rows)[0].nonzero()[0])
    moved = logits.clone()
    moved[0, first_scored - 1] += torch.randn(11)
    assert kl_divergence_loss(moved, logits, loss_mask=predictions) > 0
    moved = logits.clone()
    moved[0, : first_scored - 1] += torch.randn(11)
    assert kl_divergence_loss(moved, logits, loss_mask=predictions) == 0
