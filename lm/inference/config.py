"""How the next token is chosen, how many of them, and when to stop."""

from __future__ import annotations

import dataclasses
import math

from lm.config import check


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Drawing tokens. The filters apply in the order temperature, top_k, top_p.

    Hashable, so that a compiled function can take it as a static argument.
    """

    temperature: float = 1.0  # divides the logits; 0 is greedy: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only; 0, None: from all
    top_p: float | None = None  # the fewest that hold this share of the probability; 0, None: all
    max_new_tokens: int = 200  # per sample, end-of-text included
    num_samples: int = 1  # continuations of each prompt
    truncate_prompt: bool = True  # one longer than the context loses what comes first; or an error
    stop_at_end_of_text: bool = True  # False goes on after end-of-text, into the next document

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance; below 1e-5 logits would overflow, and none is."""
        return self.temperature < 1e-5 or self.top_k == 1

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(
            self.temperature >= 0 and math.isfinite(self.temperature),
            f"{prefix}.temperature={self.temperature!r} must be a number from 0 (greedy) up",
        )
        check(
            self.top_k is None or self.top_k >= 0,
            f"{prefix}.top_k={self.top_k!r} must be at least 1, or 0 or None to allow every token",
        )
        check(
            self.top_p is None or 0 <= self.top_p <= 1,
            f"{prefix}.top_p={self.top_p!r} must be in (0, 1], or 0 or None to allow every token",
        )
        for name in ("max_new_tokens", "num_samples"):
            value = getattr(self, name)
            check(1 <= value < 2**31, f"{prefix}.{name}={value!r} must be from 1 to {2**31 - 1}")
