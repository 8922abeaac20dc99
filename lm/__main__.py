"""The one entry point: python main.py, or lm, --config=NAME [--workdir=DIR] [--config.FIELD=…]

The words become a config, the config's `job` names a function, and that function gets the config
and the run directory. Mistakes a user can mend end in one line and exit code 2.
"""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from lm import __version__, command
from lm.config import ConfigError
from lm.parallel import TRY_AGAIN
from lm.training.config import TrainingInterrupted, TrainingStopped

JOBS = {
    "train": "lm.jobs.train.TrainJob",  # text → a trained model that writes
    "align": "lm.jobs.align.AlignJob",  # a model and rewards → one that earns more of them
    "best_of_n": "lm.jobs.best_of_n.BestOfNJob",  # prompts → their best replies, to learn from
    "generate": "lm.jobs.generate.GenerateJob",  # a run directory and a prompt → text
    "chat": "lm.jobs.chat.ChatJob",  # a model and what you say → replies
    "serve": "lm.jobs.serve.ServeJob",  # a run directory → the OpenAI API and a page to talk to it
    "tokenizer": "lm.jobs.tokenizer.TokenizerJob",  # compare tokenizers; see how one builds a word
    "why_attention": "lm.jobs.why_attention.WhyAttentionJob",  # recurrent networks and their cure
    "convert": "lm.jobs.convert.ConvertJob",  # Hugging Face weights in and out
    "describe": "lm.jobs.describe.DescribeJob",  # what a known model is made of and costs
    "plan": "lm.jobs.plan.PlanJob",  # whether a run fits hardware that is not here, and how fast
    "evaluate": "lm.jobs.evaluate.EvaluateJob",  # what a model can and cannot do, on one page
    "compare": "lm.jobs.compare.CompareJob",  # cards of several models → which differ in what
    "tale": "lm.jobs.tale.TaleJob",  # one token's way from text to the next token, and back
    "emergence": "lm.jobs.emergence.EmergenceJob",  # jumps of training, smoothly measured
    "lens": "lm.jobs.lens.LensJob",  # what it would say after each block, and what says it
    "graph": "lm.jobs.graph.GraphJob",  # which features and tokens a prediction is the sum of
    "embeddings": "lm.jobs.embeddings.EmbeddingsJob",  # what is near what, over training
    "formation": "lm.jobs.formation.FormationJob",  # how small models came to what they do
    "causes": "lm.jobs.causes.CausesJob",  # what makes it answer so: patched, by path and subspace
    "heads": "lm.jobs.heads.HeadsJob",  # what attention heads do, and how they came to do it
    "learning": "lm.jobs.learning.LearningJob",  # gradients, steps, scales, the loss's landscape
    "compare_runs": "lm.jobs.compare_runs.CompareRunsJob",  # losses of several runs in one picture
    "dictionary": "lm.jobs.dictionary.DictionaryJob",  # sparse features of a model's activations
    "corpus": "lm.jobs.corpus.CorpusJob",  # a corpus too large for one machine, on Apache Beam
}
HELP = {"--help", "-h", "-help", "--helpfull", "--helpshort"}


def run(words: Sequence[str]) -> None:
    """Does what the words after the program's name ask for."""
    program = "lm" if os.path.basename(sys.argv[0]) in ("lm", "lm.exe") else "python main.py"
    if HELP & {*words}:
        print(command.help_text([word for word in words if word not in HELP], JOBS, program))
    elif list(words) == ["--version"]:
        print(f"lm {__version__}")
    else:
        asked = command.read(words, JOBS)
        module = JOBS[asked.config.job].rpartition(".")[0]
        importlib.import_module(module).run(asked.config, asked.workdir)


def guarded(function, *args) -> int:
    """The exit code of `function(*args)`: 2 for a mistake, 1 for a run that diverged, in one line.

    A run that was asked to leave, and can be started again, ends in code 75; after Ctrl-C in 130.
    """
    try:
        function(*args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # who reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except TrainingInterrupted:
        return TRY_AGAIN
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ConfigError, TrainingStopped) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except (MemoryError, RuntimeError, OSError) as error:  # what no check foresaw
        memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        if not memory and getattr(error, "filename", None) is None:
            raise
        what = f"out of memory: {error}" if memory else f"{error.filename!r}: {error.strerror}"
        print(f"error: {' '.join(what.split())[:500]}", file=sys.stderr)
        return 2


def main() -> None:
    """Runs `sys.argv` and exits."""
    _speak_utf8()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    code = guarded(run, sys.argv[1:])
    hosts = sys.modules.get("lm.parallel.hosts")  # importing it takes a second
    if hosts and hosts.count() > 1:
        # One of several processes that failed: its threads still wait in C++ for the others, and
        # Python, which ends them there, would now and then be aborted by it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _speak_utf8() -> None:
    """Arguments, file names and output are UTF-8, whatever the locale says.

    Where the locale is another one, such as LC_ALL=C, Python starts again in its UTF-8 mode.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's has none
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    main()
