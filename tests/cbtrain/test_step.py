"""The weighted loss of one update: its parts, its normalisation, what it is invariant to."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cbtrain.data import PairedBatch, ScoredCounts, TokenBatch, step_batches
from cbtrain.loop import prepare
from cbtrain.losses import kl_divergence_loss
from cbtrain.model import add_adapter, load_base
from cbtrain.schedule import Coefficients
from cbtrain.step import CircuitBreakerStep

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
        harmful_tokens=int(batch.harmful.loss_mask.sum()),
        benign_tokens=int(batch.benign.loss_mask.sum()),
        benign_predictions=int(batch.benign.prediction_mask.sum()),
    )


def widen(batch: TokenBatch, extra: int) -> TokenBatch:
    """The same rows with more padding, of a token that is no pad token."""
    return TokenBatch(
        input_ids=F.pad(batch.input_ids, (0, extra), value=9),
        attention_mask=F.pad(batch.attention_mask, (0, extra)),
        loss_mask=F.pad(batch.loss_mask, (0, extra)),
    )


def test_the_loss_is_the_weighted_sum_written_out(world):
    """Against four full forwards of the plain model and the losses written as formulas."""
    config, data, pad, step = world
    (batch,), counts = step_batches(data, config, 0, pad)
    output = step(batch, counts, WEIGHTS)

    base = step.model.get_base_model()

    def run(rows: TokenBatch):
        return base(input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_hidden_states=True)

    with step.model.disable_adapter(), torch.no_grad():
        harmful_teacher, benign_teacher = run(batch.harmful), run(batch.benign)
    harmful_student, benign_student = run(batch.harmful), run(batch.benign)
    cosines, distances = [], []
    for layer in config.target_layers:
        mask = batch.harmful.loss_mask
        ours, theirs = harmful_student.hidden_states[layer][mask], harmful_teacher.hidden_states[layer][mask]
        cosines.append(((ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))).clamp(min=0))
        mask = batch.benign.loss_mask
        difference = benign_student.hidden_states[layer][mask] - benign_teacher.hidden_states[layer][mask]
        distances.append(difference.pow(2).sum(-1).sqrt())
    log_p, log_q = benign_teacher.logits.log_softmax(-1), benign_student.logits.log_softmax(-1)
    scored_next = batch.benign.loss_mask[:, 1:]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1][scored_next].mean()
    reroute, retain = torch.cat(cosines).mean(), torch.cat(distances).mean()

    expected = [3.0 * reroute + 2.0 * retain + 0.5 * kl, reroute, retain, kl]
    assert output.parts.tolist() == pytest.approx([value.item() for value in expected], rel=1e-5)
    assert output.loss.requires_grad


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
    wider = PairedBatch(harmful=widen(batch.harmful, 5), benign=widen(batch.benign, 3))
    expected = step(batch, counts, WEIGHTS).parts.tolist()
    assert step(wider, counts_of(wider), WEIGHTS).parts.tolist() == pytest.approx(expected, rel=1e-5)


def test_both_ways_of_reading_hidden_states_give_identical_losses_and_gradients(world):
    config, data, pad, step = world
    (batch,), counts = step_batches(data, config, 0, pad)
    results = []
    for way in ("hooks", "output_hidden_states"):
        for retained in ("target", "all"):
            other = CircuitBreakerStep(step.model, replace(config, hidden_states=way, retain_layers=retained))
            other.zero_grad()
            output = other(batch, counts, WEIGHTS)
            output.loss.backward()
            gradients = [p.grad.clone() for p in step.model.parameters() if p.grad is not None]
            results.append((output.parts, gradients))
    for first, second in ((results[0], results[2]), (results[1], results[3])):
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert not torch.equal(results[0][0], results[1][0])


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
    blank = PairedBatch(
        harmful=replace(batch.harmful, loss_mask=torch.zeros_like(batch.harmful.loss_mask)),
        benign=replace(batch.benign, loss_mask=torch.zeros_like(batch.benign.loss_mask)),
    )
    output = step(blank, counts, WEIGHTS)
    output.loss.backward()
    assert output.parts.tolist() == [0.0] * 4


def test_the_kl_mask_is_the_token_mask_shifted_by_one(world):
    """Changing a scored token changes the prediction *at* it, which belongs to the next token."""
    config, data, pad, _ = world
    (batch,), _ = step_batches(data, config, 0, pad)
    rows = batch.benign
    predictions = rows.prediction_mask
    assert torch.equal(predictions[:, :-1], rows.loss_mask[:, 1:] & rows.attention_mask[:, 1:].bool())
    assert not predictions[:, -1].any()
    logits = torch.randn(*rows.input_ids.shape, 11)
    first_scored = int(rows.loss_mask[0].nonzero()[0])
    moved = logits.clone()
    moved[0, first_scored - 1] += torch.randn(11)
    assert kl_divergence_loss(moved, logits, loss_mask=predictions) > 0
    moved = logits.clone()
    moved[0, : first_scored - 1] += torch.randn(11)
    assert kl_divergence_loss(moved, logits, loss_mask=predictions) == 0
