"""A vocabulary with every special token, for corpora whose ordinary tokens are numbered."""

import numpy as np

from lm.data.cache import TokenizedCorpus


class Vocabulary:
    """Ids 0 to 9 are special, 10 to 109 sentinels (the first has the highest id), then tokens.

    Odd tokens begin a word.
    """

    vocab_size = 70_000
    pad_id, eos_id, unk_id, mask_id, bos_id = range(5)
    sentinel_ids = tuple(range(109, 9, -1))
    first = 110
    lossless = True

    def __init__(self):
        self.special_ids = {str(id): id for id in range(self.first)}

    def word_edges(self):
        begins = np.arange(self.vocab_size) % 2 == 1
        ends = np.zeros(self.vocab_size, bool)
        begins[: self.first] = ends[: self.first] = True
        return begins, ends

    def byte_lengths(self):
        return (np.arange(self.vocab_size) >= self.first).astype(np.int32)

    def token_bytes(self, token):
        return b"" if token < self.first else b"x"


def corpus_of(lengths, pairs=False, end_of_text=True, first=Vocabulary.first, distinct_ends=False):
    """Documents with `lengths` tokens before their end-of-text, every token another one.

    With `distinct_ends` end-of-texts are made distinct, too: a million and the document's number.
    """
    pieces, token = [], first
    for number, length in enumerate(lengths):
        ids = np.arange(token, token + length)
        token += length
        end = 1_000_000 + number if distinct_ends else Vocabulary.eos_id
        pieces.append(np.append(ids, end) if end_of_text else ids)
    assert token <= Vocabulary.vocab_size
    offsets = np.cumsum([0] + [len(piece) for piece in pieces])
    return TokenizedCorpus(
        tokens=np.concatenate([*pieces, []]).astype(np.uint32),
        offsets=offsets.astype(np.int64),
        num_bytes=int(sum(lengths)),
        first_token_bytes=1,
        bos_id=Vocabulary.bos_id,
        eos_id=Vocabulary.eos_id,
        end_of_text=end_of_text,
        name="test",
        key=f"test-{list(lengths)}-{pairs}-{end_of_text}-{first}",
        pairs=pairs,
    )
