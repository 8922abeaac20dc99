"""Models served over HTTP: OpenAI's endpoints, metrics, and a web page to write with."""
