"""What a reader is shown of a run: responses before and after, and curves."""

import html.parser
import json

from lm.alignment.curves import plot_curves
from lm.alignment.page import Shown, keep_before, write_page
from lm.alignment.prompts import Prompt, PromptOrder


class Page(html.parser.HTMLParser):
    """The tags of a page, and the text between them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_what_a_policy_says_is_text_on_the_page_and_no_more(tmp_path):
    odd = '<script src="http://x">alert(1)</script> & \ud800'
    prompts = [Prompt(odd, [1], {}), Prompt([{"role": "user", "content": "é"}], [1], {})]
    keep_before(tmp_path, [Shown(odd.replace("\ud800", ""), 0.25, False), Shown("b", -1.0, True)])
    write_page(tmp_path, prompts, [Shown("after", 1.0, True), Shown(odd, 2.0, True)])
    page = Page()
    page.feed((tmp_path / "samples.html").read_text())
    assert "script" not in page.tags and page.tags.count("tr") == 3
    assert page.text.count("alert(1)") == 3 and "(cut off)" in page.text and '"é"' in page.text
    assert "before -0.375, after 1.500" in page.text


def test_curves_have_every_part_of_the_reward(tmp_path):
    records = [{"step": n, "reward": n, "reward_gold": -n, "reward_gold_std": 1} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert plot_curves(tmp_path).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 3}\n')
    assert plot_curves(tmp_path) is None


def test_prompts_come_in_rounds_that_the_seed_decides():
    prompts = [Prompt(str(n), [n], {}) for n in range(5)]
    order = PromptOrder(prompts, seed=1)
    drawn = [p.text for p in order.take(0, 15)]
    assert all(sorted(drawn[n : n + 5]) == list("01234") for n in (0, 5, 10))
    assert drawn[:5] != drawn[5:10] and drawn[3:11] == [p.text for p in order.take(3, 8)]
    assert drawn != [p.text for p in PromptOrder(prompts, seed=2).take(0, 15)]
