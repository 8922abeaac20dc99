"""The worked example of alignment, measured: every step for several seeds, a table, two pictures.

    python benchmarks/align_example.py                       # stories: docs/align.png
    python benchmarks/align_example.py --task=walks          # random walks: docs/align_walks.png
    python benchmarks/align_example.py --seeds=1 --set train.steps=2    # a try

Each step is the command that configs/align/*.py name, in a run directory of its own under
`--workdir`, so that a benchmark that is stopped goes on where it was. Then all policies answer the
same held-out questions: greedily, of which the share that is exact is counted, and drawn at
temperature 1, of which the true (gold) reward, the learnt (proxy) one and the KL to the SFT model
are means. Intervals are of the mean over seeds, 95 % by Student's t.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
GOLD = "lm.data.storyworld.instructions:gold_reward"
# What is learnt from; {name} is the run directory of another step.
REWARDED = {"rewards.functions": ("{reward}", GOLD)}
PPO = REWARDED | {"learning.critic_from": "{reward}"}
GRPO_WALKS = {
    "objective.policy.loss": "grpo",
    "advantage.name": "group",
    "rollout.prompts": "20",
    "rollout.samples": "8",
}
# Step → its config, the step that it starts from, and fields.
TASKS = {
    "stories": {
        "base": ("story_base", "", {}),
        "sft": ("story_sft", "base", {}),
        "reward": ("story_reward", "sft", {}),
        "ppo": ("story_ppo", "sft", PPO),
        "ppo_free": ("story_ppo", "sft", PPO | {"advantage.kl_coefficient": "0"}),
        "dpo": ("story_dpo", "sft", {}),
        "grpo": ("story_grpo", "sft", REWARDED),
    },
    "walks": {
        "walks": ("walks", "", {}),
        "ppo": ("walks_ppo", "walks", {}),
        "grpo": ("walks_ppo", "walks", GRPO_WALKS),
    },
}
NAMES = {"sft": "SFT", "ppo": "PPO", "ppo_free": "PPO, β = 0", "dpo": "DPO", "grpo": "GRPO"}
HELD_OUT = 2**20  # the seed of those questions: of no run


def climb(task, seed, directory, more):
    """Runs every step that has not been run."""
    for name, (config, source, fields) in TASKS[task].items():
        run = directory / name
        if (run / "done").exists():
            continue
        places = {other: directory / other for other in TASKS[task]}
        words = [f"--config=configs/align/{config}.py", f"--workdir={run}"]
        words += [f"--config.seed={seed}"]
        words += [f"--config.init_from={directory / source}"] if source else []
        for field, values in (fields | more).items():
            several = values if isinstance(values, tuple) else (values,)
            words += [f"--config.{field}={value.format(**places)}" for value in several]
        print("$ python main.py", *words, flush=True)
        subprocess.run([sys.executable, "main.py", *words], cwd=ROOT, check=True)
        (run / "done").touch()


def judged(name, directory, questions):
    """What a policy makes of the held-out questions."""
    import numpy as np

    import lm
    from lm.alignment.replies import replies
    from lm.data.conversations import example
    from lm.data.storyworld import instructions
    from lm.inference import SamplingConfig
    from lm.tokenizers import learned

    kept = directory / name / "judged.json"
    if kept.exists():
        return json.loads(kept.read_text())
    lines = [instructions.prompt(HELD_OUT, n, held_out=True) for n in range(questions)]
    asked = [example(line, "prompts") for line in lines]
    run, sft = lm.load(directory / name), lm.load(directory / "sft")
    said = replies(run, asked, SamplingConfig(max_new_tokens=24, temperature=0.0))
    exact = [
        instructions.exact(line, reply)
        for line, reply in zip(lines, said)
        if line["kind"] != "continue"
    ]
    drawn = replies(run, asked, SamplingConfig(max_new_tokens=24, temperature=1.0))
    gold = [instructions.gold(line, reply) for line, reply in zip(lines, drawn)]
    proxy = lm.load(directory / "reward").score([list(one.prompt) for one in asked], drawn)

    template, rows = sft.chat_template(), []
    for one, reply in zip(asked, drawn):
        talk = [*one.prompt, {"role": "assistant", "content": reply}]
        rows.append(learned(template, talk, given=len(one.prompt)))
    longest = max(len(ids) for ids, _ in rows)
    ids_NT, learn_NT = (
        np.array([row[i] + [0] * (longest - len(row[i])) for row in rows], np.int32)
        for i in range(2)
    )

    def logprob_NT(policy):
        parts = []
        for first in range(0, len(ids_NT), 64):
            ids_BT = ids_NT[first : first + 64]
            logits = np.asarray(policy.model(ids_BT[:, :-1]), np.float64)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            parts.append(np.take_along_axis(logits, ids_BT[:, 1:, None], -1)[..., 0])
        return np.concatenate(parts)

    kl = ((logprob_NT(run) - logprob_NT(sft)) * learn_NT[:, 1:]).sum(-1)
    found = {
        "exact": statistics.mean(exact),
        "gold": statistics.mean(gold),
        "proxy": float(np.mean(proxy)),
        "kl": float(kl.mean()),
        "words": statistics.mean(len(reply.split()) for reply in drawn),
    }
    kept.write_text(json.dumps(found))
    return found


def metrics(directory):
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def interval(values):
    """The mean, and half of its 95 % interval over seeds."""
    t = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    mean, count = statistics.mean(values), len(values)
    if count == 1:
        return mean, math.nan
    return mean, t[min(count, len(t)) - 1] * statistics.stdev(values) / math.sqrt(count)


def row(name, columns):
    """A line of the table."""
    cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in map(interval, columns)]
    return f"| {name} | " + " | ".join(cells) + " |"


def report_stories(directories, given):
    """The table, and the curves of PPO with and without its penalty."""
    columns = ("exact", "gold", "proxy", "kl", "words")
    print(
        "| policy | exact answers | gold | proxy | KL (nats) | words |", "|---" * 6 + "|", sep="\n"
    )
    for name in ("base", *NAMES):
        found = [judged(name, directory, given.questions) for directory in directories]
        print(row(NAMES.get(name, name), [[one[c] for one in found] for c in columns]), flush=True)
    right = [series(directory / "reward", "eval_accuracy")[-1][1] for directory in directories]
    print("reward model, held-out pairs ranked right: {:.3f} ± {:.3f}".format(*interval(right)))
    panels = {"learnt reward (proxy)": "reward", "true reward (gold)": "reward_gold_reward"}
    panels["KL to the SFT model (nats)"] = "kl"
    curves = {
        title: {
            NAMES[name]: [series(d / name, field) for d in directories]
            for name in ("ppo", "ppo_free")
        }
        for title, field in panels.items()
    }
    draw(curves, pathlib.Path(given.pictures, "align.png"))


def report_walks(directories, given):
    """Optimality before and after, and its curves."""
    print("| | optimality at the start | of the last ten iterations | iterations to 0.9 |")
    print("|---|---|---|---|")
    curves = {}
    for name in ("ppo", "grpo"):
        curves[NAMES[name]] = found = [series(d / name, "reward") for d in directories]
        values = [[y for _, y in one] for one in found]
        reached = [next((n for n, y in enumerate(one, 1) if y > 0.9), math.inf) for one in values]
        columns = [[one[0] for one in values], [statistics.mean(one[-10:]) for one in values]]
        print(row(NAMES[name], [*columns, reached]))
    draw({"optimality": curves}, pathlib.Path(given.pictures, "align_walks.png"))


def series(directory, field):
    """(step, value) of a metric."""
    return [(r["step"], r[field]) for r in metrics(directory) if field in r]


def draw(panels, path):
    """A panel for each title: of every name a thin line a seed, and their mean."""
    from lm.training.plots import INK, bare, figure_of, save

    figure = figure_of(figsize=(4.2 * len(panels), 3.2), dpi=130, layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        for colour, (name, seeds) in zip(("#4c78a8", "#e45756"), lines.items()):
            for one in seeds:
                axes.plot(*zip(*one), color=colour, alpha=0.25, linewidth=0.8)
            mean = [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*seeds)]
            axes.plot(*zip(*mean), color=colour, linewidth=1.8, label=name)
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_xlabel("iteration", color=INK, fontsize=9)
        bare(axes)
        if place == 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    print(f"picture: {save(figure, path)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="stories")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workdir", default="runs/align")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--pictures", default=ROOT / "docs", help="where they are put")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", dest="more",
                        help="of every config, to try the ladder out")  # fmt: skip
    given = parser.parse_args()
    directories, more = [], dict(setting.split("=", 1) for setting in given.more)
    for seed in range(given.seeds):
        directories.append(pathlib.Path(given.workdir, given.task, str(seed)).resolve())
        climb(given.task, seed, directories[-1], more)
    report = report_stories if given.task == "stories" else report_walks
    report(directories, given)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
