"""The smallest tokenizer that meets the contract: UTF-8 bytes and one end-of-text token."""

import numpy as np


class ByteTokenizer:
    kind = "byte"
    vocab_size = 257
    eos_id = 256
    bos_id = 256
    fingerprint = "bytes"

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    @property
    def target(self):
        return self

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else b""


class SeparateBosTokenizer(ByteTokenizer):
    vocab_size = 70_000  # needs uint32
    bos_id = 69_999
    fingerprint = "bytes with a bos"
