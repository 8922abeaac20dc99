"""How the next token is chosen, how many of them, and when to stop."""

from __future__ import annotations

import dataclasses

from lm.config import Count, NotNegative, Positive, Share


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Drawing tokens. The filters apply in the order temperature, top_k, top_p.

    Hashable, so that a compiled function can take it as a static argument.
    """

    temperature: NotNegative = 1.0  # divides the logits; 0 is greedy: always the likeliest token
    top_k: Count | None = None  # draw from the k likeliest tokens only; 0, None: from all
    top_p: Share | None = None  # the fewest that hold this share of the probability; 0, None: all
    max_new_tokens: Positive = 200  # per sample, end-of-text included
    num_samples: Positive = 1  # continuations of each prompt
    truncate_prompt: bool = True  # one longer than the context loses what comes first; or an error
    stop_at_end_of_text: bool = True  # False goes on after end-of-text, into the next document

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance; below 1e-5 logits would overflow, and none is."""
        return self.temperature < 1e-5 or self.top_k == 1
