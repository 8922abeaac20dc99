"""From a trained model to text: prefill, decode, draw, stream."""

from lm.inference.config import SamplingConfig
from lm.inference.generate import Generation, Generator, Timing
from lm.inference.text import TextGeneration, TextGenerator

__all__ = [
    "Generation",
    "Generator",
    "SamplingConfig",
    "TextGeneration",
    "TextGenerator",
    "Timing",
]
