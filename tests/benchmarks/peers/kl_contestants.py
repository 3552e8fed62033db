"""What `bench_kl` measures: the fused KL, the formula that it replaces and the peers, each on the same case."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cbtrain.losses.fused_kl import fused_linear_kl


@dataclass
class Case:
    """Hidden states [1, S, H] (the student's with a graph), head [V, H], scored positions [1, S]."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    mask: Tensor

    def selected(self) -> "Case":
        """The scored positions alone."""
        states = [hidden[self.mask][None] for hidden in (self.student, self.teacher)]
        return Case(*states, self.weight, self.mask[self.mask][None])

    @property
    def labels(self) -> Tensor:
        """What is not scored as −100, the rest 0: [1, S]."""
        return torch.where(self.mask, 0, -100)


Contestant = Callable[[Case], Tensor]


def ours(case: Case) -> Tensor:
    return fused_linear_kl(case.student, case.teacher, case.weight, case.mask)


def seed_formula(case: Case) -> Tensor:
    with torch.no_grad():
        teacher_logits = F.linear(case.teacher, case.weight)
    log_q = F.log_softmax(F.linear(case.student, case.weight).float(), dim=-1)
    p = F.softmax(teacher_logits.float(), dim=-1)
    divergence = F.kl_div(log_q, p, reduction="none").sum(-1)
    return (divergence * case.mask).sum() / case.mask.sum()


def liger(compiled: bool) -> Contestant:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)

    def call(case: Case) -> Tensor:
        return loss(case.student[0], case.weight, case.teacher[0], case.weight, case.labels[0])

    return call


def trl() -> Contestant:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def call(case: Case) -> Tensor:
        weight = case.weight
        return _chunked_divergence_loss(case.student, case.teacher, weight, weight, case.mask, beta=0.0)[0]

    return call


def torchtune() -> Contestant:
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    loss = ForwardKLWithChunkedOutputLoss()

    def call(case: Case) -> Tensor:
        with torch.no_grad():
            teacher = [F.linear(chunk, case.weight) for chunk in case.teacher.chunk(loss.num_output_chunks, dim=1)]
        student = [F.linear(chunk, case.weight) for chunk in case.student.chunk(loss.num_output_chunks, dim=1)]
        return loss(student, teacher, case.labels)

    return call


def peers() -> Iterator[tuple[str, Contestant]]:
    """Those that import here; what is absent is printed."""
    makers = {
        "Liger-Kernel": lambda: liger(compiled=False),
        "Liger-Kernel, compiled": lambda: liger(compiled=True),
        "TRL": trl,
        "torchtune": torchtune,
    }
    for name, maker in makers.items():
        try:
            yield name, maker()
        except ImportError as error:
            print(f"{name} is absent: {error}")
