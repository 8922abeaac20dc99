"""A model over HTTP: OpenAI's endpoints, metrics, and a web page to write with.

Needs the extra [serve]: `pip install 'lm[serve]'`.
"""
