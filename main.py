"""The one entry point: python main.py --config=configs/NAME.py [--workdir=DIR] [--config.FIELD=…]

Flags become a config, the config's `job` names a function, and that function gets the config and
the run directory. Mistakes a user can mend end in one line and exit code 2.
"""

import importlib
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from lm.config import ConfigError, check_choice, nearest
from lm.parallel.hosts import TRY_AGAIN
from lm.training.config import TrainingInterrupted, TrainingStopped

JOBS = {
    "train": "lm.jobs.train",  # text → a trained model that writes
    "generate": "lm.jobs.generate",  # a run directory and a prompt → text
    "tokenizer": "lm.jobs.tokenizer",  # compare tokenizers; see how one builds a word
    "why_attention": "lm.jobs.why_attention",  # recurrent networks, and what cured them
    "convert": "lm.jobs.convert",  # Hugging Face weights in and out
    "describe": "lm.jobs.describe",  # what a known model is made of and costs
    "plan": "lm.jobs.plan",  # whether a run fits hardware that is not here, and how fast it is
    "corpus": "lm.jobs.corpus",  # a corpus too large for one machine → tokens, on Apache Beam
}

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/quickstart.py", "What to run.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; runs/<config name> by default.")


def main(argv: list[str]) -> None:
    """Runs the job that the config names."""
    if argv[1:]:
        raise ConfigError(f"argument {argv[1]!r} is not a flag: write --config.FIELD=VALUE")
    config = _CONFIG.value
    check_choice("config.job", config.job, JOBS)
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or f"runs/{name}"
    importlib.import_module(JOBS[config.job]).run(config, workdir)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with its complaints as one line that names the nearest field or file."""
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value.job  # a config file that could not be read says so on its first use
        return rest
    except OSError as error:
        found = re.search("No such file or directory: '(.+)'", str(error))
        if not found:
            raise ConfigError(" ".join(str(error).split())) from None
        path = pathlib.Path(found[1])
        there = [str(p) for p in sorted(path.parent.glob("*.py"))]
        raise ConfigError(f"--config={path} does not exist{nearest(str(path), there)}") from None
    except (AttributeError, KeyError) as error:
        raise ConfigError(unknown_field(error, argv)) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def unknown_field(error: BaseException, argv: list[str]) -> str:
    """The line for a field that ml_collections did not find: its whole name, and the nearest."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = " ".join(str(error.args[0] if error.args else error).split())
    found = re.match(r"""['"](\w+)['"](?: Did you mean "(\w+)")?""", text)
    if not found:
        return text
    given = [arg.lstrip("-").split("=")[0] for arg in argv]
    fields = [field for field in given if found[1] in field.split(".")]
    hint = f" (did you mean {found[2]!r}?)" if found[2] else ""
    return f"{fields[0] if fields else found[1]} is not a known field{hint}"


def guarded(function, *args):
    """`function(*args)`; a mistake ends in one line and code 2, a run that diverged in code 1.

    One that was asked to leave, and can be started again, ends in code 75.
    """
    try:
        return function(*args)
    except TrainingInterrupted:
        sys.exit(TRY_AGAIN)
    except (ConfigError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    app.run(lambda argv: guarded(main, argv), flags_parser=lambda argv: guarded(parse_flags, argv))
