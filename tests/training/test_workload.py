"""What a mesh cannot share evenly, or not at all, is said before any work is lost."""

import pytest

from lm.config import ConfigError
from lm.models import ModelConfig
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig
from lm.training.config import TrainConfig
from lm.training.workload import Workload, check_layout

MIXTURE = {"num_experts": 6, "activation": "swiglu"}


def check(mesh, model, block_size=64, batch_size=32, **train):
    layout = lay_out("", MeshConfig(**mesh), -1)
    train = TrainConfig(**train)
    check_layout(Workload(ModelConfig(**model), block_size, batch_size, train=train, layout=layout))


@pytest.mark.parametrize("remat", ["full", "offload"])
def test_what_divides_is_accepted(remat):
    check({"data": 2, "fsdp": 2, "context": 2}, {"remat": remat})


@pytest.mark.parametrize(
    ("mesh", "model", "sizes", "message"),
    [
        ({"data": 8}, {}, {"batch_size": 20}, r"batch_size=20 must be a multiple of 8"),
        ({"data": 8}, {}, {"accumulation": 8}, r"batch_size=32 .* train.accumulation=8"),
        ({"data": 8}, {}, {"eval_batch_size": 12}, r"eval_batch_size=12 .* 8 devices"),
        ({"context": 4}, {}, {"block_size": 66}, r"block_size=66 .* mesh.context=4"),
        ({"context": 4}, {"cell": "gru"}, {}, r"mesh.context=4 needs .*cell='attention'.*'gru'"),
        ({"stage": 2}, {"num_layers": 3}, {}, r"mesh.stage=2 .* 3 layers"),
        ({"stage": 2}, {"remat": "offload"}, {}, r"remat='offload' needs .*mesh.stage=1.* 'full'"),
        ({"expert": 4}, MIXTURE, {}, r"mesh.expert=4 must divide .*num_experts=6"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(mesh, model, sizes, message):
    with pytest.raises(ConfigError, match=message):
        check(mesh, model, **sizes)
