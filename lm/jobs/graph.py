"""Why a model predicts what it does: an attribution graph of a prompt, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from lm.config import ConfigError, Count, Path, Positive, Share, check, view
from lm.evaluation.card import NotApplicable
from lm.evaluation.documents import documents_of
from lm.files import write_json
from lm.interpretability import dictionaries
from lm.interpretability.graphs import files, influence, report
from lm.interpretability.graphs.attribution import attribute
from lm.interpretability.graphs.examples import examples
from lm.interpretability.graphs.heads import loadings
from lm.interpretability.graphs.replacement import freeze
from lm.interpretability.heatmaps import token_names
from lm.interpretability.lenses import rows_of
from lm.interpretability.prompts import one_token, opened, prompt_tokens
from lm.parallel.platform import keep_programs
from lm.runs.run import Run


@dataclasses.dataclass(frozen=True)
class GraphJob:
    """Whose graph, of which prompt, and how much of it."""

    job: str = "graph"
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    step: int | None = None  # of the checkpoint; None: the last one
    transcoder: Path = ""  # the directory that configs/interpret/transcoder.py wrote
    prompt: str = ""  # its last token's prediction is explained
    targets: tuple[str, ...] = ()  # tokens explained; (): up to ten that reach 95 % together
    max_features: Count = 5000  # the others that are active count as errors; 0: all
    nodes: Share = 0.8  # of all influence that the nodes left have
    edges: Share = 0.98  # the same of edges
    float64: bool = False  # sums hold to 1e-12, in twice the time
    batch: Positive = 64  # targets whose gradients are taken together
    supernodes: dict = dataclasses.field(default_factory=dict)  # name → ids of nodes of graph.json
    extra_nodes: bool = True  # graph.json has positions and biases, which other readers do not know
    scores: Count = 3  # attention scores taken apart: those of heads that the strongest edges use
    tested: Count = 5  # features doubled: those with the strongest edges to the first logit
    path: Path = ""  # texts that show what features are, as data.path; "": those the run held out
    documents: Count = 200  # of them, at most; 0: none

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        for name in ("init_from", "transcoder", "prompt"):
            check(bool(getattr(self, name)), f"{prefix}.{name}='' must be given")
        for name, ids in self.supernodes.items():
            lists = isinstance(ids, list | tuple) and all(isinstance(one, str) for one in ids)
            check(lists, f"{prefix}.supernodes: {name!r} must be a list of ids, not {ids!r}")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes `workdir/graph.json` and `graph.html`, and prints how well it adds up.

    Returns:
      What is printed, by name.

    Raises:
      ConfigError: no such run or transcoder, or they do not belong together; a target that is not
        one token, a supernode of a node that is not there.
    """
    job = view(GraphJob, config)
    keep_programs()
    loaded = opened(job.init_from, job.step)
    try:
        dictionary = dictionaries.load(job.transcoder)
    except ConfigError as error:
        raise ConfigError(f"config.transcoder={job.transcoder!r}: {error}") from None
    tokens_T = prompt_tokens(loaded, job.prompt, "config.prompt")[0]
    wanted = [one_token(loaded, text, "config.targets") for text in dict.fromkeys(job.targets)]
    rows_NT = _texts(job, loaded)
    spell = functools.cache(lambda token: token_names(loaded.tokenizer, [token])[0])
    with jax.enable_x64(job.float64):
        local = freeze(loaded.skeleton, loaded.params, dictionary, tokens_T, job.max_features)
        graph = attribute(local, wanted, job.batch)
        pruned = influence.prune(graph, job.nodes, job.edges)
        scores, summary = influence.graph_scores(graph), report.summary_of(local, graph)
        summary |= scores._asdict() | {"nodes": int(pruned.nodes_n.sum())}
        summary |= {"edges": int(pruned.edges_nn.sum())}
        summary["supernodes"] = report.between(graph, job.supernodes)
        strongest = report.strongest_edges(graph, pruned)
        found = loadings(local, graph, strongest)
        apart = report.taken_apart(local, graph, strongest, found.heads_ELH, job.scores)
        summary["tested"] = report.tested(local, graph, job.tested)
    name, about = loaded.directory.resolve().name, f"{dictionary.kind} {job.transcoder}"
    document = files.document(
        graph,
        pruned,
        scores,
        spell,
        {"slug": name, "scan": name, "prompt": job.prompt, "node_threshold": job.nodes}
        | {"info": {"transcoder": about, "step": loaded.step}, "summary": summary},
        supernodes=job.supernodes,
        heads={
            pair: report.largest(heads_LH, 3) for pair, heads_LH in zip(strongest, found.heads_ELH)
        },
    )
    directory = pathlib.Path(workdir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    strict = document if job.extra_nodes else files.without_extra(document)
    write_json(directory / "graph.json", strict)
    shown = {**document, "about": report.lines(graph, summary, spell)[0], "looked": apart}
    used = sorted({one for score in apart for term in score["terms"] for one in term[:2]})
    numbers = {files.node_id(node): number for number, node in enumerate(graph.nodes)}
    shown["others"] = {one: files.described(graph, numbers[one], spell, 1.0) for one in used}
    kept = [n for n in np.flatnonzero(pruned.nodes_n) if graph.kinds[n] == "feature"]
    features = sorted({(graph.nodes[n].layer, graph.nodes[n].index) for n in kept})
    if rows_NT is not None and features:
        arguments = loaded.skeleton, loaded.params, dictionary, features, rows_NT, spell
        shown["examples"] = examples(*arguments)
    page = files.write_viewer(directory / "graph.html", shown)
    print("\n".join([*report.lines(graph, summary, spell), f"page: {page}"]))
    return summary


def _texts(job: GraphJob, loaded: Run) -> np.ndarray | None:
    """Rows of text that features are shown in; None: there are none."""
    if not job.documents:
        return None
    length, limits = min(64, loaded.skeleton.config.max_length), (job.documents, 100_000)
    try:
        reading = documents_of(loaded, job.path, *limits, 0)
        return rows_of([one.ids for one in reading.documents], length, loaded.tokenizer.eos_id)
    except (NotApplicable, ConfigError) as why:
        if job.path:
            raise ConfigError(f"config.path={job.path!r}: {why}") from None
        print(f"features are shown without texts: {why}")
        return None
