"""Where a server listens, whom it lets in, and how much one request may ask of it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from lm.config import AboveZero, Bounds, Bytes, Path, Positive, Size, check
from lm.files import read_bytes


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Where a server listens, whom it lets in, and how much one request may ask of it."""

    host: str = "127.0.0.1"  # this machine alone; "0.0.0.0" listens to all
    port: Annotated[int, Bounds(0, 65535)] = 8000  # 0: any that is free
    model_name: str = ""  # what clients call the model; "": the name of its directory
    api_key_file: Path = ""  # one key a line, of which clients send one; "": everyone may ask
    timeout: AboveZero = 600.0  # seconds that one request may take, its wait in the queue included
    body_timeout: AboveZero = 30.0  # seconds until a request has arrived whole
    max_body: Bytes = 2**22  # bytes of a request
    max_rows: Size = 128  # texts of one request: prompts times n, or inputs to embed
    max_stop: Size = 16  # stop strings of one request, of at most `max_stop_length` characters
    max_stop_length: Size = 256
    max_grammar: Positive = 2**16  # bytes of a JSON schema, regular expression or grammar, or tools
    pooling: str = ""  # of the vectors of /v1/embeddings; as of `Run.embed`

    def api_keys(self, prefix: str = "config.serve") -> tuple[str, ...]:
        """The keys in `api_key_file`; () where everyone may ask.

        Raises:
          ConfigError: the file cannot be read, or holds no key.
        """
        if not self.api_key_file:
            return ()
        field = f"{prefix}.api_key_file={self.api_key_file!r}"
        text = read_bytes(self.api_key_file).decode("ascii", "replace")
        keys = tuple(line.strip() for line in text.splitlines() if line.strip())
        check(bool(keys) and text.isascii(), f"{field} must hold keys, in ASCII, one a line")
        return keys
