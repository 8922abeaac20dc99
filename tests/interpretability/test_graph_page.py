"""`configs/interpret/graph.py`: what it prints and writes, and its page in a real browser."""

import json
import os
import shutil

import numpy as np
import pytest
from tiny_run import write_tiny_run

from lm.__main__ import main
from lm.interpretability.dictionaries import Dictionary, save

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit", "bias"}
FIELDS = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str,
    "token_prob": float, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int,
    "jsNodeId": str, "clerp": str, "influence": float,
}  # fmt: skip


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["main.py", "--config=configs/interpret/graph.py", *words])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, capsys.readouterr()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run and a transcoder of it, and the words that ask for their graph."""
    place = tmp_path_factory.mktemp("graph")
    write_tiny_run(place, num_layers=2, positions="learned", bias=True, norm="layernorm")
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (2, 32, 24), "b_enc": (2, 24), "W_dec": (3, 24, 32), "b_dec": (2, 32)}
    numbers = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    settings = {"layers": (0, 1), "source": "mlp_norm.output", "target": "mlp.output"}
    threshold = np.ones((2, 24))
    save(Dictionary(**numbers, threshold=threshold, W_skip=None, kind="cross_layer", **settings),
         place / "clt")  # fmt: skip
    words = {"init_from": place, "transcoder": place / "clt", "prompt": "a cat", "documents": 4}
    return place, [f"--config.{name}={value}" for name, value in words.items()]


@pytest.fixture(scope="module")
def drawn(made):
    """The directory of a graph, made once, with what was printed."""
    place, words = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [
            "main.py", "--config=configs/interpret/graph.py", *words, f"--workdir={place / 'out'}",
            "--config.targets=t", "--config.targets=s", "--config.float64=True",
            "--config.supernodes={'first': ['E_97_1'], 'said': ['3_116_5', '3_115_5']}",
        ])  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == 0
    return place / "out"


def test_the_files_are_what_other_readers_read(drawn):
    found = json.loads((drawn / "graph.json").read_text(encoding="utf-8"))
    assert {*found} == {"metadata", "qParams", "nodes", "links"}
    metadata, summary = found["metadata"], found["metadata"]["summary"]
    assert metadata["prompt_tokens"][1:] == ["a", "␣", "c", "a", "t"]
    assert {"slug", "scan", "transcoder_list", "prompt", "node_threshold"} <= {*metadata}
    assert metadata["schema_version"] == 1
    assert found["qParams"] == {
        "pinnedIds": [], "linkType": "both", "clickedId": "", "sg_pos": "",
        "supernodes": [["first", "E_97_1"], ["said", "3_116_5", "3_115_5"]],
    }  # fmt: skip
    nodes = {node["node_id"]: node for node in found["nodes"]}
    assert len(nodes) == len(found["nodes"])  # no two share an id
    places = {(n["layer"], n["feature"], n["ctx_idx"]) for n in found["nodes"]}
    assert len(places) == len(nodes)  # by which circuit-tracer's page tells them apart
    for node in found["nodes"]:
        assert all(isinstance(node[name], kind) for name, kind in FIELDS.items())
        assert node["feature_type"] in TYPES
        assert 0 <= node["ctx_idx"] < len(metadata["prompt_tokens"])
    assert {node["kind"] for node in found["nodes"]} > {"feature", "token", "logit", "bias"}
    for link in found["links"]:
        assert link["source"] in nodes and link["target"] in nodes
        assert nodes[link["target"]]["feature_type"] in ("cross layer transcoder", "logit")
    assert [*summary["supernodes"]] == ["first → said"]
    # What is asked for is what is explained, and it adds up.
    logits = [node["clerp"][:10] for node in found["nodes"] if node["kind"] == "logit"]
    assert logits == ['Output "t"', 'Output "s"']
    assert summary["replacement_error"] < 1e-12
    assert max(summary["residual_features"], summary["residual_logits"]) < 1e-12
    assert all(abs(one["edge"] - one["held"]) < 1e-12 for one in summary["tested"])
    assert 0 < metadata["scores"]["replacement"] < 1


def test_what_cannot_be_explained_is_said_in_a_line(made, tmp_path, monkeypatch, capsys):
    _, words = made
    for word, message in (
        ("--config.transcoder=nowhere", "config.transcoder='nowhere': nowhere holds no dictionary"),
        ("--config.targets=cat", "config.targets='cat' must be one token"),
        ("--config.nodes=1.5", "config.nodes=1.5"),
        ("--config.prompt=", "config.prompt='' must be given"),
        ("--config.supernodes={'a': 'E_97_1'}", "config.supernodes: 'a' must be a list of ids"),
    ):
        code, said = command(monkeypatch, capsys, *words, word, f"--workdir={tmp_path}")
        assert code == 2 and message in said.err and said.err.count("\n") == 1
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not CHROMIUM, reason="needs a chromium")
def test_the_page_is_walked_by_keyboard(drawn):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((390, "dark"), (1280, "light")):
            page = browser.new_page(
                viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
            )
            faults = []
            page.on("pageerror", lambda fault, faults=faults: faults.append(str(fault)))
            page.goto((drawn / "graph.html").as_uri())
            broken = axe.run(page).response["violations"]
            assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in broken]
            assert page.evaluate("document.documentElement.scrollWidth") == width
            # The likeliest logit is shown first; what is chosen is told, and so are its sums.
            expect(page.locator("#chosen")).to_contain_text('Output "t"')
            expect(page.locator("#pane")).to_contain_text("logit less the mean")
            page.locator("#share").focus()
            page.keyboard.press("Tab")  # the graph, which scrolls
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            expect(focused).to_have_attribute("aria-label", page.locator("#chosen").inner_text())
            for _ in range(3):
                page.keyboard.press("ArrowDown")
            below = focused.get_attribute("aria-label")
            assert "Output" not in below
            page.keyboard.press("Enter")
            expect(page.locator("#chosen")).to_have_text(below)
            expect(page.locator("#spoken")).to_contain_text(below)
            expect(focused).to_have_attribute("aria-pressed", "true")
            page.keyboard.press("p")
            expect(focused).to_have_attribute("aria-label", f"{below}, pinned")
            expect(page.locator("#pinned")).to_contain_text(below)
            # An edge is followed to its other end.
            page.locator("[aria-label=Outputs] button").first.focus()
            target = page.locator(":focus span").first.evaluate("span => span.firstChild.data")
            page.keyboard.press("Enter")
            expect(page.locator("#chosen")).to_have_text(target)
            expect(focused).to_have_attribute("aria-label", target)
            # What is pinned becomes a supernode beside the one that was asked for.
            page.get_by_label("Name").fill("below")
            page.keyboard.press("Enter")
            expect(page.locator("#groups li")).to_have_count(3)
            expect(page.locator("#pinned")).to_have_text("Nothing is pinned.")
            with page.expect_download() as download:
                page.get_by_role("button", name="Save graph.json").click()
            saved = json.loads(download.value.path().read_text(encoding="utf-8"))
            assert [group[0] for group in saved["qParams"]["supernodes"]] == [
                "first",
                "said",
                "below",
            ]
            # With less influence shown there are fewer nodes; tokens and logits stay.
            before = page.locator(".node").count()
            page.locator("#share").focus()
            page.keyboard.press("Home")
            assert page.locator(".node").count() < before
            expect(page.locator(".node.token")).to_have_count(6)
            expect(page.locator("#why")).to_contain_text("looks from")
            assert not faults
            page.close()
        browser.close()
