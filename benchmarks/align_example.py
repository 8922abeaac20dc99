"""The worked example of alignment, measured: every step for several seeds, a table, two pictures.

    python benchmarks/align_example.py                       # stories: docs/align.png
    python benchmarks/align_example.py --task=walks          # random walks: docs/align_walks.png
    python benchmarks/align_example.py --seeds=1 --set train.steps=2    # a try

Each step is the command that configs/align/*.py name, in a run directory of its own under
`--workdir`, so that a benchmark that is stopped goes on where it was; what is measured of a seed
stays in a .json beside the picture, and is measured anew where that is deleted; with --set nothing
stays. All policies answer the same held-out questions: greedily, of which the share that is exact
is counted, and drawn at temperature 1, of which the true (gold) reward, the learnt (proxy) one and
the KL to the SFT model are means. Intervals are of the mean over seeds, 95 % by Student's t.
"""

import argparse
import hashlib
import importlib
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
# The picture's panels, whose curves they have, and the file beside it.
CURVES = {
    "stories": {
        "learnt reward (proxy)": "reward",
        "true reward (gold)": "reward_gold_reward",
        "KL to the SFT model (nats)": "kl",
    },
    "walks": {"optimality": "reward"},
}
DRAWN = {"stories": ("ppo", "ppo_free"), "walks": ("ppo", "grpo")}
FILES = {"stories": "align.json", "walks": "align_walks.json"}
HELD_OUT = 2**20  # the seed of those questions: of no run


def made_with(task):
    """What tells the settings and the data that figures are of from others."""
    from lm.__main__ import JOBS
    from lm.command import load_config
    from lm.config import changed, defaults
    from lm.data.lines import LINES
    from lm.data.storyworld import generate

    parts = [[generate(0, number).text for number in range(20)]]
    for name, (config, source, fields) in TASKS[task].items():
        values = load_config(ROOT / "configs" / "align" / f"{config}.py")
        module, _, section = JOBS[values.job].rpartition(".")
        usual = defaults(getattr(importlib.import_module(module), section))
        parts.append([name, source, fields, sorted(changed(values, usual))])
        for path in {values.data.path} & {*LINES}:
            module, _, line = LINES[path].rpartition(".")
            make = getattr(importlib.import_module(module), line)
            parts.append([make(0, number, False) for number in range(20)])
    said = json.dumps(parts, sort_keys=True, default=str).replace(f"{ROOT}/", "")
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


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


def ranked_right(directory, pairs):
    """The share of held-out pairs that the reward model ranks right."""
    import lm
    from lm.data.storyworld import instructions

    lines = [instructions.preference(HELD_OUT, n, held_out=True) for n in range(pairs)]
    run, prompts = lm.load(directory / "reward"), [line["prompt"] for line in lines]
    chosen, rejected = (
        run.score(prompts, [n[side] for n in lines]) for side in ("chosen", "rejected")
    )
    found = {"held-out pairs": [], "of these in truth": [], "in manners alone": []}
    for line, right in zip(lines, chosen > rejected):
        truths = {instructions.truth(line, line[side]) for side in ("chosen", "rejected")}
        for name in ("held-out pairs", ["in manners alone", "of these in truth"][len(truths) - 1]):
            found[name].append(float(right))
    return {name: statistics.mean(shares) for name, shares in found.items()}


def measured(task, directory, questions):
    """All that the report takes of one seed."""
    metrics = {
        name: [json.loads(line) for line in (directory / name / "metrics.jsonl").open()]
        for name in TASKS[task]
    }
    fields = CURVES[task].values()
    curves = {
        name: {field: [round(r[field], 4) for r in metrics[name] if field in r] for field in fields}
        for name in DRAWN[task]
    }
    if task == "walks":
        return {"curves": curves}
    policies = {name: judged(name, directory, questions) for name in ("base", *NAMES)}
    return {
        "curves": curves,
        "ranked_right": ranked_right(directory, 2 * questions),
        "policies": policies,
    }


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


def report_stories(seeds):
    """The table."""
    columns = ("exact", "gold", "proxy", "kl", "words")
    print("| policy | exact answers | gold | proxy | KL (nats) | words |")
    print("|---" * 6 + "|")
    for name in seeds[0]["policies"]:
        found = [seed["policies"][name] for seed in seeds]
        print(row(NAMES.get(name, name), [[one[c] for one in found] for c in columns]))
    # What seeds have in common cancels within a seed: policies begin from the same SFT model.
    for name in [*NAMES][1:]:
        more = [s["policies"][name]["gold"] - s["policies"]["sft"]["gold"] for s in seeds]
        print(
            "gold of {} over SFT's, seed by seed: {:+.2f} ± {:.2f}".format(
                NAMES[name], *interval(more)
            )
        )
    for pairs in seeds[0]["ranked_right"]:
        right = [seed["ranked_right"][pairs] for seed in seeds]
        print("reward model, {}: {:.3f} ± {:.3f} ranked right".format(pairs, *interval(right)))


def report_walks(seeds):
    """Optimality before and after."""
    print("| | optimality at the start | of the last ten iterations | iterations to 0.9 |")
    print("|---|---|---|---|")
    for name in DRAWN["walks"]:
        values = [seed["curves"][name]["reward"] for seed in seeds]
        reached = [next((n for n, y in enumerate(one, 1) if y > 0.9), math.inf) for one in values]
        columns = [[one[0] for one in values], [statistics.mean(one[-10:]) for one in values]]
        print(row(NAMES[name], [*columns, reached]))


def draw(task, seeds, path):
    """A panel for each curve: of every policy a thin line a seed, and their mean."""
    from lm.training.plots import INK, bare, figure_of, save

    panels = CURVES[task]
    figure = figure_of(figsize=(4.2 * len(panels), 3.2), dpi=130, layout="constrained")
    for place, (title, field) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        for colour, name in zip(("#4c78a8", "#e45756"), DRAWN[task]):
            lines = [seed["curves"][name][field] for seed in seeds]
            for line in lines:
                axes.plot(range(1, len(line) + 1), line, color=colour, alpha=0.25, linewidth=0.8)
            mean = [statistics.mean(values) for values in zip(*lines)]
            steps = range(1, len(mean) + 1)
            axes.plot(steps, mean, color=colour, linewidth=1.8, label=NAMES[name])
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
    more = dict(setting.split("=", 1) for setting in given.more)
    figures = pathlib.Path(given.pictures, FILES[given.task])
    kept = json.loads(figures.read_text()) if figures.exists() and not more else {}
    of = made_with(given.task)
    if kept.pop("made_with", of) != of:
        parser.error(f"{figures} is of other settings or data: delete it to measure anew")
    for seed in map(str, range(given.seeds)):
        if seed not in kept:
            directory = pathlib.Path(given.workdir, given.task, seed).resolve()
            climb(given.task, seed, directory, more)
            kept[seed] = measured(given.task, directory, given.questions)
        if not more:  # a try is no figure to keep
            every = {"made_with": of, **kept}
            lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in every.items())
            figures.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    seeds = list(kept.values())
    {"stories": report_stories, "walks": report_walks}[given.task](seeds)
    draw(given.task, seeds, figures.with_suffix(".png"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
