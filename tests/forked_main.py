"""Runs `main.py` on many command lines in turn: each in a fork, after one import of everything.

    python tests/forked_main.py CASES.json      # {name: [arguments]} → {name: [code, out, err]}

A fork has its own flags, its own JAX and its own exit code, as a process of its own would, and
starts in no time. Cases run in the order of the file.
"""

import json
import os
import runpy
import sys
import tempfile
import warnings


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `python main.py *arguments`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = ["main.py", *arguments]
            sys.path.insert(0, os.getcwd())
            code = 70
            try:
                runpy.run_path("main.py", run_name="__main__")
                code = 0
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return os.waitstatus_to_exitcode(status), *texts


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of forks; nothing of it is running here yet
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    results = {name: run(arguments) for name, arguments in cases.items()}
    print(json.dumps(results))
