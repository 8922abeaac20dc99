"""How tokenizers compare on held-out text: tokens, speed, what survives a round trip."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from lm.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Row:
    """One tokenizer's line of the comparison. Times depend on the machine, the rest does not."""

    kind: str
    vocab_size: int
    bytes_per_token: float  # held-out UTF-8 bytes ÷ tokens
    train_seconds: float  # wall time
    encode_mb_per_second: float  # 10⁶ held-out UTF-8 bytes a second, the best of three batches
    round_trip_rate: float  # the share of held-out documents that come back exactly
    lossless: bool  # whether any Unicode text would
    lossy_because: str
    fingerprint: str


def compare(tokenizer: Tokenizer, heldout: Sequence[str], train_seconds: float) -> Row:
    """The tokenizer's line, measured on the documents `heldout`."""
    size, times = num_bytes(heldout), []
    for _ in range(3):
        start = time.perf_counter()
        batch = tokenizer.encode_batch(heldout)
        times.append(time.perf_counter() - start)
    exact = [tokenizer.decode(ids) == text for ids, text in zip(batch, heldout, strict=True)]
    return Row(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=size / max(1, sum(map(len, batch))),
        train_seconds=train_seconds,
        encode_mb_per_second=size / 1e6 / min(times),
        round_trip_rate=sum(exact) / len(exact),
        lossless=tokenizer.lossless,
        lossy_because=tokenizer.lossy_because,
        fingerprint=tokenizer.fingerprint,
    )


def num_bytes(texts: Sequence[str]) -> int:
    """The size of all texts, in bytes of UTF-8."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
