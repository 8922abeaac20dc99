"""Configs become typed views, and every mistake says how to mend it."""

import ast
import dataclasses
import socket
import sys

import ml_collections
import pytest
import tiny_jobs

from lm.config import ConfigError, check_choice, defaults, nearest, to_dict, view
from lm.models import ModelConfig
from lm.objectives import ObjectiveConfig
from lm.parallel.mesh import MeshConfig
from lm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Section:
    name: str = "plain"
    on: bool = True
    limit: int | None = None
    paths: tuple[str, ...] = ()
    either: str | tuple[str, ...] = "one"
    table: dict = dataclasses.field(default_factory=dict)
    inner: Inner = Inner()

    def validate(self, prefix):
        check_choice(f"{prefix}.name", self.name, ("plain", "fancy"))


@pytest.mark.parametrize(
    "section", [Section, ModelConfig, MeshConfig, ObjectiveConfig, OptimizerConfig]
)
def test_view_undoes_defaults(section):
    config = defaults(section)
    assert view(section, config) == section()
    assert view(section, to_dict(view(section, config))) == section()  # through plain dictionaries


def test_values_set_in_a_config_arrive_with_the_declared_type():
    config = defaults(Section)
    config.limit = 7
    config.either = ["a", "b"]
    config.paths = ("x",)
    config.inner.rate = 2
    result = view(Section, config)
    assert (result.limit, result.either, result.paths) == (7, ("a", "b"), ("x",))
    assert result.inner.rate == 2.0 and isinstance(result.inner.rate, float)
    assert view(Section, {"paths": "alone"}).paths == ("alone",)


def test_fields_left_out_keep_their_defaults():
    assert view(Section, {"inner": {"size": 9}}) == Section(inner=Inner(size=9))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nmae": "x"}, "config.nmae is not a known field (did you mean 'name'?)"),
        ({"inner": {"sise": 1}}, "config.inner.sise is not a known field (did you mean 'size'?)"),
        ({"zzz": 1}, "config.zzz is not a known field"),
        ({"inner": 3}, "config.inner=3 must be a section of fields"),
        ({"inner": {"size": "3"}}, "config.inner.size='3' must be int, not str"),
        ({"inner": {"size": 1.5}}, "config.inner.size=1.5 must be int, not float"),
        ({"inner": {"size": True}}, "config.inner.size=True must be int, not bool"),
        ({"inner": {"rate": True}}, "config.inner.rate=True must be float, not bool"),
        ({"on": 1}, "config.on=1 must be bool, not int"),
        ({"paths": ["a", 2]}, "config.paths[1]=2 must be str, not int"),
        ({"limit": "many"}, "config.limit='many' must be int | nothing, not str"),
        (
            {"name": "fanzy"},
            "config.name='fanzy' is not one of 'plain', 'fancy' (did you mean 'fancy'?)",
        ),
    ],
)
def test_mistakes_name_the_field_the_value_and_the_remedy(config, message):
    with pytest.raises(ConfigError) as error:
        view(Section, config)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "config.model.width=128 is not divisible by config.model.num_heads=5"),
        ({"num_heads": 5}, "use num_heads=4"),
        ({"num_heads": 8, "num_kv_heads": 6}, "config.model.num_kv_heads=6: use num_kv_heads=2"),
        ({"num_layers": 0}, "config.model.num_layers=0 must be at least 1"),
        ({"vocab_size": -1}, "config.model.vocab_size=-1 must be at least 0"),
        ({"mlp_width": -1}, "config.model.mlp_width=-1 must be at least 0, or None"),
        ({"dropout": 1.0}, "config.model.dropout=1.0 must be in [0, 1)"),
        ({"head_dim": 7}, "config.model.head_dim=7 must be even"),
        ({"positions": "rotery"}, "config.model.positions='rotery' is not one of"),
        ({"positions": "rotery"}, "(did you mean 'rotary'?)"),
    ],
)
def test_impossible_models_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError) as error:
        view(ModelConfig, fields, "config.model")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_file_may_set_anything_and_is_told_what_is_wrong():
    config = defaults(ModelConfig)
    config.num_kv_heads = 2  # the default is None
    assert view(ModelConfig, config).num_kv_heads == 2
    config.num_kv_heads = "two"
    with pytest.raises(ConfigError, match=r"config\.num_kv_heads='two' must be int"):
        view(ModelConfig, config)


def test_nearest_is_silent_when_nothing_is_close():
    assert nearest("adamw", ["sgd", "lion"]) == ""
    assert nearest("adm", ["adamw", "lion"]) == " (did you mean 'adamw'?)"


def test_to_dict_is_plain():
    config = ml_collections.ConfigDict({"a": {"b": 1}})
    assert to_dict(config) == {"a": {"b": 1}} and type(to_dict(config)["a"]) is dict
    assert to_dict(Section())["inner"] == {"size": 3, "rate": 0.5}


# Connecting to other processes must come before the first look at this one's devices.
READ = """
import importlib.util, pathlib, sys
for path in sorted(pathlib.Path("configs").glob("*.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.get_config()
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=1, process_id=0)
print(jax.process_count())
"""


def test_configs_are_read_before_devices_are():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = tiny_jobs.start([sys.executable, "-c", READ, str(port)])
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output.split()[-1:]) == (0, ["1"]), errors


def test_every_text_file_is_opened_with_an_encoding():
    for path in (tiny_jobs.REPOSITORY / "lm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                words = [a.value for a in node.args if isinstance(a, ast.Constant)]
                text = name in ("read_text", "write_text") or (
                    name == "open" and {"w", "a"} & {*words}
                )
                named = any(keyword.arg == "encoding" for keyword in node.keywords)
                assert named or not text, f"{path}, line {node.lineno}: encoding='utf-8'"
