"""From a trained model to text: prefill, decode, draw, stream; to vectors, and to filled masks."""

from lm.inference.engine import Engine
from lm.inference.fill import Candidate, embed, fill, fill_spans, score
from lm.inference.generate import Generation, Generator, Timing
from lm.inference.prompts import Framing
from lm.inference.requests import EngineConfig, Event, QueueFull, Request, Step
from lm.inference.sampling import SamplingConfig
from lm.inference.search import SearchConfig, search

__all__ = [
    "Candidate",
    "Engine",
    "EngineConfig",
    "Event",
    "Framing",
    "Generation",
    "Generator",
    "QueueFull",
    "Request",
    "SamplingConfig",
    "SearchConfig",
    "Step",
    "Timing",
    "embed",
    "fill",
    "fill_spans",
    "score",
    "search",
]
