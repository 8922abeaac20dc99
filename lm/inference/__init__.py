"""From a trained model to text: prefill, decode, draw, stream; to vectors, and to filled masks."""

from lm.inference.config import SamplingConfig
from lm.inference.encode import Candidate, embed, fill
from lm.inference.framing import Framing
from lm.inference.generate import Generation, Generator, Timing
from lm.inference.spans import fill_spans
from lm.inference.text import TextGeneration, TextGenerator

__all__ = [
    "Candidate",
    "Framing",
    "Generation",
    "Generator",
    "SamplingConfig",
    "TextGeneration",
    "TextGenerator",
    "Timing",
    "embed",
    "fill",
    "fill_spans",
]
