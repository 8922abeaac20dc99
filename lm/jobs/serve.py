"""Serves a trained model: the OpenAI API, a page to talk to it, metrics."""

from __future__ import annotations

import dataclasses
import functools
import signal
import sys

import ml_collections

import lm
from lm.config import ConfigError, Path, check, view
from lm.inference.engine import Engine
from lm.inference.grammar import Grammars
from lm.inference.requests import EngineConfig
from lm.parallel.platform import keep_programs
from lm.runs.run import Run
from lm.runs.vectors import Vectors

try:
    import uvicorn

    from lm.serving.app import App
    from lm.serving.asked import Served
    from lm.serving.config import ServeConfig
    from lm.serving.worker import Worker
except ModuleNotFoundError as error:
    raise ConfigError(
        f"config.job='serve' needs the package {error.name!r}: pip install 'lm[serve]'"
    ) from None


@dataclasses.dataclass(frozen=True)
class ServeJob:
    """Which model to serve, and how."""

    job: str = "serve"
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    # Of a Hugging Face directory: regular expressions of fields of config.json and of tensors that
    # may be left out though they are not known.
    ignore: str | tuple[str, ...] = ()
    # The name of a chat template, or a file with Jinja text; "": the model's own, if it has one.
    chat_template: Path = ""
    warm_up: bool = True  # compile before the first request, so that none waits for it
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Serves what a `ServeJob` asks for, until SIGTERM or Ctrl-C; what was accepted is finished.

    Nothing is written to `workdir`.

    Raises:
      ConfigError: no such run, no such template, or an address that is taken.
    """
    job = view(ServeJob, config)
    keep_programs()
    app = make_app(job, lm.load(job.init_from, ignore=job.ignore))
    settings = uvicorn.Config(
        app.asgi,
        job.serve.host,
        job.serve.port,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(job.serve.timeout) + 5,
    )
    server = uvicorn.Server(settings)
    # uvicorn drains at either signal, and then raises it again for whoever handled it before.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    except SystemExit:
        address = f"config.serve.port={job.serve.port} of host {job.serve.host!r}"
        raise ConfigError(f"{address} cannot be listened to: choose another") from None
    print("all requests are answered", file=sys.stderr)


def make_app(job: ServeJob, loaded: Run) -> App:
    """The server of a loaded model.

    Raises:
      ConfigError: a field of `job` that cannot be followed.
    """
    model = loaded.skeleton.config
    worker = None
    framing, tokenizer = loaded.framing, loaded.tokenizer
    if model.architecture != "encoder" and model.output_head:
        engine = Engine(loaded.skeleton, loaded.params, framing, tokenizer, job.engine)
        if job.warm_up:
            print("compiling …", file=sys.stderr)
            engine.warm_up()
        worker = Worker(engine)
    chat = _chat(job, loaded)
    end_ids = chat.get("chat_ends", ((), ()))[0]
    served = Served(
        name=job.serve.model_name or loaded.directory.resolve().name,
        model=model,
        tokenizer=tokenizer,
        framing=framing,
        limits=job.serve,
        grammars=Grammars(tokenizer, (*(framing.end_of_text or ()), *end_ids)),
        **chat,
    )
    vectors = Vectors(job.serve.pooling) if job.serve.pooling else loaded.vectors
    embed = functools.partial(vectors.of, model, loaded.params)
    return App(served, worker, embed, job.serve.api_keys(), vectors.width)


def _chat(job: ServeJob, loaded: Run) -> dict:
    """How the model's conversations are written and end; nothing where it has none."""
    try:
        template = loaded.chat_template(job.chat_template)
    except ConfigError:
        if job.chat_template:
            raise
        return {}
    return {"chat": template.encode, "chat_ends": template.ends}
