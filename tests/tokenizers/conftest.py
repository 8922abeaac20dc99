import pytest
from trained_tokenizers import ALL, LOSSLESS, trained


@pytest.fixture(params=ALL)
def tokenizer(request):
    return trained(request.param)


@pytest.fixture(params=LOSSLESS)
def lossless(request):
    return trained(request.param)
