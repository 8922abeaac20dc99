"""Whose a run directory is."""

import pytest
from tiny_run import write_tiny_run

from lm.config import ConfigError
from lm.runs.directory import Claim
from lm.tokenizers import TokenizerConfig, train


def test_a_claim_notices_a_run_that_began_since_it_was_checked(tmp_path):
    config = {"job": "train", "model": {"width": 64}}
    claim = Claim(tmp_path, config, config, train(TokenizerConfig(kind="byte"), []))
    assert claim.check() == []
    write_tiny_run(tmp_path)
    theirs = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"config\.model\.width=32, and this config says 64"):
        claim.write()
    assert (tmp_path / "config.json").read_bytes() == theirs
