"""Distillation: at every target the student's distribution is pulled towards a teacher's.

On texts of any source, those that the student wrote among them (Agarwal et al. 2023): what is
learned from is the teacher's distribution after each beginning, never the token that follows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from lm.config import AboveZero, Path, Share, check
from lm.models.matmul import contract
from lm.objectives.chunked import Part, summed


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """The `objective.distillation` section."""

    teacher: Path = ""  # a run or a Hugging Face directory, of the same tokenizer
    # forward: KL(teacher‖student), which covers all that the teacher may say (Hinton et al. 2015);
    # reverse: KL(student‖teacher), which seeks what it mostly says (Gu et al. 2023); jsd: between
    # them, each against a mixture of both (Agarwal et al. 2023, eq. 1)
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    mixture: Share = 0.5  # jsd: the teacher's share of the mixture; near 0 as forward, 1 as reverse
    temperature: AboveZero = 1.0  # what both logits are divided by

    def validate(self, prefix: str = "config.objective.distillation") -> None:
        """Raises ConfigError where a field is set that the divergence does not read."""
        if self.divergence == "jsd":
            fits = 0 < self.mixture < 1
            says = "must lie between 0 and 1: for these use divergence='forward' or 'reverse'"
        else:
            fits = self.mixture == 0.5
            says = f"does nothing for divergence={self.divergence!r}: leave it out, or use 'jsd'"
        check(fits, f"{prefix}.mixture={self.mixture} {says}")


@dataclasses.dataclass(frozen=True)
class _Divergence:
    """Of the teacher, whose hidden states are the `tokens` and whose head and bias the `others`."""

    config: DistillationConfig
    softcap: float  # the teacher's

    num_values = 1

    def values(self, part: Part, tokens, others):
        head, bias = others
        logits = contract("btd,vd->btv", tokens, head, jnp.float32)
        if bias is not None:
            logits += bias
        if self.softcap:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        teacher, student = (
            self._log_p(part._replace(logits=each)) for each in (logits, part.logits)
        )
        if self.config.divergence == "forward":
            value = part.sum(jnp.exp(teacher) * (teacher - student))
        elif self.config.divergence == "reverse":
            value = part.sum(jnp.exp(student) * (student - teacher))
        else:
            share, mixed = self.config.mixture, self._mixed(teacher, student)
            value = share * part.sum(jnp.exp(teacher) * (teacher - mixed))
            value += (1 - share) * part.sum(jnp.exp(student) * (student - mixed))
        return (value,), (part, teacher, student, value)

    def gradient(self, saved, tokens, weights):
        part, teacher, student, value = saved
        p = jnp.exp(student)
        if self.config.divergence == "forward":
            gradient = p - jnp.exp(teacher)
        elif self.config.divergence == "reverse":
            gradient = p * (student - teacher - value[..., None])
        else:
            slope = student - self._mixed(teacher, student)
            gradient = p * (slope - part.sum(p * slope)[..., None]) * (1 - self.config.mixture)
        return gradient * (weights / self.config.temperature)[..., None]

    def _log_p(self, part: Part) -> jax.Array:
        part = part._replace(logits=part.logits / self.config.temperature)
        return part.logits - part.log_z()[..., None]

    def _mixed(self, teacher, student) -> jax.Array:
        share = self.config.mixture
        return jnp.logaddexp(teacher + math.log(share), student + math.log(1 - share))


def linear_divergence(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    teacher_BTD: jax.Array,
    teacher_head_VD: jax.Array,
    weights_BT: jax.Array,
    config: DistillationConfig,
    *,
    bias_V: jax.Array | None = None,
    teacher_bias_V: jax.Array | None = None,
    softcap: float = 0.0,
    teacher_softcap: float = 0.0,
    chunk: int = 0,
) -> jax.Array:
    """Σ weight·divergence of the distributions that two heads give, a scalar in float32.

    It has a gradient with respect to the student's hidden states, head and bias.

    Args:
      x_BTD, head_VD, bias_V, softcap: the student's hidden states and head.
      teacher_BTD, teacher_head_VD, teacher_bias_V, teacher_softcap: the teacher's, of any width,
        over the same vocabulary.
      weights_BT: how much each position counts.
      chunk: positions whose logits exist at once, on one device; 0 chooses.

    Raises:
      ConfigError: `chunk` does not divide the sequence length.
    """
    asked_BT1 = weights_BT[..., None] != 0
    x_BTD, teacher_BTD = (jnp.where(asked_BT1, x, 0) for x in (x_BTD, teacher_BTD))
    measure = _Divergence(config, float(teacher_softcap))
    others = teacher_head_VD.astype(teacher_BTD.dtype), teacher_bias_V
    arguments = x_BTD, head_VD, bias_V, teacher_BTD, weights_BT, others
    return summed(measure, *arguments, softcap=softcap, chunk=chunk)[0]
