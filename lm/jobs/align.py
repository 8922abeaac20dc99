"""Learning from rewards: a model that follows instructions to one that does so well.

One linear story: config, devices, prompts and rewards, training steps, state, loop, samples.
"""

from __future__ import annotations

import functools
import pathlib
import signal
import time

import jax
import ml_collections
from rich.console import Console

from lm.alignment.config import AlignJob
from lm.alignment.curves import plot_curves
from lm.alignment.loop import Loop
from lm.alignment.page import keep_before, write_page
from lm.alignment.prompts import PromptOrder, fields_of, fingerprint, read_prompts
from lm.alignment.rewards import Rewards
from lm.alignment.rollouts import Sampler
from lm.alignment.scoring import Scorer
from lm.alignment.start import critic_training, first_state, whole_reference
from lm.config import to_dict, view
from lm.inference import Framing
from lm.parallel import hosts
from lm.parallel.layout import lay_out
from lm.parallel.platform import keep_buffers, keep_programs
from lm.runs.conversing import converse
from lm.runs.directory import CHECKPOINTS, Claim, check_place
from lm.runs.inherited import Origin, inherit
from lm.runs.start import begin
from lm.training.checkpoints import Checkpointer
from lm.training.config import TrainingInterrupted
from lm.training.metrics import MetricsWriter
from lm.training.progress import Progress
from lm.training.report import describe_run
from lm.training.setup import set_up
from lm.training.workload import check_workload


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
    """Learns as `config` says, or goes on where `workdir` left off.

    Returns:
      The last evaluation: `eval_reward` and others, where there are held-out prompts.

    Raises:
      TrainingInterrupted: SIGTERM came to a host before the last iteration, and the run saved.
      KeyboardInterrupt: likewise after Ctrl-C.
      TrainingStopped: learning cannot go on.
    """
    directory = pathlib.Path(workdir)
    fields, origin = inherit(config, directory)
    job = view(AlignJob, fields).with_value_head()
    with hosts.together(job.hosts):
        results, left_by = _run(job, directory, origin)
    if left_by == signal.SIGINT:
        raise KeyboardInterrupt
    if left_by:
        raise TrainingInterrupted("the run was asked to leave; the same command goes on")
    return results


def _run(job: AlignJob, directory: pathlib.Path, origin: Origin) -> tuple[dict[str, float], int]:
    """The last evaluation, and the signal that ended the run before its last iteration."""
    console = Console(soft_wrap=False, highlight=False, quiet=hosts.index() > 0)
    say = functools.partial(console.print, markup=False, soft_wrap=True)  # names are names

    # ---- Devices: what they cannot share or hold is said before any work
    if jax.default_backend() == "cpu":
        keep_buffers()
    if job.train.compilation_cache:
        keep_programs(job.train.compilation_cache)
    layout = lay_out(job.strategy, job.mesh, job.zero)
    workload = job.workload(layout)
    check_workload(workload)
    check_place(directory)

    # ---- Prompts and rewards: what may be in the directory is known with them
    tokenizer = origin.tokenizer(job.tokenizer, lambda: ())
    tokenizer, template, carried, told = converse(job, tokenizer, origin)
    framed = {"data": {"end_of_text": job.data.end_of_text}, **carried}
    framing = Framing.of_run(framed, job.model, tokenizer, "framing")
    prompts, held_out = read_prompts(job.data, job.seed, template, job.longest_prompt, say)
    rewards = Rewards(job.rewards, mesh=layout.mesh, length=job.data.block_size + 1)
    rewards.try_out([prompt.text for prompt in prompts[:2]], **fields_of(prompts[:2]))
    corpus = functools.partial(fingerprint, prompts + held_out)
    claim = Claim(directory, to_dict(job), to_dict(AlignJob()), tokenizer, corpus, carried)
    for note in told + claim.check():
        say(f"note: {note}")

    # ---- Training steps: shapes and shardings, and nothing allocated yet
    policy = set_up(workload)
    critic = critic_training(job, layout, tokenizer) if job.critic == "separate" else None
    abstract = policy.abstract | ({"critic": critic.abstract} if critic else {})
    with layout.active():
        describe_run(console, policy)
        begun = begin(origin, policy, compares=job.learning.reference)
        with Checkpointer(directory / CHECKPOINTS, job.checkpoint) as checkpointer:
            # ---- State: the directory is ours from here on
            claim.write(begun.facts)
            found = checkpointer.restore_latest(abstract)
            if found is not None:
                start, state, extra = found
                say(f"resuming at step {start} of {job.train.steps}")
            else:
                start, extra = 0, {}
                state = first_state(job, policy, critic, origin, begun)
            reference = whole_reference(policy, begun)
            frozen = {name: held for name, held in begun.frozen.items() if name != "reference"}

            # ---- Loop
            began, steps = time.perf_counter(), job.train.steps
            with MetricsWriter(directory, start) as writer, Progress(steps, start) as progress:
                loop = Loop(
                    job=job,
                    policy=policy,
                    critic=critic,
                    sampler=Sampler(
                        policy.model,
                        policy.whole(state["params"], frozen),  # let go of when it is cast
                        framing,
                        tokenizer,
                        job.rollout,
                        job.data.block_size,
                    ),
                    scorer=Scorer(policy, critic, job.rollout, tokenizer.vocab_size),
                    rewards=rewards,
                    tokenizer=tokenizer,
                    prompts=PromptOrder(prompts, job.seed),
                    held_out=held_out,
                    reference=reference,
                    frozen=frozen,
                    checkpointer=checkpointer,
                    writer=writer,
                    progress=progress,
                )
                asked = (held_out or prompts)[: job.shown]
                if start == 0:
                    keep_before(directory, loop.shown(state, asked))
                state, step = loop.run(state, start, extra)
                say(f"{step - start} iterations in {time.perf_counter() - began:.1f} s")
                if not loop.left_by:
                    write_page(directory, asked, loop.shown(state, asked))
    if hosts.index() == 0 and plot_curves(directory):
        say(f"curves: {directory / 'curves.png'}")
    return loop.last_eval, loop.left_by
